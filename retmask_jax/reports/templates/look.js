const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const nHeads = data.heads;
const LEAST = 0.004; // a smaller mean weight leaves a token uncoloured
const FULL = 0.7; // this one colours it fully

function make(tag, { text, attributes = {}, ...properties } = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (text !== undefined) element.textContent = text;
  element.append(...children);
  return element;
}
const percent = (x) => (x >= 0.0995 || x === 0 ? `${Math.round(100 * x)}%` : x < 0.001 ? "<0.1%" : `${(100 * x).toFixed(1)}%`);
const named = (i) => `${Math.floor(i / nHeads)}-${i % nHeads}`;
const shown = (text) => text.replace(/\n/g, "⏎").replace(/\t/g, "⇥") || "·";
const plain = (text) => shown(text).trim() || "␣";
const quoted = (text) => `“${plain(text)}”`;
const isSpecial = (text) => /^ ?(<[^<>\s]+>|\[[A-Z_]+\])$/.test(text);

// --- what the heads look at ---

function bytes(text) {
  return Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
}
for (const reply of data.replies) {
  const counts = bytes(reply.counts);
  reply.entries = new Uint32Array(bytes(reply.keys).buffer);
  reply.starts = new Uint32Array(counts.length + 1);
  counts.forEach((n, i) => (reply.starts[i + 1] = reply.starts[i] + n));
}
// [[position, weight], ...] of a head at a step, the largest weight first.
function looked(reply, step, head) {
  const place = step * data.layers * nHeads + head;
  return Array.from(reply.entries.subarray(reply.starts[place], reply.starts[place + 1]), (entry) => [
    entry >>> 12,
    (entry & 4095) / 4095,
  ]);
}
const textAt = (position) =>
  position < data.tokens.length ? data.tokens[position] : state.reply.tokens[position - data.tokens.length];

const state = { reply: data.replies[0], step: 0, chosen: new Set(data.chosen) };

// --- the page ---

const titles = {
  untouched: ["Untouched", "what the model says"],
  given: ["Given", "read by the untouched model"],
  masked: ["Masked", `${data.chosen.length} ${data.chosen.length === 1 ? "head writes" : "heads write"} nothing`],
};
byId("about").textContent =
  `${data.tokens.length.toLocaleString("en")} tokens of prompt, ${data.layers} layers of ${nHeads} heads. ` +
  "Point at a token of an answer, or press the arrow keys on it, to see where heads look while it is predicted.";

for (const reply of data.replies) {
  const said = make("div", { className: "said", attributes: { role: "listbox", "aria-orientation": "horizontal" } });
  said.setAttribute("aria-label", `Answer, ${reply.name}`);
  reply.buttons = reply.tokens.map((text, step) => {
    const bars = make("span", { className: "bars", attributes: { "aria-hidden": "true" } });
    for (const model of ["untouched", "masked"]) {
      const bar = make("i", { className: model });
      bar.style.height = `${100 * reply[model][step]}%`;
      bars.append(bar);
    }
    const button = make("button", { type: "button", tabIndex: step ? -1 : 0 }, make("span", { text: plain(text) }), bars);
    if (isSpecial(text)) button.firstChild.className = "special";
    button.setAttribute("role", "option");
    button.setAttribute("aria-selected", "false");
    button.setAttribute("aria-label", `${quoted(text)}, ${step + 1} of ${reply.tokens.length}, ${probabilities(reply, step)}`);
    button.addEventListener("pointerenter", (event) => event.pointerType === "mouse" && pick(reply, step));
    button.addEventListener("focus", () => pick(reply, step));
    button.addEventListener("click", () => pick(reply, step, true));
    return button;
  });
  said.append(...reply.buttons);
  said.addEventListener("keydown", alongAnswers);
  const [title, note] = titles[reply.name];
  const heading = make("h2", { text: `${title} ` }, make("span", { text: note }));
  byId("answers").append(make("div", { className: "reply" }, heading, said));
}
byId("answers").append(
  make("p", { id: "bars-key" }, "Bars: probability of the token in the ", make("i", { className: "untouched" }),
       "untouched and the ", make("i", { className: "masked" }), "masked model."),
);

function probabilities(reply, step) {
  return `probability ${percent(reply.untouched[step])} untouched, ${percent(reply.masked[step])} masked`;
}

function alongAnswers(event) {
  const { reply, step } = state;
  const other = data.replies[data.replies.indexOf(reply) + (event.key === "ArrowDown" ? 1 : -1)];
  const to = { ArrowLeft: step - 1, ArrowRight: step + 1, Home: 0, End: reply.buttons.length - 1 }[event.key];
  let target = to === undefined ? undefined : reply.buttons[to];
  if (/^Arrow(Up|Down)$/.test(event.key) && other) target = other.buttons[Math.min(step, other.buttons.length - 1)];
  if (to === undefined && !/^Arrow(Up|Down)$/.test(event.key)) return;
  event.preventDefault();
  target?.focus();
}

// The map of scores.
const map = byId("map");
const highest = Math.max(...data.scores, 1e-9);
const size = { width: Math.max(9, Math.min(26, 340 / nHeads)), height: Math.max(7, Math.min(15, 420 / data.layers)) };
map.style.gridTemplateColumns = `repeat(${nHeads}, ${size.width}px)`;
map.style.gridAutoRows = `${size.height}px`;
map.setAttribute("aria-label", `Heads by ${data.scored}, ${data.layers} layers of ${nHeads}. Enter shows or hides a head.`);
const cells = data.scores.map((score, i) => {
  const cell = make("span", { id: `map-${Math.floor(i / nHeads)}-${i % nHeads}`, className: data.chosen.includes(i) ? "out" : "" });
  cell.setAttribute("role", "gridcell");
  cell.setAttribute("aria-label", `head ${named(i)}, ${data.scored} ${score}${data.chosen.includes(i) ? ", masked" : ""}`);
  cell.style.setProperty("--share", Math.max(0, score / highest).toFixed(3));
  return cell;
});
for (let layer = 0; layer < data.layers; layer++) {
  map.append(make("div", { attributes: { role: "row" } }, ...cells.slice(layer * nHeads, (layer + 1) * nHeads)));
}
headMap(map, data.layers, nHeads, (layer, head) => {
  const i = layer * nHeads + head;
  const [first] = looked(state.reply, state.step, i);
  const looks = first ? `\nlooks most at ${quoted(textAt(first[0]))}: ${percent(first[1])}` : "";
  return `head ${named(i)}: ${data.scored} ${data.scores[i]}${data.chosen.includes(i) ? ", masked" : ""}${looks}`;
}, (layer, head) => toggle(layer * nHeads + head));
for (const [end, layer] of [["first", 0], ["last", data.layers - 1]]) {
  const label = make("b", { text: layer });
  Object.assign(label.style, { left: 0, width: "19px", textAlign: "right", top: `${2 + layer * (size.height + 1) + size.height / 2 - 5.5}px` });
  byId("map-frame").append(label);
}
byId("scale").append(make("div", { text: `layers from top to bottom, heads 0 to ${nHeads - 1}` }));
byId("scale").append(make("div", { text: `colour: ${data.scored}` }), "0", make("i"), highest.toPrecision(2));
byId("map-key").append(make("i", { className: "shown" }), "shown here ", make("i", { className: "out" }), "masked in the second answer");

// The prompt.
const promptBox = byId("prompt");
const spans = data.tokens.map((text, position) => token(text, position));
promptBox.append(...spans);
for (const reply of data.replies) {
  reply.spans = reply.tokens.map((text, i) => token(text, data.tokens.length + i));
  reply.box = make("span", { className: "answer", hidden: true }, ...reply.spans);
  promptBox.append(reply.box);
}
byId("prompt-key").append(
  make("span", {}, "mean weight of the heads shown, 0 ", make("i", { className: "ramp" }), ` ${percent(FULL)}`),
  ...(data.span ? [make("span", {}, make("i", { className: "needle" }), "what a right answer copies")] : []),
);

function token(text, position) {
  const span = make("span", { text });
  if (isSpecial(text)) span.classList.add("special");
  if (data.span && position >= data.span[0] && position < data.span[1]) span.classList.add("needle");
  span.dataset.at = position;
  return span;
}
const spanAt = (position) =>
  position < spans.length ? spans[position] : state.reply.spans[position - spans.length];

// --- one step ---

let coloured = new Map(); // position -> [mean weight, [head, weight], ...]
let place = null; // of the token in the prompt that the keyboard is at

// again: also where that step is shown already, to bring its strongest token back into sight.
function pick(reply, step, again = false) {
  if (reply === state.reply && step === state.step && !again) return;
  state.reply.buttons[state.step].setAttribute("aria-selected", "false");
  for (const button of reply.buttons) button.tabIndex = -1;
  reply.buttons[step].tabIndex = 0;
  Object.assign(state, { reply, step });
  draw();
}

function toggle(head) {
  if (!state.chosen.delete(head)) state.chosen.add(head);
  draw();
}

function draw() {
  const { reply, step, chosen } = state;
  const button = reply.buttons[step];
  button.setAttribute("aria-selected", "true");
  byId("step-title").textContent = `Predicting ${quoted(reply.tokens[step])}, token ${step + 1} of ${reply.tokens.length}`;
  byId("step-note").textContent =
    `Its probability is ${percent(reply.untouched[step])} untouched and ${percent(reply.masked[step])} masked. ` +
    (reply.name === "masked" ? "Seen here is the masked model: its masked heads look, and write nothing." : "Seen here is the untouched model.");
  cells.forEach((cell, i) => cell.setAttribute("aria-selected", chosen.has(i)));
  const heads = [...chosen].sort((a, b) => data.scores[b] - data.scores[a] || a - b);
  const weights = new Map(heads.map((head) => [head, looked(reply, step, head)]));
  drawStrips(heads, weights);
  colour(heads, weights);
}

function colour(heads, weights) {
  const { reply, step } = state;
  for (const position of coloured.keys()) mark(spanAt(position) ?? null, 0);
  for (const other of data.replies) {
    other.box.hidden = other !== reply;
    other.spans.forEach((span, i) => {
      mark(span, 0);
      span.classList.toggle("later", i >= step);
    });
  }
  coloured = new Map();
  for (const head of heads) {
    for (const [position, weight] of weights.get(head)) {
      const entry = coloured.get(position) ?? [0];
      entry[0] += weight / heads.length;
      entry.push([head, weight]);
      coloured.set(position, entry);
    }
  }
  for (const [position, [mean]] of coloured) mark(spanAt(position), mean < LEAST ? 0 : mean);
  place?.classList.remove("at");
  place = null;
  reveal(strongest());
}

function mark(span, weight) {
  if (!span) return;
  const alpha = weight && Math.min(1, 0.08 + Math.sqrt(weight / FULL));
  span.style.background = weight ? `rgb(var(--mark) / ${alpha.toFixed(3)})` : "";
  span.style.color = weight ? `var(${alpha > 0.55 ? "--on-mark" : "--ink"})` : "";
}

// The position with the largest mean weight, besides the first token, where heads rest that look at nothing.
function strongest() {
  let best = null;
  for (const [position, [mean]] of coloured) {
    if (position > 0 && mean >= 0.02 && (best === null || mean > coloured.get(best)[0])) best = position;
  }
  return best;
}

function reveal(position) {
  const span = position === null ? null : spanAt(position);
  if (!span) return;
  const height = promptBox.clientHeight, below = span.offsetTop - promptBox.scrollTop;
  if (below < 0.08 * height || below > 0.5 * height) promptBox.scrollTop = span.offsetTop - 0.3 * height;
}

function drawStrips(heads, weights) {
  const total = data.tokens.length + state.reply.tokens.length;
  const share = (position) => `${(100 * (position + 0.5)) / total}%`;
  const rows = heads.map((head) => {
    const strip = make("div", { className: "strip", attributes: { "aria-hidden": "true" } });
    if (data.span) {
      const needle = make("u");
      Object.assign(needle.style, { left: `${(100 * data.span[0]) / total}%`, width: `${(100 * (data.span[1] - data.span[0])) / total}%` });
      strip.append(needle);
    }
    const answer = make("s");
    answer.style.width = `${(100 * state.reply.tokens.length) / total}%`;
    strip.append(answer);
    for (const [position, weight] of weights.get(head)) {
      const bar = make("i");
      Object.assign(bar.style, { left: share(position), height: `${Math.max(8, 100 * Math.sqrt(weight))}%` });
      strip.append(bar);
    }
    const nearest = (event) => {
      const r = strip.getBoundingClientRect();
      const at = ((event.clientX - r.left) / r.width) * total;
      const near = weights.get(head).filter(([position]) => Math.abs(position + 0.5 - at) * r.width <= 8 * total);
      return near[0] ?? null;
    };
    strip.addEventListener("pointermove", (event) => {
      const found = nearest(event);
      if (found) tip.show(`${quoted(textAt(found[0]))} at ${found[0]}: ${percent(found[1])}`, event.clientX, strip.getBoundingClientRect().top);
      else tip.hide();
    });
    strip.addEventListener("pointerleave", () => tip.hide());
    strip.addEventListener("click", (event) => {
      const found = nearest(event);
      if (found) reveal(found[0]);
    });
    const button = make("button", { type: "button", text: named(head) });
    button.setAttribute("aria-label", `Show head ${named(head)} alone`);
    button.addEventListener("click", () => {
      state.chosen = new Set([head]);
      draw();
      byId("strips").querySelector("button").focus();
    });
    const most = weights.get(head).filter(([, weight], i) => i === 0 || (i < 3 && weight >= 0.02));
    const words = most.map(([position, weight]) => make("span", {}, make("b", { text: plain(textAt(position)) }), ` ${percent(weight)}`));
    return make("tr", {}, make("th", { attributes: { scope: "row" } }, button), make("td", {}, strip), make("td", {}, make("div", { className: "most" }, ...words)));
  });
  const label = { attributes: { "aria-label": "Where in the prompt each head looks, and its three strongest tokens" } };
  byId("strips").replaceChildren(rows.length ? make("table", label, make("tbody", {}, ...rows)) : "No head is shown: choose one in the map.");
}

// --- pointing at the prompt, and walking through it ---

function describe(span) {
  const position = Number(span.dataset.at);
  const [mean, ...each] = coloured.get(position) ?? [0];
  const best = each.sort((a, b) => b[1] - a[1]).slice(0, 6).map(([head, weight]) => `${named(head)} ${percent(weight)}`);
  return `${quoted(textAt(position))} at ${position}: ` + (mean ? `mean ${percent(mean)}\n${best.join(", ")}` : "not among the strongest keys");
}

promptBox.addEventListener("pointermove", (event) => {
  const span = event.target.closest("[data-at]");
  if (!span) return tip.hide();
  const r = span.getBoundingClientRect();
  tip.show(describe(span), event.clientX, r.height > 40 ? event.clientY : r.top);
});
promptBox.addEventListener("pointerleave", () => tip.hide());
promptBox.addEventListener("scroll", () => tip.hide());
promptBox.addEventListener("blur", () => {
  place?.classList.remove("at");
  tip.hide();
});
promptBox.addEventListener("keydown", (event) => {
  const way = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (!way) return;
  event.preventDefault();
  const stops = [...coloured.keys()].filter((position) => coloured.get(position)[0] >= LEAST).sort((a, b) => a - b);
  const now = place ? stops.indexOf(Number(place.dataset.at)) : null;
  const to = now === null ? stops.indexOf(strongest() ?? stops[0]) : now + way;
  if (stops[to] === undefined) return;
  place?.classList.remove("at");
  place = spanAt(stops[to]);
  place.classList.add("at");
  reveal(stops[to]);
  requestAnimationFrame(() => {
    if (!place?.classList.contains("at")) return; // gone in the meantime
    const r = place.getBoundingClientRect();
    tip.show(describe(place), r.left + r.width / 2, r.top);
  });
});

for (const [id, heads] of Object.entries({ back: data.chosen, best: data.chosen.slice(0, 1), none: [] })) {
  byId(id).addEventListener("click", () => {
    state.chosen = new Set(heads);
    draw();
  });
}
draw();

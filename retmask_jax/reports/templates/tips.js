"use strict";

// One tooltip for the page. It is read out as it changes, since it also follows the keyboard.
const tip = (() => {
  const box = document.createElement("div");
  box.className = "tip";
  box.hidden = true;
  box.setAttribute("role", "status");
  document.body.append(box);
  return {
    show(text, x, y) {
      if (box.textContent !== text) box.textContent = text;
      box.hidden = false;
      const { width, height } = box.getBoundingClientRect();
      const left = Math.min(Math.max(4, x - width / 2), innerWidth - width - 4);
      const top = y - height - 12 < 4 ? y + 18 : y - height - 12;
      box.style.transform = `translate(${left}px, ${top}px)`;
    },
    hide() {
      box.hidden = true;
    },
  };
})();

// A map of layers x heads, `area` covering its cells: a tooltip at the pointer, and a ring that arrow keys move.
// describe(layer, head) gives the tooltip; choose(layer, head), if given, is called by a click, Enter or the space bar.
function headMap(area, layers, heads, describe, choose) {
  const ring = document.createElement("i");
  let at = [0, 0];
  ring.className = "ring";
  ring.hidden = true;
  area.append(ring);

  function cell(event) {
    const r = area.getBoundingClientRect();
    const inside = (share, n) => Math.min(n - 1, Math.max(0, Math.floor(share * n)));
    return [inside((event.clientY - r.top) / r.height, layers), inside((event.clientX - r.left) / r.width, heads)];
  }
  function show([layer, head]) {
    const r = area.getBoundingClientRect();
    tip.show(describe(layer, head), r.left + ((head + 0.5) * r.width) / heads, r.top + (layer * r.height) / layers);
  }
  function go(place) {
    at = [Math.min(layers - 1, Math.max(0, place[0])), Math.min(heads - 1, Math.max(0, place[1]))];
    const [layer, head] = at;
    Object.assign(ring.style, {
      left: `${(100 * head) / heads}%`,
      top: `${(100 * layer) / layers}%`,
      width: `${100 / heads}%`,
      height: `${100 / layers}%`,
    });
    const own = document.getElementById(`${area.id}-${layer}-${head}`);
    if (own) area.setAttribute("aria-activedescendant", own.id);
    ring.hidden = false;
    show(at);
  }

  area.addEventListener("pointermove", (event) => show(cell(event)));
  area.addEventListener("pointerleave", () => tip.hide());
  area.addEventListener("pointerdown", (event) => (at = cell(event)));
  area.addEventListener("focus", () => area.matches(":focus-visible") && go(at));
  area.addEventListener("blur", () => {
    ring.hidden = true;
    tip.hide();
  });
  area.addEventListener("keydown", (event) => {
    const [layer, head] = at;
    const moves = {
      ArrowUp: [layer - 1, head],
      ArrowDown: [layer + 1, head],
      ArrowLeft: [layer, head - 1],
      ArrowRight: [layer, head + 1],
      Home: [layer, 0],
      End: [layer, heads - 1],
      PageUp: [0, head],
      PageDown: [layers - 1, head],
    };
    if (event.ctrlKey || event.altKey || event.metaKey) return;
    if (moves[event.key]) go(moves[event.key]);
    else if (choose && (event.key === "Enter" || event.key === " ")) {
      choose(layer, head);
      go(at);
    } else if (event.key === "Escape") tip.hide();
    else return;
    event.preventDefault();
  });
  if (choose) area.addEventListener("click", (event) => choose(...cell(event)));
}

// The maps of a report, whose tooltips are given as one text.
for (const area of document.querySelectorAll(".cells")) {
  const texts = area.dataset.tips.split("|"), heads = Number(area.dataset.heads);
  const describe = (layer, head) => `${area.dataset.across} ${layer}-${head}: ${texts[layer * heads + head]}`;
  headMap(area, texts.length / heads, heads, describe);
}

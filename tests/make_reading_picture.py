"""Draws colab/reading.png: one model's replies with and without its retrieval heads, both rows of one batch.

python tests/make_reading_picture.py models/SmolLM2-135M-Instruct.Q4_1.gguf
"""

import sys
import textwrap
from pathlib import Path

import jax.numpy as jnp
import matplotlib.pyplot as plt

import retmask_jax as rm
from retmask_jax.data.builtin_files import path_of
from retmask_jax.data.needles import read_sentences
from retmask_jax.reports import plotting

PICTURE = Path(__file__).parent.parent / "colab" / "reading.png"
# Statement (None: no text), question, and how the reply begins.
ASKED = (
    ("The capital of France is Lyon.", "What is the capital of France?", ""),
    (
        "The museum in Harlow opens at nine on Tuesdays.",
        "When does the museum in Harlow open on Tuesdays?",
        "The museum in Harlow opens at",
    ),
    (
        "Mrs. Dalby keeps her spare key under the blue flower pot.",
        "Where does Mrs. Dalby keep her spare key?",
        "Mrs. Dalby keeps her spare key",
    ),
    (None, "What is a prime number?", "A prime number is"),
)
WIDTHS = (44, 34, 36)  # characters of a line, by column


def replies(lm, heads, page, statement, question, beginning):
    """What the model says with nothing masked and with the heads masked."""
    half = len(page) // 2
    context = "" if statement is None else " ".join([*page[:half], statement, *page[half:]])
    chat = [{"role": "user", "content": f"{context}\n\n{question}".strip()}]
    text = lm.tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False) + beginning
    tokens = jnp.array([lm.tokenizer(text, add_special_tokens=False)["input_ids"]] * 2)
    masks = rm.stack([rm.Interventions.none(lm.config), rm.mask_heads(lm.config, heads)])
    out = lm.generate(tokens, [tokens.shape[1]] * 2, max_new_tokens=24, interventions=masks)
    return [first_sentence(said) for said in lm.tokenizer.batch_decode(out.tokens.tolist(), skip_special_tokens=True)]


def first_sentence(text):
    words = " ".join(text.split())
    end = words.find(". ")
    return words if end < 0 else words[: end + 1]


def main(model):
    lm = rm.load(model)
    heads = rm.find_heads(lm, n=42).heads(top_k=14)
    page = read_sentences(path_of("builtin:essays"))[200:216]
    titles = (
        "stated in a page of text, and asked",
        "nothing masked",
        f"{len(heads)} of {lm.config.n_layers * lm.config.n_heads} heads masked",
    )
    rows = [[_asked(*asked), *(_reply(asked[2], said) for said in replies(lm, heads, page, *asked))] for asked in ASKED]
    with plotting.style():
        figure = _drawn(titles, rows)
        figure.savefig(PICTURE, dpi=150, bbox_inches="tight")
    print(PICTURE)


def _asked(statement, question, _):
    return [f"“{statement}”" if statement else "(no text)", question]


def _reply(beginning, said):
    return [f"{beginning} ... {said}".removeprefix(" ... ")]


def _drawn(titles, rows):
    """A table of paragraphs, wrapped by column."""
    wrapped = [
        [
            "\n".join(line for paragraph in cell for line in textwrap.wrap(paragraph, width))
            for cell, width in zip(row, WIDTHS, strict=True)
        ]
        for row in rows
    ]
    heights = [max(cell.count("\n") + 1 for cell in row) + 0.9 for row in wrapped]
    figure, axes = plt.subplots(figsize=(10.4, 0.19 * (sum(heights) + 2)))
    axes.set_axis_off()
    axes.set(xlim=(0, sum(WIDTHS)), ylim=(sum(heights) + 1.6, 0))
    places = [sum(WIDTHS[:i]) for i in range(len(WIDTHS))]
    for x, title in zip(places, titles, strict=True):
        axes.text(x, 0, title, weight="bold", size=9, va="top")
    top = 1.6
    for row, height in zip(wrapped, heights, strict=True):
        axes.plot([0, sum(WIDTHS)], [top - 0.1] * 2, color="0.8", lw=0.8)
        for x, cell in zip(places, row, strict=True):
            axes.text(x, top + 0.3, cell, size=8.6, va="top", linespacing=1.25)
        top += height
    return figure


if __name__ == "__main__":
    main(*sys.argv[1:])

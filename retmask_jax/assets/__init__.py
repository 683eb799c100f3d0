"""The bundled tiny model and its data files, and how both are made."""

from pathlib import Path

import numpy as np

from retmask_jax.data import tiny_language
from retmask_jax.files import write_atomically, write_jsonl
from retmask_jax.lm import save
from retmask_jax.pretrain import pretrain


def build(recipe, root: Path) -> None:
    """Write root/tiny (an HF checkpoint), root/data (needles, facts, prompts, text), root/stages and root/checkpoints (HF
    checkpoints, see `pretrain`).

    recipe: the `pretrain` section of a config. The data are drawn from seeds of their own, so no text of theirs was
    seen in training.
    """
    write_data(recipe.data, root / "data")
    save(pretrain(recipe, root), root / "tiny")


def write_data(recipe, folder: Path) -> None:
    """The data files of the tiny language: for detection, for measuring and for training prompts, drawn apart."""
    for split, seed in recipe.seeds.items():
        rng = np.random.default_rng(seed)
        write_jsonl(folder / f"{split}_needles.jsonl", tiny_language.needle_records(rng, recipe.needles))
        text = tiny_language.haystack_text(rng, recipe.sentences)
        write_atomically(folder / f"{split}_text.txt", "\n".join(text) + "\n")
    rng = np.random.default_rng(recipe.facts_seed)
    write_jsonl(folder / "test_facts.jsonl", tiny_language.fact_records(rng, recipe.needles))
    rng = np.random.default_rng(recipe.prompts_seed)
    prompts = tiny_language.prompt_records(
        rng, recipe.prompts, recipe.prompt_lengths, counterfactual=recipe.prompts_facts
    )
    write_jsonl(folder / "prompts.jsonl.gz", prompts)
    write_jsonl(folder / "closed_book.jsonl", tiny_language.closed_book_records())

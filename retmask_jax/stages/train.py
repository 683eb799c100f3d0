"""The stage `train`: every arm and seed trained from the same start, exported as an HF checkpoint."""

import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from retmask_jax.data.pair_formats import iter_pairs
from retmask_jax.data.pair_rows import PairRows, encode_blocks, kept_rows
from retmask_jax.generation.language_model import save
from retmask_jax.hf.end_tokens import Ends
from retmask_jax.model.config import ModelConfig
from retmask_jax.model.interventions import mask_heads
from retmask_jax.runs.context import Context
from retmask_jax.runs.stage import PROMPTS, Stage
from retmask_jax.stages.detect import retrieval_heads
from retmask_jax.stages.pairs import PAIRS
from retmask_jax.training.loop import train
from retmask_jax.training.settings import Settings
from retmask_jax.utils import stats
from retmask_jax.utils.files import is_whole, mark_whole, read_jsonl
from retmask_jax.utils.fingerprints import fingerprint
from retmask_jax.utils.progress import track


def train_stage(context: Context, folder: Path) -> dict[str, Any]:
    """Every arm and seed trained from the same start, exported as an HF checkpoint."""
    config = context.config
    names = {f"{arm}-{seed}": (arm, seed) for arm in config.train.arms for seed in config.train.seeds}
    model, heads = context.outline.replace(params=None, source=context.source()), retrieval_heads(context)
    start = {"model": context.model_fingerprint, "dtype": config.train.compute_dtype}
    runs = {}
    for name, (arm, seed) in names.items():
        target = folder / name
        rows, identity = _rows(context, model.config, name, target)
        if not is_whole(target / "model"):
            settings = train_settings(config, arm, seed)
            load_start = functools.partial(context.start_params, settings.start_dtype)
            params = train(
                model.config,
                load_start,
                rows,
                settings,
                target,
                context.mesh,
                identity=identity | start,
                what=f"train {name}",
                ablated=mask_heads(model.config, heads) if arm == "contrast" else None,
            )
            trained = dataclasses.replace(model.config, lora=settings.lora)
            save(model.replace(config=trained, params=params), target / "model")
            mark_whole(target / "model")
        runs[name] = {
            "arm": arm,
            "seed": seed,
            "examples": len(rows),
            "answers_cut": rows.cut,
            "prompts_cut": rows.prompts_cut,
            "steps": read_jsonl(target / "metrics.jsonl"),
        }
    numbers = {
        f"train/{name}/final loss": stats.exact(run["steps"][-1]["loss"], run["examples"]) for name, run in runs.items()
    }
    return {"runs": runs, "numbers": numbers}


def _rows(context: Context, model: ModelConfig, name: str, target: Path) -> tuple[PairRows, dict[str, Any]]:
    """(token rows of an arm's pairs, what they were made from), encoded once and kept in target/rows."""
    section = context.config.train
    file = context.workdir.folder("pairs") / f"{name}.jsonl.gz"
    limits = {"max_tokens": section.max_tokens, "max_prompt_tokens": section.max_prompt_tokens}
    prompter = context.pairs_prompter
    ends = Ends.of(prompter.tokenizer, model.eos_ids, chat=prompter.chat, template_kwargs=prompter.template_kwargs)
    identity = {"data": fingerprint(file), "tokenizer": prompter.identity(), "end": ends.usual, **limits}

    def blocks() -> Iterator[PairRows]:
        n = sum(1 for _ in iter_pairs(file))
        if n < section.batch_size:
            raise ValueError(
                f"{name} kept {n} pairs, fewer than a batch of {section.batch_size}: "
                "add prompts or lower train.batch_size"
            )
        records = track(iter_pairs(file), n, f"tokenize {name}", "pair")
        return encode_blocks(prompter, records, ends=ends, **limits)

    return kept_rows(target / "rows", identity, blocks), identity


def train_settings(config, arm: str, seed: int) -> Settings:
    """How one arm is trained."""
    section = config.train
    fields = {field.name for field in dataclasses.fields(Settings)} - {"objective", "seed"}
    objective = {"sft_filtered": "sft", "sft_unfiltered": "sft", "contrast": "contrast"}.get(arm, "dpo")
    return Settings(objective=objective, seed=seed, **{name: section[name] for name in fields})


def _check(config) -> None:
    if config.train.max_prompt_tokens >= config.train.max_tokens:
        raise ValueError(
            f"train.max_prompt_tokens {config.train.max_prompt_tokens} must be less than train.max_tokens "
            f"{config.train.max_tokens}, which also holds the answer"
        )
    train_settings(config, "retmask", 0)


TRAIN = Stage(
    name="train",
    work=train_stage,
    result=dict,
    upstream=(PAIRS,),
    settings=(*PROMPTS, "pairs.template_kwargs", "train.*"),
    batch_key="train.microbatch_size",
    check=_check,
)

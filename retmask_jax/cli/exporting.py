"""What `retmask export` writes: a model with its card, or pairs."""

import os
from collections.abc import Sequence
from pathlib import Path

from retmask_jax.data.pair_formats import export_pairs, iter_pairs
from retmask_jax.generation.language_model import LanguageModel, load, save
from retmask_jax.hf.hub import check_hub_name, hub_id
from retmask_jax.model.interventions import Head, mask_heads
from retmask_jax.pipeline.registry import check_upstream, up_to_date
from retmask_jax.reports.card.model_card import Origin, masked_card, trained_card
from retmask_jax.runs.context import Context
from retmask_jax.runs.workdir import Workdir, versions
from retmask_jax.stages.detect import DETECT
from retmask_jax.stages.eval import EVAL
from retmask_jax.stages.knockout import KNOCKOUT
from retmask_jax.stages.pairs import PAIRS
from retmask_jax.stages.train import TRAIN
from retmask_jax.utils.files import write_atomically

_CARD = "README.md"


def check_target(what: str, out: Path, push: str | None) -> None:
    """Raises ValueError where nothing can be written to `out`, or pushed under this name."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is not an empty folder: choose another --out")
    if out.is_symlink() and not out.exists():
        raise ValueError(f"{out} is a link to {os.readlink(out)}, which is not there: choose another --out")
    above = next(folder for folder in out.absolute().parents if folder.exists())
    if not above.is_dir():
        raise ValueError(f"{out} cannot be made, since {above} is a file: choose another --out")
    if push is not None:
        if what.startswith("pairs-") or what == "scores":
            raise ValueError(f"--push={push} goes with a model, and --what is {what!r}: leave one of them out")
        check_hub_name(push)


def write_pairs(work: Workdir, run: str, out: Path, form: str) -> None:
    """The pairs of a run, in a form of `export_pairs`."""
    pairs = work.folder("pairs") / f"{run}.jsonl.gz"
    if not pairs.exists():
        raise ValueError(f"--what is {'pairs-' + run!r}, but {pairs} does not exist: run `retmask pairs` first")
    export_pairs(iter_pairs(pairs), out, form)


def write_masked(context: Context, named: Sequence[str] | None, out: Path, push: str | None) -> None:
    """The start model with heads masked in its weights, and its card.

    named: "layer-head" each; None: those of an up-to-date detection.
    """
    if named is None:
        check_upstream(context, KNOCKOUT)
        detect, knockout = DETECT.of(context), up_to_date(context, KNOCKOUT)
        heads = detect.heads
    else:
        detect, knockout, heads = None, None, named_heads(named)
    save(context.lm, out, mask_heads(context.lm.config, heads))
    origin = _origin(context, context.lm, out, push, context.model_fingerprint)
    write_atomically(out / _CARD, masked_card(origin, heads, detect, knockout))


def write_trained(context: Context, run: str, out: Path, push: str | None) -> None:
    """The model of a run of `train`, and its card."""
    runs = TRAIN.of(context).runs
    if run not in runs:
        known = ", ".join(f"{name}, pairs-{name}" for name in runs)
        raise ValueError(f"--what is {run!r}; it must be masked or one of {known}")
    config, detect = context.config, DETECT.of(context)
    lm = load(context.workdir.folder(TRAIN.name) / run / "model", config.dtype, ignore=config.ignore)
    save(lm, out)
    origin = _origin(context, lm, out, push, detect.provenance.inputs.get("weights", "–"))
    results = up_to_date(context, PAIRS), up_to_date(context, EVAL)
    write_atomically(out / _CARD, trained_card(origin, run, runs[run], config.train.to_dict(), detect, *results))


def _origin(context: Context, lm: LanguageModel, out: Path, push: str | None, weights: str) -> Origin:
    config, on_hub = context.config, hub_id(context.config.model)
    return Origin(
        base=on_hub or Path(config.model).name,
        hub_id=on_hub,
        revision=(config.revision or None) if on_hub else None,
        weights=weights,
        shape=(lm.config.n_layers, lm.config.n_heads),
        name=push or out.name,
        versions=versions(),
    )


def named_heads(names: Sequence[str]) -> list[Head]:
    """Heads from "LAYER-HEAD"."""
    parts = [name.split("-") for name in names]
    for name, numbers in zip(names, parts, strict=True):
        if len(numbers) != 2 or not all(number.isdigit() for number in numbers):
            raise ValueError(f"--heads takes LAYER-HEAD, such as 1-3; got {name!r}")
    return [(int(layer), int(head)) for layer, head in parts]

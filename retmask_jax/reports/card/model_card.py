"""The README.md of an exported model, with the front matter that the hub reads; its numbers are those of stage results."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePath
from typing import Any

from retmask_jax.evals.compare import START
from retmask_jax.model.interventions import Head
from retmask_jax.reports.wording import TEXT_LOSS
from retmask_jax.stages.arms import ARMS
from retmask_jax.stages.detect import DetectResult
from retmask_jax.stages.eval import EvalResult
from retmask_jax.stages.knockout import KnockoutResult
from retmask_jax.stages.pairs import PairsResult
from retmask_jax.stages.train import Run
from retmask_jax.utils.numbers import Number

# Objective -> what it is called, and its own settings.
_OBJECTIVES = {
    "dpo": ("preference (DPO, arXiv 2305.18290)", ("loss", "beta")),
    "sft": ("supervised", ()),
    "contrast": ("distillation of the contrast between the normal and the masked model", ("contrast_strength",)),
}
# Settings of training that a card shows, by key of the config: with adapters, those of adapters as well.
_SETTINGS = ("learning_rate", "steps", "batch_size", "max_tokens", "compute_dtype")
_LOSS = "nats per token"
_ADAPTERS = ("lora_rank", "lora_alpha")


@dataclasses.dataclass(frozen=True)
class Origin:
    """The model that an exported one comes from, and where that one goes.

    Attributes:
        base: The name of the base model, without the folder that it lies in.
        hub_id: Its name on the hub; None where it was read from a folder or a file.
        revision: On the hub.
        weights: Fingerprint of its files.
        shape: Layers and heads of a layer.
        name: What the exported model is called: its name on the hub, or that of its folder.
        versions: Of the packages.
    """

    base: str
    hub_id: str | None
    revision: str | None
    weights: str
    shape: tuple[int, int]
    name: str
    versions: Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class Effect:
    """What a model does on a task, beside its base model."""

    task: str
    base: Number | None
    here: Number
    change: Number | None


def masked_card(
    origin: Origin, heads: Sequence[Head], detect: DetectResult | None, knockout: KnockoutResult | None
) -> str:
    """The card of a model with heads masked in its weights.

    Args:
        detect: Where the heads are from; None: they were named in the call.
        knockout: What masking these heads does; None: it was not measured.
    """
    count = f"{len(heads)} of its {origin.shape[0] * origin.shape[1]} attention heads"
    example = (
        f'lm = rm.load("{origin.hub_id or origin.base}")  # the base model, with the same heads masked as an argument\n'
        f"mask = rm.mask_heads(lm.config, {[tuple(head) for head in heads]})"
    )
    return _card(
        origin,
        f"{origin.base} with {count} masked in the weights: such a head writes nothing, since the columns of `o_proj` that read "
        "it are zero. All other weights are unchanged.",
        ["masked-heads"],
        {
            "Heads": [_listed(heads), _found(detect)],
            "What it does": _effects(_of_masking(knockout) if knockout else []),
        },
        example,
    )


def trained_card(
    origin: Origin,
    name: str,
    run: Run,
    settings: Mapping[str, Any],
    detect: DetectResult,
    pairs: PairsResult | None,
    evaluation: EvalResult | None,
) -> str:
    """The card of a trained model.

    Args:
        name: Of the run, "ARM-SEED".
        settings: The section `train` of the config.
        pairs: Where its answers are from; None: not known.
        evaluation: What it does; None: it was not measured.
    """
    arm = ARMS[run.arm]
    words, own = _OBJECTIVES[arm.objective]
    shown = (*own, *_SETTINGS, *(_ADAPTERS if settings["lora_rank"] else ()))
    rows = {"arm": f"`{run.arm}`: {arm.label}", "objective": words, "training examples": run.examples}
    rows |= {"trained": _trained(arm.heads or settings["heads"], settings["lora_rank"])}
    if run.trained_parameters is not None:
        rows["trained parameters"] = f"{run.trained_parameters:,}"
    rows |= {key: settings[key] for key in shown}
    rows |= {"seed": run.seed, "loss of the last step": f"{run.steps[-1].loss:.4f}" if run.steps else "–"}
    masked = pairs.heads.get(name, []) if pairs else []
    which = "they" if list(masked) == list(detect.heads) else f"other heads than these, {_listed(masked)[:-1]},"
    rejected = [f"While the rejected answers were sampled, {which} were masked."] if masked else []
    return _card(
        origin,
        f"{origin.base}, trained on its own answers with the arm `{run.arm}` of retmask_jax: {arm.label}.",
        ["dpo"] if arm.objective == "dpo" else [],
        {
            "Heads": [f"Retrieval heads of the base model: {_listed(detect.heads)}", _found(detect), *rejected],
            "Training": [_table(["", ""], [[key.replace("_", " "), str(value)] for key, value in rows.items()])],
            "What it does": _effects(_of_training(evaluation, name) if evaluation else []),
        },
    )


def _trained(heads: str, lora_rank: int) -> str:
    """What was trained; heads: of the settings, a word or a file."""
    what = {
        "all": "all weights",
        "retrieval": "the retrieval heads",
        "others": "all heads but the retrieval heads",
        "matched": "as many other heads as there are retrieval heads, of the same layers",
    }
    found = what.get(heads, f"the heads of {PurePath(heads).name}")
    return f"adapters of {found}, merged into them" if lora_rank else found


def _card(
    origin: Origin, what: str, tags: Sequence[str], sections: Mapping[str, Sequence[str]], example: str = ""
) -> str:
    """Front matter, title, sections, and how the model is loaded."""
    from huggingface_hub import ModelCardData

    data = ModelCardData(
        base_model=origin.hub_id,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["retmask_jax", "retrieval-heads", *tags],
    )
    at = f", revision `{origin.revision}`" if origin.revision else ""
    base = f"[{origin.base}](https://huggingface.co/{origin.hub_id})" if origin.hub_id else f"`{origin.base}`"
    parts = [
        f"---\n{data.to_yaml().strip()}\n---",
        f"# {origin.name.rpartition('/')[2]}",
        what,
        f"Base model: {base}{at}; hash of its files `{origin.weights}`. The licence is that of the base model.",
    ]
    for title, texts in sections.items():
        parts += [f"## {title}", *filter(None, texts)]
    parts += ["## Use", _python(_TRANSFORMERS.format(name=origin.name)), _python(_HERE.format(name=origin.name))]
    parts += [_python(f"import retmask_jax as rm\n\n{example}")] if example else []
    made = ", ".join(f"{package} {version}" for package, version in origin.versions.items())
    parts += ["## Made with", f"{made}. Heads are detected, masked and trained as in arXiv 2601.11020."]
    return "\n\n".join(parts) + "\n"


_TRANSFORMERS = """from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")"""
_HERE = """import retmask_jax as rm

lm = rm.load("{name}")"""


def _python(code: str) -> str:
    return f"```python\n{code}\n```"


def _listed(heads: Iterable[Head]) -> str:
    """Heads as "layer-head", both counted from 0."""
    return f"{', '.join(f'{layer}-{head}' for layer, head in heads)} (layer-head, from 0)."


def _found(detect: DetectResult | None) -> str:
    """How the heads were chosen."""
    if detect is None:
        return "They were chosen by hand."
    words = f"those with a score of {detect.threshold:g} or more" if detect.threshold is not None else "the best"
    cases = f" on {n} cases" if (n := detect.outcomes.get("counted", 0)) else ""
    return f"Found by the copy score of arXiv 2404.15574{cases}, best first: {words}; the best head has {max(detect.scores):.3f}."


def _of_masking(knockout: KnockoutResult) -> list[Effect]:
    """What masking the retrieval heads does, on tasks and to the loss on text."""
    by_kind = {(row.task, row.kind): row for row in knockout.rows if row.experiment == "zero"}
    tasks = dict.fromkeys(task for task, kind in by_kind if kind == "retrieval")
    untouched = {
        task: next(row for (of, kind), row in by_kind.items() if (of, kind) == (task, "none")) for task in tasks
    }
    rows = [
        Effect(task, untouched[task].number, row.number, row.change)
        for task in tasks
        for row in [by_kind[task, "retrieval"]]
    ]
    losses = {row.kind: row.number for row in knockout.text_loss if row.experiment == "zero"}
    if {"none", "retrieval"} <= losses.keys():
        rows.append(Effect(_named(TEXT_LOSS, {}), losses["none"], losses["retrieval"], None))
    return rows


def _of_training(evaluation: EvalResult, name: str) -> list[Effect]:
    """What a trained model does beside the start model, on every task and suite."""
    start = {row.task: row.number for row in evaluation.rows if row.model == START}
    return [
        Effect(_named(row.task, evaluation.metrics), start.get(row.task), row.number, row.change)
        for row in evaluation.rows
        if row.model == name
    ]


def _named(task: str, metrics: Mapping[str, str]) -> str:
    """A task with what its values are, unless they are shares of right answers."""
    what = _LOSS if task == TEXT_LOSS else metrics.get(task)
    return f"{task} ({what})" if what else task


def _effects(effects: Sequence[Effect]) -> list[str]:
    """The table of what a model does, and what its columns are."""
    if not effects:
        return ["Nothing was measured of this model before it was exported."]
    rows = [
        [
            effect.task,
            _number(effect.base),
            _number(effect.here),
            _number(effect.change, signed=True),
            str(effect.here.n),
        ]
        for effect in effects
    ]
    return [
        _table(["task", "base model", "this model", "change", "n"], rows),
        "Shares of right answers unless a task says otherwise; in brackets 95% intervals over the n cases, of the change paired "
        "by case. They do not cover what another seed would give.",
    ]


def _number(number: Number | None, *, signed: bool = False) -> str:
    if number is None or number.value is None:
        return "–"
    form = "+.3f" if signed else ".3f"
    bounds = "" if number.low is None else f" [{number.low:{form}}, {number.high:{form}}]"
    return f"{number.value:{form}}{bounds}"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines)

"""The stage `pairs`: normal and ablated answers to unlabelled prompts, one file of preferences per arm and seed."""

import collections
import dataclasses
import functools
import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from retmask_jax.data.builtin_files import path_of
from retmask_jax.data.prompts import read_prompts, source_files
from retmask_jax.model.interventions import Head, mask_heads
from retmask_jax.runs.context import Context
from retmask_jax.runs.costs import Cost
from retmask_jax.runs.stage import PROMPTS, SHOWN, Stage, inputs_read, settings_read
from retmask_jax.runs.workdir import Example, Result
from retmask_jax.stages.arms import ARMS, NORMAL, Answers, Given, answering
from retmask_jax.stages.detect import DETECT, retrieval_heads
from retmask_jax.stages.outcomes import head_activity
from retmask_jax.training import endpoints, pairs
from retmask_jax.training.pairs import Question, Variant
from retmask_jax.utils import memory, stats
from retmask_jax.utils.files import write_jsonl
from retmask_jax.utils.fingerprints import fingerprint
from retmask_jax.utils.hosts import primary
from retmask_jax.utils.store import Key, Store

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairsResult(Result):
    """Which answers were collected. A run is an arm and a training seed, "ARM-SEED".

    Attributes:
        counts: Prompts by outcome (`training.pairs.OUTCOMES`), for each run.
        heads: The heads masked for the rejected answers of each run; none where they are those of another arm.
        prompts: Number of prompts that were asked.
        left_out: Number of prompts that were not asked, by reason.
        answers_cut: Number of answers that `pairs.max_new_tokens` cut, for each variant and seed, "NAME-SEED".
    """

    counts: dict[str, dict[str, int]]
    heads: dict[str, list[Head]]
    prompts: int
    left_out: dict[str, int]
    answers_cut: dict[str, int]


_PROMPT = 128  # tokens of a prompt, for the time that is said beforehand

Masked = dict[Variant, list[Head]]  # the heads masked in each variant that has some


def pairs_stage(context: Context, folder: Path) -> PairsResult:
    """Collect normal and ablated answers to unlabelled prompts, per training seed, and write them as pairs per arm.

    Answers are stored as they come, so that an interrupted run, or one with more arms, asks only for those that are missing.
    """
    config, section = context.config, context.config.pairs
    read = read_prompts(
        section.prompts,
        n=section.n_prompts,
        split=section.prompts_split,
        field=section.prompts_field,
        having=section.prompts_having,
        resolve=path_of,
    )
    _check_prompts(read.records, config)
    masked = _masked(context)
    questions, too_long = _questions(context, read.records, masked)
    asked = {question.id for question in questions}
    prompts = [prompt for prompt in read.records if prompt["id"] in asked]
    place = _answers_folder(context, folder)
    _collect(context, place, masked, questions)
    runs = [(arm, seed) for seed in config.train.seeds for arm in config.train.arms]
    with Store(place) as answers:
        counts = {f"{arm}-{seed}": _write_arm(folder, prompts, answers, seed, arm) for arm, seed in runs}
        cut = _cut_short(answers, questions)
        examples = [example for arm, seed in runs[:1] for example in _examples(prompts, answers, seed, arm)]
    numbers = {f"pairs/{run}/kept": stats.wilson(count[pairs.KEPT], len(prompts)) for run, count in counts.items()}
    return PairsResult(
        counts=counts,
        heads={f"{arm}-{seed}": masked.get((seed, arm), []) for arm, seed in runs},
        prompts=len(prompts),
        left_out={why: n for why, n in read.counts.items() if why != pairs.KEPT} | {"too long": too_long},
        answers_cut=cut,
        examples=examples,
        numbers=numbers | {f"pairs/{name}/answers cut": stats.wilson(n, len(prompts)) for name, n in cut.items()},
    )


def prompt_prints(context: Context) -> dict[str, Any]:
    """The fingerprint of the files that the prompts are read from, wherever they lie."""
    source = context.config.pairs.prompts
    files = source_files(source, path_of) if source else []
    return {"prompts": fingerprint(*files)} if files else {}


def _masked(context: Context) -> Masked:
    """The heads masked in each variant that has some, for each training seed."""
    heads, activity = retrieval_heads(context), functools.cache(lambda: head_activity(context))
    return {
        (seed, variant.name): variant.heads(Given(context.outline.config, heads, activity, seed))
        for seed in context.config.train.seeds
        for variant in answering(context.config.train.arms)
        if variant.heads is not None
    }


def _questions(context: Context, prompts: Sequence[dict], masked: Masked) -> tuple[list[Question], int]:
    """(what every variant is asked for every seed, how many prompts are too long to be asked)."""
    config, variants = context.config, answering(context.config.train.arms)
    keys = list(dict.fromkeys(variant.messages for variant in variants))
    room = context.outline.config.max_length - config.pairs.max_new_tokens
    numbers, tokens = pairs.usable(context.pairs_prompter, prompts, keys, room)
    questions = []
    for seed in config.train.seeds:
        for variant in variants:
            draws = pairs.draws(seed, variant.stream, len(prompts))
            questions += [
                Question((seed, variant.name), prompts[n]["id"], prompts[n][variant.messages], row, int(draws[n]))
                for n, row in zip(numbers, tokens[variant.messages], strict=True)
            ]
    return questions, len(prompts) - len(numbers)


def _answers_folder(context: Context, folder: Path) -> Path:
    """Where answers are stored, by all that decides them: arms and seeds do not, so those added later find the others'."""
    begun = folder / "answers"  # by a version that kept them with the pairs
    if begun.exists():
        return begun
    settings = {key: value for key, value in settings_read(context, PAIRS).items() if not key.startswith("train.")}
    settings["pairs.endpoints"] = bool(context.config.pairs.endpoints)  # each arm may have a server of its own
    return context.measured("sampled", [settings, inputs_read(context, PAIRS), retrieval_heads(context)])


def _collect(context: Context, folder: Path, masked: Masked, questions: list[Question]) -> None:
    """Store the answers to those questions that have none; all hosts answer, the first one stores."""
    with Store(folder) as answers:
        missing = [question for question in questions if question.key not in answers]
        if stored := len(questions) - len(missing):
            log.info("pairs: %d of %d answers are stored; asking for the others", stored, len(questions))
        for key, answer in _answers(context, masked, missing):
            answers.add(key, answer)


def _answers(context: Context, masked: Masked, questions: list[Question]) -> Iterator[tuple[Key, dict]]:
    """Answers to questions in the order in which they come, from this process or from the endpoints."""
    section = context.config.pairs
    variants = list(dict.fromkeys(question.variant for question in questions))
    options = {name: section[name] for name in ("temperature", "top_p", "max_new_tokens")}
    if not questions or (section.endpoints and not primary()):
        return iter(())
    if section.endpoints:
        return endpoints.sample(_endpoints(context, masked, variants), questions, **options)
    masks = {variant: mask_heads(context.lm.config, masked.get(variant, [])) for variant in variants}
    batch_size = section.batch_size or (None if memory.known() else context.config.batch_size)
    return pairs.sample(context.lm, questions, masks, batch_size=batch_size, **options)


def _endpoints(context: Context, masked: Masked, variants: list[Variant]) -> endpoints.Endpoints:
    config = context.config
    if config.prompt.chat is False:
        raise ValueError("endpoints answer chats, and prompt.chat is False: set it, or leave pairs.endpoints empty")
    prompter = context.pairs_prompter
    opened = prompter.render_messages([{"role": "user", "content": "?"}]).rstrip().endswith("<think>")
    by_name = {answers.name: answers for answers in answering(config.train.arms)}
    urls = {(seed, name): _url(config.pairs.endpoints, by_name[name], seed, masked) for seed, name in variants}
    return endpoints.Endpoints(
        urls,
        config.pairs.endpoint_model or str(config.model),
        config.pairs.concurrency,
        config.pairs.timeout,
        config.pairs.retries,
        prompter.template_kwargs,
        thoughts_begin="" if opened else "<think>",
    )


def _url(urls: Mapping[str, str], variant: Answers, seed: int, masked: Masked) -> str:
    """The address of the server that answers for a variant."""
    server, heads = variant.server or f"{variant.name}-{seed}", masked.get((seed, variant.name), [])
    if server not in urls:
        named = " ".join(f"{layer}-{head}" for layer, head in heads)
        what = f"`retmask export --heads {named}` writes its model" if heads else "it serves the model as it is"
        raise ValueError(f"pairs.endpoints names {', '.join(sorted(urls))} and lacks {server}: {what}")
    return urls[server]


def _write_arm(folder: Path, prompts: Sequence[dict], answers: Store, seed: int, arm: str) -> dict[str, int]:
    """Write an arm's records in the order of the prompts; returns how many prompts had which outcome."""
    counts = collections.Counter({name: 0 for name in pairs.OUTCOMES})
    if ARMS[arm].rejected is None:
        del counts["identical"]
    write_jsonl(folder / f"{arm}-{seed}.jsonl.gz", _records(prompts, answers, seed, arm, counts))
    return dict(counts)


def _records(
    prompts: Sequence[dict], answers: Store, seed: int, arm: str, counts: collections.Counter
) -> Iterator[dict]:
    """An arm's records in the order of the prompts; counts, which counts outcomes, is complete once all are taken."""

    def said_by(variant: Answers) -> Iterator[dict]:
        return (answers[seed, variant.name, prompt["id"]] for prompt in prompts)

    if (rejected := ARMS[arm].rejected) is None:
        return pairs.make_demonstrations(prompts, said_by(NORMAL), counts)
    return pairs.make_pairs(prompts, said_by(NORMAL), said_by(rejected), counts)


def _examples(prompts: Sequence[dict], answers: Store, seed: int, arm: str) -> list[Example]:
    """The first records of an arm, to be read."""
    first = itertools.islice(_records(prompts, answers, seed, arm, collections.Counter()), SHOWN)
    return [
        Example(
            question=record["messages"][-1]["content"],
            replies={"preferred": record["chosen"], f"rejected ({arm})": record["rejected"]},
        )
        for record in first
    ]


def _cut_short(answers: Store, questions: Sequence[Question]) -> dict[str, int]:
    """How many answers of each variant and seed max_new_tokens has cut."""
    cut = collections.Counter()
    for question in questions:
        seed, name = question.variant
        cut[f"{name}-{seed}"] += not answers[question.key]["finished"]
    return dict(sorted(cut.items()))


def _check_prompts(prompts: Sequence[dict], config) -> None:
    if len(prompts) < config.train.batch_size:
        raise ValueError(
            f"{config.pairs.prompts} gives {len(prompts)} prompts, fewer than a batch of {config.train.batch_size}: "
            "add prompts or lower train.batch_size"
        )
    for arm in config.train.arms:
        key = (ARMS[arm].rejected or NORMAL).messages
        for prompt in prompts:
            if key not in prompt:
                raise ValueError(f"{config.pairs.prompts}, prompt {prompt['id']}: arm {arm} needs {key}")


def _check(config) -> None:
    unknown = [arm for arm in config.train.arms if arm not in ARMS]
    if unknown:
        raise ValueError(f"train.arms has {', '.join(unknown)}; known arms are {', '.join(ARMS)}")


def _check_run(config) -> None:
    if not config.pairs.prompts:
        raise ValueError("pairs.prompts names no file of prompts: set it, or run detect, knockout and rope one by one")


def _cost(context: Context) -> Cost:
    section, seeds = context.config.pairs, len(context.config.train.seeds)
    if section.endpoints:
        return Cost()
    answers = section.n_prompts * seeds * len(answering(context.config.train.arms))
    rows = section.batch_size or context.config.batch_size
    return Cost(answers * _PROMPT, answers * section.max_new_tokens // 2, rows=rows)


PAIRS = Stage(
    name="pairs",
    work=pairs_stage,
    result=PairsResult,
    upstream=(DETECT,),
    settings=(*PROMPTS, "pairs.*", "train.arms", "train.seeds", "knockout.activity_windows", "text.*"),
    inputs=prompt_prints,
    batch_key="pairs.batch_size",
    check=_check,
    check_run=_check_run,
    cost=_cost,
)

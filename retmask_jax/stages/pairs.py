"""The arms, what each is trained to prefer to what, and the stage that collects their answers."""

import collections
import logging
from pathlib import Path
from typing import Any

import numpy as np

from retmask_jax.data.prompts import read_prompts, source_files
from retmask_jax.heads.knockout import activity_matched
from retmask_jax.model.interventions import mask_heads, random_heads
from retmask_jax.runs.context import Context
from retmask_jax.runs.stage import PROMPTS, Stage
from retmask_jax.stages.detect import DETECT, retrieval_heads
from retmask_jax.stages.knockout import KNOCKOUT
from retmask_jax.training import endpoints, pairs
from retmask_jax.training.pairs import Question, Variant
from retmask_jax.utils import memory, stats
from retmask_jax.utils.files import write_jsonl
from retmask_jax.utils.fingerprints import fingerprint
from retmask_jax.utils.hosts import primary
from retmask_jax.utils.store import Store

log = logging.getLogger(__name__)

# What an arm's rejected answer comes from: the model with its retrieval heads masked, or as many others: of all heads
# ("random"), of all but the retrieval heads ("any_layer"), of those in the same layers or of similar activity; "no_fact"
# asks the unmasked model without the stated fact; "contrast" needs none.
MASKED_ARMS = ("retmask", "random", "any_layer", "layer_matched", "activity_matched")
ARMS = (*MASKED_ARMS, "no_fact", "sft_filtered", "sft_unfiltered", "contrast")
_ONE_ANSWER = ("sft_unfiltered", "contrast")

# Who answers; the place in this list is the stream of draws, so that it is the same whichever arms there are.
_VARIANTS = ("normal", "retmask", "activity_matched", "any_layer", "layer_matched", "no_fact", "random")


def pairs_stage(context: Context, folder: Path) -> dict[str, Any]:
    """Normal and ablated answers to unlabelled prompts, per training seed, as one preference file per arm.

    Answers are stored as they come; a run that was cut off asks for those that are missing.
    """
    config, section = context.config, context.config.pairs
    read = read_prompts(
        section.prompts,
        n=section.n_prompts,
        split=section.prompts_split,
        field=section.prompts_field,
        resolve=context.resolve,
    )
    _check_prompts(read.records, config)
    heads = {(seed, arm): chosen for seed in config.train.seeds for arm, chosen in _arm_heads(context, seed).items()}
    questions, too_long = _questions(context, read.records, heads)
    asked = {question.id for question in questions}
    prompts = [prompt for prompt in read.records if prompt["id"] in asked]
    left_out = {why: n for why, n in read.counts.items() if why != pairs.KEPT} | {"too long": too_long}
    _collect(context, folder / "answers", heads, questions)
    with Store(folder / "answers") as answers:
        counts = {
            f"{arm}-{seed}": _write_arm(folder, prompts, answers, seed, arm)
            for seed in config.train.seeds
            for arm in config.train.arms
        }
        cut = _cut_short(answers)
    masks = {f"{arm}-{seed}": heads.get((seed, arm), []) for seed in config.train.seeds for arm in config.train.arms}
    numbers = {f"pairs/{name}/kept": stats.wilson(count["kept"], len(prompts)) for name, count in counts.items()}
    numbers |= {f"pairs/{name}/answers cut": stats.wilson(n, len(prompts)) for name, n in cut.items()}
    return {
        "counts": counts,
        "heads": masks,
        "prompts": len(prompts),
        "left_out": left_out,
        "answers_cut": cut,
        "numbers": numbers,
    }


def prompt_prints(context: Context) -> dict[str, Any]:
    """Fingerprints of the files that the prompts are read from."""
    source = context.config.pairs.prompts
    return {f"file {file}": fingerprint(file) for file in source_files(source, context.resolve)} if source else {}


def variants_of(config, seed: int) -> list[Variant]:
    """Who answers each prompt for the arms of a seed: the model as it is, and masked or without the stated fact."""
    arms = set(config.train.arms) | ({"retmask"} if "sft_filtered" in config.train.arms else set())
    return [(seed, name) for name in _VARIANTS if name == "normal" or name in arms]


def _arm_heads(context: Context, seed: int) -> dict[str, list]:
    """The heads masked to answer for each arm."""
    config, arms, heads = context.outline.config, context.config.train.arms, retrieval_heads(context)
    wanted = set(arms) | ({"retmask"} if "sft_filtered" in arms else set())
    activity_LH = np.array(KNOCKOUT.of(context).activity)
    choices = {
        "retmask": lambda: heads,
        "random": lambda: random_heads(config, n=len(heads), seed=seed),
        "any_layer": lambda: random_heads(config, n=len(heads), exclude=heads, seed=seed),
        "layer_matched": lambda: random_heads(config, like=heads, seed=seed),
        "activity_matched": lambda: activity_matched(heads, activity_LH, seed=seed),
    }
    return {arm: choose() for arm, choose in choices.items() if arm in wanted}


def _questions(context: Context, prompts, heads) -> tuple[list[Question], int]:
    """(what every variant of every seed is asked, how many prompts are too long to be)."""
    config = context.config
    without = "no_fact" in config.train.arms
    keys = ("messages", "messages_without") if without else ("messages",)
    room = context.outline.config.max_length - config.pairs.max_new_tokens
    numbers, tokens = pairs.usable(context.pairs_prompter, prompts, keys, room)
    questions = []
    for seed in config.train.seeds:
        for name in ("normal", *(arm for of, arm in heads if of == seed), *(("no_fact",) if without else ())):
            key = "messages_without" if name == "no_fact" else "messages"
            draws = pairs.draws(seed, _VARIANTS.index(name), len(prompts))
            questions += [
                Question((seed, name), prompts[number]["id"], prompts[number][key], row, int(draws[number]))
                for number, row in zip(numbers, tokens[key], strict=True)
            ]
    return questions, len(prompts) - len(numbers)


def _collect(context: Context, folder: Path, heads, questions: list[Question]) -> None:
    """Store the answers to those questions that have none; all hosts answer, the first one stores."""
    with Store(folder) as answers:
        missing = [question for question in questions if question.key not in answers]
        if stored := len(questions) - len(missing):
            log.info("pairs: %d of %d answers are stored; asking for the others", stored, len(questions))
        for key, answer in _answers(context, heads, missing):
            answers.add(key, answer)


def _answers(context: Context, heads, questions: list[Question]):
    """Answers to questions as they come, from this process or from the endpoints."""
    section = context.config.pairs
    variants = list(dict.fromkeys(question.variant for question in questions))
    options = {name: section[name] for name in ("temperature", "top_p", "max_new_tokens")}
    if not questions or (section.endpoints and not primary()):
        return iter(())
    if section.endpoints:
        return endpoints.sample(_endpoints(context, heads, variants), questions, **options)
    masks = {variant: mask_heads(context.lm.config, heads.get(variant, [])) for variant in variants}
    batch_size = section.batch_size or (None if memory.known() else context.config.batch_size)
    return pairs.sample(context.lm, questions, masks, batch_size=batch_size, **options)


def _endpoints(context: Context, heads, variants: list[Variant]) -> endpoints.Endpoints:
    config = context.config
    if not config.prompt.chat:
        raise ValueError("endpoints answer chats, and prompt.chat is False: set it, or leave pairs.endpoints empty")
    prompter = context.pairs_prompter
    opened = prompter.render_messages([{"role": "user", "content": "?"}]).rstrip().endswith("<think>")
    return endpoints.Endpoints(
        {variant: _url(config.pairs.endpoints, variant, heads.get(variant, [])) for variant in variants},
        config.pairs.endpoint_model or str(config.model),
        config.pairs.concurrency,
        config.pairs.timeout,
        config.pairs.retries,
        prompter.template_kwargs,
        thoughts_begin="" if opened else "<think>",
    )


def _url(urls, variant: Variant, heads) -> str:
    """The address of the server with these heads masked; random heads differ between seeds, and so do their servers."""
    seed, name = variant
    server = {"normal": "normal", "no_fact": "normal", "retmask": "retmask"}.get(name, f"{name}-{seed}")
    if server not in urls:
        masked = " ".join(f"{layer}-{head}" for layer, head in heads)
        what = f"`retmask export --heads {masked}` writes its model" if heads else "it serves the model as it is"
        raise ValueError(f"pairs.endpoints names {', '.join(sorted(urls))} and lacks {server}: {what}")
    return urls[server]


def _write_arm(folder: Path, prompts, answers: Store, seed: int, arm: str) -> dict[str, int]:
    """Write an arm's records in the order of the prompts; returns how many prompts had which outcome."""
    counts = collections.Counter({name: 0 for name in pairs.OUTCOMES})

    def of(name):
        return (answers[seed, name, prompt["id"]] for prompt in prompts)

    if arm in _ONE_ANSWER:
        del counts["identical"]
        records = pairs.make_demonstrations(prompts, of("normal"), counts)
    else:
        records = pairs.make_pairs(prompts, of("normal"), of("retmask" if arm == "sft_filtered" else arm), counts)
    write_jsonl(folder / f"{arm}-{seed}.jsonl.gz", records)
    return dict(counts)


def _cut_short(answers: Store) -> dict[str, int]:
    """How many answers of each variant max_new_tokens has cut."""
    cut = collections.Counter()
    for seed, name, prompt in answers:
        cut[f"{name}-{seed}"] += not answers[seed, name, prompt]["finished"]
    return dict(sorted(cut.items()))


def _check_prompts(prompts, config) -> None:
    if len(prompts) < config.train.batch_size:
        raise ValueError(
            f"{config.pairs.prompts} gives {len(prompts)} prompts, fewer than a batch of {config.train.batch_size}: "
            "add prompts or lower train.batch_size"
        )
    if "no_fact" in config.train.arms:
        for prompt in prompts:
            if "messages_without" not in prompt:
                raise ValueError(f"{config.pairs.prompts}, prompt {prompt['id']}: arm no_fact needs messages_without")


def _check(config) -> None:
    unknown = [arm for arm in config.train.arms if arm not in ARMS]
    if unknown:
        raise ValueError(f"train.arms has {', '.join(unknown)}; known arms are {', '.join(ARMS)}")


PAIRS = Stage(
    name="pairs",
    work=pairs_stage,
    result=dict,
    upstream=(DETECT, KNOCKOUT),
    settings=(*PROMPTS, "pairs.*", "train.arms", "train.seeds"),
    inputs=prompt_prints,
    batch_key="pairs.batch_size",
    check=_check,
)

"""Contrastive responses: the model's answer against that of an ablated model or prompt (arXiv 2601.11020)."""

import collections
from collections.abc import Mapping, Sequence

import numpy as np

from retmask_jax.generate import generate_many
from retmask_jax.haystack import Prompter
from retmask_jax.lm import LanguageModel
from retmask_jax.model.interventions import Interventions, stack

KEPT = "kept"


def sample_responses(lm: LanguageModel, prompter: Prompter, prompts: Sequence[dict],
                     variants: Mapping[str, Interventions], *, temperature: float, top_p: float, max_new_tokens: int,
                     batch_size: int, seed: int, messages_key: str = "messages") -> dict[str, list[dict]]:  # fmt: skip
    """One sampled response per prompt and variant: {variant: [{"text", "finished"}, ...]}.

    All variants share batches, each row with its own mask. A row's draw depends on seed, variant and prompt number
    alone. messages_key: which of a prompt's conversations is asked.
    """
    ids = [prompter.encode(prompter.render_messages(prompt[messages_key]))[0] for prompt in prompts]
    _check_context(lm, ids, max_new_tokens)
    rows = np.repeat(np.arange(len(variants)), len(prompts))
    filled = stack([iv.fill(lm.config) for iv in variants.values()])
    per_row = filled.replace(head_mask=filled.head_mask[rows], rope_mask=filled.rope_mask[rows])
    streams = [np.random.SeedSequence([seed, number]) for number in range(len(variants))]
    row_seeds = np.concatenate([stream.generate_state(len(prompts)) for stream in streams])
    results = generate_many(
        lm.config, lm.params, ids * len(variants), batch_size=batch_size, max_new_tokens=max_new_tokens,
        interventions=per_row, seeds=row_seeds, temperature=temperature, top_p=top_p, what="sample",
    )  # fmt: skip
    texts = lm.tokenizer.batch_decode([result.tokens for result in results], skip_special_tokens=True)
    responses = [
        {"text": text, "finished": len(result.tokens) < max_new_tokens}
        for text, result in zip(texts, results, strict=True)
    ]
    return {name: responses[i * len(prompts) : (i + 1) * len(prompts)] for i, name in enumerate(variants)}


def make_pairs(prompts: Sequence[dict], chosen: Sequence[dict], rejected: Sequence[dict]) -> tuple[list[dict], dict]:
    """(records {id, messages, chosen, ...}, counts): pairs that differ and are not empty, and how many were dropped."""
    records, counts = [], collections.Counter({KEPT: 0, "empty": 0, "identical": 0})
    for prompt, good, bad in zip(prompts, chosen, rejected, strict=True):
        if not good["text"].strip() or not bad["text"].strip():
            counts["empty"] += 1
        elif good["text"] == bad["text"]:
            counts["identical"] += 1
        else:
            counts[KEPT] += 1
            records.append(_record(prompt, good, bad))
    return records, dict(counts)


def make_demonstrations(prompts: Sequence[dict], chosen: Sequence[dict]) -> tuple[list[dict], dict]:
    """The model's own answers as records for supervised training (rejected repeats chosen and is not used)."""
    records = [
        _record(prompt, good, good) for prompt, good in zip(prompts, chosen, strict=True) if good["text"].strip()
    ]
    return records, {KEPT: len(records), "empty": len(prompts) - len(records)}


def _record(prompt: dict, good: dict, bad: dict) -> dict:
    return {
        "id": prompt["id"], "messages": prompt["messages"],
        "chosen": good["text"], "chosen_finished": good["finished"],
        "rejected": bad["text"], "rejected_finished": bad["finished"],
    }  # fmt: skip


def _check_context(lm: LanguageModel, ids: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    longest = max(map(len, ids))
    if longest + max_new_tokens > lm.config.max_length:
        raise ValueError(
            f"the longest prompt has {longest} tokens; with {max_new_tokens} new ones it exceeds the model's context "
            f"of {lm.config.max_length}"
        )

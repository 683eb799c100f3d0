"""Re-ranking: the model orders passages by how well they answer a query; NDCG@10 by their labels is the score."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from retmask_jax.data.prompter import Prompter
from retmask_jax.evals.measured import Measured
from retmask_jax.evals.suites.samples import Draft, Sample, answer, check_lengths, fill, prompt_text
from retmask_jax.generation.language_model import LanguageModel
from retmask_jax.generation.sampling import ContrastDecoding
from retmask_jax.model.interventions import Interventions
from retmask_jax.utils.files import iter_records
from retmask_jax.utils.store import Store

METRIC = "ndcg_cut.10"
_NUMBERING = re.compile(r"\s*\d+[.)]\s+(?=\S)")  # at the start of a line that is not empty
_SEED = 0x72616E6B


@dataclasses.dataclass(frozen=True)
class Query:
    """A query and its passages, {id: (text, relevance)}; relevance is 0 or more."""

    query: str
    passages: Mapping[str, tuple[str, int]]


def read_queries(path: str | Path) -> list[Query]:
    """Reads the queries of a JSONL file of {"query", "passages": [{"id", "text", "relevance"}, ...]}.

    Raises:
        ValueError: The file is empty, or a record, whose line the message names, lacks a field, repeats an id or has a
            relevance that is not a whole number of at least 0.
    """
    queries = []
    for number, record in iter_records(Path(path)):
        try:
            rows = [(str(p["id"]), str(p["text"]), p["relevance"]) for p in record["passages"]]
            query = Query(record["query"], {name: (text, relevance) for name, text, relevance in rows})
        except (KeyError, TypeError) as error:
            wanted = "it must have query, and passages of id, text and relevance"
            raise ValueError(f"{path}, line {number}: {wanted} (wrong at {error})") from error
        if not isinstance(query.query, str):
            raise ValueError(f"{path}, line {number}: query is {query.query!r:.40}, not a text: write it in quotes")
        wrong = [relevance for *_, relevance in rows if type(relevance) is not int or relevance < 0]
        if wrong or not rows or len(query.passages) < len(rows):
            problem = f"relevance {wrong[0]!r}" if wrong else f"{len(rows)} passages with {len(query.passages)} ids"
            raise ValueError(
                f"{path}, line {number}: {problem}; ids must differ, relevance is a whole number from 0 on"
            )
        queries.append(query)
    if not queries:
        raise ValueError(f"{path} holds no queries")
    return queries


def rerank_samples(
    prompter: Prompter, queries: Sequence[Query], length: int | None = None, *, seed: int = 0, max_new_tokens: int = 200
) -> list[Sample]:
    """Makes a sample for each query, with its passages in random order; `references` are the ids of these.

    Args:
        length: The most tokens, the answer's max_new_tokens included. If not all passages fit, the last ones of the file
            are left out. None for all passages.

    Raises:
        ValueError: Not even one passage of a query fits.
    """
    samples = []
    for i, query in enumerate(queries):
        draft = _draft(np.random.default_rng([seed, _SEED, i]), query, f"{seed}-{i}")
        wanted = length or prompter.count(prompt_text(prompter, draft, draft.most)) + max_new_tokens
        (sample,) = fill(prompter, [draft], wanted, max_new_tokens, f"rerank query {i + 1}", whole=True)
        samples.append(dataclasses.replace(sample, references=tuple(query.passages)[: sample.units]))
    return samples


def parse_order(answer: str, ids: Sequence[str]) -> list[str]:
    """Returns the ids in an answer, in the order in which they are first named.

    Ids may be separated in any way: "3 > 1", "[3], [1]", "ID3 > ID1", or a numbered list with an id on each line. They
    count only as whole words. Other words, and ids that are not among `ids`, are ignored.
    """
    lines = answer.split("\n")
    numbered = [bool(_NUMBERING.match(line)) for line in lines]
    if sum(numbered) > 1:  # otherwise the number in "1. 3" would count as an id
        lines = [_NUMBERING.sub("", line) for line in lines]
    names = "|".join(re.escape(name) for name in sorted(ids, key=len, reverse=True))
    found = re.findall(rf"(?<![\w-])(?:({names})|ID({names}))(?![\w-])", "\n".join(lines))
    return list(dict.fromkeys(plain or marked for plain, marked in found))


def ndcg(order: Sequence[str], relevance: Mapping[str, int]) -> float:
    """Computes NDCG@10 of an order as trec_eval does (gain = relevance); passages not in the order count as not found.

    Raises:
        ValueError: pytrec-eval is not installed.
    """
    try:
        import pytrec_eval
    except ImportError as error:
        raise ValueError("re-ranking needs pytrec-eval-terrier: pip install 'retmask_jax[eval]'") from error
    evaluator = pytrec_eval.RelevanceEvaluator({"query": dict(relevance)}, {METRIC})
    run = {name: float(len(order) - place) for place, name in enumerate(order)}
    return evaluator.evaluate({"query": run})["query"][METRIC.replace(".", "_")]


def run_rerank(
    lm: LanguageModel,
    prompter: Prompter,
    queries: Sequence[Query],
    length: int | None = None,
    *,
    seed: int = 0,
    max_new_tokens: int = 200,
    batch_size: int = 1,
    interventions: Interventions | None = None,
    contrast: ContrastDecoding | None = None,
    kept: Store | None = None,
) -> list[Measured]:
    """Measures NDCG@10 of the order in each greedy answer; options as of `scoring.answered`.

    Queries without a relevant passage among those shown are counted as missing.

    Raises:
        ValueError: As of `rerank_samples` and `ndcg`, or if a prompt exceeds the model's context or no query has a
            relevant passage.
    """
    ndcg(["a"], {"a": 1})  # before anything is generated
    samples = rerank_samples(prompter, queries, length, seed=seed, max_new_tokens=max_new_tokens)
    check_lengths(lm.config.max_length, [len(sample.tokens) + max_new_tokens for sample in samples], "rerank")
    labels = [
        {name: query.passages[name][1] for name in sample.references}
        for query, sample in zip(queries, samples, strict=True)
    ]
    shown = [i for i, label in enumerate(labels) if any(label.values())]
    if not shown:
        raise ValueError(
            "no query has a relevant passage among those shown: give labels, or a longer suites.rerank.length"
        )
    said = answer(
        lm,
        [samples[i] for i in shown],
        batch_size=batch_size,
        interventions=interventions,
        contrast=contrast,
        kept=kept,
        what="rerank",
    )
    values = [ndcg(parse_order(text, samples[i].references), labels[i]) for text, i in zip(said, shown, strict=True)]
    missing = {"no relevant passage": len(queries) - len(shown)} if len(shown) < len(queries) else {}
    ids = tuple(samples[i].id for i in shown)
    return [Measured("rerank", "passages", "NDCG@10", ids, np.array(values), False, length, missing)]


def _draft(rng: np.random.Generator, query: Query, name: str) -> Draft:
    names = list(query.passages)
    keys = rng.random(len(names))

    def text(units: int) -> str:
        shown = [names[i] for i in np.argsort(keys[:units], kind="stable")]
        passages = "\n\n".join(f"[ID: {name}] {query.passages[name][0]}" for name in shown)
        return (
            "Order the passages below by how well each of them answers the query, the best first.\n\n"
            f"{passages}\n\nQuery: {query.query}\n\nWrite nothing but the IDs, from the most to the least relevant passage, "
            "such as: ID2 > ID3 > ID1"
        )

    return Draft(name, text, (), len(names), least=1, prefix="Order:")

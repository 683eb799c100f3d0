"""Three pretrained models that nobody here made: the papers' phenomena, and the built-in texts. `make test-real` fetches them.

What is asked of each is what was seen before in runs with other needles and another haystack.
"""

import json
import os
from pathlib import Path

import pytest

import retmask_jax as rm
from retmask_jax.cli.main import main
from retmask_jax.data.answers import holds
from retmask_jax.data.builtin_files import path_of
from retmask_jax.data.needles import question_case, read_needles
from retmask_jax.data.prompter import make_prompter
from retmask_jax.heads.conditions import answers
from retmask_jax.hf.packaged_models import MODELS
from retmask_jax.model.interventions import Interventions

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif("RETMASK_MODELS" not in os.environ, reason="RETMASK_MODELS names no folder of models"),
]

# Heads of an earlier detection, best first: of SmolLM2 all 14, of Gemma all 7, of Qwen the first 11.
SEEN = {
    "smollm2": "18-6 17-3 23-2 18-7 17-4 20-6 23-7 21-8 21-5 23-8 23-1 22-7 24-4 22-4",
    "gemma3": "11-2 5-1 5-2 13-3 7-0 10-2 12-3",
    "qwen2_5_coder": "16-3 16-2 16-12 11-12 9-8 9-13 16-0 16-7 11-9 16-9 9-10",
}
SHARED = {"smollm2": 10, "gemma3": 5, "qwen2_5_coder": 8}  # at least so many are among the first of ours
FIRST = {"smollm2": 20, "gemma3": 7, "qwen2_5_coder": 20}


def path(name):
    return str(Path(os.environ["RETMASK_MODELS"]) / MODELS[name].file)


@pytest.fixture(scope="session")
def found(tmp_path_factory):
    """The folder of results of a model in which detection has run."""
    root = tmp_path_factory.mktemp("real")

    def of(name):
        if not (root / name / "detect" / "result.json").exists():
            assert main(["detect", path(name), f"--workdir={root / name}"]) == 0
        return root / name

    return of


@pytest.mark.parametrize("name", SEEN)
def test_detection_finds_the_heads_that_were_seen_before(found, name):
    detected = json.loads((found(name) / "detect" / "result.json").read_text())
    ours = [f"{head['layer']}-{head['head']}" for head in detected["best"]]
    assert len({*ours[: FIRST[name]]} & {*SEEN[name].split()}) >= SHARED[name]


def test_the_papers_phenomena_on_smollm2(found):
    root = found("smollm2")
    for stage in ("knockout", "rope"):
        assert main([stage, path("smollm2"), f"--workdir={root}"]) == 0
    knocked, rotary = (json.loads((root / stage / "result.json").read_text()) for stage in ("knockout", "rope"))
    recall = {row["kind"]: row["value"] for row in knocked["means"] if row["task"] == "needle 512"}
    assert recall["none"] >= 0.85 and recall["retrieval"] <= 0.05 and recall["layer-matched"] >= 0.6
    quarter = rotary["n_pairs"] // 4
    doses = {(row["kind"], row["k"]): row["value"] for row in rotary["means"] if row["task"] == "needle 512"}
    assert doses["lowest", quarter] <= 0.1 and doses["highest", quarter] >= 0.85


@pytest.mark.parametrize("name", MODELS)
def test_no_needle_is_answered_without_its_text_and_facts_are(name):
    lm = rm.load(path(name))
    prompter = make_prompter(lm.tokenizer, chat=None, template_kwargs={"enable_thinking": False})

    def right(texts, field="answer"):
        needles = read_needles(path_of(f"builtin:{texts}"))
        cases = [question_case(prompter, needle, prefix=True) for needle in needles]
        (said,) = answers(lm, cases, [Interventions()], max_new_tokens=16, batch_size=16)
        return sum(holds(text, getattr(needle, field)) for text, needle in zip(said, needles, strict=True))

    assert [right(texts) for texts in ("needles", "codes", "indirect")] == [0, 0, 0]
    assert right("facts", "memory") >= 36

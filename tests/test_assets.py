"""The bundled model and its data: made by the recipe, loadable by other tools, small."""

from pathlib import Path

import numpy as np
import pytest

import retmask_jax as rm
from retmask_jax.hf.hub import BUNDLED
from retmask_jax.pipeline.registry import check_config
from retmask_jax.runs import recipes
from retmask_jax.training.pretrain import write_data


def test_the_assets_are_small():
    total = sum(path.stat().st_size for path in BUNDLED.parent.rglob("*") if path.is_file())
    assert total < 8 * 2**20


def test_the_data_files_are_what_the_recipe_draws(tmp_path):
    write_data(recipes.load_recipe("tiny").pretrain.data, tmp_path)
    shipped = BUNDLED.parent / "data"
    assert {path.name for path in shipped.iterdir() if path.is_file()} == {path.name for path in tmp_path.iterdir()}
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (shipped / path.name).read_bytes(), path.name


def test_detection_and_measurement_share_no_needle_and_hardly_a_sentence():
    data = BUNDLED.parent / "data"
    assert not set((data / "detect_needles.jsonl").read_text().splitlines()) & set(
        (data / "test_needles.jsonl").read_text().splitlines()
    )
    plain = [
        {line for line in (data / f"{split}_text.txt").read_text().splitlines() if not line.startswith("the home of")}
        for split in ("detect", "test")
    ]
    assert len(plain[0] & plain[1]) < 0.02 * len(plain[0])


def test_transformers_on_torch_gives_the_same_logits():
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    lm = rm.load("bundled")
    tokens = np.random.default_rng(0).integers(4, lm.config.vocab_size, (2, 300))
    model = transformers.AutoModelForCausalLM.from_pretrained(BUNDLED, torch_dtype=torch.float32).eval()
    with torch.no_grad():
        theirs = model(torch.tensor(tokens)).logits.numpy()
    ours = np.asarray(lm.logits(tokens))
    assert np.abs(ours - theirs).max() < 1e-4 * np.abs(theirs).max()


@pytest.mark.parametrize(
    "name",
    [
        path.stem
        for path in sorted((Path(__file__).parent.parent / "configs").glob("*.py"))
        if path.stem != "default" and not path.stem.startswith("_")
    ],
)
def test_every_recipe_is_locked_and_valid(name):
    config = recipes.load_recipe(name)
    check_config(config)
    with pytest.raises(AttributeError):
        config.train.stpes = 3

"""Three real models in GGUF files, against transformers on torch: `RETMASK_MODELS=FOLDER make test-real`."""

import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest

import retmask_jax as rm
from retmask_jax.cli.main import main

pytestmark = pytest.mark.real

FILES = ("SmolLM2-135M-Instruct.Q4_1.gguf", "gemma-3-270m-q4_k_m.gguf", "qwen2.5-coder-0.5b-instruct-q4.gguf")
ROOT = Path(__file__).parent.parent.parent
TEXTS = ("README.md", "retmask_jax/training/README.md", "retmask_jax/hf/weights.py")
TOKENS, NEW = 300, 64


@pytest.fixture(scope="module", params=FILES)
def path(request):
    folder = os.environ.get("RETMASK_MODELS")
    if not folder:
        pytest.skip("RETMASK_MODELS names no folder with the real models")
    if not (file := Path(folder) / request.param).exists():
        pytest.skip(f"{file} is not there")
    pytest.importorskip("torch")
    return file


@pytest.fixture(scope="module")
def ours(path):
    return rm.load(path)


@pytest.fixture(scope="module")
def theirs(path):
    import torch
    from make_golden import EAGER
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32, **EAGER)
    return model.eval()


@pytest.fixture(scope="module")
def their_tokenizer(path):
    from tokenizers import normalizers, pre_tokenizers
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    # What the models' own tokenizer.json has, and transformers leaves out where it reads a GGUF file.
    if path.name.startswith("SmolLM2"):
        digits = pre_tokenizers.Digits(individual_digits=True)
        split = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
        tokenizer.backend_tokenizer.pre_tokenizer = split
    elif path.name.startswith("qwen2.5"):
        tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    return tokenizer


@pytest.fixture(scope="module")
def tokens(ours):
    texts = [(ROOT / name).read_text() for name in TEXTS]
    return np.array([ours.tokenizer(text)["input_ids"][:TOKENS] for text in texts], np.int32)


def _masks(config, seed):
    """(bool[L,H], bool[L,H,R]): a tenth of the heads; a quarter of the pairs of half of the heads."""
    rng = np.random.default_rng(seed)
    shape = (config.n_layers, config.n_heads)
    pairs_LHR = rng.random((*shape, config.n_pairs)) < 1 / 4
    return rng.random(shape) < 1 / 10, pairs_LHR & (rng.random(shape) < 1 / 2)[..., None]


@pytest.mark.parametrize("masked", ["nothing", "heads", "rotary"])
def test_logits_agree_with_torch(ours, theirs, tokens, masked, record_property):
    from make_golden import torch_logits

    head_mask, rope_mask = _masks(ours.config, seed=3)
    masks = {"nothing": {}, "heads": {"head_mask": head_mask}, "rotary": {"rope_mask": rope_mask}}[masked]
    expected = torch_logits(theirs, tokens, **masks)
    actual = np.asarray(ours.logits(tokens, interventions=rm.Interventions(**masks)))
    difference = np.abs(actual - expected).max()
    record_property("difference", float(difference))
    print(f"{masked}: logits differ by {difference:.2e} at most, of {np.abs(expected).max():.1f}")
    assert difference < 1e-3


def test_greedy_tokens_agree_with_torch(ours, theirs, tokens):
    import torch

    ids = torch.tensor(tokens[:, :100], dtype=torch.long)
    theirs.generation_config.eos_token_id = None
    expected = theirs.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, eos_token_id=None
    )
    found = ours.generate(tokens[:, :100], np.full(len(tokens), 100), NEW, stop_ids=())
    np.testing.assert_array_equal(found.tokens, expected[:, 100:].numpy())


def test_the_tokenizer_equals_that_of_transformers(ours, their_tokenizer):
    texts = _varied_texts(10_000, seed=3)
    options = {"return_offsets_mapping": True}
    found, expected = ours.tokenizer(texts, **options), their_tokenizer(texts, **options)
    wrong = [
        text
        for text, *pairs in zip(
            texts,
            found["input_ids"],
            expected["input_ids"],
            found["offset_mapping"],
            expected["offset_mapping"],
            strict=True,
        )
        if pairs[0] != pairs[1] or pairs[2] != pairs[3]
    ]
    print(f"{len(wrong)} of {len(texts)} texts are split otherwise: {wrong[:5]}")
    assert not wrong
    for ids in found["input_ids"][:1000]:
        assert ours.tokenizer.decode(ids) == their_tokenizer.decode(ids)


def test_the_chat_template_equals_that_of_transformers(ours, their_tokenizer):
    if ours.tokenizer.chat_template is None:
        assert their_tokenizer.chat_template is None
        return
    turns = [
        {"role": "user", "content": "What is 2 + 2?"},
        {"role": "assistant", "content": " Four.\n"},
        {"role": "user", "content": "And 12 x 12?"},
    ]
    for conversation in (turns, [{"role": "system", "content": "Be brief."}, *turns]):
        for options in ({"tokenize": False}, {"tokenize": True, "add_generation_prompt": True}):
            found = ours.tokenizer.apply_chat_template(conversation, **options)
            assert found == their_tokenizer.apply_chat_template(conversation, **options)


def test_a_saved_folder_holds_the_same_model(ours, tokens, tmp_path):
    import torch
    from make_golden import EAGER, torch_logits
    from transformers import AutoModelForCausalLM, AutoTokenizer

    rm.save(ours, tmp_path)
    again = rm.load(tmp_path)
    assert again.config == ours.config
    rows = tokens[:1, :64]
    logits = np.asarray(ours.logits(rows))
    np.testing.assert_array_equal(again.logits(rows), logits)
    texts = _varied_texts(200, seed=4)
    for tokenizer in (again.tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        assert tokenizer(texts)["input_ids"] == ours.tokenizer(texts)["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, **EAGER).eval()
    assert np.abs(torch_logits(model, rows) - logits).max() < 1e-3
    assert set(model.generation_config.eos_token_id) == set(ours.config.eos_ids)
    shutil.rmtree(tmp_path)


def test_inspect_says_the_quantisation(path, capsys):
    assert main(["inspect", str(path)]) == 0
    assert "tensors" in (shown := capsys.readouterr().out) and "Q8_0" in shown
    print(shown)


# --- texts ---

_PIECES = (
    [
        "the",
        " The",
        "don't",
        "I'LL",
        "we've",
        "O'Neil's",
        "naïve",
        "Straße",
        "cafe\u0301",
        "ﬁne",
        "İstanbul",
        "ǅ",
        "हिन्दी",
        "ไทย",
    ]
    + [
        "日本語",
        "中文。",
        "한국어",
        "привет",
        "שלום",
        "العربية",
        "😀",
        "👩‍👩‍👧‍👦",
        "🇫🇷",
        "\u200b",
        "\ufeff",
        "\u00a0",
        "½",
        "²",
        "٣",
        "Ⅷ",
    ]
    + [
        " ",
        "  ",
        "   ",
        " " * 7,
        " " * 40,
        "\n",
        "\n\n",
        "\n" * 35,
        "\r\n",
        "\t",
        "\t\t",
        " \n ",
        "\x00",
        "\x7f",
        "\u2028",
        "▁",
        "▁▁",
    ]
    + ["0", "1", "12", "123", "1234", "3.14", "1,000,000", "1e-5", "0x1F", "2024-05-06", "12:30", "50%", "$9.99", "#42"]
    + [
        "()",
        "[]",
        "{}",
        "=>",
        "!=",
        "...",
        "--",
        "/*",
        "*/",
        "://",
        "<b>",
        "</td>",
        "&amp;",
        "a_b",
        "fooBar",
        "__init__",
        "\\n",
    ]
    + [
        "<|im_start|>",
        "<|im_end|>",
        "<|endoftext|>",
        "<start_of_turn>",
        "<end_of_turn>",
        "<bos>",
        "<eos>",
        "<unused7>",
        "<0x0A>",
    ]
)


def _varied_texts(n: int, seed: int) -> list[str]:
    """Texts of words of this repository, of pieces that tokenizers treat in their own way, and of any characters."""
    rng = random.Random(seed)
    words = " ".join((ROOT / name).read_text() for name in TEXTS).split(" ")
    return [
        "".join(
            rng.choice((rng.choice(_PIECES), f" {rng.choice(words)}", rng.choice(words), _any_character(rng)))
            for _ in range(rng.randint(0, 24))
        )
        for _ in range(n)
    ]


def _any_character(rng: random.Random) -> str:
    code = rng.choice((rng.randrange(0x80), rng.randrange(0x3000), rng.randrange(0x110000)))
    return " " if 0xD800 <= code < 0xE000 else chr(code)

"""Tokenizers in GGUF files: made here, written as llama.cpp writes them, they split text as before; others are refused."""

import json
import random
import unicodedata
from pathlib import Path

import pytest
from helpers_gguf import write_vocabulary
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from retmask_jax.hf.tokenizer import load_tokenizer

ROOT = Path(__file__).parent.parent.parent
CORPUS = [(ROOT / name).read_text() for name in ("README.md", "retmask_jax/hf/weights.py")]
NORMAL, UNKNOWN, CONTROL, DEFINED, BYTE = 1, 2, 3, 4, 6
TEXTS = [
    "",
    " ",
    "The model's heads, I'LL say: don't!",
    "  two   spaces 1 22 333 4444\t55555  6",
    "x=12345;\n\n\n  return [a_b, fooBar]  # ½ ² ٣\r\n",
    "naïve cafe\u0301 日本語 привет 😀 \u00a0 \u200b",
    "<|end|>The end<|end|> <|tool|>",
]


# --- BPE on bytes ---


def _gpt2(digits=False):
    first = [pre_tokenizers.Digits(individual_digits=True)] if digits else []
    return pre_tokenizers.Sequence([*first, pre_tokenizers.ByteLevel(add_prefix_space=False)])


def _pattern(name):
    mapping = pytest.importorskip("transformers.integrations.gguf.gguf_tokenizer_mapping")
    split = pre_tokenizers.Split(Regex(mapping.GGUF_PRE_TOKENIZER_SPLITS[name]), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


# tokenizer.ggml.pre: its pre-tokenizer, by another hand where there is one.
PRE = {
    "gpt-2": _gpt2,
    "default": _gpt2,
    "olmo": _gpt2,
    "smollm": lambda: _gpt2(digits=True),
    "starcoder": lambda: _gpt2(digits=True),
} | {
    name: lambda name=name: _pattern(name)
    for name in ("qwen2", "deepseek-r1-qwen", "llama-bpe", "llama3", "dbrx", "tekken", "gpt-4o")
}


def _trained(pre_tokenizer, composed=False):
    tokenizer = Tokenizer(models.BPE())
    if composed:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizer, decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|begin|>", "<|end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=900, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens(["<|tool|>"])
    return tokenizer


def _byte_level(tokenizer, pre: str) -> dict:
    """The keys of a tokenizer of `_trained`."""
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    tokens = [tokenizer.id_to_token(i) for i in range(tokenizer.get_vocab_size())]
    kinds = {"<|begin|>": CONTROL, "<|end|>": CONTROL, "<|tool|>": DEFINED}
    return {
        "model": "gpt2",
        "pre": pre,
        "tokens": tokens,
        "token_type": [kinds.get(token, NORMAL) for token in tokens],
        "merges": [" ".join(merge) for merge in merges],
        "add_bos_token": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }


@pytest.mark.parametrize("pre", PRE)
def test_text_is_split_as_the_pre_tokenizer_says(tmp_path, pre):
    composed = pre == "qwen2"
    expected = _trained(PRE[pre](), composed)
    found = load_tokenizer(write_vocabulary(tmp_path / "x.gguf", _byte_level(expected, pre)))
    for text in [*TEXTS, *CORPUS]:
        encoding, ours = expected.encode(text), found(text, return_offsets_mapping=True)
        assert ours["input_ids"] == encoding.ids, text
        assert ours["offset_mapping"] == encoding.offsets, text
        assert found.decode(ours["input_ids"]) == (unicodedata.normalize("NFC", text) if composed else text)
    assert len(found) == expected.get_vocab_size()


@pytest.mark.parametrize("pre, whole", [("llama-bpe", True), ("tekken", True), ("qwen2", False), ("smollm", False)])
def test_words_of_the_vocabulary_are_whole_where_the_pre_tokenizer_says_so(tmp_path, pre, whole):
    keys = _byte_level(_trained(_gpt2()), pre)
    keys |= {"tokens": [*keys["tokens"], "\u0120qzqzq"], "token_type": [*keys["token_type"], NORMAL]}  # by no merges
    ids = load_tokenizer(write_vocabulary(tmp_path / "x.gguf", keys))(" qzqzq")["input_ids"]
    assert (ids == [len(keys["tokens"]) - 1]) == whole and (len(ids) > 1) != whole


@pytest.mark.parametrize(
    "pre, flags, begins, ends",
    [
        ("smollm", {}, False, False),
        ("llama-bpe", {}, True, False),
        ("tekken", {}, True, False),
        ("llama-bpe", {"add_bos_token": False}, False, False),
        ("qwen2", {"add_bos_token": True, "add_eos_token": True}, True, True),
    ],
)
def test_texts_begin_and_end_as_the_flags_say(tmp_path, pre, flags, begins, ends):
    keys = _byte_level(_trained(_gpt2()), pre)
    del keys["add_bos_token"]
    tokenizer = load_tokenizer(write_vocabulary(tmp_path / "x.gguf", keys | flags))
    plain = tokenizer("the end", add_special_tokens=False)["input_ids"]
    framed = [0] * begins + plain + [1] * ends
    assert tokenizer("the end")["input_ids"] == framed
    assert tokenizer("the end", "the end")["input_ids"] == framed * 2


def test_special_tokens_and_template_are_those_of_the_file(tmp_path):
    template = "{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}"
    keys = _byte_level(_trained(_gpt2()), "gpt-2") | {"padding_token_id": 1, "tokenizer.chat_template": template}
    keys |= {"tokenizer.chat_template.tools": "none", "fim_mid_token_id": 3, "add_sep_token": False}
    tokenizer = load_tokenizer(write_vocabulary(tmp_path / "x.gguf", keys))
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<|begin|>", "<|end|>", "<|end|>")
    assert tokenizer.unk_token is None
    asked = tokenizer.apply_chat_template([{"role": "user", "content": "the<|tool|>"}], tokenize=False)
    assert asked == "the<|tool|><|end|>"
    ids = tokenizer(asked)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids)[-2:] == ["<|tool|>", "<|end|>"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "the<|tool|>"


@pytest.mark.parametrize("name, strips", [("Phi-3 Mini", True), ("phi3", True), ("Phi 4", False)])
def test_control_tokens_of_phi3_take_the_blanks_after_them(tmp_path, name, strips):
    keys = _byte_level(_trained(_gpt2()), "gpt-2") | {"general.name": name}
    tokenizer = load_tokenizer(write_vocabulary(tmp_path / "x.gguf", keys))
    assert (tokenizer("<|end|>\n the")["input_ids"] == tokenizer("<|end|>the")["input_ids"]) == strips


# --- SentencePiece ---

_SPACE = "\u2581"


def _pieces(seed: int) -> dict:
    """The keys of a tokenizer: letters, words joined of them at random, each byte; scores fall with the place."""
    rng = random.Random(seed)
    letters = [_SPACE, *"abcdehlmnorst.,'"]
    words = [f"{rng.choice(letters)}{rng.choice(letters)}" for _ in range(120)]
    words += [f"{rng.choice(words)}{rng.choice(letters + words)}" for _ in range(200)]
    pieces = [word for word in dict.fromkeys(words) if _SPACE * 2 not in word]
    rng.shuffle(pieces)
    first, defined = ["<unk>", "<s>", "</s>"], ["  ", "\n"]
    tokens = [*first, *defined, *(f"<0x{byte:02X}>" for byte in range(256)), *pieces, *letters]
    kinds = [UNKNOWN, CONTROL, CONTROL, DEFINED, DEFINED] + [BYTE] * 256 + [NORMAL] * (len(pieces) + len(letters))
    scores = [0.0] * 5 + [0.0] * 256 + [-float(i) for i in range(len(pieces) + len(letters))]
    ids = {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0}
    return {"model": "llama", "pre": "default", "tokens": tokens, "token_type": kinds, "scores": scores} | ids


def _slowly(keys: dict, text: str) -> list[int]:
    """SentencePiece's algorithm: the two neighbours that make the piece with the best score are joined, the first of
    equals; what users define is joined before, and stays."""
    ids = {token.replace("  ", _SPACE * 2): i for i, token in enumerate(keys["tokens"])}
    scores = {token: keys["scores"][i] for token, i in ids.items() if keys["token_type"][i] == NORMAL}
    scores |= {_SPACE * 2: 1.0}
    symbols = list(text.replace(" ", _SPACE))
    while True:
        pairs = [
            (-scores[a + b], i) for i, (a, b) in enumerate(zip(symbols, symbols[1:], strict=False)) if a + b in scores
        ]
        if not pairs:
            break
        _, i = min(pairs)
        symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]
    known = ((symbol,) if symbol in ids else [f"<0x{byte:02X}>" for byte in symbol.encode()] for symbol in symbols)
    return [ids[token] for tokens in known for token in tokens]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("prefix", [True, False])
def test_pieces_are_joined_by_their_scores(tmp_path, seed, prefix):
    keys = _pieces(seed) | {"add_space_prefix": prefix, "add_bos_token": False}
    tokenizer = load_tokenizer(write_vocabulary(tmp_path / "x.gguf", keys))
    rng = random.Random(seed)
    texts = ["".join(rng.choices("aabcdeehlmnorst.,' é日😀", k=rng.randint(1, 40))) for _ in range(200)]
    for text in ["the other  cat's nose", " so be it", *texts]:
        text = text.replace("   ", " ")
        ids = tokenizer(text)["input_ids"]
        assert ids == _slowly(keys, f" {text}" if prefix else text), text
        assert tokenizer.decode(ids) == text


def test_flags_of_sentencepiece_have_the_defaults_of_llama_cpp(tmp_path):
    keys = _pieces(0)
    tokenizer = load_tokenizer(write_vocabulary(tmp_path / "x.gguf", keys))
    assert tokenizer("the")["input_ids"] == [1, *_slowly(keys, " the")]
    newline = keys["tokens"].index("\n")
    assert tokenizer("\n")["input_ids"][-1] == newline and tokenizer("</s>", add_special_tokens=False)["input_ids"] == [
        2
    ]
    assert tokenizer.unk_token == "<unk>" and tokenizer.convert_ids_to_tokens(3) == _SPACE * 2


# --- what is refused ---

_SMALL = {
    "model": "gpt2",
    "pre": "gpt-2",
    "tokens": ["a", "b", "ab", "<e>"],
    "token_type": [NORMAL] * 3 + [CONTROL],
    "merges": ["a b"],
    "eos_token_id": 3,
}
BAD = {
    "pre": ({"pre": "viking"}, "has the pre-tokenizer 'viking', which is not known"),
    "no pre": ({"pre": None}, "has the pre-tokenizer None, which is not known"),
    "model": ({"model": "bert"}, "has a tokenizer of type 'bert'; supported are gpt2, llama"),
    "prefix": ({"add_space_prefix": True}, "add_space_prefix=True, which is not supported"),
    "separator": ({"add_sep_token": True}, "add_sep_token=True; only False is supported"),
    "key": ({"normalizer": "NFC"}, "keys of a tokenizer that are not understood: tokenizer.ggml.normalizer"),
    "kinds": ({"token_type": [NORMAL]}, "has 4 tokens, 1 kinds of tokens and 4 rows of embeddings"),
    "id": ({"eos_token_id": 9}, "eos_token_id=9, but 4 tokens"),
    "begin": ({"add_bos_token": True}, "add_bos_token or add_eos_token, but no id"),
    "merges": ({"merges": ["a z"]}, r"the tokenizer of .* cannot be built \(.*z"),
    "scores": ({"model": "llama"}, r"the tokenizer of .* cannot be built \(.*scores"),
}


@pytest.mark.parametrize("what", BAD)
def test_other_tokenizers_are_refused_in_one_line(tmp_path, what):
    changes, message = BAD[what]
    keys = {key: value for key, value in (_SMALL | changes).items() if value is not None}
    with pytest.raises(ValueError, match=message) as caught:
        load_tokenizer(write_vocabulary(tmp_path / "x.gguf", keys))
    assert "\n" not in str(caught.value) and "x.gguf" in str(caught.value)


def test_a_token_without_a_row_of_embeddings_is_refused(tmp_path):
    with pytest.raises(ValueError, match="has 4 tokens, 4 kinds of tokens and 3 rows"):
        load_tokenizer(write_vocabulary(tmp_path / "x.gguf", _SMALL, rows=3))
    assert load_tokenizer(write_vocabulary(tmp_path / "x.gguf", _SMALL, rows=9))("ab")["input_ids"] == [2]

"""The tokenizer of a GGUF file, built from its vocabulary, merges or scores, kinds of tokens and flags.

The flags mean what they mean in llama.cpp, whose converter wrote them; so do the defaults of flags that are absent.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from retmask_jax.hf.gguf.config import token_id
from retmask_jax.hf.gguf.file import GgufFile

_PREFIX = "tokenizer.ggml."
_TOKENS, _MERGES, _TEMPLATE = f"{_PREFIX}tokens", f"{_PREFIX}merges", "tokenizer.chat_template"
# Kinds of tokens; the others are unknown, unused and byte.
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4
_SPACE = "\u2581"  # what SentencePiece writes for a space
_SPECIAL = {
    "bos_token": "bos",
    "eos_token": "eos",
    "unk_token": "unknown",
    "pad_token": "padding",
    "mask_token": "mask",
}
# Keys that are understood, besides ids of special tokens.
_KEYS = frozenset(
    f"{_PREFIX}{name}"
    for name in "model pre tokens token_type scores merges add_bos_token add_eos_token add_space_prefix add_sep_token "
    "token_type_count remove_extra_whitespaces".split()
)
_SUPPORTED = {"add_sep_token": False, "remove_extra_whitespaces": False}


@dataclasses.dataclass(frozen=True)
class _Split:
    """How text is split before merging, as the tokenizer.json of the models that a name stands for says it.

    Attributes:
        pattern: Regular expression of a piece; None for GPT-2's, which `tokenizers` has.
        digits: Whether each digit is a piece of its own before the pattern is applied.
        composed: Whether letters and their accents are made one character first (Unicode's NFC); llama.cpp leaves that out.
        whole_words: Whether a piece that is in the vocabulary is a token whatever the merges say.
        begins: Whether texts begin with BOS if the file does not say so.
    """

    pattern: str | None = None
    digits: bool = False
    composed: bool = False
    whole_words: bool = False
    begins: bool = False


_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORD, _BLANK = r"[^\r\n\p{L}\p{N}]?\p{L}+", r"\s*[\r\n]+|\s+(?!\S)|\s+"
_OTHER = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
)
_OTHER_OR_PATH = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"

_THREE_DIGITS = "|".join([_CONTRACTIONS, _WORD, r"\p{N}{1,3}", _OTHER, _BLANK])
_ONE_DIGIT = "|".join([_CONTRACTIONS, _WORD, r"\p{N}", _OTHER, _BLANK])
_GPT4O = "|".join([*(f"{cased}{_CONTRACTIONS}?" for cased in _CASED), r"\p{N}{1,3}", _OTHER_OR_PATH, _BLANK])
_TEKKEN = "|".join([*_CASED, r"\p{N}", _OTHER_OR_PATH, _BLANK])

# By the names of tokenizer.ggml.pre.
_SPLITS = (
    dict.fromkeys("default gpt-2 phi-2 mpt olmo jais".split(), _Split())
    | dict.fromkeys("smollm starcoder refact command-r codeshell exaone minerva-7b".split(), _Split(digits=True))
    | dict.fromkeys(
        "llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral lfm2".split(),
        _Split(_THREE_DIGITS, whole_words=True, begins=True),
    )
    | dict.fromkeys("dbrx smaug-bpe".split(), _Split(_THREE_DIGITS))
    | dict.fromkeys("deepseek-r1-qwen megrez stablelm2".split(), _Split(_ONE_DIGIT))
    | dict.fromkeys("gpt-4o llama4".split(), _Split(_GPT4O))
    | {"qwen2": _Split(_ONE_DIGIT, composed=True), "tekken": _Split(_TEKKEN, whole_words=True, begins=True)}
)


def has_tokenizer(file: GgufFile) -> bool:
    """Returns whether a file holds a vocabulary."""
    return _TOKENS in file.metadata


def has_chat_template(file: GgufFile) -> bool:
    """Returns whether a file holds a chat template."""
    return _TEMPLATE in file.metadata


def load_tokenizer(file: GgufFile) -> Any:
    """Returns the tokenizer of a file, as one of transformers' fast tokenizers; None if it has none.

    Raises:
        ValueError: Its algorithm, its way of splitting text or one of its flags is not supported, or it is damaged.
    """
    if not has_tokenizer(file):
        return None
    _check_keys(file)
    try:
        tokenizer, begins = _builder(file)(file)
        _add_tokens(file, tokenizer)
        _add_ends(file, tokenizer, begins)
        return _as_transformers(file, tokenizer)
    except ValueError:
        raise
    except Exception as error:  # errors of tokenizers have no base class of their own
        raise ValueError(
            f"the tokenizer of {file.path} cannot be built ({' '.join(str(error).split())[:200]}): fetch the file again"
        ) from error


def _builder(file: GgufFile) -> Callable[[GgufFile], tuple[Any, bool]]:
    builders = {"gpt2": _byte_level, "llama": _sentencepiece}
    if (model := file.metadata.get(f"{_PREFIX}model")) not in builders:
        raise ValueError(f"{file.path} has a tokenizer of type {model!r}; supported are {', '.join(builders)}")
    return builders[model]


def _byte_level(file: GgufFile) -> tuple[Any, bool]:
    """(BPE on bytes, each written as a letter, by the merges of the file; whether texts begin with BOS by default)."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    pre = file.metadata.get(f"{_PREFIX}pre")
    if pre not in _SPLITS:
        raise ValueError(
            f"{file.path} has the pre-tokenizer {pre!r}, which is not known, so text could be split wrongly; supported are "
            f"{', '.join(sorted(_SPLITS))}"
        )
    if file.metadata.get(f"{_PREFIX}add_space_prefix", False):
        raise ValueError(f"{file.path} has {_PREFIX}add_space_prefix=True, which is not supported with BPE on bytes")
    split = _SPLITS[pre]
    merges = [tuple(merge.split(" ", 1)) for merge in file.metadata.get(_MERGES, ())]
    tokenizer = Tokenizer(models.BPE(vocab=_vocabulary(file), merges=merges, ignore_merges=split.whole_words))
    if split.composed:
        tokenizer.normalizer = normalizers.NFC()
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if split.digits else []
    if split.pattern is not None:
        steps.append(pre_tokenizers.Split(Regex(split.pattern), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split.pattern is None))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return tokenizer, split.begins


def _sentencepiece(file: GgufFile) -> tuple[Any, bool]:
    """As `_byte_level`, for BPE of SentencePiece: on characters, by scores; unknown characters are written as bytes."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    vocabulary = {_spelled(token): i for token, i in _vocabulary(file).items()}
    unknown = _token(file, "unknown")
    model = models.BPE(
        vocab=vocabulary, merges=_merges(file, vocabulary), fuse_unk=True, byte_fallback=True, unk_token=unknown
    )
    tokenizer = Tokenizer(model)
    spaced = file.metadata.get(f"{_PREFIX}add_space_prefix", True)
    prefix = [normalizers.Prepend(_SPACE)] if spaced else []
    tokenizer.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", _SPACE)])
    strip = [decoders.Strip(" ", 1, 0)] if spaced else []
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer, True


def _merges(file: GgufFile, vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """The merges that scores stand for: into runs of spaces, then into the token with the highest score, in all ways."""
    scores, kinds = (file.metadata[f"{_PREFIX}{name}"].tolist() for name in ("scores", "token_type"))
    ranks = [
        (kinds[i] == _NORMAL, -scores[i] if kinds[i] == _NORMAL else 0, i, token)
        for token, i in vocabulary.items()
        if kinds[i] == _NORMAL or (kinds[i] == _USER_DEFINED and not token.strip(_SPACE))
    ]
    cuts = ((token[:at], token[at:]) for *_, token in sorted(ranks) for at in range(len(token) - 1, 0, -1))
    return [(left, right) for left, right in cuts if left in vocabulary and right in vocabulary]


def _spelled(token: str) -> str:
    """A run of spaces as SentencePiece writes it; the converter writes those that users define as spaces."""
    return _SPACE * len(token) if token and not token.strip(" ") else token


def _add_tokens(file: GgufFile, tokenizer: Any) -> None:
    """Adds what is matched in the text before it is split: control tokens, which are special, and those that users define."""
    from tokenizers import AddedToken

    tokens, kinds = file.metadata[_TOKENS], file.metadata[f"{_PREFIX}token_type"]
    strips = _strips_after_control(file)
    control = [
        AddedToken(
            token, special=True, normalized=False, rstrip=strips and token not in ("<unk>", "<s>", "<|endoftext|>")
        )
        for token, kind in zip(tokens, kinds, strict=True)
        if kind == _CONTROL
    ]
    tokenizer.add_special_tokens(control)
    defined = (token for token, kind in zip(tokens, kinds, strict=True) if kind == _USER_DEFINED)
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in defined if _spelled(token) == token])


def _strips_after_control(file: GgufFile) -> bool:
    """Whether control tokens take the blanks after them, as those of Phi-3 do; llama.cpp, too, knows them by the name."""
    name = str(file.metadata.get("general.name", "")).lower()
    return "phi-3" in name or "phi3" in name


def _add_ends(file: GgufFile, tokenizer: Any, begins: bool) -> None:
    """Makes texts begin with BOS and end with EOS where the file says so."""
    from tokenizers import processors

    first = [_token(file, "bos")] if file.metadata.get(f"{_PREFIX}add_bos_token", begins) else []
    last = [_token(file, "eos")] if file.metadata.get(f"{_PREFIX}add_eos_token", False) else []
    if None in first + last:
        raise ValueError(f"{file.path} has {_PREFIX}add_bos_token or add_eos_token, but no id for that token")
    if not first + last:
        return
    one = [*first, "$A", *last]
    two = [*one, *(f"{token}:1" for token in first), "$B:1", *(f"{token}:1" for token in last)]
    ends = {token: tokenizer.token_to_id(token) for token in first + last}
    template = processors.TemplateProcessing(single=one, pair=two, special_tokens=list(ends.items()))
    before = [] if tokenizer.post_processor is None else [tokenizer.post_processor]
    tokenizer.post_processor = processors.Sequence([*before, template])


def _as_transformers(file: GgufFile, tokenizer: Any) -> Any:
    from transformers import PreTrainedTokenizerFast

    named = {name: _token(file, own) for name, own in _SPECIAL.items()}
    given = {name: token for name, token in named.items() if token is not None}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=file.metadata.get(_TEMPLATE),
        clean_up_tokenization_spaces=False,
        **given,
    )


def _vocabulary(file: GgufFile) -> dict[str, int]:
    """{token: id}; ValueError unless there is a kind for each token and a row of the embeddings."""
    tokens, kinds = file.metadata[_TOKENS], file.metadata.get(f"{_PREFIX}token_type", ())
    rows = file.blocks["token_embd.weight"].shape[0]
    if not len(kinds) == len(tokens) <= rows:
        raise ValueError(
            f"{file.path} has {len(tokens)} tokens, {len(kinds)} kinds of tokens and {rows} rows of embeddings: fetch it again"
        )
    return {token: i for i, token in enumerate(tokens)}


def _token(file: GgufFile, name: str) -> str | None:
    """A special token by its name in the format; ValueError if its id is none of the vocabulary's."""
    i, tokens = token_id(file, name), file.metadata[_TOKENS]
    if i is not None and not 0 <= i < len(tokens):
        raise ValueError(f"{file.path} has {_PREFIX}{name}_token_id={i}, but {len(tokens)} tokens")
    return None if i is None else tokens[i]


def _check_keys(file: GgufFile) -> None:
    for name, supported in _SUPPORTED.items():
        if (found := file.metadata.get(f"{_PREFIX}{name}", supported)) != supported:
            raise ValueError(f"{file.path} has {_PREFIX}{name}={found!r}; only {supported!r} is supported")
    unknown = [
        key for key in file.metadata if key.startswith(_PREFIX) and key not in _KEYS and not key.endswith("_token_id")
    ]
    if unknown:
        raise ValueError(f"{file.path} has keys of a tokenizer that are not understood: {', '.join(sorted(unknown))}")

"""The tokenizer of a checkpoint, read by transformers or built from a GGUF file. Code of a checkpoint is never run."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from retmask_jax.hf.checkpoint_files import TOKENIZER_FILES, texts
from retmask_jax.hf.gguf import tokenizer as gguf_tokenizer
from retmask_jax.hf.gguf.file import is_gguf, open_file
from retmask_jax.utils.files import read_object

_PART, _LONGEST = "\ufffd", 6  # what stands for a part of a character, and tokens that may make up one
_TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json")


def load_tokenizer(folder: Path) -> Any:
    """Returns the tokenizer of a checkpoint, None if it has none.

    Raises:
        ValueError: The tokenizer is damaged, or needs code that comes with the checkpoint.
    """
    if is_gguf(folder):
        return gguf_tokenizer.load_tokenizer(open_file(folder))
    there = {path.name for path in texts(folder)}
    if not there & set(TOKENIZER_FILES):
        return None
    settings = folder / "tokenizer_config.json"
    needs_code = settings.name in there and "auto_map" in read_object(settings)
    try:
        return _auto_tokenizer().from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # errors of transformers and tokenizers have no base class in common
        if needs_code:
            raise ValueError(
                f"the tokenizer of {folder} needs code of its own (auto_map in {settings.name}), which is never run: "
                "save it as one of transformers' classes, with a tokenizer.json"
            ) from error
        why = " ".join(str(error).split())[:200]
        raise ValueError(
            f"the tokenizer of {folder} cannot be read ({type(error).__name__}: {why}): fetch it again"
        ) from error


def has_tokenizer(folder: Path) -> bool:
    """Returns whether a checkpoint has a tokenizer."""
    if is_gguf(folder):
        return gguf_tokenizer.has_tokenizer(open_file(folder))
    return any((folder / name).exists() for name in TOKENIZER_FILES)


def has_chat_template(folder: Path) -> bool:
    """Returns whether a checkpoint has a chat template."""
    if is_gguf(folder):
        return gguf_tokenizer.has_chat_template(open_file(folder))
    if any((folder / name).exists() for name in _TEMPLATE_FILES):
        return True
    settings = folder / "tokenizer_config.json"
    return settings.exists() and bool(read_object(settings).get("chat_template"))


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Returns the text of each token as it stands within a text: with its blanks, special tokens by their names.

    Where several tokens make up one character, the first has it and the others have no text.

    >>> tokenizer = load_tokenizer(Path("retmask_jax/assets/tiny"))
    >>> token_texts(tokenizer, tokenizer("<bos> the home of emma")["input_ids"])
    [' <bos>', ' the', ' home', ' of', ' emma']
    """
    anchor = tokenizer.encode("a", add_special_tokens=False)[-1:]  # some decoders drop the blank before a first word
    before = tokenizer.decode(anchor)

    def text(some: Sequence[int]) -> str:
        after, alone = tokenizer.decode([*anchor, *some]), tokenizer.decode(some)
        return after[len(before) :] if after.startswith(before) else alone

    alone, texts, i = {one: text([one]) for one in set(ids)}, [], 0
    while i < len(ids):
        n = 1
        whole = alone[ids[i]]
        if _PART in whole:
            joined = ((n, text(ids[i : i + n])) for n in range(2, _LONGEST + 1))
            n, whole = next(((n, found) for n, found in joined if _PART not in found), (1, whole))
        texts += [whole, *[""] * (n - 1)]
        i += n
    return texts[: len(ids)]


def _auto_tokenizer():
    """transformers' class, imported without its advice to install torch, which is not needed here."""
    quiet = "TRANSFORMERS_NO_ADVISORY_WARNINGS"
    before = os.environ.get(quiet)
    os.environ[quiet] = "1"
    try:
        from transformers import AutoTokenizer
    finally:
        if before is None:
            del os.environ[quiet]
    return AutoTokenizer

"""What ends an answer: the ids at which a model stops, and the id that ends an answer in a training row."""

import dataclasses
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from retmask_jax.hf.gguf.config import stop_ids
from retmask_jax.hf.gguf.file import is_gguf, open_file

log = logging.getLogger(__name__)

GENERATION_CONFIG = "generation_config.json"
_QUESTION, _ANSWER = "What is said here?", "These words are looked for."
_USER, _ASSISTANT = {"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _ANSWER}
# Some templates want a system turn; others refuse it.
_CONVERSATIONS = ([_USER, _ASSISTANT], [{"role": "system", "content": "Be brief."}, _USER, _ASSISTANT])


def named_stops(folder: Path, tokenizer: Any) -> dict[str, tuple[int, ...]]:
    """Returns {source: ids that end an answer} for the sources besides config.json that name any.

    The sources are generation_config.json or a GGUF file itself, the tokenizer (its EOS) and the chat template (`turn_end`).

    Raises:
        ValueError: generation_config.json cannot be read.
    """
    stops = {
        **_file_stops(Path(folder)),
        "tokenizer": (getattr(tokenizer, "eos_token_id", None),),
        "chat template": (turn_end(tokenizer),),
    }
    known = {source: tuple(i for i in ids if i is not None and i >= 0) for source, ids in stops.items()}
    return {source: ids for source, ids in known.items() if ids}


def union(*groups: Iterable[int]) -> tuple[int, ...]:
    """Returns the ids of all groups, each once, in the order of their first occurrence."""
    return tuple(dict.fromkeys(i for group in groups for i in group))


def turn_end(tokenizer: Any, template_kwargs: Mapping[str, Any] | None = None) -> int | None:
    """Returns the added token that the chat template writes after the content of an assistant turn; blanks may come
    between.

    It is looked for in a rendered conversation that ends with an assistant turn. None if there is no template, if it
    writes no such turn, and if no added token follows the content.

    >>> import retmask_jax as rm
    >>> turn_end(rm.load("bundled").tokenizer)
    2
    """
    if not getattr(tokenizer, "chat_template", None):
        return None
    for conversation in _CONVERSATIONS:
        _, found, rest = _rendered(tokenizer, conversation, template_kwargs or {}).rpartition(_ANSWER)
        if found:
            return _first_added(tokenizer, rest.lstrip(" "))
    log.info("the chat template writes no assistant turn, so it names no token that ends one")
    return None


@dataclasses.dataclass(frozen=True)
class Ends:
    """What finished answers end with in training rows: the stop id an answer was sampled with, if it is among stop_ids;
    else the id `usual`, or nothing if that is None."""

    usual: int | None
    stop_ids: tuple[int, ...] = ()

    @classmethod
    def of(
        cls, tokenizer: Any, eos_ids: Sequence[int], *, chat: bool, template_kwargs: Mapping[str, Any] | None = None
    ) -> "Ends":
        """Returns the ends of a model's rows.

        `usual` is the chat template's end of a turn if the template is used and writes one, else the tokenizer's EOS,
        else the first of the model's EOS ids.

        Args:
            eos_ids: Ids that end the model's answers.
            chat: Whether the chat template is used.
        """
        written = turn_end(tokenizer, template_kwargs) if chat else None
        usual = (written, getattr(tokenizer, "eos_token_id", None), *eos_ids)
        return cls(next((i for i in usual if i is not None), None), tuple(eos_ids))

    def after(self, record: Mapping[str, Any], side: str) -> list[int]:
        """Returns the ids after the chosen or rejected answer of a record: one id, or none if the answer was cut
        off."""
        if not record[f"{side}_finished"]:
            return []
        stop = record.get(f"{side}_stop")
        end = stop if stop in self.stop_ids else self.usual
        return [] if end is None else [end]


def _file_stops(folder: Path) -> dict[str, tuple[int, ...]]:
    if is_gguf(folder):
        return {folder.name: stop_ids(open_file(folder))}
    return {GENERATION_CONFIG: _generation_stops(folder / GENERATION_CONFIG)}


def _generation_stops(path: Path) -> tuple[int, ...]:
    """The EOS ids of generation_config.json, which may hold an id, a list of ids, or nothing."""
    if not path.exists():
        return ()
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}): fetch it again, or remove it") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path} holds a {type(settings).__name__}, not an object: fetch it again, or remove it")
    eos = settings.get("eos_token_id")
    ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if not all(type(i) is int for i in ids):
        raise ValueError(f"{path} has eos_token_id={eos!r}; it must be a token id or a list of them")
    return tuple(ids)


def _rendered(tokenizer, conversation, template_kwargs) -> str:
    """The text of a conversation, empty where the template refuses it."""
    try:
        return tokenizer.apply_chat_template(conversation, tokenize=False, **template_kwargs)
    except Exception as error:  # a template is a program, whose errors have no base class in common
        log.debug("the chat template refuses a conversation: %s", error)
        return ""


def _first_added(tokenizer, text: str) -> int | None:
    """The id of the longest added token with which a text begins."""
    added = tokenizer.added_tokens_decoder.items()
    begins = {token.content: i for i, token in added if token.content and text.startswith(token.content)}
    return begins[max(begins, key=len)] if begins else None

"""Preference pairs on disk: our records, RetMask's released form and TRL's, read into ours; written as released."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from retmask_jax.data.chat import record_id, turns
from retmask_jax.files import iter_jsonl, matching, write_jsonl

SIDES = ("chosen", "rejected")


def read_pairs(source: str | Path) -> list[dict]:
    """Every pair of the JSONL files (.gz or not) that a path or glob names, as `iter_pairs`."""
    return list(iter_pairs(source))


def iter_pairs(source: str | Path) -> Iterator[dict]:
    """Pairs {id, messages, chosen, chosen_finished, rejected, rejected_finished}, read as they are asked for.

    chosen_stop and rejected_stop, the ids that ended the answers, are there where the line has them.

    Each line is such a record; or one of RetMask's, {conversation_id, chosen, rejected} with whole conversations; or
    one of TRL's with its prompt apart, {prompt, chosen, rejected}, as texts or as turns. An answer is finished unless
    its record says otherwise. A turn's reasoning_content goes before its content, in the tags Qwen3 gives it.
    Raises ValueError naming file and line for a line that is none of these.
    """
    for path in matching(Path(source)):
        for number, stored in iter_jsonl(path):
            try:
                yield _pair(stored, f"{path.name}:{number}")
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from error


def write_released(path: str | Path, records: Iterable[dict]) -> None:
    """Write pairs as RetMask's DPO script and TRL read them: {conversation_id, chosen, rejected}, whole conversations.

    More fields say whether the answers are finished and which ids ended them, for `read_pairs`; TRL leaves them alone.
    Raises ValueError for a pair of equal answers, in which TRL would find no end of the prompt.
    """
    write_jsonl(Path(path), map(_released, records))


def _released(record: dict) -> dict:
    if record["chosen"] == record["rejected"]:
        raise ValueError(f"pair {record['id']!r} has the same answer twice: demonstrations are not pairs")
    sides = {side: [*record["messages"], {"role": "assistant", "content": record[side]}] for side in SIDES}
    finished = {f"{side}_finished": record[f"{side}_finished"] for side in SIDES}
    return {"conversation_id": record["id"]} | sides | finished | _stops(record)


def _pair(stored: Any, default_id: str) -> dict:
    if not isinstance(stored, dict) or not set(SIDES) <= set(stored):
        has = ", ".join(stored) if isinstance(stored, dict) else f"a {type(stored).__name__}"
        raise ValueError(f"a pair needs chosen and rejected; the line has {has}")
    apart = stored.get("messages", stored.get("prompt"))
    prompt, chosen = _conversation("chosen", stored["chosen"], apart)
    other_prompt, rejected = _conversation("rejected", stored["rejected"], apart)
    if prompt != other_prompt:
        raise ValueError("chosen and rejected differ before their last turn: a pair has one prompt")
    finished = {side: _flag(stored, f"{side}_finished") for side in SIDES}
    return {
        "id": record_id(stored, default_id), "messages": prompt,
        "chosen": chosen, "chosen_finished": finished["chosen"],
        "rejected": rejected, "rejected_finished": finished["rejected"],
    } | _stops(stored)  # fmt: skip


def _conversation(side: str, stored: Any, apart: Any) -> tuple[list[dict], str]:
    """(prompt, answer) of one side; apart: the prompt where it has a field of its own."""
    prompt = [] if apart is None else list(turns(apart))
    before, answer = ([], stored) if isinstance(stored, str) else _split(side, stored)
    if before and prompt and before != prompt:
        raise ValueError(f"the prompt differs from the beginning of the conversation in {side}")
    if not before and not prompt:
        raise ValueError(f"{side} holds the answer only: messages or prompt is needed beside it")
    return before or prompt, answer


def _split(side: str, stored: Any) -> tuple[list[dict], str]:
    """(turns before the answer, answer) of a conversation."""
    conversation = list(turns(stored)) if isinstance(stored, list) else []
    if not conversation or conversation[-1]["role"] != "assistant":
        raise ValueError(f"{side} is no text and no conversation that ends with an assistant turn")
    answer = conversation[-1]["content"]
    if reasoning := stored[-1].get("reasoning_content"):
        answer = "<think>\n{}\n</think>\n\n{}".format(str(reasoning).strip("\n"), answer.lstrip("\n"))
    return conversation[:-1], answer


def _stops(stored: dict) -> dict[str, int]:
    """The ids that ended the answers, where the record has them."""
    stops = {name: stored[name] for name in (f"{side}_stop" for side in SIDES) if stored.get(name) is not None}
    for name, value in stops.items():
        if type(value) is not int or value < 0:
            raise ValueError(f"{name} is {value!r}, not a token id")
    return stops


def _flag(stored: dict, name: str) -> bool:
    value = stored.get(name, True)
    if not isinstance(value, bool):
        raise ValueError(f"{name} is {value!r}, not true or false")
    return value

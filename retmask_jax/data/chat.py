"""Conversations, lists of {"role", "content"}, from the forms in which they are stored."""

from collections.abc import Iterator
from typing import Any

ROLES = ("system", "user", "assistant")


def turns(stored: Any) -> Iterator[dict[str, str]]:
    """The turns of a stored conversation, checked as they are asked for.

    A text is one user turn; a list holds turns; a mapping of two lists, roles and contents, is TFDS's form of one.
    Text may come as bytes. Raises ValueError where a turn is none.
    """
    stored = as_text(stored)
    if isinstance(stored, str):
        stored = [{"role": "user", "content": stored}]
    elif isinstance(stored, dict) and isinstance(stored.get("role"), list) and isinstance(stored.get("content"), list):
        pairs = zip(stored["role"], stored["content"], strict=True)
        stored = [{"role": role, "content": content} for role, content in pairs]
    if not isinstance(stored, list):
        fields = f" with {', '.join(stored)}" if isinstance(stored, dict) else ""
        raise ValueError(f"a {type(stored).__name__}{fields} is no text and no list of turns")
    for number, turn in enumerate(stored, 1):
        yield _turn(turn, number)


def record_id(stored: dict, default: str) -> str:
    """What a record is called: its id or conversation_id, else the default."""
    own = next((stored[name] for name in ("id", "conversation_id") if stored.get(name) is not None), default)
    return str(as_text(own))


def as_text(value: Any) -> Any:
    """Bytes as the text they are, anything else as it is."""
    return value.decode() if isinstance(value, bytes) else value


def _turn(turn: Any, number: int) -> dict[str, str]:
    if not isinstance(turn, dict) or "role" not in turn or "content" not in turn:
        raise ValueError(f"turn {number} of the conversation is not {{role, content}}")
    role, content = as_text(turn["role"]), as_text(turn["content"])
    if role not in ROLES:
        raise ValueError(f"turn {number} of the conversation has the role {role!r}; roles are {', '.join(ROLES)}")
    if not isinstance(content, str):
        raise ValueError(f"turn {number} of the conversation has no text as its content but {content!r}")
    # Of the constants, so that a file of many turns holds each name once.
    return {"role": ROLES[ROLES.index(role)], "content": content}

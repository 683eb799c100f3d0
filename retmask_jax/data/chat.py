"""Conversations, lists of turns {"role", "content"}, read from the forms in which others store them."""

from collections.abc import Iterator
from typing import Any

ROLES = ("system", "user", "assistant")


def turns(stored: Any) -> Iterator[dict[str, str]]:
    """Yields the turns of a stored conversation, each checked when it is yielded.

    Args:
        stored: A text, which is one user turn; a list of turns; or a mapping of two lists, roles and contents, as TFDS
            stores a list of turns. Texts may be bytes.

    Raises:
        ValueError: A turn is not {role, content} with a known role and a text.
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
    """Returns the id or conversation_id of a record, else the default."""
    own = next((stored[name] for name in ("id", "conversation_id") if stored.get(name) is not None), default)
    return str(as_text(own))


def as_text(value: Any) -> Any:
    """Returns bytes as text, and anything else unchanged."""
    return value.decode() if isinstance(value, bytes) else value


def _turn(turn: Any, number: int) -> dict[str, str]:
    if not isinstance(turn, dict) or "role" not in turn or "content" not in turn:
        raise ValueError(f"turn {number} of the conversation is not {{role, content}}")
    role, content = as_text(turn["role"]), as_text(turn["content"])
    if role not in ROLES:
        raise ValueError(f"turn {number} of the conversation has the role {role!r}; roles are {', '.join(ROLES)}")
    if not isinstance(content, str):
        raise ValueError(f"turn {number} of the conversation has no text as its content but {content!r}")
    # The constant instead of the text that was read: all turns of a large file then share it.
    return {"role": ROLES[ROLES.index(role)], "content": content}

"""API keys of servers, and what is kept out of messages: passwords in addresses, and keys that a server repeats."""

import re

_LEAST = 4  # characters of a key; what is shorter is no secret, and would be masked in ordinary words


def clean_key(text: str, name: str) -> str:
    """A key without the blanks and line ends around it; "" where nothing is left.

    Args:
        text: As it was given.
        name: Where it was given, such as "OPENAI_API_KEY".

    Raises:
        ValueError: No HTTP header can carry the key. The message does not show it.
    """
    key = text.strip()
    for place, char in enumerate(key, 1):
        if not is_key(char):
            raise ValueError(
                f"{name} has {_kind(char)} at place {place} of {len(key)}, which no key has: copy it again, from one line"
            )
    return key


def is_key(text: str) -> bool:
    """Returns whether a text can be sent as a key: visible ASCII characters only, and at least one."""
    return re.fullmatch("[!-~]+", text) is not None


def without_secrets(text: str, *keys: str | None) -> str:
    """A text for a message, with users and passwords in addresses, and these keys, shown as ***.

    >>> without_secrets("http://me:secret@host/v1 says: no key abcd1234", "abcd1234")
    'http://***@host/v1 says: no key ***'
    """
    for key in keys:
        if key and len(key) >= _LEAST:
            text = text.replace(key, "***")
    return re.sub(r"(:?//|:/)[^\s'\"<>]*@", r"\1***@", text)  # one slash: an address with a slip in it


def has_password(url: str) -> bool:
    """Whether an address has a user or a password before the host."""
    host, _, _ = url.partition("//")[2].replace("?", "/").replace("#", "/").partition("/")
    return "@" in host


def _kind(char: str) -> str:
    """What a character that no key has is called in a message."""
    if char in "\r\n":
        return "a line end"
    if char.isspace():
        return "a blank"
    return "a control character" if char < "\xa0" else "a character beyond ASCII"

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
        if not (" " <= char <= "~" or "\xa0" <= char <= "\xff"):
            what = (
                "a line end"
                if char in "\r\n"
                else "a control character"
                if char < "\xa0"
                else "a character beyond Latin-1"
            )
            raise ValueError(
                f"{name} has {what} at place {place} of {len(key)}, which no key has: copy it again, from one line"
            )
    return key


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

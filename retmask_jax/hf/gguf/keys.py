"""The metadata that a GGUF file has for its architecture, handed out key by key, so that none goes unread."""

from typing import Any

import numpy as np

from retmask_jax.hf.gguf.file import GgufFile


class Keys:
    """Hands out the values of an architecture's keys, which are named without it, and remembers which were asked for."""

    def __init__(self, file: GgufFile):
        self.file = file
        self._prefix = f"{file.architecture}."
        self._seen: set[str] = set()

    def get(self, name: str, default: Any = ...) -> Any:
        """Returns a value, or the default where the key is absent; ValueError if there is no default.

        Floats are returned as the shortest decimal number that means them: 1e-06 instead of 9.999999974752427e-07.
        """
        key = self._prefix + name
        self._seen.add(key)
        if key in self.file.metadata:
            value = self.file.metadata[key]
            return decimal(value) if isinstance(value, float) else value
        if default is ...:
            raise ValueError(f"{self.file.path} has no {key}, which a model of this architecture needs")
        return default

    def size(self, name: str, default: Any = ...) -> Any:
        """Returns a value as `get` does; ValueError unless it is a whole number of at least 1."""
        value = self.get(name, default)
        if value is not default and (type(value) is not int or value < 1):
            raise ValueError(
                f"{self.file.path} has {self._prefix}{name}={value!r}; it must be a whole number of at least 1"
            )
        return value

    def number(self, name: str, default: Any = ...) -> Any:
        """Returns a value as `get` does; ValueError unless it is a number."""
        value = self.get(name, default)
        if value is not default and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise ValueError(f"{self.file.path} has {self._prefix}{name}={value!r}; it must be a number")
        return value

    def expect(self, name: str, supported: Any) -> None:
        """Raises ValueError unless a value is the only one that is supported, or absent."""
        if (found := self.get(name, supported)) != supported:
            raise ValueError(f"{self.file.path} has {self._prefix}{name}={found!r}; only {supported!r} is supported")

    def finish(self) -> None:
        """Raises ValueError for keys of the architecture that were not asked for."""
        metadata = self.file.metadata
        if unknown := sorted(key for key in metadata if key.startswith(self._prefix) and key not in self._seen):
            shown = ", ".join(f"{key}={metadata[key]!r}" for key in unknown)
            raise ValueError(f"{self.file.path} has keys that are not understood, so the model could be wrong: {shown}")


def decimal(value: float) -> float:
    """Returns the shortest decimal number that is the same as a float32."""
    return float(str(np.float32(value)))

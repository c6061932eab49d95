"""Reading parsed JSON field by field, with errors that name the file and the field."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from moesim.errors import FormatError

REMEDY = "write the file again with the moesim command that made it"


class Fields:
    """An object of a run file. Every accessor raises FormatError when what is there is something
    else; with a default, what is missing or null is the default."""

    __slots__ = ("_path", "_where", "raw")

    def __init__(self, raw: Any, where: str, path: str = "") -> None:
        if not isinstance(raw, dict):
            raise FormatError(f"{where}: {path or 'the whole'} must be an object", REMEDY)
        self.raw: dict[str, Any] = raw
        self._where = where
        self._path = path

    def _name(self, key: str) -> str:
        return f"{self._path}.{key}" if self._path else key

    def bad(self, key: str, wanted: str) -> FormatError:
        return FormatError(f"{self._where}: {self._name(key)} must be {wanted}", REMEDY)

    def has(self, key: str) -> bool:
        return self.raw.get(key) is not None

    def need(self, *keys: str) -> None:
        """Raise FormatError for a key that is missing; null is there."""
        for key in keys:
            if key not in self.raw:
                raise self.bad(key, "there")

    def need_lists(self, *keys: str) -> None:
        """Raise FormatError for a key that is missing, or no list."""
        for key in keys:
            if not isinstance(self.raw.get(key), list):
                raise self.bad(key, "a list")

    def child(self, key: str) -> Fields:
        return Fields(self.raw.get(key), self._where, self._name(key))

    def maybe(self, key: str) -> Fields | None:
        return self.child(key) if self.has(key) else None

    def members(self) -> Iterator[tuple[str, Fields]]:
        """Every (key, object) of an object of objects."""
        for key in self.raw:
            yield key, self.child(key)

    def children(self, key: str) -> list[Fields]:
        """A list of objects; empty where missing."""
        items = self.values(key)
        return [Fields(x, self._where, f"{self._name(key)}[{i}]") for i, x in enumerate(items)]

    def values(self, key: str) -> list[Any]:
        value = self.raw.get(key)
        if value is None:
            return []
        if not isinstance(value, list):
            raise self.bad(key, "a list")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        value = self.raw.get(key, default)
        value = default if value is None else value
        if not isinstance(value, str):
            raise self.bad(key, "text")
        return printable(value)

    def texts(self, key: str) -> list[str]:
        values = self.values(key)
        if not all(isinstance(x, str) for x in values):
            raise self.bad(key, "a list of texts")
        return [printable(x) for x in values]

    def number(self, key: str, default: float | None = None) -> float:
        value = self.raw.get(key)
        value = default if value is None else value
        if not is_number(value):
            raise self.bad(key, "a finite number")
        return float(value)  # type: ignore[arg-type]

    def whole(self, key: str, default: int | None = None) -> int:
        value = self.number(key, default)
        if value != int(value):
            raise self.bad(key, "a whole number")
        return int(value)

    def numbers(self, key: str) -> list[float]:
        """A list of numbers; empty where missing."""
        values = self.values(key)
        if not all(is_number(x) for x in values):
            raise self.bad(key, "a list of finite numbers")
        return [float(x) for x in values]

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.raw.get(key, default)
        if not isinstance(value, bool):
            raise self.bad(key, "true or false")
        return value


def is_number(value: Any) -> bool:
    return (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and abs(value) < 1e300
        and math.isfinite(value)
    )


def printable(text: str) -> str:
    """`text` without control characters and line breaks, at most 2,000 characters."""
    return "".join(ch if ch.isprintable() else " " for ch in text[:2000])

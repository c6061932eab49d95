"""Numbers in text, read the same in options, specifications and files: ASCII digits, finite."""

from __future__ import annotations

import math
import re

_NUMBER = re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?")
_WHOLE = re.compile(r"[-+]?[0-9]{1,30}")


def number(text: str) -> float:
    """Raises ValueError for what is none: also `1_0`, digits of other scripts, NaN, infinity and
    what overflows to it, all of which float() takes."""
    found = float(text) if _NUMBER.fullmatch(text.strip()) else math.nan
    if not math.isfinite(found):
        raise ValueError(text)
    return found


def whole(text: str) -> int:
    """Raises ValueError for what is no whole number, likewise."""
    if not _WHOLE.fullmatch(text.strip()):
        raise ValueError(text)
    return int(text)


def is_index(text: str) -> bool:
    """Whether these are ASCII digits alone."""
    return text.isascii() and text.isdecimal()

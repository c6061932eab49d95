"""Errors that a user can act on.

Every error carries one line of cause and one line of remedy; the command line prints the two and
exits with `exit_code`. Nothing here imports anything heavier than difflib.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


class MoesimError(Exception):
    """Base class: `cause` says what went wrong, `remedy` what to do about it."""

    exit_code = 2

    def __init__(self, cause: str, remedy: str = "") -> None:
        self.cause = _one_line(cause)
        self.remedy = _one_line(remedy)
        super().__init__(f"{self.cause}\n{self.remedy}" if self.remedy else self.cause)

    def __reduce__(self) -> tuple[Any, ...]:
        """Survive the way back from a worker process, whatever the constructor takes."""
        return _restore, (type(self), self.args, self.__dict__)


class InputError(MoesimError):
    """A file, option or argument that cannot be used as it is."""


class FormatError(InputError):
    """A file whose content is not what its format demands."""


class MismatchError(InputError):
    """Two inputs that are each valid but do not belong together."""


class InfeasibleError(MoesimError):
    """A well-posed question whose answer is no: no plan exists. A verdict, not bad input."""

    exit_code = 1


class UnknownNameError(InputError):
    """A name that is not in a list of known ones; the nearest known name is proposed."""

    def __init__(self, kind: str, name: str, known: Iterable[str], remedy: str = "") -> None:
        names = sorted(known)
        near = [known for known in names if name and known.startswith(name.lower())][:1]
        near = near or difflib.get_close_matches(name, names, n=1, cutoff=0.4)
        listing = ", ".join(names) if len(names) <= 16 else ", ".join(names[:16]) + ", ..."
        hint = f"did you mean {near[0]!r}? " if near else ""
        super().__init__(
            f"unknown {kind} {name!r}",
            remedy or f"{hint}known: {listing}",
        )
        self.name = name
        self.nearest = near[0] if near else None


def _restore(kind: type[MoesimError], args: tuple[Any, ...], state: dict[str, Any]) -> MoesimError:
    error = kind.__new__(kind, *args)
    error.__dict__.update(state)
    return error


def plain(text: object, length: int = 80) -> str:
    """A name out of a file, fit for a terminal: one line, no control characters or lone surrogates,
    not too long. Every such name goes through here on its way to a terminal."""
    return _one_line(str(text))[:length]


def plain_lines(text: str) -> str:
    """Text of several lines with names out of files in it, fit for a terminal: as it is, but
    without control characters (escapes, bells, lone surrogates)."""
    return "".join(ch for ch in text if ch.isprintable() or ch == "\n")


def _one_line(text: str) -> str:
    """Fold line breaks and drop control characters, so that hostile names cannot forge lines."""
    folded = " ".join(str(text).split())
    return "".join(ch for ch in folded if ch.isprintable())

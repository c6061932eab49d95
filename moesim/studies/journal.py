"""The journal of a study: every finished point on a line of its own, on disk before the next.

A line is JSON with a checksum. A process that dies while writing leaves at most one torn line at
the end, which is cut off when the journal is opened again; a damaged line elsewhere costs its point
alone. One process at a time writes a journal.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from moesim.errors import FormatError, InputError
from moesim.studies.evaluator import Outcome

FORMAT = "moesim-study-journal"
VERSION = 2
MAX_LINE_BYTES = 1 << 20


class StudyJournal:
    """A journal opened for reading and appending; use it as a context manager.

    `outcomes`: finished points by key. `studies`: the study hashes it was opened for so far.
    `num_damaged`: lines that could not be read.
    """

    def __init__(self, path: Path, study: str) -> None:
        self.path = path
        self.outcomes: dict[str, Outcome] = {}
        self.studies: list[str] = []
        self.num_damaged = 0
        self._study = study
        self._new = False
        self._file: BinaryIO | None = None

    def __enter__(self) -> StudyJournal:
        """Raises InputError where the file cannot be written or another process writes it,
        FormatError where it is not a journal."""
        try:
            self._new = not self.path.exists()
            handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise InputError(
                f"cannot write the journal {self.path}: {error.strerror}",
                "name a place that you can write to with `journal`",
            ) from None
        self._file = os.fdopen(handle, "r+b", buffering=0)
        try:
            self._lock()
            self._read()
            if self._new:
                _sync_folder(self.path.resolve().parent)
            if self._study not in self.studies:
                self._append({"format": FORMAT, "version": VERSION, "study": self._study})
        except BaseException:
            self._file.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close it; a new one that holds no point is removed."""
        if self._file is not None:
            if self._new and not self.outcomes:
                self.path.unlink(missing_ok=True)
            self._file.close()

    def add(self, outcome: Outcome) -> None:
        """Append a finished point; it is on the disk when this returns."""
        if outcome.key in self.outcomes:
            return
        self._append({"point": outcome_json(outcome)})
        self.outcomes[outcome.key] = outcome

    def _lock(self) -> None:
        try:
            import fcntl
        except ImportError:  # no such locks on this system
            return
        assert self._file is not None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(
                f"another process is writing {self.path}",
                "wait for it, or give this study a journal of its own with `journal`",
            ) from None

    def _read(self) -> None:
        assert self._file is not None
        end, first = 0, True
        for line in self._file_lines():
            if not line.endswith(b"\n"):
                break
            end += len(line)
            content = _parse(line)
            if first and (content is None or content.get("format") != FORMAT):
                raise FormatError(
                    f"{self.path} is not the journal of a study",
                    "name another file with `journal`; this one is left as it is",
                )
            if first and content is not None and content.get("version") != VERSION:
                raise FormatError(
                    f"{self.path} is of journal version {content.get('version')!r:.20}, this moesim"
                    f" writes {VERSION}",
                    "name another file with `journal`",
                )
            first = False
            outcome = _outcome(content) if content is not None else None
            if outcome is not None:
                self.outcomes[outcome.key] = outcome
            elif content is not None and isinstance(content.get("study"), str):
                self.studies.append(content["study"])
            else:
                self.num_damaged += 1
        self._file.truncate(end)
        self._file.seek(end)

    def _file_lines(self) -> Any:
        assert self._file is not None
        self._file.seek(0)
        reader = os.fdopen(os.dup(self._file.fileno()), "rb")
        with reader:
            while line := reader.readline(MAX_LINE_BYTES):
                yield line

    def _append(self, content: Mapping[str, Any]) -> None:
        assert self._file is not None
        text = json.dumps(content, separators=(",", ":"), allow_nan=False)
        sealed = {**content, "sum": zlib.crc32(text.encode())}
        data = (json.dumps(sealed, separators=(",", ":"), allow_nan=False) + "\n").encode()
        try:
            written = 0
            while written < len(data):
                written += self._file.write(data[written:])
            os.fsync(self._file.fileno())
        except OSError as error:
            raise InputError(
                f"cannot write the journal {self.path}: {error.strerror}",
                "make room and run this again: finished points are kept",
            ) from None


def outcome_json(outcome: Outcome) -> dict[str, Any]:
    """An outcome as plain values; what is empty is left out."""
    raw = {name: getattr(outcome, name) for name in Outcome.__dataclass_fields__}
    raw["notes"] = list(outcome.notes)
    always = ("key", "params", "status", "figures")
    return {k: v for k, v in raw.items() if k in always or v}


def _parse(line: bytes) -> dict[str, Any] | None:
    """The content of a line, None where it does not match its checksum."""
    try:
        content = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(content, dict):
        return None
    found = content.pop("sum", None)
    try:
        text = json.dumps(content, separators=(",", ":"), allow_nan=False)
    except ValueError:
        return None
    return content if zlib.crc32(text.encode()) == found else None


def _outcome(content: Mapping[str, Any]) -> Outcome | None:
    point = content.get("point")
    if not isinstance(point, dict):
        return None
    try:
        return Outcome(**{**point, "notes": tuple(point.get("notes", ()))})
    except TypeError:
        return None


def _sync_folder(folder: Path) -> None:
    """Make the directory entry of a new file durable, where the system can."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)

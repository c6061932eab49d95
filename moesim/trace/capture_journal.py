"""The journal of a capture: one file for each finished batch, so that a stopped run can go on."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from moesim.errors import FormatError, InputError, MismatchError
from moesim.files import atomic_path, atomic_write
from moesim.trace.format import TraceMeta
from moesim.trace.npyio import read_archive
from moesim.trace.writer import TraceWriter, id_dtype
from moesim.types import Array

JOURNAL_NAME = "journal.json"


class Journal:
    """Batches of a capture in `<out>.partial`, from 0 without gaps.

    `inputs` says everything that the result depends on; a journal of other inputs is refused.
    `num_found` batches were there when it was opened. Raises MismatchError, InputError.
    """

    def __init__(self, out: str | os.PathLike[str], inputs: Mapping[str, Any]) -> None:
        target = Path(out)
        self.folder = target.with_name(f"{target.name}.partial")
        self._wanted = json.dumps(dict(inputs), sort_keys=True, indent=1)
        file = self.folder / JOURNAL_NAME
        try:
            self.folder.mkdir(exist_ok=True)
            found = file.read_text(encoding="utf-8") if file.exists() else None
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(
                f"cannot use {self.folder}: {error}", "name an `out` in a folder that you can write"
            ) from None
        if found is None:
            atomic_write(file, self._wanted)
        elif found != self._wanted:
            raise MismatchError(
                f"{self.folder} is the journal of another capture: {_difference(found, inputs)}",
                "run that capture again to finish it, or delete the folder",
            )
        self.num_found = 0
        while self._piece(self.num_found).exists():
            self.num_found += 1

    def add(self, batch_idx: int, arrays: Mapping[str, Array]) -> None:
        """Note down a finished batch, whole or not at all."""
        with atomic_path(self._piece(batch_idx)) as temporary, temporary.open("wb") as out:
            np.savez(out, allow_pickle=False, **arrays)

    @contextmanager
    def kept_if_begun(self) -> Iterator[None]:
        """Delete the journal when the block fails before there is a batch in it."""
        try:
            yield
        except BaseException:
            if not self._piece(0).exists():
                self.discard()
            raise

    def read(self, batch_idx: int) -> dict[str, Array]:
        """The arrays of a batch. Raises InputError when its file is damaged."""
        path = self._piece(batch_idx)
        try:
            return read_archive(path)
        except FormatError as error:
            remedy = f"delete {self.folder} and capture again"
            raise InputError(f"damaged: {error.cause}", remedy) from None

    def write_trace(self, out: str | os.PathLike[str], meta: TraceMeta, num_batches: int) -> None:
        """Write the batches as one trace, batch by batch, in the journal's folder, and move it to
        `out`: a run that is killed on the way leaves nothing outside that folder.

        Pieces hold `expert_ids` as int16; the trace has the smallest type that holds them.
        """
        target = Path(out)
        made = self.folder / target.name
        _remove(made)
        first = self.read(0)
        ragged = any((self.read(i)["expert_ids"] < 0).any() for i in range(num_batches))
        dtypes = {name: array.dtype.name for name, array in first.items()}
        dtypes["expert_ids"] = id_dtype(meta.num_experts, bool(ragged))
        listed = first["candidate_ids"].shape[2] if "candidate_ids" in first else 0
        if listed:
            dtypes["candidate_ids"] = id_dtype(
                meta.num_experts,
                any((self.read(i)["candidate_ids"] < 0).any() for i in range(num_batches)),
            )
        with TraceWriter(made, meta, dtypes, num_candidates=listed) as writer:
            for batch_idx in range(num_batches):
                writer.append(**self.read(batch_idx))
        try:
            made.replace(target)
        except OSError as error:
            raise InputError(
                f"cannot write {target}: {error.strerror}", "name a place that you can write to"
            ) from None

    def discard(self) -> None:
        """Delete the journal."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _piece(self, batch_idx: int) -> Path:
        return self.folder / f"{batch_idx:07d}.npz"


def _remove(path: Path) -> None:
    """Delete a file or folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _difference(found: str, inputs: Mapping[str, Any]) -> str:
    try:
        other = json.loads(found)
        names = [n for n in {**other, **inputs} if other.get(n) != inputs.get(n)]
    except (ValueError, AttributeError, TypeError):
        return "its journal.json is damaged"
    return f"it differs in {', '.join(names[:3])}"

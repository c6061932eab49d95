"""Streaming writer: appends tokens to a trace that never has to fit in memory."""

from __future__ import annotations

import os
import shutil
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import IO

import numpy as np

from moesim.errors import FormatError, InputError
from moesim.files import atomic_directory, atomic_path, atomic_write
from moesim.trace import candidates
from moesim.trace.checks import GATE_DTYPES, ID_DTYPES, REQUIRED_ARRAYS, TOKEN_DTYPES
from moesim.trace.format import Trace, TraceMeta
from moesim.types import Array

_HEADER_BYTES = 256
_COPY_BYTES = 1 << 20


def id_dtype(num_experts: int, ragged: bool = False) -> str:
    """The smallest type of the format for expert ids; `ragged` traces need -1, so a signed one."""
    if ragged:
        return "int16"
    return "uint8" if num_experts <= 256 else "uint16"


class TraceWriter:
    """Write a trace piece by piece, as a directory or, when the path ends in `.npz`, as that.

    ```
    with TraceWriter(path, meta, {"expert_ids": "uint8", "domain_ids": "int16"}) as out:
        out.append(expert_ids=..., request_ids=..., positions=..., phases=..., domain_ids=...)
    ```

    Memory is one piece. The pieces go to a hidden directory beside `path`, which is renamed (or
    packed into the `.npz`) when the `with` block ends well, and removed when it does not.

    dtypes: the types of the arrays with an axis of layers (`expert_ids` is one) and of the optional
    arrays to be written; `request_ids`, `positions` and `phases` are always written, and arrays
    without layers have one type only. num_candidates: M, where there are candidates.

    Raises InputError when `path` exists as a directory or cannot be written, FormatError when a
    piece is not of the announced arrays, shapes and types.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        meta: TraceMeta,
        dtypes: Mapping[str, str],
        num_candidates: int = 0,
    ) -> None:
        self._target = Path(path)
        self._meta = meta
        self._num_candidates = num_candidates
        names = (*candidates.LAYER_ARRAYS, *TOKEN_DTYPES)
        unknown = sorted(set(dtypes) - set(names))
        if unknown or "expert_ids" not in dtypes:
            raise FormatError(
                f"no array called {unknown[0]} in a trace" if unknown else "expert_ids are missing",
                f"the arrays are {', '.join(names)}",
            )
        self._dtypes = {
            name: np.dtype(TOKEN_DTYPES.get(name) or dtypes[name])
            for name in names
            if name in dtypes or name in REQUIRED_ARRAYS
        }
        for name, allowed in (
            ("expert_ids", ID_DTYPES),
            ("gate_weights", GATE_DTYPES),
            ("candidate_ids", ID_DTYPES),
            ("candidate_scores", candidates.SCORE_DTYPES),
        ):
            if name in self._dtypes and self._dtypes[name].name not in allowed:
                raise FormatError(
                    f"{name} cannot be {self._dtypes[name]}", f"use {' or '.join(allowed)}"
                )
        self._num_tokens = 0
        self._files: dict[str, IO[bytes]] = {}
        self._stack = ExitStack()
        self._folder = self._stack.enter_context(
            _packed(self._target, meta)
            if self._target.suffix == ".npz"
            else atomic_directory(self._target)
        )
        try:
            for name in self._dtypes:
                self._files[name] = (self._folder / f"{name}.npy").open("wb")
                self._files[name].write(self._header(name))
        except OSError as error:
            self.discard()
            raise self._cannot_write(error) from None

    @classmethod
    def like(
        cls, path: str | os.PathLike[str], trace: Trace, meta: TraceMeta | None = None
    ) -> TraceWriter:
        """A writer for the arrays that `trace` has."""
        dtypes = {name: array.dtype.name for name, array in trace.arrays().items()}
        return cls(path, trace.meta if meta is None else meta, dtypes, trace.num_candidates)

    @property
    def num_tokens(self) -> int:
        return self._num_tokens

    def append(self, **arrays: Array) -> None:
        """Append tokens: one array for each announced name, all of the same length."""
        if set(arrays) != set(self._dtypes):
            odd = sorted(set(arrays) ^ set(self._dtypes))[0]
            raise FormatError(
                f"array {odd} is {'missing' if odd in self._dtypes else 'not announced'}",
                f"append {', '.join(self._dtypes)} together",
            )
        num_tokens = len(arrays["expert_ids"])
        pieces = {n: self._checked(n, arrays[n], num_tokens) for n in self._dtypes}
        try:
            for name, piece in pieces.items():
                self._files[name].write(piece.data)
        except OSError as error:
            raise self._cannot_write(error) from None
        self._num_tokens += num_tokens

    def close(self) -> None:
        """Finish the files and move the trace to its place."""
        try:
            for name, file in self._files.items():
                file.seek(0)
                file.write(self._header(name))
                file.close()
            atomic_write(self._folder / "meta.json", self._meta.to_json())
        except OSError as error:
            self.discard()
            raise self._cannot_write(error) from None
        self._files = {}
        self._stack.close()

    def discard(self) -> None:
        """Drop what was written and not yet moved to its place."""
        for file in self._files.values():
            with suppress(OSError):  # what is buffered cannot be written, and is not wanted
                file.close()
        self._files = {}
        self._stack.__exit__(_DiscardError, _DiscardError(), None)

    def __enter__(self) -> TraceWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.discard()

    def _shape(self, name: str, num_tokens: int) -> tuple[int, ...]:
        if name in candidates.LAYER_ARRAYS:
            last = self._num_candidates if name in candidates.NAMES else self._meta.top_k
            return (num_tokens, self._meta.num_layers, last)
        return (num_tokens,)

    def _header(self, name: str) -> bytes:
        """The .npy header for the tokens so far, padded to a fixed size so that it can be
        written again at the end."""
        shape = self._shape(name, self._num_tokens)
        text = (
            f"{{'descr': {self._dtypes[name].str!r}, 'fortran_order': False, 'shape': {shape}, }}"
        )
        start = np.lib.format.magic(1, 0)
        length = _HEADER_BYTES - len(start) - 2
        return start + length.to_bytes(2, "little") + text.ljust(length - 1).encode() + b"\n"

    def _checked(self, name: str, array: Array, num_tokens: int) -> Array:
        given, wanted = np.asarray(array), self._dtypes[name]
        shape = self._shape(name, num_tokens)
        if given.shape != shape:
            raise FormatError(f"{name} has shape {given.shape}, wanted {shape}", "reshape it")
        cast = np.ascontiguousarray(given, dtype=wanted)
        if wanted.kind in "iu" and given.dtype != wanted and not np.array_equal(cast, given):
            raise FormatError(
                f"{name} has values that {wanted} cannot hold", "announce a wider type"
            )
        return cast

    def _cannot_write(self, error: OSError) -> InputError:
        return InputError(
            f"cannot write {self._target}: {error.strerror}", "name a place with room to write"
        )


class _DiscardError(Exception):
    """Tells the temporary directory that what it holds is not wanted."""


@contextmanager
def _packed(target: Path, meta: TraceMeta) -> Iterator[Path]:
    """A temporary directory whose .npy files are zipped into `target` if the block succeeds, as
    numpy's savez does, but block by block."""
    if target.is_dir():
        raise InputError(f"{target} is a directory", "name an .npz file")
    try:
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.stem[:40]}-") as name:
            yield Path(name)
            with (
                atomic_path(target) as temporary,
                zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive,
            ):
                with archive.open(_member("meta"), "w") as out:
                    np.lib.format.write_array(out, np.array(meta.to_json()), allow_pickle=False)
                for file in sorted(Path(name).glob("*.npy")):
                    with (
                        file.open("rb") as source,
                        archive.open(_member(file.stem), "w", force_zip64=True) as out,
                    ):
                        shutil.copyfileobj(source, out, _COPY_BYTES)
    except _DiscardError:
        pass
    except OSError as error:
        raise InputError(
            f"cannot write {target}: {error.strerror}", "name a place that you can write to"
        ) from None


def _member(name: str) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(f"{name}.npy")
    info.compress_type = zipfile.ZIP_DEFLATED
    return info

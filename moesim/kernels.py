"""The decorator of every compiled function: numba's njit, with a cache that sees edits elsewhere.

numba renews a function's compiled code on disk when the function's own file changes, but not when
another file does whose functions and constants it holds, and fails to read a cache that names a
class which is gone. Here a module's compiled code lies in a folder `moesim-<digest>`, whose digest
is that of its source and of every moesim module that it imports at its top level, directly or
through others. Imports in functions or under `if` do not count, so whatever a kernel holds,
and every NamedTuple that it takes, must come in by the others.

The folder is made in NUMBA_CACHE_DIR if that is set, in `__pycache__` beside this file, or in
numba's cache of the user: the first that can be written. Where none can, or without sources,
nothing is kept. Whoever makes a folder removes those that no process has opened for 30 days; one
that still works with such a folder compiles again.
"""

from __future__ import annotations

import hashlib
import inspect
import os
import re
import shutil
import threading
import time
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

try:
    from numba import config, njit
    from numba.misc.appdirs import AppDirs
except ModuleNotFoundError:
    config = None

PACKAGE = Path(__file__).parent
PREFIX = "moesim-"
UNUSED_SECONDS = 30 * 86400
IMPORT = re.compile(r"^(?:from (moesim\b[\w.]*) import (\([^)]*\)|.*)|import (moesim\b.*))", re.M)

_decorating = threading.Lock()


def kernel(function: Any = None, /, *, allocates: bool = True, **options: Any) -> Any:
    """Compile without the GIL and keep the code on disk; `options` are others of numba.njit.

    allocates: False for a function that makes no array. Numba then counts no references to its
    arguments, which for a NamedTuple of arrays costs more than a small function does itself. A
    function that makes one all the same does not compile. Without numba, in the container of a
    serving engine, functions stay Python.
    """
    if not allocates:
        options["_nrt"] = False
    if function is None:
        return lambda function: _compiled(function, options)
    return _compiled(function, options)


@cache
def digest(file: Path) -> str:
    """Digest of a source file and of the moesim files that it imports, directly or not."""
    found = {file}
    pending = [file]
    while pending:
        new = _read(pending.pop())[1] - found
        found |= new
        pending.extend(new)
    total = hashlib.sha256()
    for path in sorted(found):
        total.update(os.fsencode(path) + b"\0" + _read(path)[0])
    return total.hexdigest()[:16]


def imported(source: str) -> set[Path]:
    """The moesim files that a source imports by statements at the start of a line."""
    files = set()
    for package, members, modules in IMPORT.findall(source):
        if package:
            files |= _files(package)
            if _path(package).is_dir():
                files.update(*(_files(f"{package}.{name}") for name in re.findall(r"\w+", members)))
        else:
            files.update(*(_files(name) for name in re.findall(r"moesim[\w.]*", modules)))
    return files


def _compiled(function: Any, options: dict[str, Any]) -> Any:
    if config is None or config.DISABLE_JIT:
        return function
    with _decorating, suppress(OSError):
        name = PREFIX + digest(Path(inspect.getfile(function)))
        places = [Path(config.CACHE_DIR)] if config.CACHE_DIR else []
        user = AppDirs(appname="numba", appauthor=False).user_cache_dir
        for place in (*places, PACKAGE / "__pycache__", Path(user)):
            _open(place / name)
            compiled = _compiled_in(place / name, function, options)
            if compiled is not None:
                return compiled
    return njit(nogil=True, **options)(function)


def _compiled_in(folder: Path, function: Any, options: dict[str, Any]) -> Any:
    """The function with its cache in `folder`, or None if that cannot be written."""
    before = config.CACHE_DIR
    config.CACHE_DIR = str(folder)
    try:
        compiled = njit(cache=True, nogil=True, **options)(function)
    except RuntimeError:
        return None
    finally:
        config.CACHE_DIR = before
    return compiled if folder in Path(compiled.stats.cache_path).parents else None


@cache
def _open(folder: Path) -> None:
    """Note that `folder` is used; if it is new, remove those beside it that are no longer."""
    try:
        folder.mkdir(parents=True)
    except OSError:
        with suppress(OSError):
            os.utime(folder)
        return
    oldest = time.time() - UNUSED_SECONDS
    for other in folder.parent.glob(f"{PREFIX}*"):
        with suppress(OSError):
            if other.stat().st_mtime < oldest:
                shutil.rmtree(other, ignore_errors=True)


@cache
def _read(file: Path) -> tuple[bytes, frozenset[Path]]:
    source = file.read_bytes()
    return hashlib.sha256(source).digest(), frozenset(imported(source.decode("utf-8", "replace")))


@cache
def _files(module: str) -> set[Path]:
    path = _path(module)
    return {file for file in (path / "__init__.py", path.with_suffix(".py")) if file.is_file()}


def _path(module: str) -> Path:
    return PACKAGE.joinpath(*module.split(".")[1:])

"""Writing files so that a crash leaves the old file or none."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moesim.errors import InputError


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it onto `path` if the block succeeds.

    The temporary name keeps the suffix of `path`, since savers choose the format by it.
    Raises InputError when the folder does not exist or cannot be written.
    """
    target = Path(path)
    if target.is_dir():
        raise InputError(f"cannot write {target}: it is a directory", "name a file")
    try:
        handle, name = tempfile.mkstemp(
            dir=target.parent, prefix=f".{target.stem[:40]}-", suffix=target.suffix
        )
    except OSError as error:
        raise InputError(
            f"cannot write {target}: {error.strerror}", "name a file in a folder that you can write"
        ) from None
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_directory(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary directory beside `path`; rename it to `path` if the block succeeds.

    Raises InputError when `path` exists already or cannot be written, also for an OSError in the
    block, such as a full disk.
    """
    target = Path(path)
    if target.exists() or target.is_symlink():
        raise InputError(f"{target} exists already", "name a new directory, or an .npz file")
    folder = None
    try:
        folder = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name[:40]}-"))
        yield folder
        folder.chmod(0o777 & ~_umask())
        folder.rename(target)
    except OSError as error:
        raise InputError(
            f"cannot write {target}: {error.strerror}", "name a place that you can write to"
        ) from None
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def atomic_write(path: str | os.PathLike[str], data: bytes | str) -> None:
    """Write `data` (text as UTF-8) to `path` through a temporary file and a rename."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)

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

    The temporary name keeps the suffix of `path`, since savers choose the format by it. A device
    or pipe, such as /dev/null, is yielded itself: it must not be replaced by a file.
    Raises InputError when the folder does not exist or cannot be written, also for an OSError in
    the block, such as a full disk.
    """
    target = Path(path)
    if "\0" in target.name:
        raise InputError(f"cannot write {target}: the name holds a NUL character", "name a file")
    temporary = None
    try:
        if target.is_dir():
            raise InputError(f"cannot write {target}: it is a directory", "name a file")
        if target.exists() and not target.is_file():
            yield target
            return
        handle, name = tempfile.mkstemp(
            dir=target.parent, prefix=f".{target.stem[:40]}-", suffix=target.suffix
        )
        os.close(handle)
        temporary = Path(name)
        yield temporary
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(target)
    except OSError as error:
        raise InputError(
            f"cannot write {target}: {error.strerror or error}",
            "name a file in a folder that you can write",
        ) from None
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic_directory(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary directory beside `path`; rename it to `path` if the block succeeds.

    Raises InputError when `path` exists already or cannot be written, also for an OSError in the
    block, such as a full disk.
    """
    target = Path(path)
    folder = None
    try:
        if target.exists() or target.is_symlink():
            raise InputError(f"{target} exists already", "name a new directory, or an .npz file")
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
    """Write `data` to `path` through a temporary file and a rename.

    Text is written as UTF-8; a lone surrogate, which UTF-8 has no bytes for, as the escape
    `\\udc80` that JSON reads back.
    """
    raw = data.encode(errors="backslashreplace") if isinstance(data, str) else data
    with atomic_path(path) as temporary:
        temporary.write_bytes(raw)

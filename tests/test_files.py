"""Files appear complete or not at all, and never replace what is no file."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest

from moesim.errors import InputError
from moesim.files import atomic_directory, atomic_path, atomic_write


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def half_then(path: Path, error: Exception) -> None:
    path.write_text("half")
    raise error


def test_write_replaces_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "plan.json"
    atomic_write(target, "old")
    atomic_write(target, b"new")
    assert target.read_bytes() == b"new"
    assert names(tmp_path) == ["plan.json"]


def test_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "plan.json"
    target.write_text("old")
    with pytest.raises(ZeroDivisionError), atomic_path(target) as temporary:
        half_then(temporary, ZeroDivisionError())
    assert target.read_text() == "old"
    assert names(tmp_path) == ["plan.json"]


def test_temporary_name_keeps_the_suffix_and_the_folder(tmp_path: Path) -> None:
    with atomic_path(tmp_path / "load.png") as temporary:
        assert temporary.suffix == ".png"
        assert temporary.parent == tmp_path
        assert not (tmp_path / "load.png").exists()


def test_mode_follows_the_umask(tmp_path: Path) -> None:
    mask = os.umask(0o027)
    try:
        atomic_write(tmp_path / "plan.json", "x")
        assert os.umask(0o027) == 0o027, "the umask must be as before"
    finally:
        os.umask(mask)
    assert stat.S_IMODE((tmp_path / "plan.json").stat().st_mode) == 0o640


def test_full_disk_is_an_input_error(tmp_path: Path) -> None:
    with (
        pytest.raises(InputError, match="No space left") as caught,
        atomic_path(tmp_path / "plan.json"),
    ):
        raise OSError(28, "No space left on device")
    assert caught.value.exit_code == 2
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "cause"),
    [
        ("missing/plan.json", "No such file"),
        ("file/plan.json", "Not a directory"),
        ("folder", "it is a directory"),
        ("a\0b", "NUL"),
        ("x" * 300, "too long"),
    ],
)
def test_unusable_names(tmp_path: Path, name: str, cause: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=cause) as caught:
        atomic_write(tmp_path / name, "x")
    assert caught.value.remedy
    assert "\n" not in caught.value.cause
    assert names(tmp_path) == ["file", "folder"]


def test_pipes_are_written_not_replaced(tmp_path: Path) -> None:
    """`--out /dev/null` as root must not turn the device into a file; a pipe stands for it."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        atomic_write(pipe, "through")
        assert os.read(reader, 100) == b"through"
    finally:
        os.close(reader)
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert names(tmp_path) == ["pipe"]


def test_lone_surrogates_stay_readable_json(tmp_path: Path) -> None:
    """A hostile name that UTF-8 cannot hold is written as the escape that JSON reads back."""
    name = json.loads('"caf\\u00e9 \\ud800"')
    atomic_write(tmp_path / "meta.json", json.dumps(name, ensure_ascii=False))
    assert json.loads((tmp_path / "meta.json").read_text(encoding="utf-8")) == name


def test_directory_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "trace"
    with atomic_directory(target) as folder:
        (folder / "a.npy").write_text("x")
        assert not target.exists()
    assert names(target) == ["a.npy"]
    assert names(tmp_path) == ["trace"]
    with pytest.raises(InputError, match="exists already"), atomic_directory(target):
        raise AssertionError("the block must not run")


def test_directory_failure_leaves_nothing(tmp_path: Path) -> None:
    with (
        pytest.raises(InputError, match="No space left"),
        atomic_directory(tmp_path / "trace") as folder,
    ):
        half_then(folder / "a.npy", OSError(28, "No space left on device"))
    with pytest.raises(ZeroDivisionError), atomic_directory(tmp_path / "trace"):
        raise ZeroDivisionError
    with pytest.raises(InputError), atomic_directory(tmp_path / "missing" / "trace"):
        raise AssertionError("the block must not run")
    with pytest.raises(InputError, match="too long"), atomic_directory(tmp_path / ("x" * 300)):
        raise AssertionError("the block must not run")
    assert names(tmp_path) == []

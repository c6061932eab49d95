"""Where results and notices go: results to standard output, all else to standard error."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from inspect import signature
from pathlib import Path
from typing import Any

from moesim.errors import InputError, plain, plain_lines


def check_targets(*files: Path | None, plot: Path | None = None) -> None:
    """Refuse before the work what could not be written after it."""
    from moesim.draw import check_target

    check_target(plot)
    for target in files:
        if target is None:
            continue
        if target.is_dir():
            raise InputError(f"cannot write {target}: it is a directory", "name a file")
        if not target.resolve().parent.is_dir():
            raise InputError(
                f"cannot write {target}: there is no folder {target.parent}",
                "name a file in a folder that exists",
            )


def check_folder(folder: Path | None) -> None:
    """The same for a folder that is to be made."""
    if folder is None:
        return
    if folder.exists():
        raise InputError(f"cannot write {folder}: it exists already", "name a folder to be made")
    check_targets(folder)


def echo(text: str, err: bool = False, nl: bool = True) -> None:
    """Text for people or for a program, on standard output or error. Whatever names out of files
    are in it, no control character reaches the terminal."""
    import typer

    typer.echo(plain_lines(text), err=err, nl=nl)


def notice(*texts: str) -> None:
    """Lines on standard error, with option names in the command line's spelling."""
    from moesim.cli.main import as_options

    for text in texts:
        print(f"note: {as_options(plain(text, 1000))}", file=sys.stderr)


def wrote(*files: Path | None) -> str:
    """ "wrote plan.json and load.png"."""
    return "wrote " + " and ".join(str(file) for file in files if file is not None)


def say(line: str) -> None:
    """A progress line on standard error."""
    print(plain(line, 1000), file=sys.stderr, flush=True)


def given(job: Callable[..., Any], options: Mapping[str, Any], **changed: Any) -> dict[str, Any]:
    """Of a command's options (its `locals()`) those that `job` takes by the same name, and
    `changed`, those that it wants in another form."""
    known = signature(job).parameters
    return {**{name: value for name, value in options.items() if name in known}, **changed}

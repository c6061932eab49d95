"""Progress bars on standard error, on a terminal only."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def stage_bar() -> Iterator[Callable[[str, int, int], None]]:
    """Yield a callback `(text, done, total)` that draws a bar with the time left and what is being
    done; it does nothing off a terminal."""
    with progress_bar("") as tick:
        yield lambda text, done, total: None if tick is None else tick(done, total, text)


@contextmanager
def progress_bar(label: str) -> Iterator[Callable[..., None] | None]:
    """Yield a callback `(done, total)` that draws a bar with the time left; None off a terminal. A
    third argument is a new label."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(label, total=None)

        def tick(done: int, total: int, text: str = label) -> None:
            progress.update(task, completed=done, total=total, description=text)

        yield tick

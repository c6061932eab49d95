"""Ctrl-C during a search: the first ends it with the best so far, the second ends the program."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

NOTICE = "interrupted: finishing with the best so far; Ctrl-C again aborts"
SHOW_CURSOR = "\x1b[?25h"


@contextmanager
def stoppable() -> Iterator[Callable[[], bool]]:
    """Yield a function that says whether Ctrl-C was pressed since.

    The second Ctrl-C exits with 130 at once, whatever compiled code is running. Off the main
    thread, where Python allows no handlers, Ctrl-C stays as it was.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    asked = threading.Event()

    def handle(_number: int, _frame: Any) -> None:
        if asked.is_set():
            text = "aborted\n" if not sys.stderr.isatty() else SHOW_CURSOR + "\naborted\n"
            os.write(2, text.encode())
            os._exit(130)
        asked.set()
        os.write(2, f"note: {NOTICE}\n".encode())

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield asked.is_set
    finally:
        signal.signal(signal.SIGINT, before)

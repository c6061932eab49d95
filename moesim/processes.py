"""Processes that end with the one that started them, and a SIGTERM that tidies up."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_PR_SET_PDEATHSIG = 1


class Terminated(KeyboardInterrupt):
    """SIGTERM arrived: unwinds as Ctrl-C does, so that workers and unfinished files go."""


def die_with_parent(parent: int | None = None) -> None:
    """Ask Linux to kill this process when its parent dies, or now if it has; elsewhere do nothing.

    parent: the process that must be alive; by default the one that is the parent now.
    """
    if sys.platform != "linux":
        return
    wanted = os.getppid() if parent is None else parent
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != wanted:
        os.kill(os.getpid(), signal.SIGKILL)


@contextmanager
def terminable() -> Iterator[None]:
    """Within the block SIGTERM raises `Terminated` in the main thread. Off the main thread, where
    Python allows no handlers, and where SIGTERM has a handler already, nothing changes."""
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def handle(_number: int, _frame: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        raise Terminated

    signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

"""Stopping between two steps: Ctrl-C, and the SIGTERM with which a cluster takes a machine back."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

STOPS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def held_signals(patient: bool) -> Iterator[Callable[[], int]]:
    """Let the first Ctrl-C or SIGTERM wait for the end of a step; yields a function that returns the number of the signal that came, or 0.

    A second Ctrl-C interrupts at once, unless `patient`: torchrun and Slurm pass a signal on to processes that have it already. Only the main thread gets
    signals, and a process that ignores one (nohup) goes on doing so.
    """
    came: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: 0
        return
    before: dict[int, Any] = {number: handler for number in STOPS if (handler := signal.getsignal(number)) is not signal.SIG_IGN}

    def note(signum: int, frame: object) -> None:
        came.append(signum)
        if signum == signal.SIGINT and not patient:
            signal.signal(signum, before[signum])

    for number in before:
        signal.signal(number, note)
    try:
        yield lambda: came[0] if came else 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

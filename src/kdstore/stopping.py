"""Stopping between two steps: Ctrl-C, and the SIGTERM with which a cluster takes a machine back."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

STOPS = (signal.SIGINT, signal.SIGTERM)
WATCH_SECONDS = 0.1


@contextmanager
def held_signals(patient: bool, stop: Callable[[], None] | None = None) -> Iterator[Callable[[], int]]:
    """Let the first Ctrl-C or SIGTERM wait for the end of a step; yields a function that returns the number of the signal that came, or 0.

    `stop` is called soon after one came, to end what a step may wait for; by a thread, because a signal may find any lock held by the one that it interrupts.
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
    over = threading.Event()

    def watch(stop: Callable[[], None]) -> None:
        while not over.wait(WATCH_SECONDS):
            if came:
                return stop()

    if stop is not None:
        threading.Thread(target=watch, args=(stop,), name="kdstore-stopping", daemon=True).start()
    try:
        yield lambda: came[0] if came else 0
    finally:
        over.set()
        for number, handler in before.items():
            signal.signal(number, handler)

"""Threads that prepare rows before they are needed: images are decoded outside of Python's lock, so that a model does not wait for them."""

from __future__ import annotations

import contextlib
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")

MOST_DECODERS = 16
AHEAD = 2
"""Batches that are under way while one is used."""


def available_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def decoding_threads(device_type: str, threads: int | None = None) -> ThreadPoolExecutor:
    """Return threads that decode for a model on a device of this type, by default as many as there are cores, at most MOST_DECODERS."""
    return ThreadPoolExecutor(threads or min(MOST_DECODERS, available_cores()), "decode", _give_way if device_type == "cpu" else None)


def batches_ahead(pool: Executor, work: Callable[[int], T], rows: Sequence[int], batch: int) -> Iterator[list[T]]:
    """Have threads `work` on all rows; yields what it returned, batch by batch in the order of `rows`, and raises what it raised when that batch is due."""
    waiting: deque[list[Future[T]]] = deque()
    try:
        for start in range(0, len(rows), batch):
            waiting.append([pool.submit(work, row) for row in rows[start : start + batch]])
            if len(waiting) > AHEAD:
                yield [future.result() for future in waiting.popleft()]
        while waiting:
            yield [future.result() for future in waiting.popleft()]
    finally:
        for future in (future for futures in waiting for future in futures):
            future.cancel()


def _give_way() -> None:
    """Leave the cores to the threads of a model on the CPU: they wait for each other, so that one of them held up holds up all."""
    with contextlib.suppress(AttributeError, OSError):  # no such call, or not allowed
        thread = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, thread) + 5)  # 19 more, and they starve where others work too

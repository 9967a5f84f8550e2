"""What the commands show: results on stdout, bars, notices and errors on stderr."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Iterator
from typing import Any

from kdstore.progress import OnProgress


def show(result: Any, as_json: bool, text: str | None = None) -> None:
    if not _speaks():
        return
    content = dataclasses.asdict(result) if dataclasses.is_dataclass(result) and not isinstance(result, type) else result
    if as_json:
        print(json.dumps(content, indent=1, default=str))
    elif text is not None:
        print(text.rstrip())
    else:
        for name, value in content.items():
            print(f"{name:>24}  {_in_words(name, value)}")


def in_bytes(size: int) -> str:
    """Write a number of bytes for people."""
    from rich.filesize import decimal

    return decimal(size)


def _in_words(name: str, value: Any) -> str:
    """Write a value of a result for people, in units that they read."""
    if isinstance(value, dict) and value:
        return f"\n{'':>26}".join(f"{key}: {_in_words(key, part) if not isinstance(part, dict) else _flat(part)}" for key, part in value.items())
    if isinstance(value, dict | list | tuple):
        return ", ".join(map(str, value)) or "none"
    if name.endswith("bytes") and isinstance(value, int):
        return in_bytes(value)
    if name == "hours":
        return f"{value:.1f}" if value >= 0.1 else f"{value:.4f} ({3600 * value:.0f} seconds)"
    return str(value)


def _flat(content: dict[str, Any]) -> str:
    return ", ".join(f"{name} {_flat(value) if isinstance(value, dict) else value}" for name, value in content.items())


def say(text: str) -> None:
    if _speaks():
        print(" ".join(text.split()), file=sys.stderr)


def _speaks() -> bool:
    """Whether this process speaks for a run: of those that torchrun started the first, to which the others have told their errors."""
    return os.environ.get("RANK", "0") == "0"


@contextlib.contextmanager
def bars() -> Iterator[OnProgress]:
    """Draw a bar per stage on stderr, with rate and time left; a notice is printed above them."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

    _quiet_libraries()
    _keep_freed_memory()
    console = Console(stderr=True)
    name, amount, note = (TextColumn(text, markup=False) for text in ("{task.description}", "{task.fields[amount]}", "{task.fields[note]}"))
    columns = (name, BarColumn(24), amount, TimeRemainingColumn(), note)
    tasks: dict[str, TaskID] = {}
    bars = Progress(*columns, console=console, refresh_per_second=4)

    def on_progress(stage: str, done: int, total: int, note: str = "") -> None:
        if stage in ("warning", "notice"):
            console.print(f"{stage}: {note}", style="yellow" if stage == "warning" else None, markup=False, highlight=False, soft_wrap=True)
            return
        bars.start()  # at the first report, so that an error before it is one line alone
        amount = f"{in_bytes(done)}/{in_bytes(total)}" if stage == "bytes" else f"{done}/{total}"
        if stage not in tasks:
            tasks[stage] = bars.add_task(stage, total=total, note=note, amount=amount)
        bars.update(tasks[stage], completed=done, total=total, note=note, amount=amount)

    try:
        yield on_progress
    finally:
        if tasks:
            bars.stop()


def _quiet_libraries() -> None:
    """Keep other libraries' bars and retry messages off the screen; their errors become ours."""
    import logging

    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")  # read at its import, which most commands do without
    for name in ("huggingface_hub", "datasets", "root"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _keep_freed_memory() -> None:
    """Let glibc keep what large tensors free: they come back every step, and fresh pages made a small student's step 1.4 times as long."""
    import ctypes

    mmap_threshold, trim_threshold = -3, -1  # M_MMAP_THRESHOLD and M_TRIM_THRESHOLD of malloc.h
    with contextlib.suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL(None)
        libc.mallopt(mmap_threshold, 1 << 30)
        libc.mallopt(trim_threshold, (1 << 31) - 1)

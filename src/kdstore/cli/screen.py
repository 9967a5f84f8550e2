"""What the commands show: results on stdout, bars, notices and errors on stderr."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from kdstore.process import keep_freed_memory
from kdstore.progress import OnProgress

if TYPE_CHECKING:
    from rich.console import Console


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
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _flat(content: dict[str, Any]) -> str:
    return ", ".join(f"{name} {_flat(value) if isinstance(value, dict) else value}" for name, value in content.items())


def say(text: str) -> None:
    if _speaks():
        print(" ".join(text.split()), file=sys.stderr)


def _speaks() -> bool:
    """Whether this process speaks for a run: of those that torchrun started the first, to which the others have told their errors."""
    return os.environ.get("RANK", "0") == "0"


@contextlib.contextmanager
def bars(every: float = 60.0) -> Iterator[OnProgress]:
    """Show on stderr how far each stage is, with time left: as bars in a terminal, else as lines, of a running stage about once in `every` seconds."""
    from rich.console import Console

    _quiet_libraries()
    keep_freed_memory()
    console = Console(stderr=True, emoji=False)  # scenes:100: is no emoji
    with _bars(console) if console.is_terminal else _lines(console, every) as on_progress:
        yield on_progress


@contextlib.contextmanager
def _bars(console: Console) -> Iterator[OnProgress]:
    """Draw a bar per stage; a notice is printed above them."""
    from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

    name, amount, note = (TextColumn(text, markup=False) for text in ("{task.description}", "{task.fields[amount]}", "{task.fields[note]}"))
    columns = (name, BarColumn(24), amount, TimeRemainingColumn(), note)
    tasks: dict[str, TaskID] = {}
    bars = Progress(*columns, console=console, refresh_per_second=4)

    def on_progress(stage: str, done: int, total: int, note: str = "") -> None:
        if stage in ("warning", "notice"):
            _print_notice(console, stage, note)
            return
        bars.start()  # at the first report, so that an error before it is one line alone
        amount = f"{_amount(stage, done)}/{_amount(stage, total)}"
        if stage not in tasks:
            tasks[stage] = bars.add_task(stage, total=total, note=note, amount=amount)
        bars.update(tasks[stage], completed=done, total=total, note=note, amount=amount)

    try:
        yield on_progress
    finally:
        if tasks:
            bars.stop()


@contextlib.contextmanager
def _lines(console: Console, every: float) -> Iterator[OnProgress]:
    """Print a line when a stage ends, and until then about once in `every` seconds; what was not told of a stage that never ended comes last."""
    begun: dict[str, tuple[float, int]] = {}  # when each stage was first reported, and how much of it was done by then
    untold: dict[str, str] = {}
    ended: set[str] = set()
    told = -math.inf

    def tell(stage: str) -> None:
        nonlocal told
        console.print(untold.pop(stage), markup=False, highlight=False, soft_wrap=True)
        told = time.monotonic()

    def on_progress(stage: str, done: int, total: int, note: str = "") -> None:
        if stage in ("warning", "notice"):
            _print_notice(console, stage, note)
            return
        now = time.monotonic()
        if done < total and stage in ended:  # it begins again
            ended.discard(stage)
            begun.pop(stage)
        since, before = begun.setdefault(stage, (now, done))
        if stage in ended:
            return
        untold[stage] = _line(stage, done, total, (done - before) / (now - since) if now > since else 0.0, note)
        if done >= total:
            ended.add(stage)
        if done >= total or now - told >= every:
            tell(stage)

    try:
        yield on_progress
    finally:
        for stage in list(untold):
            tell(stage)


def _line(stage: str, done: int, total: int, rate: float, note: str) -> str:
    """Write how far a stage is, at `rate` per second so far; `note` comes last."""
    parts = [f"{_amount(stage, done)}/{_amount(stage, total)}"]
    if rate:
        parts.append(f"{_amount(stage, round(rate)) if rate >= 100 else f'{rate:.3g}'}/s")
        if done < total:
            parts.append(f"{datetime.timedelta(seconds=round((total - done) / rate))} left")
    return f"{stage}: {', '.join([*parts, note] if note else parts)}"


def _amount(stage: str, count: int) -> str:
    return in_bytes(count) if stage == "bytes" else str(count)


def _print_notice(console: Console, stage: str, note: str) -> None:
    console.print(f"{stage}: {note}", style="yellow" if stage == "warning" else None, markup=False, highlight=False, soft_wrap=True)


def _quiet_libraries() -> None:
    """Keep other libraries' bars and retry messages off the screen; their errors become ours."""
    import logging

    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")  # read at its import, which most commands do without
    for name in ("huggingface_hub", "datasets", "root"):
        logging.getLogger(name).setLevel(logging.ERROR)

"""How long jobs report: one callable, drawn by the command line and ignored by default."""

from __future__ import annotations

from collections.abc import Callable

OnProgress = Callable[[str, int, int, str], None]
"""`on_progress(stage, done, total, note)`: what runs, how much of how much is done, and a short note (rate, loss, ...)."""


def silent(stage: str, done: int, total: int, note: str = "") -> None:
    """Report to nobody."""

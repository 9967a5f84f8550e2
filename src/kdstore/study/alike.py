"""Were results that are compared with each other made alike? Told of tasks of different digests, which share no file that could be compared.

One task done twice is compared in full when labs are merged. Two teachers' students are two tasks: that they saw the same pairs, in the same precision, and
were asked the same questions of one head by one metric is in no digest, since none of it is known before a task has run.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from kdstore.jsonfile import differing_fields
from kdstore.study.grid import Task

SHARED = {  # kind -> what of a result's `alike` is the same for all models, seeds, losses and lengths on the same data
    "extract": ("source",),
    "distill": ("source", "source_pairs", "precision"),
    "retrieval": ("config_digest", "metric", "evaluated"),
    "vqa": ("config_digest", "metric", "train", "evaluated", "vocabulary"),
}


def unlike(results: Iterable[tuple[str, Task, dict[str, Any]]]) -> list[str]:
    """Return a sentence for each kind of task and data whose results were not made alike, naming two of them; `results` are (whose, task, result file)."""
    first: dict[tuple[str, str], tuple[str, dict[str, Any]]] = {}
    said: dict[tuple[str, str], str] = {}
    for whose, task, found in results:
        on = task.kind, str(task.settings.get("dataset") or task.settings.get("data") or "")
        here = {name: found["alike"][name] for name in SHARED.get(task.kind, ()) if name in found["alike"]}
        other, there = first.setdefault(on, (whose, here))
        if on not in said and other != whose and (differ := differing_fields(there, here, (other, whose))):
            said[on] = f"{' of '.join(filter(None, on))} was not run alike: {differ}."
    return list(said.values())

"""Scores of a study's arms, read from the results that are finished: by seed, and by image, so that arms are compared on the same questions.

A result is read once, however many arms and seeds it stands for: a teacher's retrieval draws nothing, so it is the same under every seed.

G images, S seeds, T arms.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from kdstore.evaluate.outcomes import read_outcomes
from kdstore.evaluate.summary import numbered
from kdstore.jsonfile import digest_of
from kdstore.study.config import StudyConfig
from kdstore.study.folder import read_done, result_path
from kdstore.study.grid import Arm, Plan
from kdstore.study.verdict import Cell, Images, judge

RECALLS = {"image_retrieval_recall@1": "retrieval/t2i@1", "text_retrieval_recall@1": "retrieval/i2t@1"}
_ROUNDING = 0.02  # official scores are rounded to two decimals


@dataclass(frozen=True, eq=False)
class Value:
    """One score of one result: its interval over images alone, and of each image the sum and the number of items, in the order that `items` names."""

    result: str
    value: float
    interval: tuple[float, float] | None
    items: str | None = None
    sum_G: np.ndarray | None = None
    count_G: np.ndarray | None = None


Score = dict[int, Value]
"""One score of an arm by seed."""


@dataclass
class Results:
    """The results of a study that are finished, by task digest, and what was read of them."""

    out: Path
    config: StudyConfig
    plan: Plan
    done: dict[str, dict[str, Any]] = field(init=False)
    _read: dict[tuple[str, str], dict[str, Value]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        found = {digest: read_done(self.out, task) for digest, task in self.plan.tasks.items()}
        self.done = {digest: result for digest, result in found.items() if result is not None}

    def content(self, digest: str | None) -> dict[str, Any] | None:
        return self.done[digest]["content"] if digest in self.done else None

    def place(self, name: str) -> str:
        """Return where lies, seen from the study's folder, what the recipe names."""
        return os.path.relpath(self.config.folders[name], self.out.absolute()) if name in self.config.folders else name

    def scores(self, arm: Arm) -> dict[str, Score]:
        """Return the finished scores of an arm, in percent, by the names of the report."""
        scores: dict[str, Score] = {}
        for seed, cell in arm.cells.items():
            for role, digest in cell.items():
                if digest in self.done and (role == "retrieval" or role.startswith("vqa/")):
                    for name, value in self._values(digest, arm.row).items():
                        shown = RECALLS.get(name) if role == "retrieval" else f"{role}/{name}"
                        if shown is not None:
                            scores.setdefault(shown, {})[seed] = value
        return scores

    def _values(self, digest: str, row: str) -> dict[str, Value]:
        if (digest, row) not in self._read:
            self._read[digest, row] = self._read_values(digest, row)
        return self._read[digest, row]

    def _read_values(self, digest: str, row: str) -> dict[str, Value]:
        content = self.done[digest]["content"]
        said: dict[str, Any] = next((record["scores"] for record in content["summary"] if record["row"] == row), {})
        values = {}
        for name, score in said.items():
            low_high = score.get("interval")
            values[name] = Value(digest, score["mean"], None if low_high is None else (low_high[0], low_high[1]))
        outcomes = read_outcomes(result_path(self.out, self.plan.tasks[digest]), content["outcomes"]) if content.get("outcomes") else None
        run = next((run for run in outcomes.runs if run.row == row), None) if outcomes is not None else None
        if outcomes is None or run is None:
            return values
        items = numbered(outcomes)
        named, sum_GC = digest_of([list(outcomes.item_N), list(outcomes.group_N), list(outcomes.kind_N)]), items.sums(run.score_N)
        for c, name in enumerate(items.names):
            sum_G, count_G = sum_GC[:, c], items.count_GC[:, c]
            if name in values and abs(sum_G.sum() / count_G.sum() - values[name].value) < _ROUNDING:  # some metrics are no means of items
                values[name] = Value(digest, values[name].value, values[name].interval, f"{named} {name}", sum_G, count_G)
        return values


def common_seeds(scores: Sequence[Score]) -> list[int]:
    """Return the seeds under which all of these are finished."""
    return sorted(set.intersection(*(set(score) for score in scores))) if scores else []


def table(scores: Sequence[Score], seeds: Sequence[int]) -> tuple[np.ndarray, Images | None]:
    """Return scores [T, S] in percent, with the sums by image where all are of the same questions and two seeds or more say what images add."""
    values = [[score[seed] for seed in seeds] for score in scores]
    every = [value for row in values for value in row]
    score_TS = np.array([[value.value for value in row] for row in values], np.float64)
    if len(seeds) < 2 or every[0].items is None or len({value.items for value in every}) > 1:
        return score_TS, None
    return score_TS, Images(np.array([[value.sum_G for value in row] for row in values]), np.asarray(every[0].count_G))


def summary(score: Score, *, drawn: bool = True) -> dict[str, Any]:
    """Return what the report says of one score: `mean`, its 95 % interval over seeds and images, and the values by seed.

    What is not `drawn` is the same under every seed: it stands once, with an interval over images. One seed of what is drawn has none.
    """
    seeds = sorted(score)
    if not drawn or len(seeds) == 1:
        value = score[seeds[0]]
        low, high = (None, None) if drawn or value.interval is None else value.interval
        return {"mean": value.value, "low": low, "high": high, "by_seed": [value.value]}
    score_TS, images = table([score], seeds)
    point = judge(Cell(("arm",), np.zeros(1), np.zeros(1), score_TS, images), 0.0).points[0]
    return {"mean": point.score, "low": point.low, "high": point.high, "by_seed": point.by_seed}


def standard_error(said: Mapping[str, Any]) -> float:
    """Return the standard error that an interval of `summary` implies; without one, the whole scale: such a score is told apart from no other."""
    return 100.0 if said["low"] is None else (said["high"] - said["low"]) / (2 * 1.96)

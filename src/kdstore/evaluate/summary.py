"""What a result says of each row over all its seeds: mean and intervals of every score that is a mean of its items.

A score that is none (average precision, a recall by class) has a mean over seeds and no interval, as has one that stands on a single image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kdstore.evaluate.outcomes import Outcomes
from kdstore.metrics.statistics import beyond_unanimity, bootstrap_means, image_sums, percentile_interval, seed_errors, t_interval

OVERALL = "overall"
_ROUNDING = 0.011  # official scores are rounded to two decimals


@dataclass(frozen=True)
class Items:
    """The items of outcomes as numbers: image and kind of each; the scores they count for are `names`, the kinds and then `overall`."""

    names: tuple[str, ...]
    image_N: np.ndarray
    kind_N: np.ndarray
    count_GC: np.ndarray  # items of each image and score

    def sums(self, score_N: np.ndarray) -> np.ndarray:
        """Return the sum of one score per item over the items of each image and score, [G, C]."""
        return _with_overall(image_sums(score_N, self.image_N, self.kind_N, len(self.names) - 1)[0])


def numbered(outcomes: Outcomes) -> Items:
    """Number the images and kinds of outcomes in the order in which they appear."""
    kinds, kind_N = _codes(outcomes.kind_N)
    image_N = _codes(outcomes.group_N)[1]
    count_GC = _with_overall(image_sums(np.zeros(len(outcomes)), image_N, kind_N, len(kinds))[1])
    return Items((*kinds, OVERALL), image_N, kind_N, count_GC)


def summarise(rows: Sequence[dict[str, Any]], outcomes: Outcomes | None) -> list[dict[str, Any]]:
    """Return a record per row name, in order: its seeds, and by score `mean`, `items`, `images` and, in percent, `interval` (over images and, where there
    are several, seeds), `over_images` and `over_seeds`. Each is a 95 % interval."""
    names = list(dict.fromkeys(row["row"] for row in rows))
    summary = []
    for name in names:
        of_name = [row for row in rows if row["row"] == name]
        scores = {score: {"mean": float(np.mean([row["scores"][score] for row in of_name]))} for score in of_name[0]["scores"]}
        summary.append({"row": name, "seeds": [row["seed"] for row in of_name if row.get("seed") is not None], "scores": scores})
    if outcomes is not None:
        _add_intervals([record for record in summary if any(run.row == record["row"] for run in outcomes.runs)], outcomes)
    return summary


def _add_intervals(summary: list[dict[str, Any]], outcomes: Outcomes) -> None:
    items = numbered(outcomes)
    count_C, images_C = items.count_GC.sum(axis=0), (items.count_GC > 0).sum(axis=0)
    score_RSN = [np.stack([run.score_N for run in outcomes.runs if run.row == record["row"]]) for record in summary]
    drawn_RBC = bootstrap_means(np.stack([items.sums(score_SN.mean(axis=0)) for score_SN in score_RSN]), items.count_GC)
    for record, score_SN, drawn_BC in zip(summary, score_RSN, drawn_RBC, strict=True):
        mean_SC = np.stack([items.sums(score_N).sum(axis=0) for score_N in score_SN]) / count_C
        found = {"interval": drawn_BC + seed_errors(mean_SC), "over_images": drawn_BC}
        ends: dict[str, Any] = {}
        for what, draws in found.items():
            low_C, high_C = np.clip(percentile_interval(draws), 0, 100)
            ends[what] = beyond_unanimity(low_C, high_C, images_C)
        if len(mean_SC) > 1:
            ends["over_seeds"] = np.clip(t_interval(mean_SC), 0, 100)
        for c, name in enumerate(items.names):
            score = record["scores"].get(name)
            if score is not None and images_C[c] > 1 and abs(mean_SC[:, c].mean() - score["mean"]) < _ROUNDING:
                score |= {what: [float(low_C[c]), float(high_C[c])] for what, (low_C, high_C) in ends.items()}
                score |= {"items": int(count_C[c]), "images": int(images_C[c])}


def _codes(texts: Sequence[str]) -> tuple[list[str], np.ndarray]:
    number = {text: i for i, text in enumerate(dict.fromkeys(texts))}
    return list(number), np.array([number[text] for text in texts])


def _with_overall(values_GK: np.ndarray) -> np.ndarray:
    return np.concatenate([values_GK, values_GK.sum(axis=1, keepdims=True)], axis=1)

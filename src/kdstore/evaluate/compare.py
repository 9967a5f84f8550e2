"""Two results on the same questions: how far they are apart, how sure that is, and on which questions one model is right alone.

Everything is paired: image by image, and seed by seed where heads were trained under several (the same initialisation and batches). So results of
other questions, metrics or protocols are refused rather than compared loosely. Chance is drawn as in `kdstore.metrics.statistics`.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

import kdstore
from kdstore.errors import EvaluationError, UnknownName
from kdstore.evaluate.outcomes import Outcomes, Run, read_outcomes
from kdstore.evaluate.page import Answered, open_questions, write_page
from kdstore.evaluate.protocol import NOT_IN_DIGEST
from kdstore.evaluate.results import check_out, read_result
from kdstore.evaluate.summary import OVERALL, numbered
from kdstore.evaluate.tables import aligned_table, items_asked
from kdstore.jsonfile import differing_fields, disk_errors, make_folders, write_json
from kdstore.metrics.statistics import (
    RESAMPLES,
    bootstrap_means,
    flipped_means,
    holm,
    mcnemar_p,
    percentile_interval,
    seed_errors,
    t_interval,
    two_sided_p,
)
from kdstore.progress import OnProgress, silent

RIGHT = 50.0  # percent of the mean over seeds, from which an item counts as answered right
_NO_PROTOCOL = (*NOT_IN_DIGEST, "cache", "train_cache", "predictions", "name", "metric_version")  # the last may be unset: `metric` says which it was


@dataclass(frozen=True)
class Side:
    """One of the two: the row of a result, with its outcomes and their runs in the order of the seeds."""

    path: Path
    content: dict[str, Any]
    outcomes: Outcomes
    row: str

    @property
    def runs(self) -> list[Run]:
        return sorted((run for run in self.outcomes.runs if run.row == self.row), key=lambda run: run.seed or 0)

    @property
    def seeds(self) -> list[int | None]:
        return [run.seed for run in self.runs]

    @property
    def score_SN(self) -> np.ndarray:
        return np.stack([run.score_N for run in self.runs])

    @property
    def scores(self) -> dict[str, Any]:
        """What the result's summary says of the row's scores that have an interval: those that are means of items."""
        found = [record["scores"] for record in self.content.get("summary", []) if record["row"] == self.row]
        return {name: score for scores in found for name, score in scores.items() if "interval" in score}

    def answered(self) -> Answered:
        """Return what the row answered, for a page."""
        answers = [run.answer_N for run in self.runs if run.answer_N is not None]
        return Answered(f"{self.content['model']['name']}, {self.row}", self.score_SN.mean(axis=0), answers)

    def record(self) -> dict[str, Any]:
        """Return what a comparison says of this side."""
        return {"file": str(self.path), "digest": self.content["digest"], "model": self.content["model"]["name"], "row": self.row, "seeds": self.seeds}


def compare(
    a: str | Path,
    b: str | Path,
    *,
    row_a: str = "model",
    row_b: str = "model",
    out: str | None = None,
    page: str | None = None,
    examples: int = 60,
    folder: str | None = None,
    on_progress: OnProgress = silent,
) -> dict[str, Any]:
    """Compare a row of result A with one of result B; writes the comparison to `out`, and to `page` the questions that one alone answers right.

    The page shows at most `examples` questions for each side; `folder` is where the data set lies now, if not where it was evaluated.
    Raises EvaluationError for results that cannot be paired, or hold no outcomes.
    """
    for path in (out, page):
        check_out(path)
    first, second = _side(a, row_a), _side(b, row_b)
    _check_paired(first, second)
    split = open_questions(first.content, folder) if page is not None else None
    content = {
        "stage": "evaluate compare",
        "a": first.record(),
        "b": second.record(),
        "data": first.content["data"],
        "metric": first.content.get("metric"),
        "config_digest": first.content["config_digest"],
        "right_from": RIGHT,
        "resamples": RESAMPLES,
        "scores": _differences(first, second),
        "made": {"versions": {"kdstore": kdstore.__version__, **{name: version(name) for name in ("numpy", "scipy")}}},
    }
    if page is not None and split is not None:
        sides = (first.answered(), second.answered())
        _make_folder_of(page)
        write_page(page, split, first.outcomes.item_N, sides, right_from=RIGHT, examples=examples, on_progress=on_progress)
    if out is None:
        return content
    _make_folder_of(out)
    return {**content, "digest": write_json(Path(out), content)}


def comparison_table(content: dict[str, Any]) -> str:
    """Render a comparison as Markdown, the difference with its 95 % interval."""
    names = [f"{side.upper()}: {content[side]['model']}, {content[side]['row']}" for side in ("a", "b")]
    table = [["score", "A", "B", "A - B", "p", "p (Holm)", "only A right", "only B right", "items", "images"]]
    for score in content["scores"]:
        low, high = score["interval"]
        p_values = [f"{score[name]:.4f}" if name in score else "-" for name in ("p", "p_holm")]
        counts = [str(score[name]) for name in ("only_a_right", "only_b_right", "items", "images")]
        table.append([score["score"], f"{score['a']:.1f}", f"{score['b']:.1f}", f"{score['difference']:+.1f} [{low:+.1f}, {high:+.1f}]", *p_values, *counts])
    return "\n".join([*names, "", aligned_table(table, num_texts=1)])


def _make_folder_of(path: str) -> None:
    with disk_errors(Path(path)):
        make_folders(Path(path).absolute().parent)


def _side(path: str | Path, row: str) -> Side:
    content = read_result(path)
    outcomes = read_outcomes(path, content.get("outcomes"))
    if row not in (known := dict.fromkeys(run.row for run in outcomes.runs)):
        raise UnknownName.of(f"row of {path}", row, known)
    return Side(Path(path), content, outcomes, row)


def _check_paired(a: Side, b: Side) -> None:
    """Raise EvaluationError that says in what two results differ, if that forbids to pair them."""
    differing = [f"{name}: {a.content.get(name)} and {b.content.get(name)}" for name in ("stage", "metric") if a.content.get(name) != b.content.get(name)]
    if not differing and a.content["config_digest"] != b.content["config_digest"]:
        settings_a, settings_b = ({k: v for k, v in side.content["config"].items() if k not in _NO_PROTOCOL} for side in (a, b))
        if said := differing_fields(settings_a, settings_b, ("A", "B")):
            differing.append(f"protocol ({said})")
    if not differing and (said := differing_fields(items_asked(a.content), items_asked(b.content), ("A", "B"))):
        differing.append(f"data ({said})")
    if not differing and any(getattr(a.outcomes, name) != getattr(b.outcomes, name) for name in ("item_N", "kind_N", "group_N")):
        shared = set(zip(a.outcomes.kind_N, a.outcomes.item_N, strict=True)) & set(zip(b.outcomes.kind_N, b.outcomes.item_N, strict=True))
        differing.append(f"questions: {len(a.outcomes)} and {len(b.outcomes)}, of which {len(shared)} are the same")
    if not differing and None not in (*a.seeds, *b.seeds) and a.seeds != b.seeds:
        differing.append(f"seeds: {a.seeds} and {b.seeds}")
    if differing:
        raise EvaluationError(f"{a.path} and {b.path} cannot be compared, they differ in {'; '.join(differing)}.", "Evaluate both models in the same way.")


def _differences(a: Side, b: Side) -> list[dict[str, Any]]:
    """Return a record per score that both rows have, `overall` first; p is adjusted over all others."""
    items = numbered(a.outcomes)
    shared = [c for c, name in enumerate(items.names) if name in a.scores and name in b.scores]
    shared.sort(key=lambda c: items.names[c] != OVERALL)
    if not shared:
        raise EvaluationError(f"{a.path} and {b.path} share no score that is a mean of items.", "Compare rows of one metric.")
    count_GC = items.count_GC[:, shared]
    a_SN, b_SN = a.score_SN, b.score_SN
    difference_SN = a_SN - b_SN  # a side that draws nothing is paired with every seed of the other
    sum_GC = items.sums(difference_SN.mean(axis=0))[:, shared]
    mean_SC = np.stack([items.sums(difference_N)[:, shared].sum(axis=0) for difference_N in difference_SN]) / count_GC.sum(axis=0)
    drawn_BC, errors_BC = bootstrap_means(sum_GC[None], count_GC)[0], seed_errors(mean_SC)
    ends = {"interval": percentile_interval(drawn_BC + errors_BC), "over_images": percentile_interval(drawn_BC)}
    if len(mean_SC) > 1:
        ends["over_seeds"] = t_interval(mean_SC)
    p_C = two_sided_p(flipped_means(sum_GC, count_GC.sum(axis=0)) + errors_BC, mean_SC.mean(axis=0))
    records = []
    for place, c in enumerate(shared):
        chosen_N = np.full(len(items.kind_N), True) if items.names[c] == OVERALL else items.kind_N == c
        records.append(
            {
                "score": items.names[c],
                "a": float(a_SN[:, chosen_N].mean()),
                "b": float(b_SN[:, chosen_N].mean()),
                "difference": float(mean_SC[:, place].mean()),
                **{name: np.clip((low_C[place], high_C[place]), -100, 100).tolist() for name, (low_C, high_C) in ends.items()},
                "p": float(p_C[place]),
                **_counts(a_SN[:, chosen_N], b_SN[:, chosen_N]),
                "items": int(chosen_N.sum()),
                "images": int((count_GC[:, place] > 0).sum()),
            }
        )
    kinds = [record for record in records if record["score"] != OVERALL]
    for record, adjusted in zip(kinds, holm([record["p"] for record in kinds]), strict=True):
        record["p_holm"] = adjusted
    return records


def _counts(a_SN: np.ndarray, b_SN: np.ndarray) -> dict[str, Any]:
    """Count the items that one side alone answers right; McNemar's p where every item is plainly right or wrong."""
    right_a, right_b = (score_SN.mean(axis=0) >= RIGHT for score_SN in (a_SN, b_SN))
    only_a, only_b = int((right_a & ~right_b).sum()), int((right_b & ~right_a).sum())
    plain = len(a_SN) == len(b_SN) == 1 and np.isin((a_SN, b_SN), (0, 100)).all()
    return {"only_a_right": only_a, "only_b_right": only_b, **({"p_mcnemar": mcnemar_p(only_a, only_b)} if plain else {})}

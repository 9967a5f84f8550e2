"""Tables of a study: from the one content that collect.py returns to what the report, Markdown, CSV and LaTeX show alike.

A table without rows is not there at all, so that half a study shows what it has.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from kdstore.jsonfile import make_folders, write_bytes
from kdstore.study.tabular import FORMS, Cell, Table, cells

NO_TEACHER, BORN_AGAIN, QUESTION_ONLY = "no teacher", "born-again", "question-only"  # of CONTROLS
_RETRIEVAL = {"t2i": "image by text", "i2t": "text by image"}
_MARKS = 6  # of a learning curve, in its table


def all_tables(content: dict[str, Any]) -> dict[str, Table]:
    """Return {name: table} of those that have rows."""
    made = [
        *(_verdicts(content), _points(content), _inversions(content), _arms(content), _gains(content), _kinds(content), _curves(content), _cost(content)),
        *(_prediction(content), _teachers(content), _students(content), _spectra(content), *_agreement(content), _controls(content), _failures(content)),
    ]
    return {table.name: table for table in made if table.rows}


def write_tables(folder: Path, tables: Iterable[Table]) -> None:
    """Write NAME.md, NAME.csv and NAME.tex of each table."""
    make_folders(folder)
    for table in tables:
        for ending, render in FORMS.items():
            write_bytes(folder / f"{table.name}.{ending}", render(table).encode())


def score_label(score: str) -> str:
    """Name a score for people: `vqa/gqa/overall` is VQA gqa."""
    family, _, rest = score.partition("/")
    if family == "vqa":
        return "VQA " + rest.removesuffix("/overall").replace("/", ", ")
    side, _, k = rest.partition("@")
    return f"R@{k} {_RETRIEVAL.get(side, side.replace('_', ' '))}" if family == "retrieval" and k else score


def measure_label(measure: str) -> str:
    """Name a diagnostic for people."""
    return measure.replace("_", " ")


def arm_label(arm: dict[str, Any]) -> str:
    """Name an arm for people."""
    if arm["kind"] != "control":
        return f"{'teacher' if arm['kind'] == 'teacher' else 'student of'} {arm['teacher']}"
    return control_of(arm) + (" teacher" if control_of(arm) == BORN_AGAIN and not arm["loss"] else "")


def taught_by(arm: dict[str, Any]) -> str:
    """Return who taught an arm, as figures name it: a teacher's label, or the control that makes its teacher."""
    return control_of(arm) or str(arm["teacher"])


def control_of(arm: dict[str, Any]) -> str:
    """Return the name of the control that an arm is of; '' for other arms."""
    return str(arm["id"]).split("|")[1] if arm["kind"] == "control" else ""


def arms_of(content: dict[str, Any]) -> list[dict[str, Any]]:
    return list(content.get("arms") or [])


def overall_scores(arms: Sequence[dict[str, Any]]) -> list[str]:
    """Return the names of the scores but those of single question kinds, in the order in which arms bring them."""
    return [name for name in dict.fromkeys(s for arm in arms for s in arm["scores"]) if not name.startswith("vqa/") or name.endswith("/overall")]


def kind_scores(arms: Sequence[dict[str, Any]]) -> list[str]:
    return [name for name in dict.fromkeys(s for arm in arms for s in arm["scores"]) if name.startswith("vqa/") and not name.endswith("/overall")]


def thinned(points: Sequence[Any], most: int) -> list[Any]:
    """Return at most so many of the points, evenly spaced, with the first and the last."""
    if len(points) <= most:
        return list(points)
    return [points[round(i * (len(points) - 1) / (most - 1))] for i in range(most)]


def mean_curves(content: dict[str, Any]) -> dict[str, list[tuple[int, float, float, float]]]:
    """Return {arm: [(samples, mean, lowest, highest loss over seeds)]} at the samples that every seed of the arm has."""
    by_arm: dict[str, list[dict[int, float]]] = {}
    for curve in content.get("curves") or []:
        by_arm.setdefault(curve["arm"], []).append({p["samples"]: p["loss"] for p in curve["points"]})
    found = {}
    for arm, seeds in by_arm.items():
        shared = sorted(set.intersection(*map(set, seeds)))
        found[arm] = [(n, sum(s[n] for s in seeds) / len(seeds), min(s[n] for s in seeds), max(s[n] for s in seeds)) for n in shared]
    return found


def _score(score: dict[str, Any] | None, source: str = "", digits: int = 1) -> Cell:
    if score is None:
        return Cell()
    return Cell(value=score["mean"], low=score.get("low"), high=score.get("high"), digits=digits, source=source)


def _number(value: float | None, digits: int = 1) -> Cell:
    return Cell(value=value, digits=digits)


def _measured(value: float | None) -> Cell:
    """Return a number of unknown size with three digits that count."""
    if value is None:
        return Cell()
    size = abs(value)
    return Cell(value=value, digits=0 if size >= 100 else 1 if size >= 10 else 2 if size >= 1 else 3)


def _named(arm: dict[str, Any]) -> Cell:
    return Cell(arm_label(arm), source=arm["id"], teacher=taught_by(arm))


def _of_teacher(teacher: str, source: str = "") -> Cell:
    return Cell(teacher, source=source or f"teacher|{teacher}", teacher=teacher)


def _arms(content: dict[str, Any]) -> Table:
    arms = arms_of(content)
    scores = overall_scores(arms)
    rows = []
    for arm in arms:
        count, cost = arm.get("parameters") or {}, arm.get("cost") or {}
        millions = [_number(n / 1e6 if n is not None else None, 2) for n in (count.get("total"), count.get("without_token_embedding"))]
        seconds = [_number(cost.get(name), 0) for name in ("seconds", "teacher_seconds")]
        learned = cells(arm["student"], arm["samples"], " ".join(map(str, arm["seeds"])))
        rows.append((_named(arm), *cells(arm["kind"], arm["loss"]), *(_score(arm["scores"].get(s), arm["id"]) for s in scores), *learned, *millions, *seconds))
    titles = ("arm", "kind", "loss", *map(score_label, scores), "student", "samples", "seeds")
    return Table(
        "arms",
        "Scores in percent, means over seeds with their 95 % intervals; parameters with and without tokens; seconds to train, and share of the store's.",
        (*titles, "parameters (M)", "without tokens (M)", "seconds", "share of the store's"),
        tuple(rows),
    )


def _cell(verdict: dict[str, Any]) -> Sequence[Cell]:
    return cells(verdict["loss"], verdict["student"], verdict["samples"], verdict["vqa"], score_label(verdict["strength"]))


_CELL = ("loss", "student", "samples", "VQA set", "strength")


def _verdicts(content: dict[str, Any]) -> Table:
    rows = []
    for verdict in content.get("verdicts") or []:
        trend, rho = (verdict.get(name) or {} for name in ("trend", "spearman"))
        found = (
            Cell(value=trend.get("difference"), low=trend.get("low"), high=trend.get("high")),
            Cell(value=rho.get("rho"), low=rho.get("low"), high=rho.get("high"), digits=2),
            _number(rho.get("p"), 3),
        )
        rows.append((*_cell(verdict), *cells(verdict["verdict"]), *found, *cells(f"{verdict['sentence']} {verdict.get('in_general') or ''}".strip())))
    caption = "The verdict of every cell; the mean over pairs of teachers of stronger minus weaker, in points; Spearman's rank correlation of strength and VQA."
    titles = ("verdict", "stronger minus weaker", "Spearman's rho", "p of rho", "in words")
    return Table("verdicts", caption, (*_CELL, *titles), tuple(rows))


def student_id(verdict: dict[str, Any], teacher: str) -> str:
    """Return the id of the arm behind a point of a verdict."""
    return f"student|{verdict['student']}|{teacher}|{verdict['loss']}|{verdict['samples']}"


def _points(content: dict[str, Any]) -> Table:
    rows = [
        (
            _of_teacher(point["teacher"], student_id(verdict, point["teacher"])),
            *_cell(verdict),
            _number(point["strength"]),
            Cell(value=point["score"], low=point.get("low"), high=point.get("high"), source=student_id(verdict, point["teacher"])),
            *cells(" ".join(f"{x:z.1f}" for x in point.get("by_seed") or [])),
        )
        for verdict in content.get("verdicts") or []
        for point in verdict["points"]
    ]
    caption = "Teachers ascending in strength (their own score, in percent), and the VQA of their students in percent with its 95 % interval over seeds."
    return Table("strength", caption, ("teacher", *_CELL, "teacher's score", "student's VQA", "by seed"), tuple(rows))


def _inversions(content: dict[str, Any]) -> Table:
    rows = [
        (
            _of_teacher(inversion["better"], student_id(verdict, inversion["better"])),
            _of_teacher(inversion["worse"], student_id(verdict, inversion["worse"])),
            *_cell(verdict),
            Cell(value=inversion["difference"], low=inversion.get("low"), high=inversion.get("high")),
            _number(inversion.get("p"), 3),
            _number(inversion.get("p_holm"), 3),
        )
        for verdict in content.get("verdicts") or []
        for inversion in verdict.get("inversions") or []
    ]
    caption = "Pairs where the weaker teacher has the better student: by how many points, between bounds that hold for all pairs together at 95 %."
    return Table("inversions", caption, ("better student of", "worse student of", *_CELL, "points", "p", "p after Holm"), tuple(rows))


def _gains(content: dict[str, Any]) -> Table:
    by_id = {arm["id"]: arm for arm in arms_of(content)}
    rows = []
    for gain in content.get("gains") or []:
        arm = by_id[gain["arm"]]
        difference = Cell(value=gain["difference"], low=gain.get("low"), high=gain.get("high"), source=arm["id"])
        said = cells(arm["loss"], arm["student"], arm["samples"], against(gain, by_id), score_label(gain["score"]))
        rows.append((_named(arm), *said, difference, *cells(" ".join(f"{x:+z.1f}" for x in gain.get("by_seed") or []))))
    caption = "What an arm has over another of the same student, loss and length: points, paired by seed, with the 95 % interval."
    return Table("gains", caption, ("arm", "loss", "student", "samples", "over", "score", "points", "by seed"), tuple(rows))


def against(gain: dict[str, Any], by_id: dict[str, dict[str, Any]]) -> str:
    """Name what a gain is over: an arm, or a control."""
    return arm_label(by_id[gain["against"]]) if gain["against"] in by_id else str(gain["against"])


def _kinds(content: dict[str, Any]) -> Table:
    arms = arms_of(content)
    kinds = kind_scores(arms)
    sets = {name.split("/")[1] for name in kinds}
    rows = [
        (_named(arm), *cells(arm["loss"], arm["student"], arm["samples"]), *(_score(arm["scores"].get(kind), arm["id"]) for kind in kinds))
        for arm in arms
        if any(kind in arm["scores"] for kind in kinds)
    ]
    titles = [score_label(kind).removeprefix("VQA ") if len(sets) > 1 else kind.split("/", 2)[2] for kind in kinds]
    return Table(
        "kinds", "VQA accuracy by kind of question, in percent, with the 95 % interval over seeds.", ("arm", "loss", "student", "samples", *titles), tuple(rows)
    )


def _curves(content: dict[str, Any]) -> Table:
    by_id, curves = {arm["id"]: arm for arm in arms_of(content)}, mean_curves(content)
    marks = thinned(sorted({point[0] for curve in curves.values() for point in curve}), _MARKS)
    rows = []
    for name, curve in curves.items():
        at = {samples: Cell(value=mean, low=low, high=high, digits=3, source=name) for samples, mean, low, high in curve}
        rows.append(
            (_named(by_id[name]), *cells(by_id[name]["loss"], by_id[name]["student"], by_id[name]["samples"]), *(at.get(mark, Cell()) for mark in marks))
        )
    caption = "Training loss at so many samples seen: mean over seeds and, in brackets, the lowest and highest seed. Losses of different sums do not compare."
    return Table("curves", caption, ("arm", "loss", "student", "samples", *(f"at {mark:,}" for mark in marks)), tuple(rows))


def _cost(content: dict[str, Any]) -> Table:
    arms = [arm for arm in arms_of(content) if arm["samples"] and (arm.get("cost") or {}).get("seconds") is not None]
    scores = [name for name in overall_scores(arms) if name.startswith("vqa/")]
    rows = [
        (
            *(_named(arm), *cells(arm["loss"], arm["student"], arm["samples"]), *(_score(arm["scores"].get(s), arm["id"]) for s in scores)),
            *(_number(arm["cost"].get(name), 0) for name in ("seconds", "teacher_seconds")),
        )
        for arm in arms
    ]
    caption = "Seconds to train one student, and its share of those in which its teacher's store was made."
    return Table("cost", caption, ("arm", "loss", "student", "samples", *map(score_label, scores), "student's seconds", "share of the store's"), tuple(rows))


def _prediction(content: dict[str, Any]) -> Table:
    rows = []
    for p in content.get("prediction") or []:
        rho = Cell(value=p["rho"], low=p.get("low"), high=p.get("high"), digits=2)
        better = {True: "yes", False: "no"}.get(p.get("beats_strength"))
        rows.append(
            (
                *cells(measure_label(p["measure"])),
                rho,
                _number(p.get("p"), 3),
                _number(p.get("p_holm"), 3),
                _number(p.get("left_out_error"), 2),
                *cells(better, p["sentence"]),
            )
        )
    caption = "Rank correlation of each measure of the teachers with their students' VQA, and the error in points when it predicts a teacher that was left out."
    return Table("prediction", caption, ("measure", "Spearman's rho", "p", "p after Holm", "left-out error", "better than strength", "in words"), tuple(rows))


def _diagnostics(content: dict[str, Any]) -> dict[str, Any]:
    return content.get("diagnostics") or {}


def _teachers(content: dict[str, Any]) -> Table:
    found = _diagnostics(content).get("teachers") or {}
    measures = list(dict.fromkeys(m for values in found.values() for m in values))
    rows = [(_of_teacher(teacher), *(_measured(values.get(m)) for m in measures)) for teacher, values in found.items()]
    return Table("diagnostics-teachers", "What was measured on each teacher's store.", ("teacher", *map(measure_label, measures)), tuple(rows))


def _students(content: dict[str, Any]) -> Table:
    by_id, found = {arm["id"]: arm for arm in arms_of(content)}, _diagnostics(content).get("students") or {}
    measures = list(dict.fromkeys(m for values in found.values() for m in values))
    rows = []
    for name, values in found.items():
        if name in by_id:
            arm = by_id[name]
            rows.append((_named(arm), *cells(arm["loss"], arm["student"], arm["samples"]), *(_measured(values.get(m)) for m in measures)))
    return Table(
        "diagnostics-students",
        "What was measured between a student and its teacher.",
        ("arm", "loss", "student", "samples", *map(measure_label, measures)),
        tuple(rows),
    )


def _spectra(content: dict[str, Any]) -> Table:
    spectra = {teacher: values for teacher, values in (_diagnostics(content).get("spectra") or {}).items() if sum(values) > 0}
    marks = [n for n in (1, 2, 4, 8, 16, 32, 64, 128, 256) if any(len(values) >= n for values in spectra.values())]
    rows = [(_of_teacher(t), *(_number(100 * sum(values[:n]) / sum(values)) for n in marks)) for t, values in spectra.items()]
    return Table(
        "spectra", "Percent of the variance of a teacher's image embeddings in its first components.", ("teacher", *(f"first {n}" for n in marks)), tuple(rows)
    )


def _agreement(content: dict[str, Any]) -> list[Table]:
    return [
        Table(
            f"agreement-{slug(measure)}",
            f"Agreement between teachers: {measure_label(measure)}.",
            ("teacher", *found["names"]),
            tuple((_of_teacher(name), *(_number(x, 2) for x in row)) for name, row in zip(found["names"], found["matrix"], strict=True)),
        )
        for measure, found in (_diagnostics(content).get("agreement") or {}).items()
    ]


def slug(text: str) -> str:
    """Return the name of a file for a text."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "x"


def _controls(content: dict[str, Any]) -> Table:
    first: dict[str, str] = {}
    for arm in arms_of(content):
        first.setdefault(control_of(arm), arm["id"])
    rows = [
        (Cell(c["name"], source=first.get(c["name"], "")), *cells(c["expected"], c["tolerance"], c["found"], c["verdict"], c["why"]))
        for c in content.get("controls") or []
    ]
    caption = "What was expected of each control before the first run, what was found, and whether it holds."
    return Table("controls", caption, ("control", "expected", "tolerance", "found", "verdict", "why"), tuple(rows))


def _failures(content: dict[str, Any]) -> Table:
    rows = [tuple(cells(f["label"], f["reason"], f["log"])) for f in content.get("failures") or []]
    return Table("failures", "Tasks that failed, each with its log.", ("task", "reason", "log"), tuple(rows))

"""Figures of a study: from the one content that collect.py returns to panels, each with words that say what is seen in it.

A panel shows one student, length and VQA set; where more than two losses are compared, also one loss. What a panel would need and the content lacks leaves
the panel out. Files are named after what they show, never after a stranger's label.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.transforms import Bbox

from kdstore.jsonfile import make_folders, write_bytes
from kdstore.study.drawing import (
    HEAT_STEPS,
    WIDTH,
    Figure,
    Palette,
    as_file,
    label_ends,
    label_points,
    left_for,
    palette,
    panel,
    role,
    short,
)
from kdstore.study.tables import (
    BORN_AGAIN,
    NO_TEACHER,
    QUESTION_ONLY,
    against,
    arms_of,
    control_of,
    kind_scores,
    mean_curves,
    measure_label,
    overall_scores,
    score_label,
    taught_by,
)

_FILLS = ("full", "none")  # of the markers of two losses


def palette_of(content: dict[str, Any]) -> Palette:
    """Give every teacher of the recipe its colour: by strength where a verdict tells it, else in the order of the arms."""
    arms = arms_of(content)
    named = dict.fromkeys(point["teacher"] for verdict in (content.get("verdicts") or [])[:1] for point in verdict["points"])
    named |= dict.fromkeys((content.get("recipe") or {}).get("teachers") or {})
    named |= dict.fromkeys(arm["teacher"] for arm in arms if arm["kind"] != "control")
    return palette(list(named), [BORN_AGAIN])


def all_figures(content: dict[str, Any], colors: Palette) -> dict[str, list[Figure]]:
    """Return {section: its panels}."""
    draw: dict[str, Callable[[dict[str, Any], Palette], Iterable[Figure]]] = {
        "strength": _strength,
        "gains": _gains,
        "kinds": _kinds,
        "curves": _curves,
        "cost": _cost,
        "prediction": _prediction,
        "spectra": _spectra,
        "agreement": _agreement,
    }
    return {name: list(of(content, colors)) for name, of in draw.items()}


def write_figures(folder: Path, figures: Iterable[Figure]) -> None:
    """Write NAME.svg and NAME.pdf of each figure."""
    make_folders(folder)
    for figure in figures:
        for form in ("svg", "pdf"):
            write_bytes(folder / f"{figure.name}.{form}", as_file(figure, form))


def _students(content: dict[str, Any], colors: Palette) -> list[dict[str, Any]]:
    """Return the arms that a teacher taught: those of controls, then from the weakest teacher's to the strongest's."""
    order = list(colors.role_of)
    arms = [arm for arm in arms_of(content) if arm["loss"] is not None and arm["samples"] is not None]
    return sorted(arms, key=lambda arm: -1 if arm["kind"] == "control" else order.index(arm["teacher"]))


def _control(content: dict[str, Any], name: str, of: dict[str, Any]) -> dict[str, Any] | None:
    """Return the control's arm of the student and the length that `of` has; a control without training has no length."""
    for arm in arms_of(content):
        if control_of(arm) == name and arm["student"] == of["student"] and arm["samples"] in (of["samples"], None):
            return arm
    return None


def _cells(arms: Sequence[dict[str, Any]], *by: str) -> list[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Group arms by fields, in order."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for arm in arms:
        groups.setdefault(tuple(arm[name] for name in by), []).append(arm)
    return [(dict(zip(by, key, strict=True)), group) for key, group in groups.items()]


def _titled(cell: dict[str, Any], cells: Sequence[dict[str, Any]], first: str = "") -> str:
    """Say of a cell what is not the same for all cells."""
    told = [f"{value:,} samples" if name == "samples" else str(value) for name, value in cell.items() if len({c[name] for c in cells}) > 1]
    return ", ".join([first] * bool(first) + told)


def _range(score: dict[str, Any], digits: int = 1) -> str:
    text = f"{score['mean']:z.{digits}f}"
    return text if score.get("low") is None else f"{text} [{score['low']:z.{digits}f}, {score['high']:z.{digits}f}]"


def _bar(axes: Any, x: float, y: float, ends: Sequence[float | None], *, color: str, marker: str, fill: str = "full", across: bool = False) -> None:
    """Draw a point and its interval, upright or across."""
    low, high = ends
    if low is not None and high is not None:
        line = ([low, high], [y, y]) if across else ([x, x], [low, high])
        axes.plot(*line, color=color, linewidth=1.5, solid_capstyle="round", zorder=3)
    size = 9.5 if marker == "*" else 6
    face = role("surface") if fill == "none" else color
    axes.plot([x], [y], marker=marker, markersize=size, markerfacecolor=face, markeredgecolor=color, markeredgewidth=1.3, linestyle="none", zorder=4)


def _strength(content: dict[str, Any], colors: Palette) -> Iterable[Figure]:
    verdicts = [v for v in content.get("verdicts") or [] if v["points"]]
    named = [{name: v[name] for name in ("student", "samples", "vqa")} for v in verdicts]
    for i, (verdict, cell) in enumerate(zip(verdicts, named, strict=True)):
        none = _untaught(content, verdict)
        title = _titled(cell, named, f"{verdict['loss']}: {verdict['verdict']}")
        axes = panel(title, f"teacher's {score_label(verdict['strength'])} (%)", "student's VQA accuracy (%)", right=0.4)
        points = sorted([*verdict["points"], *_born_again(content, verdict)], key=lambda p: p["strength"])
        alike = [v for v in verdicts if v["vqa"] == verdict["vqa"]]
        shown = [p | {"mean": p["score"]} for v in alike for p in [*v["points"], *_born_again(content, v)]] + [_untaught(content, v) for v in alike]
        heights = [s[end] for s in shown for end in ("mean", "low", "high") if s.get(end) is not None]
        places = [p["strength"] for p in points]
        axes.set_xlim(*_padded(places, 0.14))
        axes.set_ylim(*_padded(heights, 0.08))
        axes.plot(*zip(*((p["strength"], p["score"]) for p in verdict["points"]), strict=True), color=role("line"), linewidth=1.2, zorder=1)
        taken, words = [], ""
        if none:
            taken += _level(axes, none)
            words = f" Without a teacher: {_range(none)}."
        for p in points:
            color = colors.color(p["teacher"])
            for x in p.get("by_seed") or []:
                axes.plot([p["strength"]], [x], marker="_", markersize=7, color=color, linestyle="none", zorder=2)
            _bar(axes, p["strength"], p["score"], (p.get("low"), p.get("high")), color=color, marker=colors.marker(p["teacher"]))
        taken += [_upright(axes, p["strength"], p["low"], p["high"]) for p in points if p.get("low") is not None]
        label_points(axes, [(p["strength"], p["score"], p["teacher"]) for p in points], taken)
        said = "; ".join(f"{p['teacher']} at {p['strength']:.1f}: {_range(p | {'mean': p['score']})}" for p in points)
        yield Figure(f"strength-{i + 1}", title, f"Students' VQA over their teachers' strength, from the weakest to the strongest. {said}.{words}", axes.figure)


def _untaught(content: dict[str, Any], verdict: dict[str, Any]) -> dict[str, Any]:
    """Return the VQA score of the verdict's student without a teacher; {} if it was not measured."""
    arm = _control(content, NO_TEACHER, verdict) or {"scores": {}}
    found: dict[str, Any] = arm["scores"].get(f"vqa/{verdict['vqa']}/overall") or {}
    return found


def _born_again(content: dict[str, Any], verdict: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the student of the teacher of its own size as one more point of the verdict's, if both were scored."""
    score = f"vqa/{verdict['vqa']}/overall"
    arms = [arm for arm in arms_of(content) if control_of(arm) == BORN_AGAIN and arm["student"] == verdict["student"]]
    strengths = [arm["scores"][verdict["strength"]]["mean"] for arm in arms if arm["loss"] is None and verdict["strength"] in arm["scores"]]
    scores = [arm["scores"].get(score) for arm in arms if (arm["loss"], arm["samples"]) == (verdict["loss"], verdict["samples"])]
    return [{"teacher": BORN_AGAIN, "strength": x, "score": found["mean"], **found} for x in strengths for found in scores if found]


def _padded(values: Sequence[float], share: float) -> tuple[float, float]:
    low, high = min(values), max(values)
    pad = (high - low) * share or 1.0
    return low - pad, high + pad


def _level(axes: Any, none: dict[str, Any]) -> list[Bbox]:
    """Draw the line of the student without a teacher with its interval, and say so at its end; returns the boxes of line and text."""
    if none.get("low") is not None:
        axes.axhspan(none["low"], none["high"], facecolor=role("line"), alpha=0.45, linewidth=0, zorder=0)
    axes.axhline(none["mean"], color=role("none"), linewidth=1.1, linestyle=(0, (5, 3)), zorder=1)
    said = axes.annotate(f"no teacher {_range(none)}", (1, none["mean"]), xycoords=("axes fraction", "data"), xytext=(0, -3), textcoords="offset points")
    said.set(ha="right", va="top", fontsize=8, color=role("muted"))
    inside, (_, height) = axes.get_window_extent(), axes.transData.transform((0, none["mean"]))
    return [said.get_window_extent(axes.figure.canvas.get_renderer()), Bbox.from_extents(inside.x0, height - 1, inside.x1, height + 1)]


def _upright(axes: Any, x: float, low: float, high: float) -> Bbox:
    (at, bottom), (_, top) = axes.transData.transform((x, low)), axes.transData.transform((x, high))
    return Bbox.from_extents(at - 2, bottom, at + 2, top)


def _rows(title: str, x: str, rows: Sequence[str], series: Sequence[Sequence[tuple[int, dict[str, Any], str, str]]], key: str = "") -> Any:
    """Draw rows of points with their intervals: of each series (row, score, colour, marker), two series as filled and hollow."""
    labels = [short(row) for row in rows]
    left = left_for(labels)
    axes = panel(title, x, "", left=left, bottom=0.66 if key else 0.52, width=max(WIDTH, 2.3 + left), height=1.15 + 0.26 * len(rows), key=key)
    for s, points in enumerate(series):
        shift = 0.0 if len(series) == 1 else 0.17 * (1 - 2 * s / (len(series) - 1))
        for row, score, color, marker in points:
            ends = (score.get("low"), score.get("high"))
            _bar(axes, score["mean"], row + shift, ends, color=color, marker=marker, fill=_FILLS[s % 2], across=True)
    axes.set_yticks(range(len(rows)), labels)
    axes.tick_params(axis="y", labelcolor=role("ink"), labelsize=8.5)
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.grid(axis="y", visible=True)
    axes.grid(axis="x", visible=True)
    return axes


def _by_loss(arms: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Return the losses that share a panel: two as filled and hollow markers, more than two one by one."""
    losses = list(dict.fromkeys(arm["loss"] for arm in arms))
    return [losses] if len(losses) <= 2 else [[loss] for loss in losses]


def _key(losses: Sequence[str]) -> str:
    return f"filled {short(losses[0])}, hollow {short(losses[1])}" if len(losses) == 2 else ""


def _gains(content: dict[str, Any], colors: Palette) -> Iterable[Figure]:
    students = {arm["id"]: arm for arm in _students(content, colors)}
    by_id = {arm["id"]: arm for arm in arms_of(content)}
    gains = [g for g in content.get("gains") or [] if g["arm"] in students and g["score"].endswith("/overall")]
    cells = _cells(
        [students[g["arm"]] | {"gain": g, "against": against(g, by_id), "score": g["score"]} for g in gains], "against", "student", "samples", "score"
    )
    order = list(students)
    number = 0
    for cell, arms in cells:
        arms.sort(key=lambda arm: order.index(arm["id"]))
        for losses in _by_loss(arms):
            number += 1
            shown = [arm for arm in arms if arm["loss"] in losses]
            rows = list(dict.fromkeys(map(taught_by, shown)))
            series = [
                [
                    (rows.index(taught_by(a)), a["gain"] | {"mean": a["gain"]["difference"]}, colors.color(taught_by(a)), colors.marker(taught_by(a)))
                    for a in shown
                    if a["loss"] == loss
                ]
                for loss in losses
            ]
            more = _titled({name: cell[name] for name in ("student", "samples", "score")}, [c for c, _ in cells])
            title = ", ".join(part for part in (f"over {cell['against']}", more, losses[0] if len(losses) == 1 else "") if part)
            axes = _rows(title, "points of VQA", rows, series, _key(losses))
            axes.axvline(0, color=role("none"), linewidth=1, zorder=1)
            said = "; ".join(f"{taught_by(a)} by {a['loss']} {_range(a['gain'] | {'mean': a['gain']['difference']})}" for a in shown)
            yield Figure(f"gains-{number}", title, f"Points of VQA that students have {title}, paired by seed: {said}.", axes.figure)


def _kinds(content: dict[str, Any], colors: Palette) -> Iterable[Figure]:
    students = _students(content, colors)
    number = 0
    cells = _cells(students, "student", "samples")
    for cell, arms in cells:
        for kind in kind_scores(arms):
            for losses in _by_loss(arms):
                number += 1
                shown = [arm for arm in arms if arm["loss"] in losses and kind in arm["scores"]]
                none, asked = (_control(content, name, cell) for name in (NO_TEACHER, QUESTION_ONLY))
                rows = [NO_TEACHER] * bool(none and kind in none["scores"]) + list(dict.fromkeys(map(taught_by, shown)))
                series = [
                    [(rows.index(taught_by(a)), a["scores"][kind], colors.color(taught_by(a)), colors.marker(taught_by(a))) for a in shown if a["loss"] == loss]
                    for loss in losses
                ]
                if none and kind in none["scores"]:
                    series[0].append((0, none["scores"][kind], role("none"), "o"))
                title = _titled(cell, [c for c, _ in cells], kind.split("/", 2)[2]) + (f", {losses[0]}" if len(_by_loss(arms)) > 1 else "")
                axes = _rows(title, "accuracy (%)", rows, series, _key(losses))
                said = [f"{taught_by(a)} by {a['loss']} {_range(a['scores'][kind])}" for a in shown]
                said += [f"{name} {_range(c['scores'][kind])}" for name, c in ((NO_TEACHER, none), (QUESTION_ONLY, asked)) if c and kind in c["scores"]]
                if asked and kind in asked["scores"]:
                    axes.axvline(asked["scores"][kind]["mean"], color=role("none"), linewidth=1, linestyle=(0, (1.5, 2)), zorder=1)
                    note = axes.annotate(
                        "question-only", (asked["scores"][kind]["mean"], 1), xycoords=("data", "axes fraction"), xytext=(3, -1), textcoords="offset points"
                    )
                    note.set(va="top", fontsize=7.5, color=role("muted"))
                yield Figure(f"kinds-{number}", title, f"VQA accuracy on questions of kind {title}: {'; '.join(said)}.", axes.figure)


def _curves(content: dict[str, Any], colors: Palette) -> Iterable[Figure]:
    curves = mean_curves(content)
    cells = _cells([arm for arm in _students(content, colors) if arm["id"] in curves], "loss", "student", "samples")
    for i, (cell, arms) in enumerate(cells):
        title = _titled(cell, [c for c, _ in cells]) or str(cell["loss"])
        axes = panel(title, "samples seen", "training loss", right=1.3)
        none = _control(content, NO_TEACHER, cell)
        ends, said = [], []
        for arm in [*([none] if none and none["id"] in curves else []), *arms]:
            name = taught_by(arm)
            color = colors.color(name)
            x, mean, low, high = zip(*curves[arm["id"]], strict=True)
            axes.fill_between(x, low, high, color=color, alpha=0.16, linewidth=0)
            axes.plot(x, mean, color=color, linewidth=1.4, linestyle="-" if name in colors.role_of else (0, (4, 2)))
            ends.append((x[-1], mean[-1], name, color))
            said.append(f"{name} from {mean[0]:.3f} to {mean[-1]:.3f}")
        axes.set_xlim(0, max(x for x, *_ in ends))
        axes.xaxis.set_major_formatter(_counted)
        axes.spines["left"].set_visible(False)
        label_ends(axes, ends)
        yield Figure(f"curves-{i + 1}", title, f"Training loss over samples seen, means over seeds, {title}: {'; '.join(said)}.", axes.figure)


def _counted(value: float, place: int) -> str:
    return f"{value / 1e6:g}M" if value >= 1e6 else f"{value / 1e3:g}k" if value >= 1e3 else f"{value:g}"


def _cost(content: dict[str, Any], colors: Palette) -> Iterable[Figure]:
    students = [a for a in _students(content, colors) if taught_by(a) in colors.role_of and (a.get("cost") or {}).get("seconds") is not None]
    sets = [name for name in overall_scores(students) if name.startswith("vqa/")]
    cells = [(cell | {"score": name}, arms) for name in sets for cell, arms in _cells([a for a in students if name in a["scores"]], "loss", "student")]
    for i, (cell, arms) in enumerate(cells):
        lengths = {arm["samples"] for arm in arms}
        none = [c for n in sorted(lengths) if (c := _control(content, NO_TEACHER, {"student": cell["student"], "samples": n})) and cell["score"] in c["scores"]]
        shown = [*none, *arms]
        unit, per = ("hours", 3600.0) if max(map(_seconds, shown)) > 7200 else ("minutes", 60.0)
        title = _titled(cell | {"score": score_label(cell["score"])}, [c | {"score": score_label(c["score"])} for c, _ in cells]) or str(cell["loss"])
        axes = panel(title, f"{unit}: a student and its share of the store", "student's VQA accuracy (%)", right=0.4)
        scores = [arm["scores"][cell["score"]] for arm in shown]
        axes.set_xlim(*_padded([_seconds(arm) / per for arm in shown], 0.12))
        axes.set_ylim(*_padded([x for s in scores for x in (s["mean"], s.get("low"), s.get("high")) if x is not None], 0.08))
        taken, points, said = [], [], []
        for arm, score in zip(shown, scores, strict=True):
            name = taught_by(arm) + (f", {_counted(arm['samples'], 0)}" if len(lengths) > 1 else "")
            x, ends = _seconds(arm) / per, (score.get("low"), score.get("high"))
            _bar(axes, x, score["mean"], ends, color=colors.color(taught_by(arm)), marker=colors.marker(taught_by(arm)))
            if ends[0] is not None:
                taken.append(_upright(axes, x, score["low"], score["high"]))
            points.append((x, score["mean"], name))
            said.append(f"{name}: {_range(score)} for {x:.2f} {unit}")
        label_points(axes, points, taken)
        yield Figure(f"cost-{i + 1}", title, f"Students' VQA over what they cost, {title}. {'; '.join(said)}.", axes.figure)


def _seconds(arm: dict[str, Any]) -> float:
    return float(arm["cost"]["seconds"]) + float(arm["cost"].get("teacher_seconds") or 0)


def _prediction(content: dict[str, Any], colors: Palette) -> Iterable[Figure]:
    found = sorted((p for p in content.get("prediction") or [] if p.get("rho") is not None), key=lambda p: abs(p["rho"]))
    if not found:
        return
    points = [(i, p | {"mean": p["rho"]}, role("accent") if p.get("beats_strength") else role("none"), "o") for i, p in enumerate(found)]
    title = "Spearman's rho with the students' VQA"
    axes = _rows(title, "rho", [measure_label(p["measure"]) for p in found], [points], "blue: better than strength")
    axes.set_xlim(-1.05, 1.05)
    axes.axvline(0, color=role("none"), linewidth=1, zorder=1)
    said = "; ".join(f"{measure_label(p['measure'])} {_range(p | {'mean': p['rho']}, 2)}" for p in reversed(found))
    yield Figure("prediction", title, f"{title}, strongest first: {said}.", axes.figure)


def _spectra(content: dict[str, Any], colors: Palette) -> Iterable[Figure]:
    spectra = {t: [x / sum(values) for x in values] for t, values in ((content.get("diagnostics") or {}).get("spectra") or {}).items() if sum(values) > 0}
    if not spectra:
        return
    axes = panel("Spectra of image embeddings", "component", "share of the variance", left=0.8, right=1.3)
    ends, said = [], []
    for teacher, values in sorted(spectra.items(), key=lambda item: list(colors.role_of).index(item[0]) if item[0] in colors.role_of else -1):
        shown = [(i, value) for i, value in enumerate(values, start=1) if value >= 1e-6]  # below that, rounding
        axes.plot(*zip(*shown, strict=True), color=colors.color(teacher), linewidth=1.5)
        ends.append((*shown[-1], teacher, colors.color(teacher)))
        half = next(n for n in range(1, len(values) + 1) if sum(values[:n]) >= 0.5)
        said.append(f"{teacher} has half of its variance in {half} of {len(values)}")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(1, max(x for x, *_ in ends))
    axes.xaxis.set_major_formatter(_counted)
    axes.yaxis.set_major_formatter(lambda value, place: f"{100 * value:g}%")
    axes.minorticks_off()
    label_ends(axes, ends)
    yield Figure("spectra", "Spectra", f"Share of the variance by component: {'; '.join(said)}.", axes.figure)


def _agreement(content: dict[str, Any], colors: Palette) -> Iterable[Figure]:
    for i, (name, found) in enumerate(((content.get("diagnostics") or {}).get("agreement") or {}).items()):
        measure = measure_label(name)
        names, matrix = [short(name, 16) for name in found["names"]], found["matrix"]
        known = [x for row in matrix for x in row if x is not None and math.isfinite(x)]
        low, high = min(known, default=0.0), max(known, default=1.0)
        left, side = left_for(names), 0.46 * len(names)
        axes = panel(measure, "", "", left=left, bottom=left, width=left + side + 0.15, height=side + 0.36 + left)
        axes.set(xlim=(-0.5, len(names) - 0.5), ylim=(len(names) - 0.5, -0.5))
        axes.grid(visible=False)
        axes.spines["bottom"].set_visible(False)
        axes.set_xticks(range(len(names)), names, fontsize=8, rotation=90)
        axes.set_yticks(range(len(names)), names, fontsize=8)
        axes.tick_params(length=0, labelcolor=role("ink"))
        for row, values in enumerate(matrix):
            for column, value in enumerate(values):
                if value is not None:
                    step = round((value - low) / ((high - low) or 1) * (HEAT_STEPS - 1))
                    axes.bar(column, 0.94, 0.94, row - 0.47, color=colors.roles[f"heat{step}"][0], linewidth=0)
                    axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=7.5, color=role("ink"))
        pairs = sorted((matrix[a][b], found["names"][a], found["names"][b]) for a in range(len(names)) for b in range(a) if matrix[a][b] is not None)
        said = (
            f" Most alike: {pairs[-1][1]} and {pairs[-1][2]}, {pairs[-1][0]:.2f}; least: {pairs[0][1]} and {pairs[0][2]}, {pairs[0][0]:.2f}." if pairs else ""
        )
        yield Figure(f"agreement-{i + 1}", measure, f"Heat map of the agreement of {len(names)} teachers by {measure}.{said}", axes.figure)

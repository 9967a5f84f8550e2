"""The report of a study: one HTML page that opens offline, and its tables and figures as files beside it.

Whatever is missing from the content is missing from the page. Names, sentences and commands are a stranger's: the template escapes them, and the page's
own policy forbids every request and every script but the one whose digest it names.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

import kdstore
from kdstore.jsonfile import disk_errors, make_folders, write_bytes
from kdstore.study.drawing import Figure, Palette, inline_svg
from kdstore.study.figures import all_figures, palette_of, write_figures
from kdstore.study.tables import all_tables, arm_label, arms_of, measure_label, score_label, write_tables
from kdstore.study.tabular import Cell, Table, brief, cells

_TONES = {"monotone": "good", "holds": "good", "yes": "good", "not monotone": "bad", "fails": "bad", "not decidable": "open", "not run": "open"}


@dataclass(frozen=True)
class Section:
    """A part of the page: `figures` and `behind` name what all_figures and all_tables return; tables behind figures are folded, `shown` ones are not."""

    id: str
    title: str
    lead: str
    figures: str = ""
    shown: tuple[str, ...] = ()
    behind: tuple[str, ...] = ()


SECTIONS = (
    Section(
        "strength",
        "Teacher strength and student",
        "Each point is the student of one teacher: its mean over seeds with the 95 % interval, and a short line per seed. If better teachers made better "
        "students, points would only rise to the right. Dashed line and band: the student without a teacher. Star: taught by a teacher of its own size.",
        "strength",
        ("verdicts", "inversions"),
        ("strength",),
    ),
    Section("scores", "All scores", "Every arm of the study under one protocol. Choose a column's title to sort by it.", shown=("arms",)),
    Section(
        "gains",
        "What a teacher adds",
        "Differences within the same seed, so that the luck of the first weights and of the batches drops out. An interval that holds 0 says nothing.",
        "gains",
        behind=("gains",),
    ),
    Section("kinds", "Kinds of question", "Where a gain comes from. The dotted line is the same head without an image.", "kinds", behind=("kinds",)),
    Section(
        "curves",
        "Learning curves",
        "Means over seeds; the band spans them. A lower loss is no better student: each loss has its own scale, and its own teacher to match.",
        "curves",
        behind=("curves",),
    ),
    Section(
        "cost", "Score and cost", "The time to train a student, and its share of the time in which its teacher's store was made.", "cost", behind=("cost",)
    ),
    Section(
        "prediction",
        "What predicts the student",
        "How each measure of the teachers orders their students, beside the teachers' own strength; few teachers leave wide intervals.",
        "prediction",
        ("prediction",),
    ),
    Section(
        "diagnostics",
        "Diagnostics",
        "Measured on stores alone: of each teacher, and of each student beside its teacher.",
        shown=("diagnostics-teachers", "diagnostics-students"),
    ),
    Section("spectra", "Spectra", "How many directions the image embeddings of each teacher use.", "spectra", behind=("spectra",)),
    Section("agreement", "Agreement between teachers", "1 is the same geometry; the stronger the colour, the more alike.", "agreement", behind=("agreement-",)),
    Section("controls", "Controls", "What was expected was written down before the first run.", shown=("controls",)),
    Section("threats", "Threats to validity", ""),
    Section("failures", "Failures", "What failed can be run again; all else stands.", shown=("failures",)),
)


def write_report(folder: Path, content: dict[str, Any]) -> Path:
    """Write index.html, tables/ and figures/ into the folder and return the page; raises CannotWrite, DiskFull."""
    colors, page = palette_of(content), folder / "index.html"
    tables, figures = all_tables(content), all_figures(content, colors)
    with disk_errors(folder):
        make_folders(folder)
        write_tables(folder / "tables", tables.values())
        write_figures(folder / "figures", [figure for panels in figures.values() for figure in panels])
        write_bytes(page, render(content, tables, figures, colors).encode())
    return page


def render(content: dict[str, Any], tables: dict[str, Table], figures: dict[str, list[Figure]], colors: Palette) -> str:
    """Return the page."""
    arms = arms_of(content)
    sections = [found for found in (_found(section, tables, figures, content) for section in SECTIONS) if found]
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["tone"] = lambda text: _TONES.get(text, "")
    environment.filters["signed"] = lambda text: text.replace("-", "\N{MINUS SIGN}")
    environment.filters["label"] = measure_label
    script = _resource("report.js")
    return environment.from_string(_resource("report.html")).render(
        content=content,
        headline=content.get("headline") or {},
        warnings=_warnings(content),
        facts=_facts(content),
        sections=sections,
        tables={name: brief(table) for name, table in tables.items()},
        panels={name: [(figure, Markup(inline_svg(figure, colors))) for figure in panels] for name, panels in figures.items()},
        sources=[(arm, arm_label(arm), _by_seed(arm)) for arm in arms],
        place={arm["id"]: f"source-{i}" for i, arm in enumerate(arms)},
        colors=colors,
        explained=(content.get("diagnostics") or {}).get("explained") or {},
        recipe=json.dumps(content.get("recipe") or {}, indent=1, ensure_ascii=False),
        script=Markup(script),
        policy=f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}",
        version=kdstore.__version__,
    )


def _resource(name: str) -> str:
    return files("kdstore.study").joinpath(name).read_text(encoding="utf-8")


def _found(section: Section, tables: dict[str, Table], figures: dict[str, list[Figure]], content: dict[str, Any]) -> Section | None:
    """Return the section with the names of the tables that are there; None if nothing of it is."""
    shown, behind = (
        tuple(name for name in tables for wanted in names if name == wanted or (wanted.endswith("-") and name.startswith(wanted)))
        for names in (section.shown, section.behind)
    )
    if not (shown or figures.get(section.figures) or (section.id == "threats" and content.get("threats"))):
        return None
    return replace(section, shown=tuple(sorted(shown, key=section.shown.index)), behind=behind)


def _warnings(content: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Return (where on the page, what, why) of all that makes the verdict doubtful."""
    found = []
    for control in content.get("controls") or []:
        if control["verdict"] == "fails":
            found.append(("controls", f"The control {control['name']} misbehaves.", control["why"] or control["found"]))
    found += [("threats", "What was expected was changed.", said) for said in content.get("changed") or []]
    found += [("threats", "Results are compared that were not made alike.", said) for said in content.get("unlike") or []]
    left_out = [control["name"] for control in content.get("controls") or [] if control["verdict"] == "not run"]
    if left_out:
        found.append(("controls", f"Not run: {', '.join(left_out)}.", "What they would have shown is not known."))
    finished = content.get("finished") or {}
    failed, missing = finished.get("failed", 0), finished.get("missing", 0)
    if failed or missing:
        total = finished.get("done", 0) + failed + missing
        said = f"{finished.get('done', 0):,} of {total:,} tasks are done, {failed:,} failed and {missing:,} are missing."
        found.append(("failures" if content.get("failures") else "provenance", "The study is not whole.", said))
    return found


def _facts(content: dict[str, Any]) -> list[tuple[str, str]]:
    """Return (number, of what) of the grid as it was found."""
    students = [arm for arm in arms_of(content) if arm["kind"] == "student"]
    sets = {name.split("/")[1] for arm in students for name in arm["scores"] if name.startswith("vqa/")}
    recipe = (content.get("recipe") or {}).get("teachers")
    counted = {
        "teacher": {arm["teacher"] for arm in students if not recipe or arm["teacher"] in recipe},
        "student": {arm["student"] for arm in students},
        "loss": {arm["loss"] for arm in students},
        "schedule": {arm["samples"] for arm in students},
        "seed": {seed for arm in students for seed in arm["seeds"]},
        "VQA set": sets,
    }
    return [(str(len(values)), what if len(values) == 1 else f"{what}es" if what == "loss" else f"{what}s") for what, values in counted.items() if values]


def _by_seed(arm: dict[str, Any]) -> Table:
    rows = [
        (*cells(score_label(name)), Cell(value=score["mean"], low=score.get("low"), high=score.get("high")), *cells(_seeds(score)))
        for name, score in arm["scores"].items()
    ]
    return Table("", "", ("score", "mean", "by seed"), tuple(rows))


def _seeds(score: dict[str, Any]) -> str:
    values: Sequence[float] = score.get("by_seed") or []
    return ", ".join(f"{value:.2f}" for value in values)

"""What a study cannot tell, and why: said of its own recipe and numbers, each only where it applies.

T teachers; strengths and scores are in percent.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from kdstore.study.verdict import counted

FEWEST_TEACHERS = 5  # with fewer, no rank correlation reaches 5 % (Spearman's exact test)
FEWEST_SEEDS = 3
APART = 8.0  # points of recall between neighbouring teachers, from which a ladder is one
SATURATED = 95.0

Threat = dict[str, str]


def threats(content: dict[str, Any], margin: float) -> list[Threat]:
    """Return the threats to the validity of a study, from the rest of its content, the most serious first."""
    found = (*_controls(content), *_size(content), *_teachers(content, margin), *_data(content), *_protocol(content))
    return [{"title": title, "text": text} for title, text in found]


def _controls(content: dict[str, Any]) -> Iterator[tuple[str, str]]:
    failing = [control["name"] for control in content["controls"] if control["verdict"] == "fails"]
    absent = [control["name"] for control in content["controls"] if control["verdict"] == "not run"]
    if content["changed"]:
        yield "Expectations were changed", " ".join([*content["changed"], "Who sets them after numbers can be seen, chooses the verdict."])
    if content["unlike"]:
        yield "Results were not made alike", " ".join([*content["unlike"], "A difference between them may be due to that."])
    if failing:
        yield "Controls misbehave", f"Not as expected before the run: {_listed(failing)}. Until that is explained, no conclusion below is safe."
    if absent:
        yield "Controls are missing", f"Without {_listed(absent)}, what these rule out is not ruled out."
    finished = content["finished"]
    if finished["missing"] or finished["failed"]:
        left = finished["missing"] + finished["failed"]
        yield "The study is not whole", f"{left} of {finished['done'] + left} tasks are not done: means are over the seeds that are, and may move."


def _size(content: dict[str, Any]) -> Iterator[tuple[str, str]]:
    grid, teachers = content["recipe"]["study"], content["recipe"]["teachers"]
    if len(teachers) < FEWEST_TEACHERS:
        text = (
            f"{counted(len(teachers), 'teacher')}: no order of students can be significant over teachers in general; what is said holds for these checkpoints."
        )
        yield "Few teachers", text
    if len(grid["seeds"]) < FEWEST_SEEDS:
        yield "Few seeds", f"{counted(len(grid['seeds']), 'seed')}: what a seed does is hardly known, and intervals are wide or absent."
    if len(content["recipe"]["students"]) == 1:
        yield "One student", "A student of another size or kind may order the teachers otherwise."
    if len(grid["samples"]) == 1:
        yield "One schedule length", "Gains of distillation often vanish with longer training; this study has one length."
    if len(grid["losses"]) == 1:
        yield "One loss", "What a teacher passes on depends on the loss; this study has one."


def _teachers(content: dict[str, Any], margin: float) -> Iterator[tuple[str, str]]:
    recalls = {arm["teacher"]: said for arm in content["arms"] if arm["kind"] == "teacher" and (said := arm["scores"].get("retrieval/t2i@1"))}
    ladder = sorted(recalls, key=lambda teacher: float(recalls[teacher]["mean"]))
    saturated = [teacher for teacher in ladder if recalls[teacher]["mean"] >= SATURATED]
    if saturated:
        yield "Saturated teachers", f"The recall of {_listed(saturated)} is {SATURATED:g} % or more: the test set cannot tell how strong they are."
    near = [(a, b) for a, b in pairwise(ladder) if recalls[b]["mean"] - recalls[a]["mean"] < APART]
    tied = [(a, b) for a, b in near if recalls[a]["high"] is not None and recalls[b]["low"] is not None and recalls[a]["high"] >= recalls[b]["low"]]
    if tied:
        text = f"The intervals of the recall of {_listed([f'{a} and {b}' for a, b in tied])} overlap: their order in strength may be chance."
        yield "Teachers closer than their noise", text
    apart = [f"{a} and {b}" for a, b in near if (a, b) not in tied]
    if apart:
        yield "Teachers close together", f"{_listed(apart)} are less than {APART:g} points of recall apart: a ladder of small steps needs more seeds."
    parameters = {arm["teacher"]: arm["parameters"] for arm in content["arms"] if arm["kind"] == "teacher" and arm["parameters"]}
    students = {arm["student"]: arm["parameters"] for arm in content["arms"] if arm["kind"] == "student" and arm["parameters"]}
    for student, own in students.items():
        size = own["without_token_embedding"]
        smaller = [teacher for teacher, count in parameters.items() if count["without_token_embedding"] <= size]
        if smaller:
            yield "A student as large as its teacher", f"{student} has at least the parameters of {_listed(smaller)}: there is no capacity gap to cross."
    for student in {arm["student"] for arm in content["arms"] if arm["kind"] == "student"}:
        gains = [gain for gain in content["gains"] if gain["arm"].split("|")[1] == student and gain["against"].startswith("control|no teacher|")]
        small = [gain for gain in gains if gain["score"].startswith("vqa/") and gain["high"] is not None and gain["high"] < margin]
        if small and len(small) == len([gain for gain in gains if gain["score"].startswith("vqa/")]):
            text = f"No teacher brings {student} {margin:g} points of VQA over training alone: an order of teachers that teach nothing says nothing."
            yield "Nothing was taught", text


def _data(content: dict[str, Any]) -> Iterator[tuple[str, str]]:
    grid = content["recipe"]["study"]
    if grid["data"].startswith("scenes"):
        yield "A synthetic world", "All images are drawn by one program with few words; real images and captions may order the teachers otherwise."
    if len(grid["vqa"]) == 1:
        yield "One data set of questions", f"All answers are about {grid['vqa'][0]}; others ask for other things."


def _protocol(content: dict[str, Any]) -> Iterator[tuple[str, str]]:
    recipe = content["recipe"]
    if not recipe["sweep"]:
        text = "No setting was swept: each loss and teacher has the same learning rate and weights, which may suit some better than others."
        yield "No sweep", text
    if not content["diagnostics"]["teachers"]:
        yield "No diagnostics", "Nothing measured here says why a teacher is a good one: name [study] probes."
    elif len(recipe["teachers"]) < 6:
        text = f"{counted(len(recipe['teachers']), 'teacher')}: among so many measures one is found by chance that orders them as their students."
        yield "Many measures, few teachers", text


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"

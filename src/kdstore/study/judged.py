"""Controls judged by what was written down before the run: the differences that CONTROLS names, measured, and whether they are as expected.

A difference is judged as a number, without regard to its interval: a tolerance is there to allow for noise, and whoever sets it says so beforehand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from kdstore.study.controls import CONTROLS, RECALL, VQA, Control, Expected
from kdstore.study.grid import Arm, Plan
from kdstore.study.scores import Score, common_seeds

CHANCE = "chance"

Scores = Mapping[str, Mapping[str, Score]]
"""Arm id -> score -> values by seed."""


@dataclass(frozen=True)
class Found:
    """One difference in points, the mean over the seeds that both sides have, and whether it is as expected."""

    expected: Expected
    label: str
    score: str
    difference: float
    holds: bool


def judge_controls(plan: Plan, scores: Scores, chance: Mapping[str, Mapping[str, float]], without: tuple[str, ...], margin: float) -> list[dict[str, Any]]:
    """Return a record of every control; `chance` is what the best constant answer scores, by data set and kind of question."""
    return [_judge(name, control, plan, scores, chance, name in without, margin) for name, control in CONTROLS.items()]


def _judge(name: str, control: Control, plan: Plan, scores: Scores, chance: Mapping[str, Mapping[str, float]], left_out: bool, margin: float) -> dict[str, Any]:
    record = {"name": name, "expected": control.expected, "tolerance": _tolerance(control, margin)}
    if left_out:
        return record | {"found": "", "verdict": "not run", "why": "The recipe leaves it out."}
    if not control.differences:
        there = any(scores[arm.id] for arm in plan.arms if arm.control == name)
        found = "It is a reference: its gains stand in their table." if there else ""
        return record | {"found": found, "verdict": "holds" if there else "not run", "why": "" if there else "It is not finished."}
    measured = [found for expected in control.differences for found in _differences(expected, plan, scores, chance, margin)]
    missing = [expected for expected in control.differences if not any(found.expected == expected for found in measured) and not expected.only]
    if not measured or missing:
        return record | {"found": " ".join(map(_said, _worst(measured))), "verdict": "not run", "why": "It is not finished."}
    failing = [found for found in measured if not found.holds]
    why = f"{len(failing)} of {len(measured)} differences are not as expected, such as: {_said(_worst(failing)[0])}" if failing else ""
    return record | {"found": " ".join(map(_said, _worst(measured))), "verdict": "fails" if failing else "holds", "why": why}


def _differences(expected: Expected, plan: Plan, scores: Scores, chance: Mapping[str, Mapping[str, float]], margin: float) -> Iterator[Found]:
    """Yield a difference for each two arms that go together, and each score that both have."""
    for arm in _arms(plan, expected.of):
        of = {name: score for name, score in scores[arm.id].items() if _wanted(name, expected)}
        if expected.against == CHANCE:
            for name, score in of.items():
                _, dataset, kind = name.split("/", 2)
                constant = chance.get(dataset, {}).get(kind)
                if constant is not None and kind != "overall":  # the best constant answer to all kinds is below the best to each
                    yield _found(expected, f"{expected.of} ({kind})", name, [value.value - constant for value in score.values()], margin)
            continue
        for other in _arms(plan, expected.against):
            if _together(arm, other):
                for name, score in of.items():
                    against = scores[other.id].get(name, {})
                    if not name.startswith("vqa/") or name.endswith("/overall"):
                        seeds = common_seeds([score, against])
                        if seeds:
                            differences = [score[seed].value - against[seed].value for seed in seeds]
                            yield _found(expected, _named(arm, expected), name, differences, margin)


def _found(expected: Expected, label: str, score: str, differences: list[float], margin: float) -> Found:
    difference = float(np.mean(differences))
    return Found(expected, label, score, difference, expected.holds(difference, margin))


def _arms(plan: Plan, name: str) -> list[Arm]:
    """Return the arms that a name of Expected stands for; of the born-again control the students, not their teacher."""
    kinds: dict[str, Callable[[Arm], bool]] = {"student": lambda arm: arm.kind == "student", "teacher": lambda arm: arm.kind == "teacher"}
    return [arm for arm in plan.arms if kinds.get(name, lambda arm: arm.control == name)(arm)]


def _together(a: Arm, b: Arm) -> bool:
    """Tell whether two arms are of one student, loss and length, as far as both have such; a student goes with its own teacher."""
    if "teacher" in (a.kind, b.kind) and "student" in (a.kind, b.kind):
        return a.teacher == b.teacher
    both = ((a.student, b.student), (a.loss, b.loss), (a.samples, b.samples))
    return all(x is None or y is None or x == y for x, y in both)


def _wanted(score: str, expected: Expected) -> bool:
    family, _, rest = score.partition("/")
    if family == RECALL:
        return RECALL in expected.scores and rest == "t2i@1"
    return VQA in expected.scores and (not expected.only or rest.partition("/")[0] in expected.only)


def _worst(found: list[Found]) -> list[Found]:
    """Return of each expected difference the one that is furthest off."""
    worst: dict[Expected, Found] = {}
    for one in found:
        if one.expected not in worst or _off(one) > _off(worst[one.expected]):
            worst[one.expected] = one
    return list(worst.values())


def _off(found: Found) -> float:
    return {"above": -found.difference, "not above": found.difference, "near": abs(found.difference)}[found.expected.outcome]


def _said(found: Found) -> str:
    expected = found.expected
    way = "above" if found.difference >= 0 else "below"
    return f"{found.label}: {abs(found.difference):.1f} points {way} {expected.against} in {found.score} (expected {expected.outcome} it)."


def _named(arm: Arm, expected: Expected) -> str:
    """Name an arm in a sentence: what it is, and of which cell."""
    said = [str(value) for value in (arm.teacher if arm.kind != "control" else None, arm.student, arm.loss, arm.samples) if value is not None]
    return f"{expected.of} ({', '.join(said)})" if said else expected.of


def _tolerance(control: Control, margin: float) -> str:
    points = sorted({expected.points(margin) for expected in control.differences})
    return " and ".join(f"{value:g} point{'' if value == 1 else 's'}" for value in points) or "none"

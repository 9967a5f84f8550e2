"""The controls of every study, with what is expected of each and how far it may be off: written down, and copied into study.json, before the first task runs.

A control is judged by differences of scores in points, each the mean over paired seeds: `of` minus `against`, which are names of controls, `student`
(every student of a teacher), `teacher` (each teacher itself), or `chance` (the best constant answer per kind of question). A difference `is` as expected by
one of the predicates of HOLDS. Which losses, students and lengths: all that both sides have.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

HOLDS: dict[str, Callable[[float, float], bool]] = {
    "above": lambda difference, tolerance: difference > tolerance,
    "not above": lambda difference, tolerance: difference <= tolerance,
    "near": lambda difference, tolerance: abs(difference) <= tolerance,
}
VQA, RECALL = "vqa", "retrieval"


@dataclass(frozen=True)
class Expected:
    """One difference; a `tolerance` of None is the study's margin. `only` names the data sets of which it is expected, none: all."""

    of: str
    against: str
    outcome: str  # of HOLDS
    tolerance: float | None = None
    scores: tuple[str, ...] = (VQA,)
    only: tuple[str, ...] = ()

    def holds(self, difference: float, margin: float) -> bool:
        """Tell whether a difference in points is as expected."""
        return HOLDS[self.outcome](difference, self.points(margin))

    def points(self, margin: float) -> float:
        """Return the tolerance in points."""
        return margin if self.tolerance is None else self.tolerance


@dataclass(frozen=True)
class Control:
    """How a control is made, what is expected of it and why, and the differences that say whether it is so (none: it is a reference)."""

    made: str
    expected: str
    differences: tuple[Expected, ...]


CONTROLS: dict[str, Control] = {
    "no teacher": Control(
        "the student learns from the pairs alone",
        "the baseline; its features help to answer, so it is above the same head without an image",
        (Expected("no teacher", "question-only", "above", 0.0),),
    ),
    "untrained student": Control(
        "the head on the student's architecture with random weights",
        "the floor: training without a teacher is above it",
        (Expected("no teacher", "untrained student", "above", 0.0),),
    ),
    "question-only": Control(
        "the head without an image",
        "within 3 points of chance where questions are balanced (scenes); elsewhere, where they can be guessed, not above the untrained student by the margin",
        (Expected("question-only", "chance", "near", 3.0, only=("scenes",)), Expected("question-only", "untrained student", "not above")),
    ),
    "vocabulary oracle": Control(
        "the best answer that the vocabulary has to each question",
        "the ceiling: nothing is above it",
        (Expected("student", "vocabulary oracle", "not above", 0.0), Expected("teacher", "vocabulary oracle", "not above", 0.0)),
    ),
    "random teacher": Control(
        "students of a teacher with random weights, of the first teacher's architecture",
        "not above no teacher by more than the margin: it has nothing to teach",
        (Expected("random teacher", "no teacher", "not above", scores=(VQA, RECALL)),),
    ),
    "permuted targets": Control(
        "students of the first teacher, its image and text targets permuted independently",
        "not above no teacher by more than the margin: it has the targets' statistics without what they say of a pair",
        (Expected("permuted targets", "no teacher", "not above", scores=(VQA, RECALL)),),
    ),
    "born-again": Control(
        "students of a teacher of their own architecture, which was trained alone",
        "whatever it is: what it has over no teacher is the gain of softer labels, and a stronger teacher's is counted from here",
        (),
    ),
    "teacher itself": Control(
        "every teacher under the students' own protocol",
        "the bar to reach: no student is above its own teacher by more than the margin",
        (Expected("student", "teacher", "not above", scores=(VQA, RECALL)),),
    ),
}


def controls_record() -> dict[str, Any]:
    """Return all controls as JSON."""
    return {name: asdict(control) for name, control in CONTROLS.items()}

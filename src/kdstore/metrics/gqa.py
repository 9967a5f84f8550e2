"""GQA by its published evaluator: accuracy and what it says about consistency, validity, plausibility, distribution and grounding.

Answers are compared as strings as they are; common toolkits ignore case and punctuation and so report more. All scores are over balanced
questions; unbalanced ones are there to be entailed. What the given questions cannot tell is left out of the aggregate: consistency, if an
entailed question is not among them; validity and plausibility without `choices`; distribution without a group.

Quirks kept: the scene as a whole is never a region of grounding; answers that are never right are ignored in the distribution; the
mean of nothing is 0. The evaluator's object attention cannot run and is not offered.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from kdstore.errors import EvaluationError
from kdstore.metrics.scores import Question, QuestionId, Scores, by_id, check_same_ids, extra_of, field_of, gold_of, scores_of

COMMON = frozenset({"color", "material", "shape"})
_NO_STEP = ("exist", "query: name", "choose name")


def score_gqa(question_of: Mapping[QuestionId, Question], predictions: Mapping[QuestionId, str], version: str) -> Scores:
    """Score the balanced questions: `accuracy`, `binary` and `open`, and what else can be told; `distribution` is lower for better."""
    balanced = _balanced(question_of)
    right = {i: float(predictions[i] == gold_of(question)) for i, question in question_of.items()}
    types = {i: extra_of(question, "types") for i, question in balanced.items()}
    is_open = {i: kind["structural"] == "query" for i, kind in types.items()}
    others = {
        "binary": _percent(right[i] for i in balanced if not is_open[i]),
        "open": _percent(right[i] for i in balanced if is_open[i]),
    }
    entailed = {i: [e for e in extra_of(question, "entailed") if e != i] for i, question in balanced.items()}
    if all(e in right for of_question in entailed.values() for e in of_question):
        others["consistency"] = _percent(_mean([right[e] for e in entailed[i]]) for i in balanced if right[i] and entailed[i])
    if all("choices" in question["extra"] for question in balanced.values()):
        for name, field in (("validity", "valid"), ("plausibility", "plausible")):
            others[name] = _percent(_belongs(predictions[i], question, field) for i, question in balanced.items())
    group_of = {i: group for i, question in balanced.items() if (group := extra_of(question, "groups")["global"]) is not None}
    if group_of:
        others["distribution"] = round(_chi_square(balanced, predictions, group_of) / 100, 2)
    breakdowns = {
        "accuracyPerStructuralType": {i: kind["structural"] for i, kind in types.items()},
        "accuracyPerSemanticType": {i: kind["semantic"] for i, kind in types.items()},
        "accuracyPerSteps": {i: str(num_steps(extra_of(question, "semantic"))) for i, question in balanced.items()},
        "accuracyPerLength": {i: str(len(field_of(question, "question", "question").split())) for i, question in balanced.items()},
    }
    return scores_of("gqa", version, {i: right[i] for i in balanced}, mean=_percent, breakdowns=breakdowns, others=others)


def gqa_grounding(
    questions: Iterable[Question], attentions: Mapping[QuestionId, Sequence[Sequence[float]]], scenes: Mapping[Any, Mapping[str, Any]], *, map_size: int = 7
) -> Scores:
    """Score how much attention falls on the objects that a balanced question and its full answer point at, in percent.

    `attentions` maps question ids to [map_size, map_size] weights, the first index from left to right; `scenes` maps the extra field `imageId`
    to `width`, `height` and `objects` (x, y, w, h in pixels). Overlapping objects count twice, so a question can exceed 100.
    Raises EvaluationError if an attention map is missing, superfluous, misshapen or not finite, or an object or scene is unknown.
    """
    balanced = _balanced(by_id(questions))
    check_same_ids(attentions, balanced)
    fractions = {}
    for question_id, question in balanced.items():
        weight_XY = np.asarray(attentions[question_id], np.float64)
        if weight_XY.shape != (map_size, map_size) or not np.isfinite(weight_XY).all():
            raise EvaluationError(
                f"The attention of question {question_id} has the shape {weight_XY.shape}; expected finite weights of shape ({map_size}, {map_size}).",
                "Correct the attention maps, or give their size as map_size.",
            )
        covered = (_covered(region, map_size) for region in _regions(question, scenes))
        fractions[question_id] = float(sum((weight_XY * share_XY).sum() for share_XY in covered))
    return scores_of("gqa-grounding", "official", fractions, main="grounding", mean=_percent)


def num_steps(program: Iterable[Mapping[str, Any]]) -> int:
    """Count the operations of a question's program (`semantic`) that are reasoning, not the asking at its end."""
    return sum(not any(word in f"{step['operation']}: {step['argument']}" for word in _NO_STEP) for step in program)


def _balanced(question_of: Mapping[QuestionId, Question]) -> dict[QuestionId, Question]:
    balanced = {i: question for i, question in question_of.items() if extra_of(question, "isBalanced")}
    if not balanced:
        raise EvaluationError(f"None of {len(question_of)} questions is balanced.", "GQA scores balanced questions: give those, with or without the others.")
    return balanced


def _belongs(prediction: str, question: Question, field: str) -> float:
    extra = question["extra"]
    return float(prediction in (COMMON if "Common" in extra["types"]["detailed"] else extra["choices"][field]))


def _chi_square(balanced: Mapping[QuestionId, Question], predictions: Mapping[QuestionId, str], group_of: Mapping[QuestionId, str]) -> float:
    """Return the chi-square distance of predicted from right answers within each group, weighted by the group's size."""
    gold: defaultdict[str, Counter[str]] = defaultdict(Counter)
    predicted: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for question_id, group in group_of.items():
        gold[group][gold_of(balanced[question_id])] += 1
        predicted[group][predictions[question_id]] += 1
    total = 0.0
    for group, expected in gold.items():
        total += sum(float(predicted[group][answer] - n) ** 2 / n for answer, n in expected.items()) * expected.total()
    return total / len(group_of)


def _regions(question: Question, scenes: Mapping[Any, Mapping[str, Any]]) -> list[tuple[float, float, float, float]]:
    """Return left, top, right and bottom of each object that is pointed at, relative to the image."""
    image, pointers = extra_of(question, "imageId"), extra_of(question, "annotations")
    named = [*pointers["question"].values(), *pointers["fullAnswer"].values()]
    if image not in scenes or any(name not in scenes[image]["objects"] for name in named):
        raise EvaluationError(f"Question {question['question_id']} points at objects that scene {image} does not have.", "Give the scene graphs of this split.")
    width, height, objects = (scenes[image][name] for name in ("width", "height", "objects"))
    boxes = [objects[name] for name in named]
    return [(b["x"] / width, b["y"] / height, (b["x"] + b["w"]) / width, (b["y"] + b["h"]) / height) for b in boxes]


def _covered(region: tuple[float, float, float, float], map_size: int) -> np.ndarray:
    """Return the share of each cell of the map that lies in the region, [map_size, map_size]."""
    left, top, right, bottom = region
    start, end = np.arange(map_size) / map_size, np.arange(1, map_size + 1) / map_size
    share_X = np.clip(np.minimum(end, right) - np.maximum(start, left), 0, None) * map_size
    share_Y = np.clip(np.minimum(end, bottom) - np.maximum(start, top), 0, None) * map_size
    return share_X[:, None] * share_Y[None, :]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _percent(fractions: Iterable[float]) -> float:
    """Return the mean in percent as the evaluator prints it: the mean of nothing is 0, and the product comes last."""
    return round(_mean(list(fractions)) * 100, 2)

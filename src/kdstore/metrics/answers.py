"""The metrics of question answering under one signature: `score_answers(metric, questions, predictions, version=...) -> Scores`.

`questions` are records (mappings) with

- `question_id`: any hashable, one per question (VizWiz: the image's name);
- `question` (GQA only), `question_type`, `answer_type`: texts;
- `answers`: a list of records with `answer` and `answer_id` (further fields are ignored). Where a data set has one answer it stands there once, or repeated;
- `extra`: a mapping with what only this data set's metric needs, under the names of the published files:

| metric | versions (default first) | `extra` |
| --- | --- | --- |
| `vqa` (VQA v1, VQA v2, OK-VQA) | `2021`, `2016`, `m4c` | `multiple_choices`, for multiple-choice tasks alone |
| `textvqa`, `stvqa` | `official` | |
| `anls` | `inclusive`, `strict`, `m4c` | |
| `vizwiz` | `curly`, `straight` | |
| `vizwiz-answerability` | `official` | `answerable` (0 or 1); a prediction is a number, 1 for answerable |
| `aokvqa` | `official` | `difficult_direct_answer` |
| `aokvqa-choice` | `official` | `choices`, `correct_choice_idx` |
| `gqa` | `official` | `isBalanced`, `types`, `groups`, `entailed`, `semantic`; `choices` (`valid`, `plausible`) where there is one |
| `clevr` | `official` | `question_family_index` |
| `nlvr2` | `official` | `identifier` |
| `exact` (DAQUAR, easy-VQA and the like) | `official` | |

`predictions` maps question ids to answers (`predictions_of` reads official result records: of a repeated id the last wins). There must be one for
each question and none besides. A version is one of the behaviours that circulate under a metric's name; a score without it means nothing, so it is in
the result (`Scores.version`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from kdstore.errors import EvaluationError, UnknownName
from kdstore.metrics.aokvqa import score_aokvqa, score_aokvqa_choice
from kdstore.metrics.exact import score_clevr, score_exact, score_nlvr2
from kdstore.metrics.gqa import score_gqa
from kdstore.metrics.scores import Question, QuestionId, Scores, by_id, check_same_ids, field_of
from kdstore.metrics.textvqa import ANLS_VERSIONS, score_anls, score_stvqa, score_textvqa
from kdstore.metrics.vizwiz import VIZWIZ_VERSIONS, score_vizwiz, score_vizwiz_answerability
from kdstore.metrics.vqa import VERSIONS, score_vqa


@dataclass(frozen=True)
class Metric:
    """A scoring function of (question by id, prediction by id, version), its versions, the default first, and what it takes as a prediction."""

    score: Callable[[Mapping[QuestionId, Question], Mapping[QuestionId, Any], str], Scores]
    versions: tuple[str, ...] = ("official",)
    predicts: type = str


def score_answers(metric: str, questions: Iterable[Question], predictions: Mapping[QuestionId, Any], *, version: str | None = None) -> Scores:
    """Score predictions by a registered metric, in its default version unless one is named; nothing that is passed in is changed.

    Raises UnknownName for an unknown metric or version, EvaluationError if there is no question, an id is repeated, the ids of the two sides
    differ, a prediction is of the wrong type or NaN, or a record lacks what the metric needs.
    """
    version = metric_version(metric, version)
    question_of = by_id(questions)
    check_same_ids(predictions, question_of)
    for question_id in question_of:
        _check_prediction(question_id, predictions[question_id], METRICS[metric].predicts)
    return METRICS[metric].score(question_of, predictions, version)


def metric_version(metric: str, version: str | None = None) -> str:
    """Return the version, or the metric's default; raises UnknownName, so that a wrong name ends before any work."""
    if metric not in METRICS:
        raise UnknownName.of("metric of answers", metric, METRICS)
    versions = METRICS[metric].versions
    if version is not None and version not in versions:
        raise UnknownName.of(f"version of the metric {metric}", version, versions)
    return version or versions[0]


def predictions_of(records: Iterable[Mapping[str, Any]], id_field: str = "question_id", answer_field: str = "answer") -> dict[Hashable, Any]:
    """Read official result records; of a repeated id the last wins, as in the official evaluators."""
    return {field_of(r, id_field, "prediction"): field_of(r, answer_field, "prediction") for r in records}


def _check_prediction(question_id: QuestionId, prediction: object, expected: type) -> None:
    if expected is str and isinstance(prediction, str):
        return
    if expected is float and isinstance(prediction, int | float) and math.isfinite(prediction):
        return
    what = "a text" if expected is str else "a finite number"
    raise EvaluationError(f"The prediction for question {question_id} is {prediction!r}; expected {what}.", "Correct the predictions.")


METRICS: dict[str, Metric] = {
    "vqa": Metric(score_vqa, tuple(VERSIONS)),
    "textvqa": Metric(score_textvqa),
    "stvqa": Metric(score_stvqa),
    "anls": Metric(score_anls, ANLS_VERSIONS),
    "vizwiz": Metric(score_vizwiz, VIZWIZ_VERSIONS),
    "vizwiz-answerability": Metric(score_vizwiz_answerability, predicts=float),
    "aokvqa": Metric(score_aokvqa),
    "aokvqa-choice": Metric(score_aokvqa_choice),
    "gqa": Metric(score_gqa),
    "clevr": Metric(score_clevr),
    "nlvr2": Metric(score_nlvr2),
    "exact": Metric(score_exact),
}
"""Name -> metric."""

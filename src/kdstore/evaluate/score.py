"""Score a file of predictions, in the format that the data set's own evaluator takes: no model, no image."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from kdstore.config import as_dict, config_digest
from kdstore.errors import EvaluationError
from kdstore.evaluate.datasets import VqaQuestion, check_vqa_name, open_vqa, read_predictions, scored_split, submission
from kdstore.evaluate.datasets.submission import records
from kdstore.evaluate.outcomes import Outcomes, Run
from kdstore.evaluate.protocol import ScoreConfig
from kdstore.evaluate.results import check_out, made_record, write_result
from kdstore.metrics.answers import metric_version, score_answers
from kdstore.metrics.scores import Scores, rounded_percent
from kdstore.progress import OnProgress, silent

NOT_IN_DIGEST = ("predictions", "folder", "name", "out")
OTHER_FORMATS = {"vizwiz-answerability": records("image", "answerable")}
"""Metric -> format of its predictions, where that is not the format of the data set's own metric."""


def evaluate_score(config: ScoreConfig, *, on_progress: OnProgress = silent) -> dict[str, Any]:
    """Score a prediction file and return the result; writes the result file if one is named.

    Raises UnknownName for a wrong data set, metric or version, EvaluationError for questions or predictions that cannot be read or do not fit together.
    """
    check_out(config.out)
    check_vqa_name(config.dataset)
    name = config.split or scored_split(config.dataset)
    config = replace(config, split=name)
    started = time.perf_counter()
    on_progress("questions", 0, 1, f"{config.dataset}/{name}")
    split = open_vqa(config.dataset, name, folder=config.folder)
    on_progress("questions", 1, 1, f"{len(split.questions)} to score")
    metric = config.metric or split.metric
    version = metric_version(metric, config.metric_version)
    predictions = read_predictions(config.predictions, replace(split, submission=OTHER_FORMATS.get(metric, split.submission)))
    if not split.answered:
        submission(split, predictions)  # says what is missing
        raise EvaluationError(
            f"{split.name} has no answers to score with: its owner keeps them. {config.predictions} answers each of its questions once.",
            "Send the file to the owner's server, or name another split.",
        )
    scores = score_answers(metric, (q.annotation() for q in split.questions), predictions, version=version)
    content = {
        "stage": "evaluate score",
        "model": {"name": config.name or Path(config.predictions).stem, "identity": None, "predictions": sha256_of(config.predictions)},
        "data": {"evaluated": split.record()},
        "metric": {"name": metric, "version": version},
        "config": as_dict(config),
        "config_digest": config_digest(config, leave_out=NOT_IN_DIGEST),
        "rows": [{"row": "model", "seed": None, **score_record(scores, split.questions)}],
        "made": made_record(None, time.perf_counter() - started),
    }
    answers = [predictions[q.question_id] for q in split.questions]
    return write_result(config.out, content, outcomes_of(split.questions, [("model", None, answers, scores)]))


def score_record(scores: Scores, questions: Sequence[VqaQuestion]) -> dict[str, Any]:
    """Put the quoted score and those of the question types side by side, the columns of a table, and the metric's official fields behind."""
    counted = [(q.question_type, scores.per_question[q.question_id] / 100) for q in questions if q.question_id in scores.per_question]
    of_type = {kind: rounded_percent(score for k, score in counted if k == kind) for kind in dict.fromkeys(kind for kind, _ in counted)}
    flat = {"overall": scores.overall, **scores.groups.get("perQuestionType", of_type)}
    return {"scores": flat, "aggregate": scores.aggregate, "groups": scores.groups}


def outcomes_of(questions: Sequence[VqaQuestion], runs: Sequence[tuple[str, int | None, Sequence[Any], Scores]]) -> Outcomes:
    """Put every answer beside its score, of the questions that count; runs are (row, seed, an answer to each question, scores) of one metric."""
    counted = [q.question_id in runs[0][3].per_question for q in questions]
    items = [q for q, counts in zip(questions, counted, strict=True) if counts]
    columns = ([str(q.question_id) for q in items], [q.cluster or " ".join(map(str, q.images)) for q in items], [q.question_type for q in items])
    scored = (
        Run(
            row,
            seed,
            np.array([scores.per_question[q.question_id] for q in items]),
            [str(answer) for answer, counts in zip(answers, counted, strict=True) if counts],
        )
        for row, seed, answers, scores in runs
    )
    return Outcomes(*columns, tuple(scored))


def sha256_of(path: str) -> str:
    """Return the hex sha256 of a file."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()

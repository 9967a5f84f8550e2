"""Prediction files in the formats that the owners' servers and evaluators take: written for a split without answers, read to score one with answers.

A prediction file is read strictly. The official evaluators let the last of two answers to a question win; here that is an error, since
nobody submits two answers on purpose.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdstore.errors import EvaluationError
from kdstore.jsonfile import write_bytes

if TYPE_CHECKING:
    from kdstore.evaluate.datasets.form import VqaSplit

Pairs = Iterable[tuple[Any, Any]]
MAX_BYTES = 1 << 30  # of a prediction file; that of VQA v2 test is 30 MB


@dataclass(frozen=True)
class Submission:
    """A format of prediction files: the object that (question id, answer) pairs are in it, that object as text, and the pairs of a text."""

    content: Callable[[Pairs], Any]
    text: Callable[[Any], str]
    pairs: Callable[[str], Pairs]
    suffix: str = ".json"


def submission(split: VqaSplit, predictions: Mapping[Hashable, Any]) -> Any:
    """Return the predictions as the owner's server takes them, in the order of the questions; raises EvaluationError unless each question has one."""
    missing = [q.question_id for q in split.questions if q.question_id not in predictions]
    if missing or len(predictions) != len(split.questions):
        first = f"question {missing[0]} has no prediction" if missing else "there are predictions for other questions"
        raise EvaluationError(
            f"{len(predictions)} predictions for the {len(split.questions)} questions of {split.name}: {first}.", "Predict every question once."
        )
    return split.submission.content((q.question_id, predictions[q.question_id]) for q in split.questions)


def write_submission(path: str | Path, split: VqaSplit, predictions: Mapping[Hashable, Any]) -> None:
    """Write the prediction file of a split, atomically."""
    write_bytes(Path(path), split.submission.text(submission(split, predictions)).encode())


def read_predictions(path: str | Path, split: VqaSplit) -> dict[Hashable, Any]:
    """Read a prediction file in the format of the split's owner; raises EvaluationError naming what is wrong in it."""
    path = Path(path)
    if not path.is_file():
        raise EvaluationError(f"No file {path.name} in {path.parent.absolute()}.", "Give --predictions the file of a model's answers.")
    if path.stat().st_size > MAX_BYTES:
        raise EvaluationError(f"{path} is larger than any file of predictions.", "Give --predictions the file of a model's answers.")
    predictions: dict[Hashable, Any] = {}
    try:
        for question_id, answer in split.submission.pairs(path.read_text(encoding="utf-8")):
            if not isinstance(question_id, int | str):
                raise EvaluationError(f"the question id {question_id!r} is no number or text")
            if question_id in predictions:
                raise EvaluationError(f"question {question_id} is answered more than once")
            predictions[question_id] = answer
    except (EvaluationError, ValueError, RecursionError, csv.Error) as e:
        reason = e.message if isinstance(e, EvaluationError) else f"{e}"
        raise EvaluationError(f"{path} is no prediction file of {split.name}: {reason}.", "docs/vqa-datasets.md has the format of each data set.") from e
    return predictions


def records(id_field: str, answer_field: str) -> Submission:
    """Return the format of a JSON list of records with these two fields."""

    def content(pairs: Pairs) -> list[dict[str, Any]]:
        return [{id_field: question_id, answer_field: answer} for question_id, answer in pairs]

    def pairs(text: str) -> Pairs:
        rows = json.loads(text)
        if not isinstance(rows, list):
            raise EvaluationError("it is not a JSON list")
        for n, row in enumerate(rows):
            if not (isinstance(row, dict) and id_field in row and answer_field in row):
                raise EvaluationError(f"record {n} has no '{id_field}' and '{answer_field}'")
            yield row[id_field], row[answer_field]

    return Submission(content, json.dumps, pairs)


def _object_pairs(text: str) -> Pairs:
    pairs = json.loads(text, object_pairs_hook=tuple)  # an object would hide that an id is there twice
    if not isinstance(pairs, tuple):
        raise EvaluationError("it is not a JSON object")
    return pairs


def _csv_text(rows: Any) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def _csv_pairs(text: str) -> Pairs:
    for n, row in enumerate(csv.reader(io.StringIO(text), strict=True), start=1):
        if row and len(row) != 2:
            raise EvaluationError(f"row {n} has {len(row)} columns, not question id and answer")
        if row:
            yield row[0], row[1]


RECORDS = records("question_id", "answer")
OBJECT = Submission(dict, json.dumps, _object_pairs)
CSV = Submission(list, _csv_text, _csv_pairs, ".csv")

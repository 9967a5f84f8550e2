"""CLEVR 1.0: `questions/CLEVR_SPLIT_questions.json` and `images/SPLIT`; a question's type is the last function of its program."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kdstore.errors import EvaluationError
from kdstore.evaluate.datasets.files import Answers, ImageFiles, answer_type, chosen, folder_of, read_json, rows_of
from kdstore.evaluate.datasets.form import VqaQuestion, VqaSplit


def open_clevr(folder: Path | None, split: str, num_images: int | None) -> VqaSplit:
    """Open a split; `test` has neither answers nor programs. A question without `question_index` is named by its place in the file."""
    root = folder_of("clevr", folder)
    path = root / "questions" / f"CLEVR_{chosen('clevr', split, ('train', 'val', 'test'))}_questions.json"
    answered = split != "test"
    needed = {"answer": str, "question_family_index": int, "program": list} if answered else {}
    rows = rows_of(path, read_json(path), {"image_filename": str, "question": str, **needed}, "questions")
    answers_of, images, questions = Answers(str(path)), ImageFiles(), []
    for n, row in enumerate(rows):
        records = answers_of([row["answer"]]) if answered else ()
        image = images(root / "images" / split / row["image_filename"])
        kind, extra = (_last_function(path, n, row), {"question_family_index": row["question_family_index"]}) if answered else ("all", {})
        questions.append(VqaQuestion(row.get("question_index", n), (image,), row["question"], kind, answer_type(records), records, extra))
    return images.split(f"clevr/{split}", questions, metric="clevr", answered=answered)


def _last_function(path: Path, n: int, row: dict[str, Any]) -> str:
    last = row["program"][-1] if row["program"] else None
    name = last.get("function", last.get("type")) if isinstance(last, dict) else None  # generated sets call it type
    if not isinstance(name, str):
        raise EvaluationError(f"Record {n} of {path} has no function at the end of its program: {str(last)[:80]}.", "Restore the file from its origin.")
    return name

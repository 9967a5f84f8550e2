"""Any data set as lines of JSON: `SPLIT.jsonl`, one object per line with `image` (a path from the folder), `question`, and `answers` or `answer`.

Optional are `question_id` (else the line's number), `question_type` (else `all`) and `answer_type` (else from the answers). A file in which no
line has an answer is a split without answers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kdstore.errors import EvaluationError
from kdstore.evaluate.datasets.files import Answers, ImageFiles, answer_type, folder_of, read_lines
from kdstore.evaluate.datasets.form import VqaQuestion, VqaSplit


def open_jsonl(folder: Path | None, split: str, num_images: int | None) -> VqaSplit:
    """Open `SPLIT.jsonl` of the folder."""
    path = folder_of("jsonl", folder) / f"{split}.jsonl"
    rows = list(read_lines(path))
    answered = not rows or any("answers" in row or "answer" in row for _, row in rows)
    images = ImageFiles()
    questions = [_question(path, line, row, images, answered) for line, row in rows]
    return images.split(f"jsonl/{split}", questions, answered=answered)


def _question(path: Path, line: int, row: dict[str, Any], images: ImageFiles, answered: bool) -> VqaQuestion:
    answers = row.get("answers", [row["answer"]] if "answer" in row else None) if answered else []
    if not (isinstance(row.get("image"), str) and isinstance(row.get("question"), str) and isinstance(answers, list) and bool(answers) == answered):
        raise EvaluationError(
            f"Line {line} of {path} must have the texts 'image' and 'question', and 'answers' (a list) or 'answer'; it has {', '.join(row)}.",
            "Correct the line.",
        )
    question_id = row.get("question_id", line)
    if not isinstance(question_id, int | str):
        raise EvaluationError(f"Line {line} of {path} has the question_id {question_id!r}; expected a number or a text.", "Correct the line.")
    records = Answers(f"Line {line} of {path}")(answers)
    types = {"question_type": "all", "answer_type": answer_type(records)}
    types |= {name: row[name] for name in types if name in row}
    for name, value in types.items():
        if not isinstance(value, str):
            raise EvaluationError(f"Line {line} of {path} has the {name} {value!r}; expected a text.", "Correct the line.")
    return VqaQuestion(question_id, (images(path.parent / row["image"]),), row["question"], types["question_type"], types["answer_type"], records)

"""easy-VQA: `SPLIT/questions.json`, rows of [question, answer, image id], and `SPLIT/images/ID.png`; question types follow from the answer."""

from __future__ import annotations

from pathlib import Path

from kdstore.errors import EvaluationError
from kdstore.evaluate.datasets.files import Answers, ImageFiles, answer_type, folder_of, read_json, rows_of
from kdstore.evaluate.datasets.form import VqaQuestion, VqaSplit

COLORS = frozenset({"black", "blue", "brown", "cyan", "gray", "green", "grey", "orange", "pink", "purple", "red", "teal", "white", "yellow"})


def open_easy_vqa(folder: Path | None, split: str, num_images: int | None) -> VqaSplit:
    """Open `train` or `test`; a question's id is its place in the file, images are in the order of their ids."""
    root = folder_of("easy-vqa", folder) / split
    path = root / "questions.json"
    rows = rows_of(path, read_json(path), {})
    for row in rows:
        if not (isinstance(row, list) and [type(cell) for cell in row] == [str, str, int]):
            raise EvaluationError(f"{path} holds {row!r}; expected [question, answer, image id].", "Restore the file from its origin.")
    answers_of, images = Answers(str(path)), ImageFiles()
    image_of = {image_id: images(root / "images" / f"{image_id}.png") for image_id in sorted({image_id for _, _, image_id in rows})}
    questions = []
    for question_id, (question, answer, image_id) in enumerate(rows):
        records = answers_of([answer])
        question_type = "yes/no" if answer in ("yes", "no") else "color" if answer in COLORS else "shape"
        questions.append(VqaQuestion(question_id, (image_of[image_id],), question, question_type, answer_type(records), records))
    return images.split(f"easy-vqa/{split}", questions)

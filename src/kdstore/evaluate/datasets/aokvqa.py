"""A-OKVQA, direct answers: `aokvqa_v1p0_SPLIT.json`, a list of questions with ten direct answers and four choices, on images of COCO 2017.

The local evaluator takes an object of question ids and answers; for the leaderboard the owners' prepare_predictions.py makes its file of that one.
"""

from __future__ import annotations

from pathlib import Path

from kdstore.evaluate.datasets.files import Answers, ImageFiles, answer_type, chosen, folder_of, one_of, read_json, rows_of
from kdstore.evaluate.datasets.form import VqaQuestion, VqaSplit
from kdstore.evaluate.datasets.submission import OBJECT

_EXTRA = ("choices", "correct_choice_idx", "difficult_direct_answer")


def open_aokvqa(folder: Path | None, split: str, num_images: int | None) -> VqaSplit:
    """Open a split; `test` has no answers."""
    root = folder_of("aokvqa", folder)
    name = f"aokvqa_v1p0_{chosen('aokvqa', split, ('train', 'val', 'test'))}.json"
    path = one_of(root, name, f"aokvqa/{name}")
    answered = split != "test"
    rows = rows_of(path, read_json(path), {"question_id": str, "image_id": int, "question": str, **({"direct_answers": list} if answered else {})})
    near = next((root / p for p in (f"{split}2017", f"coco/{split}2017") if (root / p).is_dir()), root / f"{split}2017")
    answers_of, images, questions = Answers(str(path)), ImageFiles(), []
    for row in rows:
        records = answers_of(row["direct_answers"]) if answered else ()
        image = images(near / f"{row['image_id']:012d}.jpg")
        extra = {field: row[field] for field in _EXTRA if field in row}
        questions.append(VqaQuestion(row["question_id"], (image,), row["question"], "all", answer_type(records), records, extra))
    return images.split(f"aokvqa/{split}", questions, metric="aokvqa", answered=answered, submission=OBJECT)

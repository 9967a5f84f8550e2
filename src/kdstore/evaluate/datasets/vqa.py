"""VQA v2, VQA v1 and OK-VQA: a questions file and an annotations file, tied by question ids, on images of COCO 2014 and 2015.

Layout of the owners' archives side by side, or in the folders `Questions`, `Annotations` and `Images/mscoco` of the official API.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

from kdstore.errors import EvaluationError
from kdstore.evaluate.datasets.files import Answers, ImageFiles, chosen, folder_of, one_of, read_json, rows_of
from kdstore.evaluate.datasets.form import VqaQuestion, VqaSplit

SUBSETS = {"train": "train2014", "val": "val2014", "test-dev": "test-dev2015", "test": "test2015"}
"""Split -> what the files' names call it; the images of test-dev are a part of those of test."""


def _open(name: str, prefix: str, splits: tuple[str, ...], folder: Path | None, split: str, num_images: int | None) -> VqaSplit:
    """Open a split; the splits of test have no answers."""
    root = folder_of(name, folder)
    subset = SUBSETS[chosen(name, split, splits)]
    answered = not split.startswith("test")
    asked_file = _file(root, "Questions", f"{prefix}OpenEnded_mscoco_{subset}_questions.json")
    asked = rows_of(asked_file, read_json(asked_file), {"question_id": int, "image_id": int, "question": str}, "questions")
    image_of = _images(root, "test2015" if subset == "test-dev2015" else subset)
    images = ImageFiles()
    if not answered:
        unanswered = (VqaQuestion(q["question_id"], (images(image_of(q["image_id"])),), q["question"], "all", "other", ()) for q in asked)
        return images.split(f"{name}/{split}", unanswered, answered=False)
    path = _file(root, "Annotations", f"{prefix}mscoco_{subset}_annotations.json")
    rows = rows_of(path, read_json(path), {"question_id": int, "answers": list, "question_type": str, "answer_type": str}, "annotations")
    answers_of = Answers(str(path))
    annotation_of = {row["question_id"]: (row["question_type"], row["answer_type"], answers_of(row.pop("answers"))) for row in rows}
    without = [q["question_id"] for q in asked if q["question_id"] not in annotation_of]
    if without or len(annotation_of) != len(asked):
        first = f"question {without[0]} has no annotation" if without else "there are annotations of other questions, or questions twice"
        raise EvaluationError(f"{asked_file} and {path} do not belong together: {first}.", "Restore both files from their origin.")
    questions = (VqaQuestion(q["question_id"], (images(image_of(q["image_id"])),), q["question"], *annotation_of[q["question_id"]]) for q in asked)
    return images.split(f"{name}/{split}", questions)


def _file(root: Path, folder: str, name: str) -> Path:
    return one_of(root, name, f"{folder}/{name}")


def _images(root: Path, subset: str) -> Callable[[int], Path]:
    near = next((root / p for p in (subset, f"Images/mscoco/{subset}") if (root / p).is_dir()), root / subset)
    return lambda image_id: near / f"COCO_{subset}_{image_id:012d}.jpg"


open_vqa_v2 = functools.partial(_open, "vqav2", "v2_", ("train", "val", "test-dev", "test"))
open_vqa_v1 = functools.partial(_open, "vqav1", "", ("train", "val", "test-dev", "test"))
open_ok_vqa = functools.partial(_open, "okvqa", "", ("train", "val"))

"""TextVQA 0.5.1: `TextVQA_0.5.1_SPLIT.json` with the questions in `data`; train and val share the images in `train_images`, test has `test_images`."""

from __future__ import annotations

from pathlib import Path

from kdstore.evaluate.datasets.files import Answers, ImageFiles, answer_type, chosen, folder_of, read_json, rows_of
from kdstore.evaluate.datasets.form import VqaQuestion, VqaSplit


def open_textvqa(folder: Path | None, split: str, num_images: int | None) -> VqaSplit:
    """Open a split; `test` has no answers."""
    root = folder_of("textvqa", folder)
    path = root / f"TextVQA_0.5.1_{chosen('textvqa', split, ('train', 'val', 'test'))}.json"
    answered = split != "test"
    rows = rows_of(path, read_json(path), {"question_id": int, "image_id": str, "question": str, **({"answers": list} if answered else {})}, "data")
    near = root / ("train_images" if answered else "test_images")
    answers_of, images, questions = Answers(str(path)), ImageFiles(), []
    for row in rows:
        records = answers_of(row["answers"]) if answered else ()
        image = images(near / f"{row['image_id']}.jpg")
        questions.append(VqaQuestion(row["question_id"], (image,), row["question"], "all", answer_type(records), records))
    return images.split(f"textvqa/{split}", questions, metric="textvqa", answered=answered)

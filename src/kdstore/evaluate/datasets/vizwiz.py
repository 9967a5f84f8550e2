"""VizWiz VQA: `SPLIT.json`, a list of one question per image, and the images in the folder `SPLIT`; the image's name is the question's id."""

from __future__ import annotations

from pathlib import Path

from kdstore.evaluate.datasets.files import Answers, ImageFiles, answer_type, chosen, folder_of, one_of, read_json, rows_of
from kdstore.evaluate.datasets.form import VqaQuestion, VqaSplit
from kdstore.evaluate.datasets.submission import records


def open_vizwiz(folder: Path | None, split: str, num_images: int | None) -> VqaSplit:
    """Open a split; `test` has no answers."""
    root = folder_of("vizwiz", folder)
    chosen("vizwiz", split, ("train", "val", "test"))
    path = one_of(root, f"{split}.json", f"Annotations/{split}.json")
    answered = split != "test"
    rows = rows_of(path, read_json(path), {"image": str, "question": str, **({"answers": list} if answered else {})})
    near = next((root / p for p in (split, f"Images/{split}") if (root / p).is_dir()), root / split)
    answers_of, images, questions = Answers(str(path)), ImageFiles(), []
    for row in rows:
        given = answers_of(row["answers"]) if answered else ()
        kind = row.get("answer_type") if isinstance(row.get("answer_type"), str) else answer_type(given)
        extra = {"answerable": row["answerable"]} if "answerable" in row else {}
        questions.append(VqaQuestion(row["image"], (images(near / row["image"]),), row["question"], "all", str(kind), given, extra))
    return images.split(f"vizwiz/{split}", questions, metric="vizwiz", answered=answered, submission=records("image", "answer"))

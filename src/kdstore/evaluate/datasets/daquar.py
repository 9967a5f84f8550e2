"""DAQUAR: a text file in which a line with the question, naming its image, is followed by a line with the answer; images are of NYU Depth v2.

Several answers to one question stand on one line with commas between them; they are one answer here, as in the published accuracy.
"""

from __future__ import annotations

import re
from pathlib import Path

from kdstore.errors import EvaluationError
from kdstore.evaluate.datasets.files import Answers, ImageFiles, answer_type, chosen, folder_of, read_text
from kdstore.evaluate.datasets.form import VqaQuestion, VqaSplit

SPLITS = {"train": "894.raw.train", "test": "894.raw.test", "train-37": "37.raw.train", "test-37": "37.raw.test"}
"""Split -> what the file's name calls it; 37 are those of the reduced set of object classes."""
_IMAGE = re.compile(r"\bimage\d+\b")


def open_daquar(folder: Path | None, split: str, num_images: int | None) -> VqaSplit:
    """Open a split; a question's id is its place in the file."""
    root = folder_of("daquar", folder)
    path = root / f"qa.{SPLITS[chosen('daquar', split, tuple(SPLITS))]}.txt"
    lines = [line.strip() for line in read_text(path).splitlines() if line.strip()]
    if len(lines) % 2:
        raise EvaluationError(f"{path} has {len(lines)} lines; expected a line with the answer after each question.", "Restore the file from its origin.")
    answers_of, images, questions = Answers(str(path)), ImageFiles(), []
    for n, (question, answer) in enumerate(zip(lines[::2], lines[1::2], strict=True)):
        if not (named := _IMAGE.findall(question)):
            raise EvaluationError(f"Question {n} of {path} names no image: {question[:80]}.", "Restore the file from its origin.")
        image = images(root / "nyu_depth_images" / f"{named[-1]}.png")
        records = answers_of([answer])
        questions.append(VqaQuestion(n, (image,), question, "all", answer_type(records), records))
    return images.split(f"daquar/{split}", questions, metric="exact")

"""NLVR2: one JSON object per line with a sentence on two images, true or false; the owners' evaluator takes a CSV of identifier and answer."""

from __future__ import annotations

from pathlib import Path

from kdstore.errors import EvaluationError
from kdstore.evaluate.datasets.files import Answers, ImageFiles, chosen, folder_of, one_of, read_lines
from kdstore.evaluate.datasets.form import VqaQuestion, VqaSplit
from kdstore.evaluate.datasets.submission import CSV

SPLITS = ("train", "dev", "test1", "test2")


def open_nlvr2(folder: Path | None, split: str, num_images: int | None) -> VqaSplit:
    """Open a split; images lie in `images/SPLIT/DIRECTORY` where the line has a directory, in `SPLIT` otherwise."""
    root = folder_of("nlvr2", folder)
    path = one_of(root, f"{chosen('nlvr2', split, SPLITS)}.json", f"nlvr2/data/{split}.json", f"data/{split}.json")
    near = next((root / p for p in (f"images/{split}", split) if (root / p).is_dir()), root / f"images/{split}")
    answers_of, images, questions = Answers(str(path)), ImageFiles(), []
    for line, row in read_lines(path):
        identifier, sentence, label = (row.get(name) for name in ("identifier", "sentence", "label"))
        if not (isinstance(identifier, str) and isinstance(sentence, str) and isinstance(label, str) and identifier.count("-") == 3):
            raise EvaluationError(
                f"Line {line} of {path} has no identifier (split-set-pair-sentence), sentence and label.", "Restore the file from its origin."
            )
        pair = identifier.rpartition("-")[0]
        inside = near / str(row["directory"]) if "directory" in row else near
        both = tuple(images(inside / f"{pair}-img{side}.png") for side in (0, 1))
        of_set = pair.rpartition("-")[0]  # whose pairs share images and sentences
        questions.append(VqaQuestion(identifier, both, sentence, "all", "yes/no", answers_of([label]), {"identifier": identifier}, of_set))
    return images.split(f"nlvr2/{split}", questions, metric="nlvr2", submission=CSV)

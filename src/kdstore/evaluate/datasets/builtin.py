"""The built-in scenes, with their questions."""

from __future__ import annotations

import functools
from pathlib import Path

from kdstore.data.scenes import Scenes
from kdstore.errors import EvaluationError
from kdstore.evaluate.datasets.form import VqaQuestion, VqaSplit


def open_scenes(folder: Path | None, split: str, num_images: int | None) -> VqaSplit:
    """Open a split of the scenes, or its first `num_images`; raises UnknownName, EvaluationError if a folder is given."""
    if folder is not None:
        raise EvaluationError(f"scenes are built in and take no folder, found {folder}.", "Leave the folder out.")
    return _drawn(split, num_images)


@functools.lru_cache(maxsize=4)  # several models are evaluated on the same scenes: ask about them once
def _drawn(split: str, num_images: int | None) -> VqaSplit:
    source = Scenes(split, num_images)
    questions = tuple(
        VqaQuestion(q.question_id, (i,), q.question, q.question_type, q.answer_type, q.answers) for i in range(len(source)) for q in source.questions(i)
    )
    return VqaSplit(f"scenes/{split}", questions, tuple(source.key(i) for i in range(len(source))), source.image, lambda i: source.image(i).sha256)

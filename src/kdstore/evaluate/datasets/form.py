"""The one form of a VQA data set: questions that point at images, and functions that read an image.

Questions carry the annotators' answers as official records. Where a set has a single answer per question it is repeated as ten annotators, under
which the official accuracy (2021) is exact match. What only one data set's metric needs travels in `extra`, under its owner's names.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from kdstore.data.source import LoadedImage, UndecodableImage
from kdstore.errors import EvaluationError
from kdstore.evaluate.datasets.submission import RECORDS, Submission
from kdstore.jsonfile import canonical_json


@dataclass(frozen=True)
class VqaQuestion:
    """A question on images of its split, by number (NLVR2: two); `answers` are records with `answer` and `answer_id`, one per annotator.

    Equal records are one object, so none of them may be changed. Questions of one `cluster` are not independent of each other; where it is empty those on
    the same images are one.
    """

    question_id: int | str
    images: tuple[int, ...]
    question: str
    question_type: str
    answer_type: str
    answers: tuple[dict[str, Any], ...]
    extra: Mapping[str, Any] = field(default_factory=dict)
    cluster: str = ""

    def annotation(self) -> dict[str, Any]:
        """Return the official annotation record, with `question` and `extra` beside it, as METRICS take it."""
        return {
            "question_id": self.question_id,
            "question": self.question,
            "question_type": self.question_type,
            "answer_type": self.answer_type,
            "answers": list(self.answers),
            "extra": self.extra,
        }


@dataclass(frozen=True)
class VqaSplit:
    """The questions of one split and its images by number; `name` says what it is in results, `metric` which of METRICS scores it.

    `answered` is False for a split whose answers its owner keeps: its questions have none, and `submission` is how the owner's server takes ours.
    `sha256` returns the hex digest of an encoded image and `size` its bytes without reading it (None: images that are drawn).
    """

    name: str
    questions: tuple[VqaQuestion, ...]
    image_names: tuple[str, ...]
    load: Callable[[int], LoadedImage]
    sha256: Callable[[int], str]
    size: Callable[[int], int | None] = lambda i: None
    metric: str = "vqa"
    answered: bool = True
    submission: Submission = RECORDS

    @property
    def num_images(self) -> int:
        return len(self.image_names)

    def image(self, i: int) -> LoadedImage:
        """Decode image `i`; raises EvaluationError, since a question without its image has no score."""
        try:
            return self.load(i)
        except UndecodableImage as e:
            raise EvaluationError(
                f"Image {self.image_names[i]} of {self.name} cannot be decoded: {e.reason}.", "Restore the image, or take its questions out."
            ) from e

    @functools.cached_property
    def digest(self) -> str:
        """The sha256 of all questions with their answers, taken one by one, since a split may hold millions of answers."""
        content = hashlib.sha256()
        for question in self.questions:
            content.update(canonical_json(question.annotation()))
        return f"sha256:{content.hexdigest()}"

    def record(self) -> dict[str, Any]:
        """Say in a result which questions these were."""
        return {"name": self.name, "num_images": self.num_images, "num_questions": len(self.questions), "digest": self.digest}

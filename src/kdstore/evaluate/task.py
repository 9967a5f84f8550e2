"""What a VQA evaluation asks: both splits, and everything that follows from the training questions alone.

Nothing here looks at the answers of the evaluated split but its scores. Where epochs are chosen by a score, it is that of a part of the training images that
no head is trained on, the same part for all models and seeds.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from kdstore.data.source import LoadedImage
from kdstore.errors import ConfigError, EvaluationError
from kdstore.evaluate.answers import AnswerVocabulary, answer_vocabulary, best_answers, chance_per_type, label_scores, soft_target, word_vocabulary
from kdstore.evaluate.datasets import open_vqa
from kdstore.evaluate.datasets.form import VqaQuestion, VqaSplit
from kdstore.evaluate.leaks import check_leaks, image_sizes
from kdstore.evaluate.protocol import VqaConfig
from kdstore.jsonfile import digest_of
from kdstore.metrics.answers import metric_version, score_answers
from kdstore.metrics.scores import Scores
from kdstore.progress import OnProgress


@dataclass(frozen=True, eq=False)
class Asked:
    """Questions and what a head should answer to each: label -> soft target."""

    questions: tuple[VqaQuestion, ...]
    targets: tuple[dict[int, float], ...]


@dataclass(frozen=True, eq=False)
class VqaTask:
    """Both splits; `trained` leaves out questions that no label answers and those on images that are `held` out."""

    train: VqaSplit
    evaluated: VqaSplit
    vocabulary: AnswerVocabulary
    words: dict[str, int]
    trained: Asked
    held: Asked | None
    dropped: int
    num_images: int  # of a question
    version: str
    leaks: dict[str, Any]

    def score(self, answers: Sequence[str]) -> Scores:
        """Score one answer to each question of the evaluated split by its metric."""
        questions = self.evaluated.questions
        predictions: dict[Hashable, Any] = {q.question_id: answer for q, answer in zip(questions, answers, strict=True)}
        return score_answers(self.evaluated.metric, self.annotations, predictions, version=self.version)

    @functools.cached_property
    def images_digest(self) -> str:
        """What the images of both splits are by name and size, wherever their folder lies, and which of them each question is about."""
        return digest_of([_images_of(split) for split in (self.train, self.evaluated)])

    def check_images(self) -> None:
        """Raise EvaluationError if an image of either split is not there, before hours of encoding those that are."""
        for split in (self.train, self.evaluated):
            for i in range(split.num_images):
                split.size(i)

    @functools.cached_property
    def annotations(self) -> list[dict[str, Any]]:
        return [q.annotation() for q in self.evaluated.questions]

    @functools.cached_property
    def label_scores(self) -> list[dict[str, float] | None]:
        return label_scores(self.evaluated.questions, self.vocabulary, self.score)

    @property
    def oracle(self) -> list[str]:
        """The vocabulary's best answers."""
        return best_answers(self.label_scores, self.vocabulary)

    @property
    def chance(self) -> dict[str, float]:
        """The score of the best constant answer per question type and, as `overall`, for all."""
        return chance_per_type(self.evaluated.questions, self.label_scores)

    def record(self) -> dict[str, Any]:
        """Say which questions these are, and how far the answer vocabulary reaches."""
        held = {} if self.held is None else {"held_out": len(self.held.questions)}
        reach: dict[str, Any] = {"answered": self.evaluated.answered}
        if self.evaluated.answered:
            answerable = sum(bool(soft_target(q, self.vocabulary)) for q in self.evaluated.questions)
            reach |= {"answerable": answerable, "coverage": round(100 * answerable / len(self.evaluated.questions), 2)}
        return {
            "train": {**self.train.record(), "dropped": self.dropped, **held},
            "evaluated": {**self.evaluated.record(), **reach},
            "leaks": self.leaks,
            "vocabulary": {
                "answers": len(self.vocabulary),
                "words": len(self.words),
                "from": self.train.name,
                "digest": digest_of(list(self.vocabulary.labels)),
            },
        }


def open_task(config: VqaConfig, on_progress: OnProgress) -> VqaTask:
    """Open both splits; raises what `open_vqa` raises, EvaluationError and ConfigError for questions that cannot be trained on."""
    on_progress("questions", 0, 2, f"{config.dataset}/{config.train_split}")
    train = _together([open_vqa(config.dataset, split, folder=config.folder, num_images=config.train_images) for split in config.train_splits])
    on_progress("questions", 1, 2, f"{config.dataset}/{config.eval_split}")
    evaluated = open_vqa(config.dataset, config.eval_split, folder=config.folder, num_images=config.eval_images)
    on_progress("questions", 2, 2, f"{len(train.questions)} to train on, {len(evaluated.questions)} to answer")
    if len(config.train_splits) > 1 and evaluated.answered:
        raise ConfigError(
            f"Heads are trained on one split where another is scored, found {config.train_split}: {evaluated.name} has answers.",
            "Train on 'train' alone; several splits are for the predictions of a test split without answers.",
        )
    (num_images, *others) = sorted({len(q.images) for split in (train, evaluated) for q in split.questions})
    if others:
        raise EvaluationError(f"Questions of {train.name} and {evaluated.name} have {num_images} to {others[-1]} images.", "Give each the same number.")
    if not train.answered:
        raise EvaluationError(f"{train.name} has no answers to train on.", "Train on a split with answers.")
    vocabulary = answer_vocabulary(train.questions, config.min_answer_count)
    held_out = _held_out(train.num_images, config.early_stopping)
    asked = [(q, soft_target(q, vocabulary, config.lookup)) for q in train.questions]
    held = [(q, target) for q, target in asked if not held_out.isdisjoint(q.images)]
    pairs = [(q, target) for q, target in asked if target and held_out.isdisjoint(q.images)]
    if not pairs or (config.early_stopping and not held):
        raise EvaluationError(
            f"No question of {train.name} {'is held out' if pairs else 'to train on has an answer that scores'}.",
            "Give questions on whose answers annotators agree, and more images than early_stopping holds out.",
        )
    return VqaTask(
        train=train,
        evaluated=evaluated,
        vocabulary=vocabulary,
        words=word_vocabulary(train.questions),
        trained=_asked(pairs),
        held=_asked(held) if held else None,
        dropped=len(asked) - len(held) - len(pairs),
        num_images=num_images,
        version=metric_version(evaluated.metric, config.metric_version),
        leaks=check_leaks(train, evaluated, config.leaks, on_progress=on_progress),
    )


def _asked(pairs: Sequence[tuple[VqaQuestion, dict[int, float]]]) -> Asked:
    return Asked(tuple(q for q, _ in pairs), tuple(target for _, target in pairs))


def _images_of(split: VqaSplit) -> dict[str, Any]:
    sizes = image_sizes(split)
    return {"images": [[Path(name).name, sizes.get(i)] for i, name in enumerate(split.image_names)], "asked": [list(q.images) for q in split.questions]}


def _held_out(num_images: int, share: float) -> set[int]:
    """Draw the images that are not trained on, at least one if a share is asked for."""
    count = max(1, round(share * num_images)) if share else 0
    return set(np.random.default_rng(0).permutation(num_images)[:count].tolist())


def _together(splits: Sequence[VqaSplit]) -> VqaSplit:
    """Lay splits behind each other: their images are numbered on, and their questions have no ids that could meet."""
    if len(splits) == 1:
        return splits[0]
    starts = np.cumsum([0, *(split.num_images for split in splits)]).tolist()

    def of(number: int) -> tuple[VqaSplit, int]:
        s = int(np.searchsorted(starts, number, side="right")) - 1
        return splits[s], number - starts[s]

    def load(number: int) -> LoadedImage:
        split, i = of(number)
        return split.load(i)

    def sha256(number: int) -> str:
        split, i = of(number)
        return split.sha256(i)

    def size(number: int) -> int | None:
        split, i = of(number)
        return split.size(i)

    questions = tuple(
        replace(q, question_id=f"{split.name}/{q.question_id}", images=tuple(i + start for i in q.images))
        for split, start in zip(splits, starts, strict=False)
        for q in split.questions
    )
    return replace(
        splits[0],
        name="+".join(split.name for split in splits),
        questions=questions,
        image_names=tuple(name for split in splits for name in split.image_names),
        load=load,
        sha256=sha256,
        size=size,
        answered=all(split.answered for split in splits),
    )

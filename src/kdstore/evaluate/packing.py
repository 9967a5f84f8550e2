"""Questions packed into rows for the heads: those on the same images lie behind each other, so that hardly anything is padded.

Shape suffixes as in `heads`; I images of a question.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from kdstore.evaluate.answers import PADDING, START
from kdstore.evaluate.heads import MAX_WORDS, PackedQuestions

QUESTIONS_PER_ROW = 8


@dataclass(frozen=True, eq=False)
class QuestionRows:
    """Questions packed into rows, each on the same images: `PackedQuestions` as arrays, and `question_RP`, the number of each question (-1 pads)."""

    image_RI: np.ndarray
    word_RS: np.ndarray
    place_RS: np.ndarray
    segment_RS: np.ndarray
    start_RP: np.ndarray
    question_RP: np.ndarray

    def __len__(self) -> int:
        return len(self.image_RI)


def pack_questions(words: Sequence[Sequence[int]], images: Sequence[tuple[int, ...]]) -> QuestionRows:
    """Pack questions (their word ids, without start) into rows of at most QUESTIONS_PER_ROW questions on the same images, by image.

    All questions must have the same number of images.
    """
    order = sorted(range(len(words)), key=lambda q: images[q])  # stable: questions keep their order
    groups: list[list[int]] = []
    for q in order:
        if groups and images[groups[-1][0]] == images[q] and len(groups[-1]) < QUESTIONS_PER_ROW:
            groups[-1].append(q)
        else:
            groups.append([q])
    num_words = max(sum(1 + min(len(words[q]), MAX_WORDS - 1) for q in group) for group in groups)
    num_questions = max(map(len, groups))
    shape = (len(groups), num_words)
    rows = QuestionRows(
        image_RI=np.array([images[group[0]] for group in groups], np.int64),
        word_RS=np.full(shape, PADDING, np.int64),
        place_RS=np.zeros(shape, np.int64),
        segment_RS=np.full(shape, -1, np.int64),
        start_RP=np.full((len(groups), num_questions), -1, np.int64),
        question_RP=np.full((len(groups), num_questions), -1, np.int64),
    )
    for r, group in enumerate(groups):
        end = 0
        for p, q in enumerate(group):
            ids = [START, *words[q]][:MAX_WORDS]
            span = slice(end, end + len(ids))
            rows.word_RS[r, span], rows.place_RS[r, span], rows.segment_RS[r, span] = ids, range(len(ids)), p
            rows.start_RP[r, p], rows.question_RP[r, p] = end, q
            end += len(ids)
    return rows


def packed_batch(rows: QuestionRows, chosen: np.ndarray, device: torch.device) -> PackedQuestions:
    """Take the chosen rows, without columns that are padding in all of them."""
    length = int((rows.segment_RS[chosen] >= 0).sum(axis=1).max())
    num_questions = int((rows.start_RP[chosen] >= 0).sum(axis=1).max())

    def take(array: np.ndarray, columns: int) -> torch.Tensor:
        return torch.from_numpy(array[chosen, :columns]).to(device)

    return PackedQuestions(take(rows.word_RS, length), take(rows.place_RS, length), take(rows.segment_RS, length), take(rows.start_RP, num_questions))

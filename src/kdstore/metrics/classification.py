"""Scores of a classifier: accuracy at 1 and 5, mean recall per class, mean average precision of several labels; all in percent.

Keys are those of CLIP Benchmark, which states fractions. Of equal scores the lower class wins, and the lower row, which that tool leaves to chance.

N images, C classes, D width.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from kdstore.errors import EvaluationError
from kdstore.metrics.neighbours import nearest, top_k
from kdstore.metrics.unit import unit_rows

_ROWS_AT_ONCE = 4096


def truth_ranks(score_NC: np.ndarray, label_N: np.ndarray) -> np.ndarray:
    """Return how many classes stand before each row's label, int64 [N]; raises EvaluationError for scores that are not finite and labels beyond the classes."""
    if score_NC.shape[:1] != label_N.shape or not len(label_N) or not 0 <= label_N.min() <= label_N.max() < score_NC.shape[1]:
        raise EvaluationError(f"Scores {score_NC.shape} and labels {label_N.shape} do not fit.", "Give one label, below the number of classes, per row.")
    rank_N = np.empty(len(label_N), np.int64)
    for start in range(0, len(label_N), _ROWS_AT_ONCE):
        score_BC, label_B1 = score_NC[start : start + _ROWS_AT_ONCE], label_N[start : start + _ROWS_AT_ONCE, None]
        if not np.isfinite(score_BC).all():
            raise EvaluationError("Some scores of the classes are not finite.", "Check the features.")
        of_label_B1 = np.take_along_axis(score_BC, label_B1, axis=1)
        before_BC = (score_BC > of_label_B1) | ((score_BC == of_label_B1) & (np.arange(score_BC.shape[1]) < label_B1))
        rank_N[start : start + _ROWS_AT_ONCE] = before_BC.sum(axis=1)
    return rank_N


def classification_scores(rank_N: np.ndarray, label_N: np.ndarray, num_classes: int) -> dict[str, float]:
    """Return `acc1`, `acc5` (with five classes or more) and `mean_per_class_recall`, over the classes that occur, of what `truth_ranks` gives."""
    right_N = rank_N < 1
    recalls = np.bincount(label_N, right_N)[np.bincount(label_N) > 0] / np.bincount(label_N)[np.bincount(label_N) > 0]
    scores = {"acc1": 100 * float(right_N.mean())}
    if num_classes >= 5:
        scores["acc5"] = 100 * float((rank_N < 5).mean())
    return {**scores, "mean_per_class_recall": 100 * float(recalls.mean())}


def neighbour_votes(train_ND: np.ndarray, label_N: np.ndarray, query_QD: np.ndarray, num_classes: int, *, k: int = 20, temperature: float = 0.07) -> np.ndarray:
    """Return each class's votes [Q, C], float64: exp(cosine / temperature) of those of the k nearest training rows that are of the class.

    DINO's protocol: Caron et al. 2021 (arXiv 2104.14294), after Wu et al. 2018 (arXiv 1805.01978). Raises EvaluationError for fewer training rows than k.
    """
    if not 1 <= k <= len(train_ND):
        raise EvaluationError(f"{k} neighbours were asked for among {len(train_ND)} training rows.", "Ask for fewer.")
    cosine_QK, row_QK = nearest(unit_rows(query_QD), unit_rows(train_ND), k)
    vote_QC = np.zeros((len(query_QD), num_classes))
    np.add.at(vote_QC, (np.arange(len(query_QD))[:, None], label_N[row_QK]), np.exp(cosine_QK.astype(np.float64) / temperature))
    return vote_QC


def mean_average_precision(score_NC: np.ndarray, truth_NC: np.ndarray) -> float:
    """Return the mean over classes of the mean precision at each positive, without interpolation; a class without positives counts as 0."""
    if score_NC.shape != truth_NC.shape or not score_NC.size:
        raise EvaluationError(f"Scores {score_NC.shape} and labels {truth_NC.shape} do not fit.", "Give one label per score.")
    if not np.isfinite(score_NC).all():
        raise EvaluationError("Some scores of the classes are not finite.", "Check the features.")
    place_N = np.arange(1, len(score_NC) + 1)
    precisions = []
    for score_N, truth_N in zip(score_NC.T, truth_NC.T.astype(bool), strict=True):
        sorted_N = truth_N[np.argsort(-score_N, kind="stable")]
        precision_N = sorted_N.cumsum() / place_N
        precisions.append(precision_N[sorted_N].sum() / max(1, int(truth_N.sum())))
    return 100 * float(np.mean(precisions))


def zeroshot_accuracy(image_ND: np.ndarray, class_CD: np.ndarray, labels: Sequence[Collection[int]]) -> float:
    """Return for which share of images the nearest class is one of the image's `labels`."""
    chosen = top_k(unit_rows(image_ND), unit_rows(class_CD), 1)[:, 0]
    return 100 * float(np.mean([choice in of_image for choice, of_image in zip(chosen.tolist(), labels, strict=True)]))

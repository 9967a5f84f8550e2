"""How far a student agrees with its teacher on the same pairs, and with labels: pure functions of embeddings.

N images, M texts, C classes, D a width; student and teacher have a width of their own except where cosines are taken.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from kdstore.metrics.retrieval import top_k


def mean_cosine(a_ND: np.ndarray, b_ND: np.ndarray) -> float:
    """Return the mean cosine of rows of the same place, float64."""
    return float((_unit(a_ND) * _unit(b_ND)).sum(1, dtype=np.float64).mean())


def top1_agreement(student: tuple[np.ndarray, np.ndarray], teacher: tuple[np.ndarray, np.ndarray]) -> float:
    """Return for which share of queries, in percent, two models choose the same candidate; each gives (queries [N, D], candidates [M, D])."""
    chosen = [top_k(_unit(query_ND), _unit(candidate_MD), 1)[:, 0] for query_ND, candidate_MD in (student, teacher)]
    return 100 * float((chosen[0] == chosen[1]).mean())


def zeroshot_accuracy(image_ND: np.ndarray, class_CD: np.ndarray, labels: Sequence[Collection[int]]) -> float:
    """Return for which share of images, in percent, the nearest class is one of the image's `labels`."""
    chosen = top_k(_unit(image_ND), _unit(class_CD), 1)[:, 0]
    return 100 * float(np.mean([choice in of_image for choice, of_image in zip(chosen.tolist(), labels, strict=True)]))


def _unit(rows_ND: np.ndarray) -> np.ndarray:
    rows_ND = np.asarray(rows_ND, np.float32)
    return rows_ND / np.maximum(np.linalg.norm(rows_ND, axis=1, keepdims=True), np.finfo(np.float32).tiny)

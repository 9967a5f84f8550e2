"""How one model's embeddings lie on the sphere: pure functions that need no second model, in memory of a block of rows by N.

N rows, M candidates, D width; image and text rows of one place are a pair.
"""

from __future__ import annotations

import numpy as np
from scipy import special, stats

from kdstore.errors import EvaluationError
from kdstore.metrics.neighbours import top_k
from kdstore.metrics.unit import unit_rows

_ROWS_AT_ONCE = 2048


def modality_gap(image_ND: np.ndarray, text_MD: np.ndarray) -> float:
    """Return the distance of the mean unit image from the mean unit text: Liang et al. 2022 (arXiv 2203.02053)."""
    image_D, text_D = (unit_rows(row_ND).mean(0, dtype=np.float64) for row_ND in (image_ND, text_MD))
    return float(np.linalg.norm(image_D - text_D))


def alignment(image_ND: np.ndarray, text_ND: np.ndarray) -> float:
    """Return the mean squared distance of the unit rows of a pair: Wang & Isola 2020 (arXiv 2005.10242), with alpha = 2; lower is closer."""
    return float(((unit_rows(image_ND) - unit_rows(text_ND)) ** 2).sum(1, dtype=np.float64).mean())


def uniformity(row_ND: np.ndarray, t: float = 2.0) -> float:
    """Return log mean exp(-t |x - y|^2) over all pairs of different rows at unit length: Wang & Isola 2020 (arXiv 2005.10242); lower is more even.

    Raises EvaluationError below two rows.
    """
    if len(row_ND) < 2:
        raise EvaluationError(f"Uniformity needs two rows or more, found {len(row_ND)}.", "Give more rows.")
    unit_ND = unit_rows(row_ND)
    total = 0.0
    for start in range(0, len(unit_ND), _ROWS_AT_ONCE):
        cosine_BN = unit_ND[start : start + _ROWS_AT_ONCE] @ unit_ND[start:].T
        kernel_BN = np.exp(2 * t * (cosine_BN - 1))
        total += float(np.triu(kernel_BN, 1).sum(dtype=np.float64))
    return float(np.log(total / (len(unit_ND) * (len(unit_ND) - 1) / 2)))


def effective_rank(row_ND: np.ndarray) -> float:
    """Return exp of the entropy of the singular values, as shares of their sum, of the centred unit rows: Roy & Vetterli 2007 (EUSIPCO).

    Centred, as the common direction of a modality says nothing of what its rows tell apart. Raises EvaluationError for rows that do not vary.
    """
    singular_D = np.sqrt(_variances(row_ND))
    return float(np.exp(special.entr(singular_D / singular_D.sum()).sum()))


def spectrum(row_ND: np.ndarray) -> np.ndarray:
    """Return which share of the variance of the unit rows lies along each principal direction, float64 [D], the largest first; raises as `effective_rank`."""
    variance_D = _variances(row_ND)
    return variance_D / variance_D.sum()


def _variances(row_ND: np.ndarray) -> np.ndarray:
    """Return the squared singular values [D] of the centred unit rows, the largest first."""
    unit_ND = unit_rows(row_ND)
    mean_D = unit_ND.mean(0, dtype=np.float64)
    gram_DD = np.zeros((unit_ND.shape[1],) * 2)
    for start in range(0, len(unit_ND), _ROWS_AT_ONCE):
        centred_BD = unit_ND[start : start + _ROWS_AT_ONCE] - mean_D
        gram_DD += centred_BD.T @ centred_BD
    variance_D = np.maximum(np.linalg.eigvalsh(gram_DD), 0)[::-1]
    if not np.sqrt(variance_D).sum() > 1e-6 * len(unit_ND) ** 0.5:
        raise EvaluationError("Effective rank and spectrum are not defined: all rows are the same.", "Give rows that differ.")
    return variance_D


def hubness(query_ND: np.ndarray, candidate_MD: np.ndarray, k: int = 10) -> float:
    """Return the skewness of how often each candidate is among a query's k nearest: Radovanovic et al. 2010 (JMLR 11); 0 has no hubs.

    Raises EvaluationError where there are no more than k candidates.
    """
    if len(candidate_MD) <= k:
        raise EvaluationError(f"Hubness at {k} neighbours needs more than {k} candidates, found {len(candidate_MD)}.", "Give more rows.")
    occurrence_M = np.bincount(top_k(unit_rows(query_ND), unit_rows(candidate_MD), k).reshape(-1), minlength=len(candidate_MD))
    return 0.0 if occurrence_M.min() == occurrence_M.max() else float(stats.skew(occurrence_M))


def caption_margins(image_ND: np.ndarray, true_ND: np.ndarray, false_ND: np.ndarray) -> np.ndarray:
    """Return by how much each image's cosine with its true caption exceeds that with its false one, float64 [N]."""
    image_ND = unit_rows(image_ND).astype(np.float64)
    return (image_ND * (unit_rows(true_ND) - unit_rows(false_ND).astype(np.float64))).sum(axis=1)


def preference(margin_N: np.ndarray) -> float:
    """Return how often the true caption wins, in percent; a tie counts half, so that a model that sees no difference is at 50."""
    return 100 * float(((margin_N > 0) + 0.5 * (margin_N == 0)).mean())


def target_entropy(query_ND: np.ndarray, candidate_MD: np.ndarray, scale: float) -> float:
    """Return the mean entropy, in nats, of softmax(scale * cosine) over the candidates: what a query's soft target holds beside its one answer.

    At most log M; Hinton et al. 2015 (arXiv 1503.02531) on why it matters. A bias of the logits changes nothing.
    """
    query_ND, candidate_MD = unit_rows(query_ND), unit_rows(candidate_MD)
    total = 0.0
    for start in range(0, len(query_ND), _ROWS_AT_ONCE):
        logit_BM = scale * (query_ND[start : start + _ROWS_AT_ONCE] @ candidate_MD.T).astype(np.float64)
        log_share_BM = special.log_softmax(logit_BM, axis=1)
        total -= float((np.exp(log_share_BM) * log_share_BM).sum())
    return total / len(query_ND)


def sphere_measures(image_ND: np.ndarray, text_ND: np.ndarray, scale: float | None, k: int, *, at_k: str = "") -> dict[str, float]:
    """Return by name how images and their captions lie on the sphere: all measures above but those of false captions.

    Entropies of soft targets only where the `scale` of the logits is known; `at_k` ends the names of hubness, which is of k neighbours.
    """
    measures = {
        "modality_gap": modality_gap(image_ND, text_ND),
        "alignment": alignment(image_ND, text_ND),
        "image_uniformity": uniformity(image_ND),
        "text_uniformity": uniformity(text_ND),
        "image_effective_rank": effective_rank(image_ND),
        "text_effective_rank": effective_rank(text_ND),
        f"image_hubness{at_k}": hubness(text_ND, image_ND, k),
        f"text_hubness{at_k}": hubness(image_ND, text_ND, k),
    }
    if scale is not None:
        measures["image_target_entropy"] = target_entropy(image_ND, text_ND, scale)
        measures["text_target_entropy"] = target_entropy(text_ND, image_ND, scale)
    return measures

"""How far two models agree on the same rows, and how they lie in memory no larger than their own: nothing here is N x N.

N rows, M candidates, D a width: a and b (student and teacher) have a width of their own except where cosines are taken.
"""

from __future__ import annotations

import numpy as np
from scipy import stats

from kdstore.errors import EvaluationError
from kdstore.metrics.neighbours import others_nearest, top_k
from kdstore.metrics.unit import unit_rows

_ROWS_AT_ONCE = 4096


def mean_cosine(a_ND: np.ndarray, b_ND: np.ndarray) -> float:
    """Return the mean cosine of rows of the same place, float64."""
    return float((unit_rows(a_ND) * unit_rows(b_ND)).sum(1, dtype=np.float64).mean())


def top1_agreement(student: tuple[np.ndarray, np.ndarray], teacher: tuple[np.ndarray, np.ndarray]) -> float:
    """Return for which share of queries, in percent, two models choose the same candidate; each gives (queries [N, D], candidates [M, D])."""
    chosen = [top_k(unit_rows(query_ND), unit_rows(candidate_MD), 1)[:, 0] for query_ND, candidate_MD in (student, teacher)]
    return 100 * float((chosen[0] == chosen[1]).mean())


def debiased_linear_cka(a_ND: np.ndarray, b_ND: np.ndarray) -> float:
    """Return the debiased centred kernel alignment of linear kernels: 1 for equal similarity structure, 0 on average for independent rows.

    Kornblith et al. 2019 (arXiv 1905.00414) with the unbiased HSIC of Song et al. 2012 (JMLR 13), as in Nguyen et al. 2021 (arXiv 2010.15327). The plain form
    grows as the number of rows nears the width; of this one too only values at one number of rows compare. Raises EvaluationError below four rows, and
    for rows of no structure.
    """
    if len(a_ND) != len(b_ND) or len(a_ND) < 4:
        raise EvaluationError(f"The debiased CKA needs four rows or more of both models, found {len(a_ND)} and {len(b_ND)}.", "Give the same rows of both.")
    a, b = (row_ND.mean(0, dtype=np.float64) for row_ND in (a_ND, b_ND))
    own = _unbiased_hsic(a_ND, a_ND, a, a) * _unbiased_hsic(b_ND, b_ND, b, b)
    if not own > 0:
        raise EvaluationError("The debiased CKA is not defined: the rows of a model do not vary, or are too few.", "Give more rows.")
    return float(_unbiased_hsic(a_ND, b_ND, a, b) / np.sqrt(own))


def mutual_neighbours(a_ND: np.ndarray, b_ND: np.ndarray, k: int = 10) -> float:
    """Return which share of each row's k nearest others by cosine two models have in common, in percent, over all rows.

    Huh et al. 2024 (arXiv 2405.07987). Raises EvaluationError for k rows or fewer.
    """
    found_a, found_b = (others_nearest(unit_rows(row_ND), k) for row_ND in (a_ND, b_ND))
    shared = sum(int((of_a[:, :, None] == of_b[:, None]).sum()) for of_a, of_b in zip(_blocks(found_a), _blocks(found_b), strict=True))
    return 100 * shared / found_a.size


def similarity_rank_correlation(a_ND: np.ndarray, b_ND: np.ndarray, *, pairs: int = 2_000_000, seed: int = 0) -> float:
    """Return Spearman's correlation of two models' cosines over all pairs of rows, or over this many drawn with replacement where there are more.

    Representational similarity analysis: Kriegeskorte et al. 2008 (Frontiers in Systems Neuroscience 2). Raises EvaluationError below three rows.
    """
    n = len(a_ND)
    if n < 3:
        raise EvaluationError(f"A correlation of similarities needs three rows or more, found {n}.", "Give more rows.")
    if n * (n - 1) // 2 <= pairs:
        first, second = np.triu_indices(n, 1)
    else:
        rng = np.random.default_rng(seed)
        first = rng.integers(0, n, pairs)
        second = (first + rng.integers(1, n, pairs)) % n
    return float(stats.spearmanr(_cosines(a_ND, first, second), _cosines(b_ND, first, second)).statistic)


def _unbiased_hsic(a_ND: np.ndarray, b_ND: np.ndarray, mean_a: np.ndarray, mean_b: np.ndarray) -> float:
    """Return the unbiased HSIC of linear kernels, up to a factor that depends on N alone.

    With K = AA', L = BB' of centred rows and their diagonals k, l set to zero, the sums over N x N that Song et al. take are
    tr KL = |A'B|^2 - k.l, 1'KL1 = k.l, 1'K1 = -1'k: what is left is one D x D matrix.
    """
    n = len(a_ND)
    cross_DD = np.zeros((a_ND.shape[1], b_ND.shape[1]))
    diagonal_a, diagonal_b = np.empty(n), np.empty(n)
    for start in range(0, n, _ROWS_AT_ONCE):
        here = slice(start, start + _ROWS_AT_ONCE)
        a_BD, b_BD = a_ND[here].astype(np.float64) - mean_a, b_ND[here].astype(np.float64) - mean_b
        cross_DD += a_BD.T @ b_BD
        diagonal_a[here], diagonal_b[here] = (a_BD**2).sum(1), (b_BD**2).sum(1)
    both = float(diagonal_a @ diagonal_b)
    return float((cross_DD**2).sum()) - both - 2 / (n - 2) * both + diagonal_a.sum() * diagonal_b.sum() / ((n - 1) * (n - 2))


def _cosines(row_ND: np.ndarray, first_P: np.ndarray, second_P: np.ndarray) -> np.ndarray:
    unit_ND = unit_rows(row_ND)
    parts = [(unit_ND[f] * unit_ND[s]).sum(1, dtype=np.float64) for f, s in zip(_blocks(first_P), _blocks(second_P), strict=True)]
    return np.concatenate(parts)


def _blocks(row_N: np.ndarray) -> list[np.ndarray]:
    return [row_N[start : start + _ROWS_AT_ONCE] for start in range(0, len(row_N), _ROWS_AT_ONCE)]

"""Spearman's rank correlation of a few teachers: exact p, and an interval that stays honest where the usual ones collapse.

Fisher's transform gives five teachers in perfect order an interval of no width. Here a test is inverted instead: the interval holds every correlation
of a bivariate normal law under which ranks as extreme as these come up in more than one sample of forty, on either side. T units (teachers).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations

import numpy as np
from scipy import stats

_EXACT_UP_TO = 8  # units of which all orders are listed
_SAMPLED_ORDERS = 50_000
_LATENT = np.sin(np.linspace(0, np.pi / 2, 61))  # correlations of the normal law that are tried, denser near 1


@dataclass(frozen=True)
class Spearman:
    """Rank correlation with exact two-sided p, a 95 % interval, and the smallest p that so many units can give; `rho` is None where all ranks are tied."""

    rho: float | None
    p: float
    low: float
    high: float
    smallest_p: float


def spearman(x_T: np.ndarray, y_T: np.ndarray) -> Spearman:
    """Correlate the ranks of two measures of the same units; p counts the orders of the units, sampled beyond eight. Raises ValueError for NaN."""
    if not (np.isfinite(x_T).all() and np.isfinite(y_T).all()) or x_T.shape != y_T.shape:
        raise ValueError(f"Spearman needs two finite measures of the same units, found {x_T} and {y_T}")
    num = len(x_T)
    x_T, y_T = (stats.rankdata(values_T) - (num + 1) / 2 for values_T in (x_T, y_T))
    norm = np.sqrt((x_T @ x_T) * (y_T @ y_T))
    if norm == 0:
        return Spearman(None, 1.0, -1.0, 1.0, 1.0)
    rho = float(x_T @ y_T / norm)
    size_P = _by_chance(tuple(np.sort(x_T)), tuple(np.sort(y_T))) / norm
    p = (size_P >= abs(rho) - 1e-9).mean()
    return Spearman(rho, float(p), *_interval(rho, num), float((size_P >= size_P.max() - 1e-9).mean()))


@lru_cache(maxsize=16)
def _by_chance(x_T: tuple[float, ...], y_T: tuple[float, ...]) -> np.ndarray:
    """Return the size of the product of ranks in every order of the units; beyond eight in a sample with the sorted order, so that no p is 0."""
    num = len(x_T)
    if num <= _EXACT_UP_TO:
        order_PT = np.array(list(permutations(range(num))), np.int8)
    else:
        order_PT = np.random.default_rng(0).permuted(np.tile(np.arange(num), (_SAMPLED_ORDERS, 1)), axis=1)
        order_PT[0] = np.arange(num)
    return np.abs(np.array(y_T)[order_PT] @ np.array(x_T))


def _interval(rho: float, num: int) -> tuple[float, float]:
    low_L, high_L = _middle(num)
    latent_L = np.concatenate([-_LATENT[:0:-1], _LATENT])
    first, last = np.argmax(high_L >= rho - 1e-9), np.flatnonzero(low_L <= rho + 1e-9)[-1]
    ends = latent_L[[max(first - 1, 0), min(last + 1, len(latent_L) - 1)]]  # rounded outwards
    low, high = 6 / np.pi * np.arcsin(ends / 2)  # of ranks, from that of the normal law (Pearson 1907)
    return float(min(low, rho)), float(max(high, rho))


@lru_cache(maxsize=16)
def _middle(num: int) -> tuple[np.ndarray, np.ndarray]:
    """Return between which ends 95 % of the rank correlations of `num` units lie, for each latent correlation from -1 to 1."""
    x_DT, noise_DT = np.random.default_rng(0).standard_normal((2, max(1000, 20_000 // num), num))
    rank_DT = x_DT.argsort(axis=1).argsort(axis=1) - (num - 1) / 2
    ends = []
    for latent in _LATENT:
        other_DT = (latent * x_DT + np.sqrt(1 - latent**2) * noise_DT).argsort(axis=1).argsort(axis=1)
        rho_D = (rank_DT * other_DT).sum(axis=1) / (num * (num**2 - 1) / 12)
        ends.append(np.quantile(rho_D, [0.025, 0.975], method="inverted_cdf"))
    low_L, high_L = np.array(ends).T
    return np.concatenate([-high_L[:0:-1], low_L]), np.concatenate([-low_L[:0:-1], high_L])

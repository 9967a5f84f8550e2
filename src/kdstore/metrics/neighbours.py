"""The nearest of many candidates by inner product: exact, or by an index that looks at a part of them and says how much it misses.

The rule for ties, which common tools leave to chance: of equal similarities the lower row wins. Candidates with equal embeddings are searched once and
expanded afterwards, since a matrix product may give equal rows similarities that differ in the last bit.

D width, Q queries, B of them at once, C candidates, U different candidates, K depth, G groups of equal candidates.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt

from kdstore.errors import EvaluationError

Array = npt.NDArray[Any]
Search = Callable[[Array, int], tuple[Array, Array]]
"""`search(query_BD, depth)` -> similarities and rows [B, depth], best first; row -1 where fewer were found."""

_QUERIES_AT_ONCE = 4096
_LEAST_PER_LIST = 39  # candidates, below which faiss warns
_MOST_PER_LIST = 64  # that lists are fitted to


def exact_search(candidate_CD: Array) -> Search:
    """Look at every candidate, in blocks; copies nothing."""
    return lambda query_BD, depth: faiss.knn(query_BD, candidate_CD, depth, metric=faiss.METRIC_INNER_PRODUCT)


def list_search(probes: int, seed: int = 0) -> Callable[[Array], Search]:
    """Make an approximate search over unit rows: k-means splits the candidates into about 4 sqrt(C) lists, a query looks at the `probes` nearest.

    Of faiss's indexes this one, since it is fitted alike in every run, and holds one copy of the candidates.
    """

    def fitted(candidate_CD: Array) -> Search:
        lists = max(1, min(round(4 * len(candidate_CD) ** 0.5), len(candidate_CD) // _LEAST_PER_LIST))
        index = faiss.IndexIVFFlat(faiss.IndexFlatIP(candidate_CD.shape[1]), candidate_CD.shape[1], lists, faiss.METRIC_INNER_PRODUCT)
        index.cp.spherical, index.cp.seed, index.cp.max_points_per_centroid = True, seed, _MOST_PER_LIST
        index.train(candidate_CD)
        index.add(candidate_CD)
        index.nprobe = min(probes, lists)
        return index.search

    return fitted


def top_k(query_QD: Array, candidate_CD: Array, k: int) -> Array:
    """Return the rows of the min(k, C) candidates of largest inner product per query, best first, int64; of equal ones the lower row first."""
    return nearest(query_QD, candidate_CD, k)[1]


def nearest(query_QD: Array, candidate_CD: Array, k: int, search: Callable[[Array], Search] = exact_search) -> tuple[Array, Array]:
    """Return similarities float32 and rows int64 [Q, min(k, C)] of the nearest candidates; -inf and -1 where an approximate search found fewer.

    Raises EvaluationError for a k below 1.
    """
    if k < 1:
        raise EvaluationError(f"K must be at least 1, found {k}.", "Correct K.")
    k = min(k, len(candidate_CD))
    unique_UD, group_C = _different(np.ascontiguousarray(candidate_CD, np.float32))
    members_UK = _lowest_members(group_C, len(unique_UD), k)
    find = search(unique_UD)
    score_QK, row_QK = np.empty((len(query_QD), k), np.float32), np.empty((len(query_QD), k), np.int64)
    for start in range(0, len(query_QD), _QUERIES_AT_ONCE):
        query_BD = np.ascontiguousarray(query_QD[start : start + _QUERIES_AT_ONCE], np.float32)
        stop = start + len(query_BD)
        score_QK[start:stop], row_QK[start:stop] = _found(find, query_BD, members_UK, k)
    return score_QK, row_QK


def others_nearest(row_ND: Array, k: int) -> Array:
    """Return the rows of each row's k nearest among the others, int64 [N, k]; raises EvaluationError where there are no k others."""
    if not 1 <= k < len(row_ND):
        raise EvaluationError(f"{k} neighbours of each row need more than {k} rows, found {len(row_ND)}.", "Give more rows, or ask for fewer neighbours.")
    found = top_k(row_ND, row_ND, k + 1)
    others = found != np.arange(len(row_ND))[:, None]
    others[others.all(axis=1), k] = False  # equal lower rows have pushed it out
    return found[others].reshape(len(row_ND), k)


def share_found(found_QK: Array, query_QD: Array, candidate_CD: Array) -> float:
    """Return which share of the exact K nearest an approximate search has found, in percent."""
    exact_QK = top_k(query_QD, candidate_CD, found_QK.shape[1])
    return 100 * float((exact_QK[:, :, None] == found_QK[:, None]).any(axis=2).mean())


def _found(find: Search, query_BD: Array, members_UK: Array, k: int) -> tuple[Array, Array]:
    """Search groups of equal candidates deep enough that no tie is cut off, then order their members by (similarity, row)."""
    depth = min(len(members_UK), k + 1)
    while True:
        score_BG, group_BG = find(query_BD, depth)
        score_BG = np.where(group_BG < 0, -np.inf, score_BG)
        last, kth = score_BG[:, -1], score_BG[:, min(k, depth) - 1]
        # Groups beyond the k-th matter only if their similarity ties with it.
        if depth == len(members_UK) or bool(((last < kth) | (group_BG[:, -1] < 0)).all()):
            break
        depth = min(len(members_UK), 4 * depth)
    row_BGK = np.where(group_BG[:, :, None] < 0, -1, members_UK[group_BG])
    score_BGK = np.where(row_BGK < 0, -np.inf, score_BG[:, :, None])
    row_BR, score_BR = row_BGK.reshape(len(query_BD), -1), score_BGK.reshape(len(query_BD), -1)
    order_BR = np.lexsort((row_BR, -score_BR), axis=1)[:, :k]
    return np.take_along_axis(score_BR, order_BR, axis=1), np.take_along_axis(row_BR, order_BR, axis=1)


def _different(candidate_CD: Array) -> tuple[Array, Array]:
    """Return the different rows in the order in which they first come, and the number among them of each row; the rows themselves where all differ."""
    # 64 bits: among a million different rows two share a hash once in forty million runs.
    hash_C = np.fromiter((hash(row.tobytes()) for row in candidate_CD), np.int64, len(candidate_CD))
    _, first_U, group_C = np.unique(hash_C, return_index=True, return_inverse=True)
    if len(first_U) == len(candidate_CD):
        return candidate_CD, np.arange(len(candidate_CD))
    order_U = np.argsort(first_U)
    place_U = np.empty_like(order_U)
    place_U[order_U] = np.arange(len(order_U))
    return candidate_CD[first_U[order_U]], place_U[group_C]


def _lowest_members(group_C: Array, num_groups: int, k: int) -> Array:
    """Return the lowest k rows of each group of equal candidates, padded with -1: no more of one group can be among the top k."""
    by_group_C = np.argsort(group_C, kind="stable")
    size_U = np.bincount(group_C, minlength=num_groups)
    place_C = np.arange(len(group_C)) - np.repeat(np.cumsum(size_U) - size_U, size_U)
    members_UK = np.full((num_groups, min(k, int(size_U.max()))), -1, np.int64)
    kept_C = place_C < k
    members_UK[group_C[by_group_C][kept_C], place_C[kept_C]] = by_group_C[kept_C]
    return members_UK

"""Recall at K of image and text retrieval with several captions per image, in percent, and the best recall that repeated captions allow.

Keys are those of CLIP Benchmark: `image_retrieval_recall@K` averages over texts (a hit: the text's image is among the top K images),
`text_retrieval_recall@K` over images (a hit: at least one of its captions is among the top K texts). That tool states fractions.

The rule for ties, which common tools leave to chance: of equal similarities the lower row wins. Candidates with equal embeddings are
searched once and expanded afterwards, since a matrix product may give equal rows similarities that differ in the last bit.

N images, M texts, D width, Q queries, C candidates, U different candidates, K depth.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence

import faiss
import numpy as np

from kdstore.errors import EvaluationError

KS = (1, 5, 10)
_QUERIES_AT_ONCE = 4096


def retrieval_recall(image_ND: np.ndarray, text_MD: np.ndarray, image_of_text_M: np.ndarray, ks: Sequence[int] = KS) -> dict[str, float]:
    """Return recall at each K in both directions, in percent; embeddings are normalised here, `image_of_text_M` holds each text's image row.

    A K beyond the number of candidates looks at all of them. Raises EvaluationError for values that are not finite, shapes that do not fit,
    or an image without a caption.
    """
    image_ND, text_MD = _normalised(image_ND, "image"), _normalised(text_MD, "text")
    image_of_text_M = _checked_pairs(image_of_text_M, len(image_ND), len(text_MD))
    image_of_text_MK = top_k(text_MD, image_ND, max(ks))
    text_of_image_NK = top_k(image_ND, text_MD, max(ks))
    image_hit_MK = image_of_text_MK == image_of_text_M[:, None]
    text_hit_NK = image_of_text_M[text_of_image_NK] == np.arange(len(image_ND))[:, None]
    return {f"image_retrieval_recall@{k}": 100 * float(image_hit_MK[:, :k].any(axis=1).mean()) for k in ks} | {
        f"text_retrieval_recall@{k}": 100 * float(text_hit_NK[:, :k].any(axis=1).mean()) for k in ks
    }


def recall_ceiling(captions: Sequence[str], image_of_text_M: np.ndarray, ks: Sequence[int] = KS) -> dict[str, float]:
    """Return the recall, in percent, that a perfect model which cannot tell equal captions apart can expect; 100 where no caption repeats.

    Image retrieval: a caption that c images share finds each of them equally well, so its own image is in the top K with min(1, K / c).
    Text retrieval: of c equal captions, o are the image's own; K of the c in random order hold one of those with
    1 - C(c - o, K) / C(c, K). The image looks through the equal captions where this is highest, which is optimal, since the chance
    to miss in several groups is a product of terms that fall faster the more of one group has been seen.
    """
    rows = _checked_pairs(image_of_text_M, None, len(captions)).tolist()
    images_of: defaultdict[str, set[int]] = defaultdict(set)
    for caption, image in zip(captions, rows, strict=True):
        images_of[caption].add(image)
    rows_of = Counter(captions)
    own = Counter(zip(rows, captions, strict=True))
    ceiling = {f"image_retrieval_recall@{k}": 100 * float(np.mean([min(1.0, k / len(images_of[c])) for c in captions])) for k in ks}
    for k in ks:
        best: defaultdict[int, float] = defaultdict(float)
        for (image, caption), num_own in own.items():
            best[image] = max(best[image], _chance_of_own(rows_of[caption], num_own, k))
        ceiling[f"text_retrieval_recall@{k}"] = 100 * float(np.mean(list(best.values())))
    return ceiling


def top_k(query_QD: np.ndarray, candidate_CD: np.ndarray, k: int) -> np.ndarray:
    """Return the rows of the min(k, C) candidates of largest inner product per query, best first, int64; of equal ones the lower row first."""
    if k < 1:
        raise EvaluationError(f"Recall needs K of at least 1, found {k}.", "Correct the list of K.")
    k = min(k, len(candidate_CD))
    candidate_CD = np.ascontiguousarray(candidate_CD, np.float32)
    unique_UD, group_C = np.unique(candidate_CD, axis=0, return_inverse=True)
    members_UK = _lowest_members(group_C.reshape(-1), len(unique_UD), k)
    index = faiss.IndexFlatIP(candidate_CD.shape[1])
    index.add(unique_UD)
    found_QK = np.empty((len(query_QD), k), np.int64)
    for start in range(0, len(query_QD), _QUERIES_AT_ONCE):
        query_BD = np.ascontiguousarray(query_QD[start : start + _QUERIES_AT_ONCE], np.float32)
        found_QK[start : start + len(query_BD)] = _search(index, query_BD, members_UK, k)
    return found_QK


def _search(index: faiss.IndexFlatIP, query_BD: np.ndarray, members_UK: np.ndarray, k: int) -> np.ndarray:
    """Search groups of equal candidates deep enough that no tie is cut off, then order their members by (similarity, row)."""
    depth = min(index.ntotal, k + 1)
    while True:
        score_BG, group_BG = index.search(query_BD, depth)
        # Groups beyond the k-th matter only if their similarity ties with it.
        if depth == index.ntotal or bool((score_BG[:, -1] < score_BG[:, min(k, depth) - 1]).all()):
            break
        depth = min(index.ntotal, 4 * depth)
    row_BGK = members_UK[group_BG]
    score_BGK = np.where(row_BGK < 0, -np.inf, score_BG[:, :, None])
    row_BR, score_BR = row_BGK.reshape(len(query_BD), -1), score_BGK.reshape(len(query_BD), -1)
    order_BR = np.lexsort((row_BR, -score_BR), axis=1)[:, :k]
    return np.take_along_axis(row_BR, order_BR, axis=1)


def _lowest_members(group_C: np.ndarray, num_groups: int, k: int) -> np.ndarray:
    """Return the lowest k rows of each group of equal candidates, padded with -1: no more of one group can be among the top k."""
    by_group_C = np.argsort(group_C, kind="stable")
    size_U = np.bincount(group_C, minlength=num_groups)
    place_C = np.arange(len(group_C)) - np.repeat(np.cumsum(size_U) - size_U, size_U)
    members_UK = np.full((num_groups, min(k, int(size_U.max()))), -1, np.int64)
    kept_C = place_C < k
    members_UK[group_C[by_group_C][kept_C], place_C[kept_C]] = by_group_C[kept_C]
    return members_UK


def _chance_of_own(num_equal: int, num_own: int, k: int) -> float:
    return 1.0 if k >= num_equal else 1 - math.comb(num_equal - num_own, k) / math.comb(num_equal, k)


def _normalised(embedding_RD: np.ndarray, side: str) -> np.ndarray:
    """Return unit rows in float32; a zero row stays zero."""
    if embedding_RD.ndim != 2 or len(embedding_RD) == 0:
        raise EvaluationError(f"Expected {side} embeddings of shape (rows, width), found {embedding_RD.shape}.", "Give at least one row.")
    embedding_RD = np.asarray(embedding_RD, np.float32)
    bad = int((~np.isfinite(embedding_RD)).any(axis=1).sum())
    if bad:
        raise EvaluationError(f"{bad} of {len(embedding_RD)} {side} embeddings are not finite.", "Leave invalid rows out.")
    return embedding_RD / np.maximum(np.linalg.norm(embedding_RD, axis=1, keepdims=True), np.finfo(np.float32).tiny)


def _checked_pairs(image_of_text_M: np.ndarray, num_images: int | None, num_texts: int) -> np.ndarray:
    """Check that each text has an image and each image a text; without `num_images` they are counted by the largest row."""
    image_of_text_M = np.asarray(image_of_text_M, np.int64)
    if image_of_text_M.shape != (num_texts,) or num_texts == 0:
        raise EvaluationError(
            f"Expected the image row of each of {num_texts} texts, found {image_of_text_M.shape}.", "Give one image row per text, of at least one text."
        )
    num_images = int(image_of_text_M.max()) + 1 if num_images is None else num_images
    if image_of_text_M.min() < 0 or image_of_text_M.max() >= num_images:
        raise EvaluationError(f"Texts name image rows {image_of_text_M.min()} to {image_of_text_M.max()} of {num_images} images.", "Correct the image rows.")
    without = num_images - len(np.unique(image_of_text_M))
    if without:
        raise EvaluationError(f"{without} of {num_images} images have no caption.", "Evaluate retrieval on images that have captions.")
    return image_of_text_M

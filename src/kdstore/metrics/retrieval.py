"""Recall at K of image and text retrieval with several captions per image, in percent, and the best recall that repeated captions allow.

Keys are those of CLIP Benchmark: `image_retrieval_recall@K` averages over texts (a hit: the text's image is among the top K images),
`text_retrieval_recall@K` over images (a hit: at least one of its captions is among the top K texts). That tool states fractions.

Of equal similarities the lower row wins (`neighbours`), which common tools leave to chance.

N images, M texts, D width, K depth.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence

import numpy as np

from kdstore.errors import EvaluationError
from kdstore.metrics.neighbours import Array, Search, exact_search, nearest
from kdstore.metrics.unit import finite_unit_rows

KS = (1, 5, 10)


def retrieval_recall(
    image_ND: np.ndarray, text_MD: np.ndarray, image_of_text_M: np.ndarray, ks: Sequence[int] = KS, search: Callable[[Array], Search] = exact_search
) -> dict[str, float]:
    """Return recall at each K in both directions, in percent; embeddings are normalised here, `image_of_text_M` holds each text's image row.

    A K beyond the number of candidates looks at all of them. Raises EvaluationError for values that are not finite, shapes that do not fit,
    or an image without a caption.
    """
    return recall_of_hits(*retrieval_hits(image_ND, text_MD, image_of_text_M, max(ks), search), ks)


def retrieval_hits(
    image_ND: np.ndarray, text_MD: np.ndarray, image_of_text_M: np.ndarray, depth: int, search: Callable[[Array], Search] = exact_search
) -> tuple[np.ndarray, np.ndarray]:
    """Return where each text's image and where a text of each image stand: bool [M, depth] and [N, depth], best first; raises as `retrieval_recall`."""
    found = nearest_both_ways(image_ND, text_MD, depth, search)
    return hits_of_ranking(*found, _checked_pairs(image_of_text_M, len(image_ND), len(text_MD)))


def nearest_both_ways(image_ND: np.ndarray, text_MD: np.ndarray, depth: int, search: Callable[[Array], Search] = exact_search) -> tuple[Array, Array]:
    """Return the rows of each text's nearest images [M, depth] and of each image's nearest texts [N, depth], by cosine, best first."""
    image_ND, text_MD = finite_unit_rows(image_ND, "image embeddings"), finite_unit_rows(text_MD, "text embeddings")
    return nearest(text_MD, image_ND, depth, search)[1], nearest(image_ND, text_MD, depth, search)[1]


def hits_of_ranking(image_of_text_MK: Array, text_of_image_NK: Array, image_of_text_M: Array) -> tuple[Array, Array]:
    """Return where each text's image and where a text of each image stand, as `retrieval_hits` does."""
    image_hit_MK = image_of_text_MK == image_of_text_M[:, None]
    text_hit_NK = (image_of_text_M[text_of_image_NK] == np.arange(len(text_of_image_NK))[:, None]) & (text_of_image_NK >= 0)
    return image_hit_MK, text_hit_NK


def recall_of_hits(image_hit_MK: np.ndarray, text_hit_NK: np.ndarray, ks: Sequence[int] = KS) -> dict[str, float]:
    """Return recall at each K, in percent, of the hits in both directions."""
    return {
        f"{side}_retrieval_recall@{k}": 100 * float(hit[:, :k].any(axis=1).mean()) for side, hit in (("image", image_hit_MK), ("text", text_hit_NK)) for k in ks
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


def _chance_of_own(num_equal: int, num_own: int, k: int) -> float:
    return 1.0 if k >= num_equal else 1 - math.comb(num_equal - num_own, k) / math.comb(num_equal, k)


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

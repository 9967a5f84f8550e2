"""How sure a score is, and a difference of two: resampling of images, with what seeds add on top.

The questions of one image are not independent, so whole images are drawn, and a score is the ratio of two sums over the drawn images. Intervals
are the percentiles of 10,000 such scores: they stay within what is possible, and they can hold a second source of chance, the seeds under which heads
were trained, for which the corrections of BCa are not made. A bootstrap of three seeds would be far too narrow, since it never sees a fourth;
so to each resampled score a draw of Student's t is added, scaled to the error of the mean over seeds. Where one source is silent, what is left
is the percentile interval of the other, or its t interval.

R models, S seeds, N items, G images, C scores (a column is one mean, such as that of a question kind), B resamples.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from scipy import stats

RESAMPLES = 10_000
_AT_ONCE = 1 << 22  # weights that are drawn and multiplied at once


def image_sums(score_N: np.ndarray, image_N: np.ndarray, kind_N: np.ndarray, num_kinds: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the sum of scores and the number of items of each image and kind, float64 [G, kinds]; images and kinds are numbers from 0."""
    num_images = int(image_N.max()) + 1
    cell_N = image_N.astype(np.int64) * num_kinds + kind_N
    sums = np.bincount(cell_N, weights=score_N, minlength=num_images * num_kinds)
    counts = np.bincount(cell_N, minlength=num_images * num_kinds).astype(np.float64)
    return sums.reshape(num_images, num_kinds), counts.reshape(num_images, num_kinds)


def bootstrap_means(sum_RGC: np.ndarray, count_GC: np.ndarray, *, resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """Return the scores of R models on `resamples` draws of as many images, with replacement, [R, B, C]; NaN where a draw holds no item of a score."""
    columns_GX = np.concatenate([*sum_RGC, count_GC], axis=1).astype(np.float32)
    totals_BX = np.concatenate([weight_BG @ columns_GX for weight_BG in _drawn_weights(len(count_GC), resamples, seed)]).astype(np.float64)
    *sums, count_BC = np.split(totals_BX, len(sum_RGC) + 1, axis=1)
    with np.errstate(invalid="ignore"):
        return np.stack(sums) / count_BC


def flipped_means(difference_GC: np.ndarray, count_C: np.ndarray, *, resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """Return mean differences [B, C] where for each image a coin decides which model is which; `difference_GC` are sums, `count_C` all items."""
    difference_GC = difference_GC[(difference_GC != 0).any(axis=1)]
    bits = np.random.default_rng(seed)
    means = []
    for num in _parts(resamples, len(difference_GC)):
        words = bits.integers(0, 1 << 32, (num, -(-len(difference_GC) // 32)), np.uint32)
        coin_BG = np.unpackbits(words.view(np.uint8), axis=1, count=len(difference_GC))
        means.append((2.0 * coin_BG - 1.0) @ difference_GC / count_C)
    return np.concatenate(means)


def seed_errors(mean_SC: np.ndarray, *, resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """Return draws [B, C] of how far a mean over these seeds may be from that over all seeds (Student's t); zeros for one seed, which says nothing."""
    num_seeds = len(mean_SC)
    if num_seeds < 2:
        return np.zeros((resamples, mean_SC.shape[1]))
    error_C = mean_SC.std(axis=0, ddof=1) / np.sqrt(num_seeds)
    return np.random.default_rng((1, seed)).standard_t(num_seeds - 1, (resamples, len(error_C))) * error_C


def percentile_interval(drawn_BC: np.ndarray, confidence: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
    """Return the lower and the upper end [C] of the middle `confidence` of the draws."""
    low_C, high_C = np.nanquantile(drawn_BC, [(1 - confidence) / 2, (1 + confidence) / 2], axis=0)
    return low_C, high_C


def beyond_unanimity(low_C: np.ndarray, high_C: np.ndarray, images_C: np.ndarray, confidence: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
    """Widen intervals of scores, in percent, that are 0 or 100 on every image, where resampling sees no spread, to the exact end for as many tosses.

    Clopper & Pearson 1934 (Biometrika 26): of G images that all are right, the lower end is the G-th root of (1 - confidence) / 2.
    """
    reach_C = 100 * (1 - ((1 - confidence) / 2) ** (1 / images_C))
    return np.where(low_C > 100 - 1e-4, 100 - reach_C, low_C), np.where(high_C < 1e-4, reach_C, high_C)


def t_interval(mean_SC: np.ndarray, confidence: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
    """Return Student's t interval [C] of the mean over seeds; two or more of them."""
    half_C = stats.t.ppf((1 + confidence) / 2, len(mean_SC) - 1) * mean_SC.std(axis=0, ddof=1) / np.sqrt(len(mean_SC))
    return mean_SC.mean(axis=0) - half_C, mean_SC.mean(axis=0) + half_C


def two_sided_p(null_BC: np.ndarray, observed_C: np.ndarray) -> np.ndarray:
    """Return how often chance alone gives a difference as large as the observed one, [C], which counts as one of the draws: never 0."""
    tolerance_C = 1e-9 * np.maximum(np.abs(observed_C), 1e-9)  # equal sums in another order
    return (1 + (np.abs(null_BC) >= np.abs(observed_C) - tolerance_C).sum(axis=0)) / (1 + len(null_BC))


def mcnemar_p(only_a: int, only_b: int) -> float:
    """Return the exact two-sided p of McNemar's test: discordant items as tosses of a fair coin, each independent of the others."""
    return float(stats.binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0


def holm(p_K: Sequence[float]) -> list[float]:
    """Return p values adjusted for all of them being looked at (Holm 1979): the k-th smallest of m times m - k + 1, never falling."""
    order = np.argsort(p_K, kind="stable")
    stepped = np.maximum.accumulate(np.sort(p_K) * np.arange(len(order), 0, -1))
    adjusted = np.empty(len(order))
    adjusted[order] = np.minimum(stepped, 1.0)
    return adjusted.tolist()


def _drawn_weights(num_images: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Yield how often each image is drawn, float32 [some of B, G]."""
    draws = np.random.default_rng(seed)
    for num in _parts(resamples, num_images):
        drawn_BG = draws.integers(0, num_images, (num, num_images)) + num_images * np.arange(num)[:, None]
        yield np.bincount(drawn_BG.ravel(), minlength=num * num_images).reshape(num, num_images).astype(np.float32)


def _parts(resamples: int, num_images: int) -> Iterator[int]:
    at_once = max(1, _AT_ONCE // max(1, num_images))
    for start in range(0, resamples, at_once):
        yield min(at_once, resamples - start)

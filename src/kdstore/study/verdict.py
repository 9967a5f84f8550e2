"""Do stronger teachers make better students? What a table of scores, teachers by seeds, bears out: monotone, not monotone, or not decidable.

Two questions are kept apart. Of *these checkpoints*, chance lies in seeds and test images, and a few seeds decide much: all students share the seeds,
so what is left when teacher and seed are taken out gives (T-1)(S-1) degrees of freedom where the differences of one pair give S-1.
Of *teachers in general*, the teachers are the sample, and fewer than five decide nothing: `spearman` and `in_general`, never part of the verdict.

- "not monotone": in some pair the stronger teacher's students are worse, by the margin or more as estimated (Holm over all pairs and their mean).
- "monotone": the mean over pairs of stronger minus weaker is above 0, and the 95 % interval of every pair excludes an inversion by the margin.
- Otherwise "not decidable", and why. Teachers whose strengths cannot be told apart form no pair.

A teacher counts with the larger of its own residual variance and that of all: with the pooled one alone, teachers whose students vary more than others'
are too often called different (benchmarks/verdict_errors.py). T teachers, S seeds, G images, K pairs and contrasts of them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from scipy.special import ndtri, stdtr, stdtrit

from kdstore.metrics.statistics import holm
from kdstore.study.correlation import Spearman, spearman

MONOTONE, NOT_MONOTONE, NOT_DECIDABLE = "monotone", "not monotone", "not decidable"
ALPHA = 0.05  # of each claim
_SCORE_ROUNDING = 0.02  # official scores are rounded to two decimals
_FLOAT_ROUNDING = 1e-9  # of a score: differences below are no evidence, however small the variance


@dataclass(frozen=True)
class Images:
    """The same questions by image: `sum_TSG` of scores in percent, `count_G` of questions (one score of `evaluate.summary.Items`)."""

    sum_TSG: np.ndarray
    count_G: np.ndarray


@dataclass(frozen=True)
class Cell:
    """What a verdict is about: the teachers' strengths with standard errors, and their students' scores in percent, under seeds that all share.

    Without `images` the verdict holds for these test images only. Raises ValueError for a table that is incomplete or not finite.
    """

    teachers: Sequence[str]
    strength_T: np.ndarray
    strength_error_T: np.ndarray
    score_TS: np.ndarray
    images: Images | None = None

    def __post_init__(self) -> None:
        num = len(self.teachers)
        if not num or len(set(self.teachers)) != num or self.score_TS.ndim != 2 or not self.score_TS.size:
            raise ValueError(f"expected scores by teacher and seed, found {self.score_TS.shape} for {list(self.teachers)}")
        for values in (self.strength_T, self.strength_error_T, self.score_TS):
            if len(values) != num or not np.isfinite(values).all():
                raise ValueError(f"expected a finite value for each of {num} teachers, found {values}")
        if (self.strength_error_T < 0).any():
            raise ValueError(f"expected standard errors, found {self.strength_error_T}")
        _check_images(self.score_TS, self.images)


@dataclass(frozen=True)
class Point:
    """A teacher and its students' mean score with a 95 % interval over seeds and images, None from one seed."""

    teacher: str
    strength: float
    score: float
    low: float | None
    high: float | None
    by_seed: list[float]


@dataclass(frozen=True)
class Trend:
    """Mean over `pairs` of the stronger teacher's students minus the weaker's, in points; 95 % interval, two-sided p."""

    difference: float
    low: float
    high: float
    p: float
    pairs: int


@dataclass(frozen=True)
class Inversion:
    """The stronger teacher whose students are `worse`, and the weaker whose are `better`: by how many points, one-sided p.

    Each end is a bound that holds at 95 % for all pairs together, so an inversion whose `low` is above 0 is one after Bonferroni.
    """

    better: str
    worse: str
    difference: float
    low: float
    high: float
    p: float
    p_holm: float


@dataclass(frozen=True)
class Verdict:
    """What a cell bears out, its points ascending in strength, its inversions in p; `p_inverted` is that of "not monotone"."""

    verdict: str
    sentence: str
    scope: str
    points: list[Point]
    spearman: Spearman
    in_general: str
    trend: Trend | None
    inversions: list[Inversion]
    p_inverted: float


@dataclass(frozen=True)
class Headline:
    """The one verdict over all cells of a study."""

    verdict: str
    sentence: str
    scope: str


@dataclass(frozen=True)
class Gain:
    """How far one arm is above another, in points, paired by seed: 95 % interval and two-sided p over seeds and images, None from one seed."""

    difference: float
    low: float | None
    high: float | None
    p: float | None
    by_seed: list[float]


@dataclass(frozen=True)
class _Estimates:
    """Contrasts of the teachers' mean scores."""

    value_K: np.ndarray
    error_K: np.ndarray
    df_K: np.ndarray

    @property
    def t_K(self) -> np.ndarray:
        return self.value_K / self.error_K

    def half_K(self, alpha: float) -> np.ndarray:
        """Return how far a bound that misses with probability `alpha` lies from each value."""
        return self.error_K * stdtrit(self.df_K, 1 - alpha)

    def two_sided_p(self, k: int) -> float:
        return float(2 * stdtr(self.df_K[k], -abs(self.t_K[k])))


def judge(cell: Cell, margin: float) -> Verdict:
    """Return what a cell bears out, where an inversion by less than `margin` points counts as nothing. Raises ValueError for a negative margin."""
    if not margin >= 0:
        raise ValueError(f"expected a margin of 0 points or more, found {margin}")
    pairs = _told_apart(cell)
    if cell.score_TS.shape[1] < 2:
        return _verdict(cell, NOT_DECIDABLE, "one seed gives no interval.")
    if not pairs:
        return _verdict(cell, NOT_DECIDABLE, "no two teachers can be told apart in strength.")
    inverted_KT = np.zeros((len(pairs) + 1, len(cell.teachers)))  # the weaker's students minus the stronger's; last the mean over pairs
    for k, (stronger, weaker) in enumerate(pairs):
        inverted_KT[k, weaker], inverted_KT[k, stronger] = 1, -1
    inverted_KT[-1] = inverted_KT.sum(axis=0) / len(pairs)
    found = _estimate(cell.score_TS, cell.images, inverted_KT)
    p_K = stdtr(found.df_K, -found.t_K)
    holm_K = np.array(holm(p_K))
    reach_K = found.half_K(ALPHA / len(p_K))
    inversions = [
        Inversion(cell.teachers[weaker], cell.teachers[stronger], *(float(x) for x in (value, value - reach, value + reach, p, p_holm)))
        for (stronger, weaker), value, reach, p, p_holm in zip(pairs, found.value_K, reach_K, p_K, holm_K, strict=False)
        if value > 0
    ]
    inversions.sort(key=lambda inversion: inversion.p)
    mean, half, p = float(-found.value_K[-1]), float(found.half_K(ALPHA / 2)[-1]), found.two_sided_p(-1)
    trend = Trend(mean, mean - half, mean + half, p, len(pairs))

    relevant = [inversion for inversion in inversions if inversion.difference >= margin]
    p_mean = float(holm_K[-1])
    p_inverted = min(p_mean, relevant[0].p_holm) if relevant else 1.0
    possible_K = (found.value_K + found.half_K(ALPHA / 2))[:-1]
    if p_inverted <= ALPHA:
        verdict = NOT_MONOTONE
        said = _inverted(cell, relevant[0], len(pairs)) if relevant[0].p_holm <= ALPHA else f"{_mean(trend)}, {said_p(p_mean)} after Holm."
    elif trend.low > 0 and (possible_K < margin).all():
        verdict = MONOTONE
        said = f"{_mean(trend)}, and no pair is inverted by {margin:g} or more."
    else:
        verdict = NOT_DECIDABLE
        said = _doubt(cell, trend, pairs[int(possible_K.argmax())], float(possible_K.max()), margin)
    return _verdict(cell, verdict, said, trend, inversions, p_inverted)


def headline(cells: Mapping[str, Verdict], unfinished: Collection[str] = ()) -> Headline:
    """Return the verdict over cells by label: "not monotone" if a cell is after Holm over cells, "monotone" only if every cell is.

    `unfinished` labels, of cells with a verdict or without, count in Holm and are not monotone yet.
    """
    if not cells:
        return Headline(NOT_DECIDABLE, "Not decidable: no cell is finished.", "no checkpoints")
    counting = dict.fromkeys(unfinished, 1.0) | {label: cell.p_inverted for label, cell in cells.items()}
    adjusted = dict(zip(counting, holm(list(counting.values())), strict=True))
    inverted = [label for label, p in adjusted.items() if p <= ALPHA]
    count = {verdict: sum(cell.verdict == verdict for cell in cells.values()) for verdict in (MONOTONE, NOT_MONOTONE, NOT_DECIDABLE)}
    if inverted:
        first = min(inverted, key=adjusted.__getitem__)
        verdict, said = NOT_MONOTONE, f"Not monotone in {len(inverted)} of {counted(len(cells), 'cell')} (Holm over cells). {first}: {cells[first].sentence}"
    elif count[MONOTONE] == len(cells) and not unfinished:
        verdict, said = MONOTONE, f"Monotone in {'each of ' if len(cells) > 1 else ''}{counted(len(cells), 'cell')}: stronger teachers make better students."
    else:
        alone = f", {count[NOT_MONOTONE]} not monotone alone but not after Holm over cells" if count[NOT_MONOTONE] else ""
        alone += f"; {counted(len(unfinished), 'planned cell')} not finished" if unfinished else ""
        verdict = NOT_DECIDABLE
        said = f"Not decidable: of {counted(len(cells), 'cell')}, {count[MONOTONE]} monotone, {count[NOT_DECIDABLE]} not decidable{alone}."
    checkpoints = {point.teacher for cell in cells.values() for point in cell.points}
    signs = {np.sign(cell.spearman.rho or 0) if cell.spearman.p <= ALPHA else 0 for cell in cells.values()}
    general = {frozenset({1}): "better students in every cell", frozenset({-1}): "worse students in every cell"}.get(frozenset(signs), "nothing is decided")
    return Headline(verdict, said, f"{_conditional(len(checkpoints))}; over teachers in general: {general}")


def gain(score_S: np.ndarray, against_S: np.ndarray, images: Images | None = None) -> Gain:
    """Return how far an arm is above another under the same seeds; the rows of `images` are the two. Raises ValueError for scores that are not finite."""
    score_TS = np.stack([score_S, against_S])
    if not score_TS.size or not np.isfinite(score_TS).all():
        raise ValueError(f"expected finite scores of two arms under the same seeds, found {score_S} and {against_S}")
    _check_images(score_TS, images)
    by_seed = (score_S - against_S).tolist()
    if len(by_seed) < 2:
        return Gain(by_seed[0], None, None, None, by_seed)
    found = _estimate(score_TS, images, np.array([[1.0, -1.0]]))
    value, half, p = found.value_K[0], found.half_K(ALPHA / 2)[0], found.two_sided_p(0)
    return Gain(float(value), float(value - half), float(value + half), p, by_seed)


def _told_apart(cell: Cell) -> list[tuple[int, int]]:
    """Return the pairs (stronger, weaker) whose strengths differ at 5 % after Bonferroni over all pairs."""
    every = list(combinations(range(len(cell.teachers)), 2))
    threshold = ndtri(1 - ALPHA / 2 / max(1, len(every)))
    pairs = []
    for i, j in every:
        difference, error = cell.strength_T[i] - cell.strength_T[j], np.hypot(cell.strength_error_T[i], cell.strength_error_T[j])
        if abs(difference) > threshold * error:
            pairs.append((i, j) if difference > 0 else (j, i))
    return pairs


def _estimate(score_TS: np.ndarray, images: Images | None, weight_KT: np.ndarray) -> _Estimates:
    """Estimate contrasts of teachers, their weights summing to 0: noise of seeds from the table's residuals, and of images beside it."""
    num_teachers, num_seeds = score_TS.shape
    residual_TS = score_TS - score_TS.mean(axis=1, keepdims=True) - score_TS.mean(axis=0) + score_TS.mean()
    df = (num_teachers - 1) * (num_seeds - 1)
    variance_T = np.full(num_teachers, (residual_TS**2).sum() / df)
    if num_teachers > 2:  # Grubbs 1948: the residuals of one teacher hold 1 - 2 / T of its variance, and 1 / T of the mean of all
        own_T = ((residual_TS**2).sum(axis=1) / (num_seeds - 1) - variance_T / num_teachers) / (1 - 2 / num_teachers)
        variance_T = np.maximum(own_T, variance_T)
    covariance_TT, image_df = _image_covariance(images, num_teachers)
    images_K = np.einsum("kt,tu,ku->k", weight_KT, covariance_TT, weight_KT)
    error_K, df_K = _error(weight_KT**2 @ variance_T / num_seeds, df, images_K, image_df)
    return _Estimates(weight_KT @ score_TS.mean(axis=1), error_K + _FLOAT_ROUNDING * np.abs(score_TS).max(), df_K)


def _error(seeds_K: np.ndarray, seed_df: int, images_K: np.ndarray, image_df: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the standard error and the degrees of freedom (Satterthwaite 1946) of the sum of two variances."""
    images_K = np.maximum(images_K, 0)  # a difference of two, where images hold next to nothing
    whole_K = seeds_K + images_K
    parts_K = seeds_K**2 / seed_df + images_K**2 / image_df
    return np.sqrt(whole_K), np.divide(whole_K**2, parts_K, out=np.full(len(whole_K), float(seed_df)), where=parts_K > 0)


def _image_covariance(images: Images | None, num_teachers: int) -> tuple[np.ndarray, int]:
    """Return the covariance of the teachers' mean scores that images alone would give, with its degrees of freedom: zeros without images.

    Scores are ratios of sums over images, linearised; only products of different seeds count, as what one seed does to an image is already noise of seeds.
    """
    if images is None:
        return np.zeros((num_teachers, num_teachers)), 1
    num_seeds, num_images = images.sum_TSG.shape[1], int((images.count_G > 0).sum())
    mean_TS1 = images.sum_TSG.sum(axis=2, keepdims=True) / images.count_G.sum()
    part_TSG = (images.sum_TSG - mean_TS1 * images.count_G) / images.count_G.sum()
    whole_TG = part_TSG.sum(axis=1)
    products_TT = whole_TG @ whole_TG.T - np.einsum("tsg,usg->tu", part_TSG, part_TSG, optimize=True)
    return products_TT / (num_seeds * (num_seeds - 1)) * num_images / (num_images - 1), num_images - 1


def _check_images(score_TS: np.ndarray, images: Images | None) -> None:
    if images is None:
        return
    if images.sum_TSG.shape != (*score_TS.shape, len(images.count_G)) or (images.count_G > 0).sum() < 2:
        raise ValueError(f"expected sums over two or more images for scores {score_TS.shape}, found {images.sum_TSG.shape}")
    mean_TS = images.sum_TSG.sum(axis=2) / images.count_G.sum()
    if not (np.abs(mean_TS - score_TS) <= _SCORE_ROUNDING).all():
        raise ValueError(f"the sums by image give other scores: {mean_TS} instead of {score_TS}")


def _points(cell: Cell) -> list[Point]:
    num_teachers, num_seeds = cell.score_TS.shape
    half_T: list[float | None] = [None] * num_teachers
    if num_seeds > 1:
        covariance_TT, image_df = _image_covariance(cell.images, num_teachers)
        error_T, df_T = _error(cell.score_TS.var(axis=1, ddof=1) / num_seeds, num_seeds - 1, covariance_TT.diagonal(), image_df)
        half_T = (error_T * stdtrit(df_T, 1 - ALPHA / 2)).tolist()
    points = []
    for t in np.argsort(cell.strength_T, kind="stable"):
        mean, half = float(cell.score_TS[t].mean()), half_T[t]
        low, high = (None, None) if half is None else (mean - half, mean + half)
        points.append(Point(cell.teachers[t], float(cell.strength_T[t]), mean, low, high, cell.score_TS[t].tolist()))
    return points


def _verdict(cell: Cell, verdict: str, said: str, trend: Trend | None = None, inversions: Sequence[Inversion] = (), p_inverted: float = 1.0) -> Verdict:
    num_teachers = len(cell.teachers)
    scope = _conditional(num_teachers) + ("" if cell.images else " and these test images")
    sentence = f"{verdict.capitalize()} over {counted(num_teachers, 'teacher')}: {said}"
    association = spearman(cell.strength_T, cell.score_TS.mean(axis=1))
    return Verdict(verdict, sentence, scope, _points(cell), association, _in_general(association, num_teachers), trend, list(inversions), p_inverted)


def _inverted(cell: Cell, inversion: Inversion, num_pairs: int) -> str:
    strength = dict(zip(cell.teachers, cell.strength_T, strict=True))
    worse, better = (f"{name} (strength {strength[name]:.1f})" for name in (inversion.worse, inversion.better))
    by = f"{inversion.difference:.1f} points [{inversion.low:.1f}, {inversion.high:.1f}]"
    return f"students of {worse} score {by} below those of {better}, {said_p(inversion.p_holm)} after Holm over {counted(num_pairs, 'pair')} and their mean."


def _mean(trend: Trend) -> str:
    ends = f"{trend.difference:+.1f} points [{trend.low:+.1f}, {trend.high:+.1f}]"
    return f"students of the stronger teacher are {ends} above those of the weaker, in the mean of {counted(trend.pairs, 'pair')}"


def _doubt(cell: Cell, trend: Trend, pair: tuple[int, int], possible: float, margin: float) -> str:
    """Say what stands in the way of either verdict."""
    reasons = []
    if trend.low <= 0:
        reasons.append(f"{_mean(trend)}, which leaves the direction open")
    if possible >= margin:
        stronger, weaker = (cell.teachers[t] for t in pair)
        reasons.append(f"students of {stronger} may be up to {possible:.1f} points below those of the weaker {weaker}, more than the margin of {margin:g}")
    return f"{'; '.join(reasons)}."


def _in_general(found: Spearman, num_teachers: int) -> str:
    """Say what the teachers, taken as a sample, bear out beyond themselves."""
    if found.smallest_p > ALPHA or found.rho is None:
        return f"{counted(num_teachers, 'teacher')} cannot carry a verdict about teachers in general: p can be no smaller than {found.smallest_p:.2g}."
    said = f"Spearman {found.rho:.2f} [{found.low:.2f}, {found.high:.2f}], {said_p(found.p)}"
    if found.p > ALPHA:
        return f"Over teachers in general nothing is decided ({said})."
    return f"Over teachers in general, if these are a fair sample, stronger ones make {'better' if found.rho > 0 else 'worse'} students ({said})."


def _conditional(num_teachers: int) -> str:
    return f"conditional on {f'these {num_teachers} checkpoints' if num_teachers > 1 else 'this checkpoint'}"


def counted(number: int, what: str) -> str:
    """Return `1 teacher`, `5 teachers`."""
    return f"{number} {what}{'' if number == 1 else 's'}"


def said_p(p: float) -> str:
    """Return a p value as a text quotes it."""
    return f"p = {p:.2g}" if p >= 1e-4 else "p < 0.0001"

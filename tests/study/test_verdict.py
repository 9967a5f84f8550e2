"""The verdict on tables whose truth is known, what must not change it, and its numbers against scipy where scipy has the same thing."""

from __future__ import annotations

import json
import random
from dataclasses import asdict, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from kdstore.metrics.statistics import bootstrap_means, holm, t_interval
from kdstore.study.correlation import spearman
from kdstore.study.verdict import MONOTONE, NOT_DECIDABLE, NOT_MONOTONE, Cell, Images, gain, headline, judge

FEW = settings(deadline=None, max_examples=30)


def cell_of(truth: list[float], seeds: int = 3, spread: float = 0.3, strength_error: float = 1.0, draw: int = 0) -> Cell:
    """Teachers 8 points apart, whose students scatter over seeds that all share."""
    rng, num = np.random.default_rng(draw), len(truth)
    score_TS = 50 + np.array(truth)[:, None] + 2 * rng.standard_normal(seeds) + spread * rng.standard_normal((num, seeds))
    return Cell([f"teacher {t}" for t in range(num)], 40 + 8.0 * np.arange(num), np.full(num, strength_error), score_TS)


def by_image(cell: Cell, of_image_TSG: np.ndarray) -> Cell:
    """The same cell on images, some with more questions than others."""
    count_G = 1.0 + np.arange(of_image_TSG.shape[-1]) % 5
    sum_TSG = (cell.score_TS[:, :, None] + of_image_TSG) * count_G
    return replace(cell, score_TS=sum_TSG.sum(axis=2) / count_G.sum(), images=Images(sum_TSG, count_G))


@pytest.mark.parametrize(
    ("truth", "spread", "verdict"),
    [
        ([0, 2, 4, 6, 8], 0.3, MONOTONE),
        ([0, 2, 4, 4, 4], 0.2, MONOTONE),
        ([0, 2, 4, 3.8, 5], 0.1, MONOTONE),
        ([0, 3, 6, 2, 9], 0.3, NOT_MONOTONE),
        ([8, 6, 4, 2, 0], 0.3, NOT_MONOTONE),
        ([4, 3, 2, 1, 0], 0.8, NOT_MONOTONE),
        ([0, 0, 0, 0, 0], 0.3, NOT_DECIDABLE),
        ([0, 2, 4, 6, 8], 4.0, NOT_DECIDABLE),
        ([0, 3, 6, 2, 9], 5.0, NOT_DECIDABLE),
        ([0, 3, 6, 5.5, 9], 0.5, NOT_DECIDABLE),
        ([0, 3], 0.1, MONOTONE),
        ([3, 0], 0.1, NOT_MONOTONE),
    ],
)
def test_the_verdict_is_that_of_the_truth_where_noise_lets_it_be_seen(truth: list[float], spread: float, verdict: str) -> None:
    found = judge(cell_of(truth, spread=spread), margin=1.0)
    assert found.verdict == verdict
    assert found.sentence.startswith(f"{verdict.capitalize()} over {len(truth)} teachers: ")
    assert (found.p_inverted <= 0.05) == (verdict == NOT_MONOTONE)
    json.dumps(asdict(found), allow_nan=False)


def test_an_inversion_is_told_with_both_teachers_its_bounds_and_holm_over_all_pairs() -> None:
    cell = cell_of([0, 3, 6, 2, 9])
    found = judge(cell, margin=1.0)
    first = found.inversions[0]
    assert (first.better, first.worse) == ("teacher 2", "teacher 3")
    assert first.difference == pytest.approx(cell.score_TS[2].mean() - cell.score_TS[3].mean())
    assert 0 < first.low < first.difference < first.high
    assert first.p_holm == pytest.approx(11 * first.p)  # ten pairs and their mean
    assert "students of teacher 3 (strength 64.0) score" in found.sentence
    assert [one.p for one in found.inversions] == sorted(one.p for one in found.inversions)


def test_the_trend_of_two_teachers_is_the_paired_t_test() -> None:
    cell = cell_of([0, 1], seeds=5, spread=1.0)
    trend, paired = judge(cell, margin=1.0).trend, stats.ttest_rel(cell.score_TS[1], cell.score_TS[0])
    assert trend is not None
    assert (trend.p, trend.low, trend.high) == pytest.approx((paired.pvalue, *paired.confidence_interval(0.95)), rel=1e-6)


def test_a_teacher_counts_with_its_own_variance_where_that_is_larger() -> None:
    cell = cell_of([0, 1, 9, 3, 4], seeds=5, spread=0.2)
    score_TS = cell.score_TS + 5 * np.outer([0, 0, 1, 0, 0], [1, -1, 1, -1, 0])  # the middle teacher, which has no weight in the trend
    found = judge(replace(cell, score_TS=score_TS), margin=1.0)
    residual_TS = score_TS - score_TS.mean(axis=1, keepdims=True) - score_TS.mean(axis=0) + score_TS.mean()
    pooled = (residual_TS**2).sum() / 16
    own = ((residual_TS[2] ** 2).sum() / 4 - pooled / 5) / (3 / 5)
    assert own > 2 * pooled
    assert found.trend is not None
    assert found.trend.high - found.trend.difference == pytest.approx(stats.t.isf(0.025, 16) * np.sqrt(pooled / 5 * (16 + 4 + 4 + 16) / 100), rel=1e-6)
    assert found.inversions[0].better == "teacher 2"
    reach = found.inversions[0].high - found.inversions[0].difference
    assert reach == pytest.approx(stats.t.isf(0.05 / 11, 16) * np.sqrt((own + pooled) / 5), rel=1e-6)


def test_teachers_that_cannot_be_told_apart_are_not_ordered() -> None:
    cell = cell_of([0, 3, 6, 2, 9])
    near = replace(cell, strength_T=np.array([40, 48, 60, 61, 80.0]))  # the inverted two are a point apart, with a standard error of 1.4
    found = judge(near, margin=1.0)
    assert found.verdict == NOT_MONOTONE  # teacher 1 is weaker than teacher 3 all the same
    assert ("teacher 2", "teacher 3") not in {(one.better, one.worse) for one in found.inversions}
    assert found.trend is not None
    assert found.trend.pairs == 9
    assert judge(replace(cell, strength_T=np.full(5, 60.0), strength_error_T=np.zeros(5)), margin=1.0).verdict == NOT_DECIDABLE
    assert "told apart" in judge(cell_of([0, 9], strength_error=9.0), margin=1.0).sentence


def test_one_seed_decides_nothing_and_has_no_interval() -> None:
    found = judge(cell_of([0, 5, 10, 15, 20], seeds=1), margin=1.0)
    assert found.verdict == NOT_DECIDABLE
    assert "one seed" in found.sentence
    assert all(point.low is None and point.high is None for point in found.points)
    assert gain(np.array([3.0]), np.array([1.0])).low is None
    json.dumps(asdict(found), allow_nan=False)


def test_fewer_than_five_teachers_say_nothing_of_teachers_in_general_whatever_the_verdict_on_these() -> None:
    four, five = (judge(cell_of([3.0 * t for t in range(num)]), margin=1.0) for num in (4, 5))
    assert four.verdict == five.verdict == MONOTONE
    assert four.scope == "conditional on these 4 checkpoints and these test images"
    assert "cannot carry a verdict about teachers in general: p can be no smaller than 0.083" in four.in_general
    assert "make better students" in five.in_general


@pytest.mark.parametrize(("num", "smallest"), [(2, 1.0), (3, 1 / 3), (4, 1 / 12), (5, 1 / 60), (6, 1 / 360)])
def test_the_p_of_a_perfect_order_is_two_of_all_orders(num: int, smallest: float) -> None:
    found = spearman(np.arange(num), np.arange(num) ** 2)
    assert (found.rho, found.p, found.smallest_p) == pytest.approx((1.0, smallest, smallest))
    assert found.low < 0.9
    assert found.high == 1


@FEW
@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=3, max_size=12))
def test_spearman_is_scipys_and_lies_in_its_interval(values: list[tuple[int, int]]) -> None:
    x_T, y_T = np.array(values, float).T
    found = spearman(x_T, y_T)
    if np.ptp(x_T) == 0 or np.ptp(y_T) == 0:
        assert (found.rho, found.p) == (None, 1.0)
    else:
        assert found.rho == pytest.approx(stats.spearmanr(x_T, y_T).statistic)
        assert found.rho is not None
        assert -1 <= found.low <= found.rho <= found.high <= 1
        assert 0 < found.smallest_p <= found.p <= 1


def test_spearmans_interval_holds_the_truth_in_nineteen_of_twenty_samples() -> None:
    rng, latent = np.random.default_rng(0), 0.8
    drawn_NT2 = rng.multivariate_normal([0, 0], [[1, latent], [latent, 1]], (400, 7))
    found = [spearman(x_T, y_T) for x_T, y_T in drawn_NT2.transpose(0, 2, 1)]
    truth = 6 / np.pi * np.arcsin(latent / 2)
    assert 0.93 < np.mean([one.low <= truth <= one.high for one in found]) < 0.99


def test_image_noise_that_all_seeds_share_takes_a_verdict_back() -> None:
    cell = cell_of([0, 1, 2, 3, 4], spread=0.1)
    rng = np.random.default_rng(0)
    shared = by_image(cell, 50 * rng.standard_normal((5, 1, 200)) * np.ones((1, 3, 1)))
    assert judge(replace(shared, images=None), margin=1.0).verdict != NOT_DECIDABLE
    assert judge(shared, margin=1.0).verdict == NOT_DECIDABLE
    same = by_image(cell, 50 * rng.standard_normal(200) * np.ones((5, 3, 1)))  # hard and easy images are no reason to doubt a difference
    assert judge(same, margin=1.0).verdict == MONOTONE


def test_image_noise_is_that_of_the_bootstrap_and_what_one_seed_does_to_an_image_is_not_counted_twice() -> None:
    rng = np.random.default_rng(1)
    cell = cell_of([0, 1], seeds=4, spread=0.0)
    shared = by_image(cell, 20 * rng.standard_normal((2, 1, 300)) * np.ones((1, 4, 1)))
    assert shared.images is not None
    drawn_RBC = bootstrap_means(shared.images.sum_TSG.mean(axis=1)[:, :, None], shared.images.count_G[:, None])
    found = gain(shared.score_TS[0], shared.score_TS[1], shared.images)
    assert found.low is not None
    assert (found.difference - found.low) / 1.97 == pytest.approx((drawn_RBC[0] - drawn_RBC[1]).std(), rel=0.06)
    widths = []
    for draw in range(40):
        own = by_image(cell, 20 * np.random.default_rng(draw).standard_normal((2, 4, 300)))
        ends = [gain(*own.score_TS, images) for images in (own.images, None)]
        widths.append([one.difference - one.low for one in ends if one.low is not None])
    with_images, without = np.median(widths, axis=0)
    assert with_images < 1.15 * without


def test_a_gain_is_the_paired_t_interval() -> None:
    arm_S, against_S = np.array([51.0, 53, 52]), np.array([50.0, 50.5, 50.9])
    found = gain(arm_S, against_S)
    low_C, high_C = t_interval((arm_S - against_S)[:, None])
    assert (found.difference, found.low, found.high) == pytest.approx((np.mean(arm_S - against_S), low_C[0], high_C[0]), rel=1e-6)
    assert found.p == pytest.approx(stats.ttest_rel(arm_S, against_S).pvalue, rel=1e-6)
    assert found.by_seed == pytest.approx([1.0, 2.5, 1.1])


def test_a_table_with_a_hole_or_of_other_scores_is_refused() -> None:
    cell = cell_of([0, 1, 2])
    hole_TS = cell.score_TS.copy()
    hole_TS[1, 1] = np.nan
    for changed in ({"score_TS": hole_TS}, {"strength_T": np.array([1, 2, np.inf])}, {"strength_error_T": -np.ones(3)}, {"teachers": ["a", "a", "b"]}):
        with pytest.raises(ValueError, match="expected"):
            replace(cell, **changed)
    with pytest.raises(ValueError, match="other scores"):
        replace(cell, images=Images(np.ones((3, 3, 4)), np.ones(4)))
    with pytest.raises(ValueError, match="margin"):
        judge(cell, margin=float("nan"))
    with pytest.raises(ValueError, match="finite"):
        gain(np.array([1.0, np.nan]), np.array([1.0, 2.0]))


@FEW
@given(st.integers(0, 1000), st.integers(2, 6), st.integers(2, 4), st.floats(0.1, 3), st.randoms(use_true_random=False))
def test_order_of_teachers_and_seeds_scale_and_what_a_seed_adds_to_all_change_nothing(
    draw: int, num: int, seeds: int, scale: float, shuffle: random.Random
) -> None:
    cell = cell_of(np.random.default_rng(draw).normal(0, 1.5, num).tolist(), seeds, spread=0.6, draw=draw)
    teachers, order = shuffle.sample(range(num), num), shuffle.sample(range(seeds), seeds)
    added_S = np.array([shuffle.uniform(-5, 5) for _ in range(seeds)])
    found = judge(cell, margin=1.0)
    other = judge(
        Cell(
            [cell.teachers[t] for t in teachers],
            cell.strength_T[teachers] * 3 - 7,
            cell.strength_error_T[teachers] * 3,
            (cell.score_TS[teachers] * scale + added_S)[:, order],
        ),
        margin=scale,
    )
    assert (found.verdict, found.spearman) == (other.verdict, other.spearman)
    assert [point.teacher for point in found.points] == [point.teacher for point in other.points] == cell.teachers
    assert [(one.better, one.worse) for one in found.inversions] == [(one.better, one.worse) for one in other.inversions]
    assert [one.p_holm for one in found.inversions] == pytest.approx([one.p_holm for one in other.inversions], rel=1e-4)
    assert found.trend is not None
    assert other.trend is not None
    assert np.array([found.trend.low, found.trend.high]) * scale == pytest.approx([other.trend.low, other.trend.high], rel=1e-4, abs=1e-4)


def test_equal_scores_are_no_evidence_however_small_their_spread() -> None:
    flat = Cell(["a", "b", "c"], np.array([1.0, 2, 3]), np.zeros(3), np.full((3, 3), 0.1) + np.array([0.1, 0.2, 0.3]))
    found = judge(flat, margin=0.0)
    assert found.verdict == NOT_DECIDABLE
    assert found.trend is not None
    assert found.trend.low < 0 < found.trend.high
    assert found.spearman.rho is None


def test_errors_of_flat_and_dented_truths_stay_at_five_percent() -> None:
    wrong = np.zeros(3)
    for draw in range(200):
        flat = judge(cell_of([0.0] * 5, spread=0.5, draw=draw), margin=1.0).verdict
        dented = judge(cell_of([0, 3, 6, 5, 9], spread=0.5, draw=draw), margin=1.0).verdict
        wrong += (flat == MONOTONE, flat == NOT_MONOTONE, dented == MONOTONE)
    assert (wrong <= 17).all()  # more than 17 of 200 come up once in fifty times at 5 %


def test_the_headline_is_monotone_only_everywhere_and_not_monotone_after_holm_over_cells() -> None:
    rising, flat, falling = (judge(cell_of(truth), margin=1.0) for truth in ([0, 2, 4, 6, 8], [0] * 5, [8, 6, 4, 2, 0]))
    assert headline({"x": rising, "y": rising}).verdict == MONOTONE
    assert headline({"x": rising, "y": flat}).verdict == NOT_DECIDABLE
    found = headline({"x": rising, "student S, fd": falling})
    assert found.verdict == NOT_MONOTONE
    assert "Not monotone in 1 of 2 cells" in found.sentence
    assert "student S, fd: Not monotone over 5 teachers" in found.sentence
    assert found.scope.startswith("conditional on these 5 checkpoints")
    weak = replace(falling, p_inverted=0.03)
    cells = {"x": rising, "weak": weak}
    assert min(holm([cell.p_inverted for cell in cells.values()])) == pytest.approx(0.06)
    assert headline(cells).verdict == NOT_DECIDABLE
    assert "not after Holm" in headline(cells).sentence
    assert headline({"x": rising}, unfinished=["x"]).verdict == NOT_DECIDABLE
    assert headline({"x": replace(falling, p_inverted=0.02)}, unfinished=["y", "z"]).verdict == NOT_DECIDABLE
    assert headline({}).verdict == NOT_DECIDABLE

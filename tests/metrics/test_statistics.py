"""Intervals hold what they promise on data whose truth is known, and agree with scipy where scipy has the same thing."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from kdstore.metrics.statistics import (
    beyond_unanimity,
    bootstrap_means,
    flipped_means,
    holm,
    image_sums,
    mcnemar_p,
    percentile_interval,
    seed_errors,
    t_interval,
    two_sided_p,
)


def clustered(rng: np.random.Generator, num_images: int, spread: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Scores of 0 and 100 whose mean over all images is 50, and their images: those of one image share its difficulty."""
    image_N = np.repeat(np.arange(num_images), rng.integers(2, 12, num_images))
    ease_N = (spread * rng.standard_normal(num_images))[image_N]
    return 100.0 * (ease_N + rng.standard_normal(len(image_N)) > 0), image_N


def interval(score_N: np.ndarray, image_N: np.ndarray, seed: int) -> tuple[float, float]:
    sum_GC, count_GC = image_sums(score_N, image_N, np.zeros(len(image_N), int), 1)
    low_C, high_C = percentile_interval(bootstrap_means(sum_GC[None], count_GC, resamples=600, seed=seed)[0])
    return float(low_C[0]), float(high_C[0])


def test_the_interval_by_image_holds_the_truth_and_one_that_forgets_images_does_not() -> None:
    rng = np.random.default_rng(1)
    by_image = by_item = 0
    for trial in range(300):
        score_N, image_N = clustered(rng, 120)
        low, high = interval(score_N, image_N, trial)
        by_image += low <= 50 <= high
        half = 1.96 * score_N.std() / np.sqrt(len(score_N))
        by_item += abs(score_N.mean() - 50) <= half
    assert 0.91 <= by_image / 300 <= 0.985
    assert by_item / 300 < 0.85


def test_with_three_seeds_the_interval_over_both_holds_the_truth_and_that_over_images_alone_does_not() -> None:
    rng = np.random.default_rng(2)
    held = np.zeros(2)
    for trial in range(300):
        score_N, image_N = clustered(rng, 60, spread=0.5)
        mean_S1 = score_N.mean() + 8 * rng.standard_normal((3, 1))
        sum_GC, count_GC = image_sums(score_N + (mean_S1.mean() - score_N.mean()), image_N, np.zeros(len(image_N), int), 1)
        drawn_BC = bootstrap_means(sum_GC[None], count_GC, resamples=1000, seed=trial)[0]
        ends = [percentile_interval(draws) for draws in (drawn_BC + seed_errors(mean_S1, resamples=1000, seed=trial), drawn_BC)]
        held += [low_C[0] <= 50 <= high_C[0] for low_C, high_C in ends]
    assert 0.91 <= held[0] / 300 <= 0.99
    assert held[1] / 300 < 0.8


def test_p_values_of_no_difference_are_uniform_and_those_of_items_that_forget_images_are_not() -> None:
    rng = np.random.default_rng(3)
    found, forgotten = [], []
    for trial in range(300):
        difference_N, image_N = clustered(rng, 60)
        difference_N = difference_N - 50
        sum_GC, count_GC = image_sums(difference_N, image_N, np.zeros(len(image_N), int), 1)
        null_BC = flipped_means(sum_GC, count_GC.sum(axis=0), resamples=500, seed=trial)
        found.append(two_sided_p(null_BC, difference_N.mean(keepdims=True))[0])
        forgotten.append(stats.ttest_1samp(difference_N, 0).pvalue)
    assert 0.02 <= np.mean(np.array(found) <= 0.05) <= 0.08
    assert 0.13 <= np.mean(np.array(found) <= 0.2) <= 0.27
    assert np.mean(np.array(forgotten) <= 0.05) > 0.2


def test_the_bootstrap_agrees_with_scipys_where_images_are_items() -> None:
    score_N = np.random.default_rng(4).choice([0.0, 30.0, 60.0, 100.0], 80)
    sums = image_sums(score_N, np.arange(80), np.zeros(80, int), 1)
    low_C, high_C = percentile_interval(bootstrap_means(sums[0][None], sums[1], seed=1)[0])
    theirs = stats.bootstrap((score_N,), np.mean, method="percentile", n_resamples=10_000, rng=np.random.default_rng(5)).confidence_interval
    assert (low_C[0], high_C[0]) == pytest.approx((theirs.low, theirs.high), abs=0.5)


def test_the_paired_test_agrees_with_scipys_exact_one() -> None:
    difference_N = np.array([5.0, -3, 0, 8, 2, -1, 6, 0, 4, -2, 7, 3])
    theirs = stats.permutation_test((difference_N, np.zeros(12)), lambda a, b: np.mean(a - b), permutation_type="samples", n_resamples=np.inf).pvalue
    ours = two_sided_p(flipped_means(difference_N[:, None], np.array([12.0])), difference_N.mean(keepdims=True))[0]
    assert ours == pytest.approx(theirs, abs=0.01)
    mean_SC = np.array([[1.0, 5], [2, 9], [4, 1]])
    theirs_t = stats.ttest_1samp(mean_SC, 0).confidence_interval()
    assert np.allclose(t_interval(mean_SC), (theirs_t.low, theirs_t.high))


def test_what_cannot_differ_has_no_width_and_a_p_of_one() -> None:
    sum_GC, count_GC = image_sums(np.full(6, 100.0), np.array([0, 0, 1, 1, 2, 2]), np.zeros(6, int), 1)
    assert percentile_interval(bootstrap_means(sum_GC[None], count_GC, resamples=50)[0]) == (100, 100)
    assert two_sided_p(flipped_means(np.zeros((3, 1)), np.array([6.0]), resamples=50), np.zeros(1))[0] == 1
    assert not seed_errors(np.array([[50.0]]), resamples=50).any()


def test_a_kind_that_a_draw_misses_counts_in_the_other_draws_alone() -> None:
    sum_GC, count_GC = image_sums(np.array([100.0, 0, 30]), np.array([0, 1, 0]), np.array([0, 0, 1]), 2)
    means_BC = bootstrap_means(sum_GC[None], count_GC, resamples=200)[0]
    assert set(np.unique(means_BC[:, 0])) == {0, 50, 100}
    assert set(means_BC[~np.isnan(means_BC[:, 1]), 1]) == {np.float32(30)}
    assert 0 < np.isnan(means_BC[:, 1]).mean() < 0.5
    assert percentile_interval(means_BC)[0][1] == np.float32(30)


def test_the_same_seed_draws_the_same_however_much_is_drawn_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    score_N, image_N = clustered(np.random.default_rng(6), 30)
    sum_GC, count_GC = image_sums(score_N, image_N, image_N % 2, 2)
    at_once = bootstrap_means(sum_GC[None], count_GC, resamples=64, seed=1), flipped_means(sum_GC, count_GC.sum(0), resamples=64, seed=1)
    assert not np.array_equal(at_once[0], bootstrap_means(sum_GC[None], count_GC, resamples=64, seed=2))
    monkeypatch.setattr("kdstore.metrics.statistics._AT_ONCE", 100)
    parts = bootstrap_means(sum_GC[None], count_GC, resamples=64, seed=1), flipped_means(sum_GC, count_GC.sum(0), resamples=64, seed=1)
    assert np.allclose(at_once[0], parts[0])
    assert np.allclose(at_once[1], parts[1])


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_follows_its_definition(p_K: list[float]) -> None:
    adjusted = holm(p_K)
    ranked = sorted(range(len(p_K)), key=lambda k: p_K[k])
    largest = 0.0
    for place, k in enumerate(ranked):
        largest = max(largest, min(1.0, (len(p_K) - place) * p_K[k]))
        assert adjusted[k] == pytest.approx(largest)


def test_mcnemar_is_the_sign_test_of_the_discordant() -> None:
    assert mcnemar_p(0, 0) == 1
    assert mcnemar_p(1, 9) == pytest.approx(2 * (1 + 10) / 2**10)
    assert mcnemar_p(3, 12) == mcnemar_p(12, 3)


def test_scores_that_are_the_same_on_all_images_have_the_exact_binomial_interval() -> None:
    """Resampling sees no spread where all images are right, however few they are."""
    low_C, high_C = beyond_unanimity(np.array([100.0, 0.0, 40.0]), np.array([100.0, 0.0, 60.0]), np.array([4, 1000, 10]))
    for right, images, low, high in ((4, 4, low_C[0], high_C[0]), (0, 1000, low_C[1], high_C[1])):
        exact = stats.binomtest(right, images).proportion_ci(0.95, method="exact")
        assert (low / 100, high / 100) == pytest.approx((exact.low, exact.high))
    assert (low_C[2], high_C[2]) == (40.0, 60.0)

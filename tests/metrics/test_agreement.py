"""Agreement of two models and the geometry of one, each against its definition computed in float64."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from scipy.spatial.distance import cdist, pdist

from kdstore.errors import EvaluationError
from kdstore.metrics import agreement, geometry
from kdstore.metrics.agreement import debiased_linear_cka, mean_cosine, mutual_neighbours, similarity_rank_correlation, top1_agreement
from kdstore.metrics.geometry import alignment, caption_margins, effective_rank, hubness, modality_gap, preference, spectrum, target_entropy, uniformity

IMAGES = np.array([[1.0, 0.1], [0.1, 2.0], [-3.0, 0.0]])
TEXTS = np.array([[5.0, 0.0], [0.0, 1.0], [-1.0, -0.1]])


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every sum below crosses the border of a block."""
    monkeypatch.setattr(agreement, "_ROWS_AT_ONCE", 7)
    monkeypatch.setattr(geometry, "_ROWS_AT_ONCE", 7)


def related(seed: int, rows: int, widths: tuple[int, int] = (6, 9)) -> tuple[np.ndarray, np.ndarray]:
    """Rows of two models that see the same thing, float64."""
    rng = np.random.default_rng(seed)
    seen = rng.normal(size=(rows, 4))
    a, b = (seen @ rng.normal(size=(4, width)) + rng.normal(size=(rows, width)) + 2 for width in widths)
    return a, b


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_the_cosine_does_not_depend_on_the_length_of_rows() -> None:
    assert mean_cosine(IMAGES, 7 * IMAGES) == pytest.approx(1)
    assert mean_cosine(np.eye(2), np.array([[0, 3.0], [0, 2.0]])) == pytest.approx(0.5)


def test_models_of_other_widths_agree_where_they_choose_the_same_candidate() -> None:
    wide = np.eye(3)
    assert top1_agreement((IMAGES, TEXTS), (wide, wide)) == 100
    assert top1_agreement((IMAGES, TEXTS), (wide, wide[[0, 2, 1]])) == pytest.approx(100 / 3)


def hsic_over_all_quadruples(k: np.ndarray, el: np.ndarray) -> float:
    """The U-statistic that the unbiased HSIC is: a mean over ordered quadruples of different rows."""
    terms = [k[i, j] * (el[i, j] + el[q, r] - 2 * el[i, q]) for i, j, q, r in itertools.permutations(range(len(k)), 4)]
    return float(np.mean(terms))


@given(st.integers(0, 2**32 - 1))
def test_debiased_cka_is_the_mean_over_all_quadruples_of_rows(seed: int) -> None:
    a, b = related(seed, 7)
    k, el = a @ a.T, b @ b.T
    expected = hsic_over_all_quadruples(k, el) / np.sqrt(hsic_over_all_quadruples(k, k) * hsic_over_all_quadruples(el, el))
    assert debiased_linear_cka(a, b) == pytest.approx(expected, abs=1e-9)


def test_debiased_cka_of_float32_rows_is_that_of_its_kernels_in_float64() -> None:
    a, b = related(0, 60, (20, 30))

    def hsic(k: np.ndarray, el: np.ndarray) -> float:
        n = len(k)
        k, el = k - np.diag(np.diag(k)), el - np.diag(np.diag(el))
        return float(np.trace(k @ el) + k.sum() * el.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (k @ el).sum())

    k, el = a.astype(np.float32).astype(np.float64), b.astype(np.float32).astype(np.float64)
    k, el = k @ k.T, el @ el.T
    assert debiased_linear_cka(a.astype(np.float32), b.astype(np.float32)) == pytest.approx(hsic(k, el) / np.sqrt(hsic(k, k) * hsic(el, el)), abs=1e-9)


def test_cka_is_one_for_a_turned_copy_and_about_nothing_for_unrelated_rows_of_great_width() -> None:
    rng = np.random.default_rng(0)
    a = rng.normal(size=(50, 200))
    turn = np.linalg.qr(rng.normal(size=(200, 200)))[0]
    assert debiased_linear_cka(a, 3 * a @ turn + 1) == pytest.approx(1)
    assert abs(debiased_linear_cka(a, rng.normal(size=(50, 200)))) < 0.15  # the plain form gives 0.8


@given(st.integers(0, 2**32 - 1), st.integers(1, 8))
def test_mutual_neighbours_are_counted_as_sets(seed: int, k: int) -> None:
    a, b = related(seed, 20)
    nearest = [np.argsort(-(unit(rows) @ unit(rows).T - 9 * np.eye(20)), axis=1)[:, :k].tolist() for rows in (a, b)]
    shares = [len(set(of_a) & set(of_b)) / k for of_a, of_b in zip(*nearest, strict=True)]
    assert mutual_neighbours(a, b, k) == pytest.approx(100 * float(np.mean(shares)))


def test_the_rank_correlation_takes_all_pairs_where_they_are_few_and_a_sample_of_many() -> None:
    a, b = related(1, 80)
    expected = stats.spearmanr(1 - pdist(a, "cosine"), 1 - pdist(b, "cosine")).statistic
    assert 0.1 < expected < 0.9
    assert similarity_rank_correlation(a, b) == pytest.approx(expected, abs=1e-4)  # float32 rows may turn a near tie
    assert similarity_rank_correlation(a, b, pairs=3000) == pytest.approx(expected, abs=0.06)
    assert similarity_rank_correlation(a, b, pairs=100) == similarity_rank_correlation(a, b, pairs=100) != similarity_rank_correlation(a, b, pairs=100, seed=1)


@given(st.integers(0, 2**32 - 1), st.integers(12, 40))
def test_the_geometry_of_one_model_equals_its_definitions_in_float64(seed: int, rows: int) -> None:
    image, text = related(seed, rows, (5, 5))
    x, y = unit(image), unit(text)
    assert modality_gap(image, text) == pytest.approx(np.linalg.norm(x.mean(0) - y.mean(0)), abs=1e-6)
    assert alignment(image, text) == pytest.approx((np.linalg.norm(x - y, axis=1) ** 2).mean(), abs=1e-6)
    assert uniformity(image) == pytest.approx(np.log(np.exp(-2 * pdist(x) ** 2).mean()), abs=1e-5)
    singular = np.linalg.svd(x - x.mean(0), compute_uv=False)
    share = singular / singular.sum()
    assert effective_rank(image) == pytest.approx(np.exp(-(share * np.log(share)).sum()), rel=1e-4)
    nearest = np.argsort(cdist(x, y), axis=1)[:, :3]
    assert hubness(image, text, k=3) == pytest.approx(stats.skew(np.bincount(nearest.ravel(), minlength=rows)), abs=1e-9)
    logits = 20 * x @ y.T
    share = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    assert target_entropy(image, text, 20) == pytest.approx(stats.entropy(share, axis=1).mean(), abs=1e-4)


def test_the_bounds_of_the_geometry_are_reached() -> None:
    basis = np.eye(8)
    assert target_entropy(basis, np.ones((5, 8)), 100) == pytest.approx(np.log(5))
    assert target_entropy(basis, basis, 1e4) == pytest.approx(0)
    assert effective_rank(np.r_[basis, -basis]) == pytest.approx(8)
    assert alignment(basis, -basis) == pytest.approx(4)
    assert hubness(basis, np.r_[np.ones((1, 8)), -basis], k=1) == pytest.approx(stats.skew([8] + 8 * [0]))
    assert hubness(np.r_[basis, -basis], np.r_[basis, -basis], k=1) == 0


def test_too_few_rows_and_rows_that_do_not_vary_are_refused() -> None:
    same = np.ones((10, 3))
    for wrong, said in (
        (lambda: debiased_linear_cka(IMAGES, TEXTS), "four rows or more"),
        (lambda: debiased_linear_cka(same, same), "do not vary"),
        (lambda: mutual_neighbours(IMAGES, TEXTS, 3), "more than 3 rows"),
        (lambda: similarity_rank_correlation(IMAGES[:2], TEXTS[:2]), "three rows or more"),
        (lambda: uniformity(IMAGES[:1]), "two rows or more"),
        (lambda: effective_rank(same), "all rows are the same"),
        (lambda: hubness(IMAGES, TEXTS, 3), "more than 3 candidates"),
    ):
        with pytest.raises(EvaluationError, match=said):
            wrong()


def test_the_spectrum_is_the_variance_along_principal_directions_and_sums_to_one() -> None:
    rows = related(1, 40)[0]
    expected = np.sort(np.linalg.eigvalsh(np.cov(unit(rows).T)))[::-1]
    assert spectrum(rows) == pytest.approx(expected / expected.sum(), abs=1e-6)


def test_the_true_caption_wins_by_its_lead_in_cosine_and_a_tie_counts_half() -> None:
    image, true, false = (np.random.default_rng(seed).normal(size=(30, 5)) for seed in range(3))
    false[0] = 3 * true[0]
    expected = (unit(image) * unit(true)).sum(1) - (unit(image) * unit(false)).sum(1)
    margins = caption_margins(image, true, false)
    assert margins == pytest.approx(expected, abs=1e-6)
    assert preference(np.array([0.2, -0.1, 0.0, 0.0])) == 50
    assert preference(margins[1:]) == pytest.approx(100 * (expected[1:] > 0).mean())

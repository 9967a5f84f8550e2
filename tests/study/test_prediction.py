"""What predicts the students: left-out errors against refitting, and a comparison with the teacher's own score that few teachers never decide."""

from __future__ import annotations

import json
from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdstore.study.prediction import exchange_p, left_out_error, predict

FEW = settings(deadline=None, max_examples=40)


@FEW
@given(st.lists(st.tuples(st.integers(0, 3), st.floats(-50, 50)), min_size=3, max_size=9))
def test_the_left_out_error_is_that_of_a_line_fitted_anew_without_each_teacher(values: list[tuple[int, float]]) -> None:
    x_T, y_T = np.array(values, float).T
    errors = []
    for t in range(len(x_T)):
        x, y = np.delete(x_T, t), np.delete(y_T, t)
        predicted = y.mean() if np.ptp(x) == 0 else np.polyval(np.polyfit(x, y, 1), x_T[t])
        errors.append(abs(y_T[t] - predicted))
    assert left_out_error(x_T, y_T) == pytest.approx(np.mean(errors), rel=1e-6, abs=1e-6)


def test_a_measure_that_orders_the_students_beats_a_strength_that_does_not_given_teachers_enough() -> None:
    score_T = 50 + 2 * np.arange(9.0)
    strength_T = np.array([5.0, 1, 8, 2, 7, 3, 9, 4, 6])
    strength, good, bad = predict({"rank": score_T**3, "noise": strength_T[::-1]}, score_T, strength_T)
    assert strength.measure == "strength"
    assert strength.beats_strength is None
    assert good.beats_strength is True
    assert good.left_out_error == pytest.approx(0, abs=1e-9)
    assert "better than by the teacher's own score" in good.sentence
    assert bad.beats_strength is None
    assert "not decidably" in bad.sentence
    assert good.p_holm == pytest.approx(3 * good.p)
    turned = predict({"noise": strength_T}, score_T, score_T)[1]
    assert turned.beats_strength is False
    assert "worse than" in turned.sentence
    json.dumps([asdict(one) for one in (strength, good, bad)], allow_nan=False)


@FEW
@given(st.integers(0, 10_000), st.integers(3, 5))
def test_five_teachers_never_decide_whether_a_measure_beats_the_strength(draw: int, num: int) -> None:
    score_T, strength_T = np.random.default_rng(draw).standard_normal((2, num))
    assert predict({"the score itself": score_T}, score_T, strength_T)[1].beats_strength is None


@FEW
@given(st.integers(0, 10_000), st.integers(3, 14))
def test_which_of_two_measures_comes_first_does_not_matter_to_their_comparison(draw: int, num: int) -> None:
    score_T, a_T, b_T = np.random.default_rng(draw).standard_normal((3, num))
    assert exchange_p(a_T, b_T, score_T) == exchange_p(b_T, a_T, score_T) > 0
    assert exchange_p(a_T, a_T, score_T) == 1


def test_two_teachers_have_no_left_out_error_and_holes_are_refused() -> None:
    found = predict({"rank": np.array([1.0, 2])}, np.array([50.0, 51]), np.array([1.0, 2]))
    assert [one.left_out_error for one in found] == [None, None]
    with pytest.raises(ValueError, match="finite"):
        predict({"rank": np.array([1.0, np.nan, 3])}, np.arange(3.0), np.arange(3.0))

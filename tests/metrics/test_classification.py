"""Scores of classifiers against scikit-learn, their rules for ties, and labels that do not fit."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, balanced_accuracy_score, top_k_accuracy_score

from kdstore.errors import EvaluationError
from kdstore.metrics.classification import classification_scores, mean_average_precision, truth_ranks, zeroshot_accuracy


@given(seed=st.integers(0, 2**32 - 1), rows=st.integers(1, 60), classes=st.integers(3, 9))
def test_scores_equal_those_of_scikit_learn(seed: int, rows: int, classes: int) -> None:
    rng = np.random.default_rng(seed)
    score, label = rng.normal(size=(rows, classes)), rng.integers(0, classes, rows)
    found = classification_scores(truth_ranks(score, label), label, classes)
    names = range(classes)
    assert found["acc1"] == pytest.approx(100 * top_k_accuracy_score(label, score, k=1, labels=names))
    assert ("acc5" in found) == (classes >= 5)
    if classes > 5:  # of all classes it warns
        assert found["acc5"] == pytest.approx(100 * top_k_accuracy_score(label, score, k=5, labels=names))
    if len(set(label)) > 1 and set(score.argmax(1)) <= set(label):  # it warns of others, and of a single one
        assert found["mean_per_class_recall"] == pytest.approx(100 * balanced_accuracy_score(label, score.argmax(1)))
    truth = rng.random((rows, classes)) < 0.4
    expected = [average_precision_score(t, s) if t.any() else 0 for t, s in zip(truth.T, score.T, strict=True)]
    assert mean_average_precision(score, truth) == pytest.approx(100 * float(np.mean(expected)))


def test_of_equal_scores_the_lower_class_and_the_lower_row_come_first() -> None:
    assert truth_ranks(np.ones((3, 3)), np.array([0, 1, 2])).tolist() == [0, 1, 2]
    assert mean_average_precision(np.ones((2, 1)), np.array([[True], [False]])) == 100
    assert mean_average_precision(np.ones((2, 1)), np.array([[False], [True]])) == 50


def test_an_image_may_have_several_labels() -> None:
    images, texts = np.array([[1.0, 0.1], [0.1, 2.0], [-3.0, 0.0]]), np.array([[5.0, 0.0], [0.0, 1.0], [-1.0, -0.1]])
    assert zeroshot_accuracy(images, texts, [{0}, {0, 1}, {1}]) == pytest.approx(200 / 3)


def test_what_does_not_fit_is_one_clear_line() -> None:
    with pytest.raises(EvaluationError, match="below the number of classes"):
        truth_ranks(np.zeros((2, 3)), np.array([0, 3]))
    with pytest.raises(EvaluationError, match="not finite"):
        truth_ranks(np.array([[np.nan, 0]]), np.array([1]))
    with pytest.raises(EvaluationError, match="do not fit"):
        mean_average_precision(np.zeros((2, 3)), np.zeros((3, 2), bool))

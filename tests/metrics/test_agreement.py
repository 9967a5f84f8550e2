"""Agreement of a student with its teacher and with labels."""

from __future__ import annotations

import numpy as np
import pytest

from kdstore.metrics.agreement import mean_cosine, top1_agreement, zeroshot_accuracy

IMAGES = np.array([[1.0, 0.1], [0.1, 2.0], [-3.0, 0.0]])
TEXTS = np.array([[5.0, 0.0], [0.0, 1.0], [-1.0, -0.1]])


def test_the_cosine_does_not_depend_on_the_length_of_rows() -> None:
    assert mean_cosine(IMAGES, 7 * IMAGES) == pytest.approx(1)
    assert mean_cosine(np.eye(2), np.array([[0, 3.0], [0, 2.0]])) == pytest.approx(0.5)


def test_models_of_other_widths_agree_where_they_choose_the_same_candidate() -> None:
    wide = np.eye(3)
    assert top1_agreement((IMAGES, TEXTS), (wide, wide)) == 100
    assert top1_agreement((IMAGES, TEXTS), (wide, wide[[0, 2, 1]])) == pytest.approx(100 / 3)


def test_an_image_may_have_several_labels() -> None:
    assert zeroshot_accuracy(IMAGES, TEXTS, [{0}, {0, 1}, {1}]) == pytest.approx(200 / 3)

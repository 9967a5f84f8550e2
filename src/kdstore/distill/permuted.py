"""Targets without what they say of their pair: the control of a study that keeps a teacher's statistics and takes its knowledge away.

Images and texts are permuted independently. Permuted together, an image's target would still fit its caption's, and every loss that contrasts the teacher's
images with its texts would keep its diagonal. The student sees its own images, captions and views; only what it is told of them is another's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kdstore.distill.pairs import Pairs, Rows
from kdstore.distill.targets import Targets
from kdstore.distill.tokens import Standard
from kdstore.store.order import TARGET, permuted


@dataclass(eq=False)
class PermutedTargets:
    """Targets whose row r is that of row `image_row[r]` or `text_row[r]` of others."""

    targets: Targets
    name: str
    logit_scale: float | None
    logit_bias: float | None
    image_row: Rows
    text_row: Rows

    def shape(self, array: str) -> tuple[int, ...]:
        return self.targets.shape(array)

    def image(self, array: str, rows: Rows, views: Rows) -> npt.NDArray[Any]:
        return self.targets.image(array, self.image_row[rows], views)

    def text(self, array: str, rows: Rows) -> npt.NDArray[Any]:
        return self.targets.text(array, self.text_row[rows])

    def standard(self, array: str, kind: str) -> Standard:
        return self.targets.standard(array, kind)


def permute_targets(all_targets: Sequence[Targets], pairs: Pairs, seed: int) -> tuple[PermutedTargets, ...]:
    """Permute the rows that are trained on among themselves, images and texts apart, for each teacher by `seed` alone."""
    return tuple(
        PermutedTargets(
            targets,
            targets.name,
            targets.logit_scale,
            targets.logit_bias,
            _permutation(pairs.target_rows[k], seed, 2 * k),
            _permutation(np.concatenate([texts.rows[k] for texts in pairs.all_texts]), seed, 2 * k + 1),
        )
        for k, targets in enumerate(all_targets)
    )


def _permutation(rows: Rows, seed: int, number: int) -> Rows:
    """Return the row that stands for each row: those of `rows` (-1: none) among themselves, all others for themselves."""
    held = np.unique(rows[rows >= 0])
    stands_for = np.arange(held[-1] + 1 if len(held) else 0)
    stands_for[held] = held[permuted(np.arange(len(held)), len(held), seed, TARGET, number)]
    return stands_for

"""What the terms of a loss are functions of, and the few formulas that they share.

Shapes: B pairs in the batch, S width of the student, D width of a teacher, T tokens of a teacher, W their width.
Notation: Z = scale * image @ text.T, p = softmax of each row; `both ways` = mean of f(Z) and f(Z.T), where the transpose comes before the softmax.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

ABSENT = torch.empty(0)


@dataclass(frozen=True)
class Features:
    """One batch as losses see it, beside one teacher or none: unit rows, and scales that multiply cosines.

    `positives_BB` holds the targets of contrastive terms, one distribution per row: uniform over the pairs with an equal caption; `synthetic_*` are those of
    a second caption of each image. `projected_*` are the student's rows in the teacher's space, `fused_*` rows made of both models' rows. `tokens_BTW`
    are the student's tokens, and `summary_BD` its image rows, in the space of the teacher's standardised `teacher_tokens_BTW` and `teacher_summary_BD`.
    What no term of the loss uses is absent (`Term.needs`, `Term.uses`).
    """

    image_BS: Tensor
    text_BS: Tensor
    scale: Tensor
    positives_BB: Tensor
    bias: Tensor = ABSENT
    synthetic_BS: Tensor = ABSENT
    synthetic_positives_BB: Tensor = ABSENT
    teacher_image_BD: Tensor = ABSENT
    teacher_text_BD: Tensor = ABSENT
    teacher_synthetic_BD: Tensor = ABSENT
    teacher_scale: float = math.nan  # of softmax terms: the teacher's own unless the run says another
    own_scale: float = math.nan
    own_bias: float = math.nan
    weight: float = 1.0
    projected_image_BD: Tensor = ABSENT
    projected_text_BD: Tensor = ABSENT
    cross_scale: Tensor = ABSENT
    fused_image_BS: Tensor = ABSENT
    fused_text_BS: Tensor = ABSENT
    fusion_scale: Tensor = ABSENT
    tokens_BTW: Tensor = ABSENT
    teacher_tokens_BTW: Tensor = ABSENT
    summary_BD: Tensor = ABSENT
    teacher_summary_BD: Tensor = ABSENT
    draw_B: Tensor = ABSENT  # uniform in [0, 1), another for each teacher

    @property
    def logits_BB(self) -> Tensor:
        """The student's image-to-text logits."""
        return self.scale * self.image_BS @ self.text_BS.T

    @property
    def teacher_logits_BB(self) -> Tensor:
        """The teacher's image-to-text logits, without its bias."""
        return self.teacher_scale * self.teacher_image_BD @ self.teacher_text_BD.T

    @property
    def teacher_odds_BB(self) -> Tensor:
        """The logits of a teacher that was trained with a sigmoid, with its own scale and bias."""
        return self.own_scale * self.teacher_image_BD @ self.teacher_text_BD.T + self.own_bias


def cross_entropy(target_BB: Tensor, logits_BB: Tensor) -> Tensor:
    """Mean over rows of -sum_j target log softmax(logits)."""
    return -(target_BB * logits_BB.log_softmax(dim=1)).sum(dim=1).mean()


def kl(teacher_BB: Tensor, student_BB: Tensor) -> Tensor:
    """KL(p(teacher), p(student)) of logits, the teacher first, mean over rows."""
    return F.kl_div(student_BB.log_softmax(dim=1), teacher_BB.log_softmax(dim=1), log_target=True, reduction="batchmean")


def soft_cross_entropy(teacher_BB: Tensor, student_BB: Tensor) -> Tensor:
    """CE(p(teacher), p(student)) of logits."""
    return cross_entropy(teacher_BB.softmax(dim=1), student_BB)


def both_ways(term: Callable[[Tensor, Tensor], Tensor], a_BB: Tensor, b_BB: Tensor) -> Tensor:
    """Mean of a term of image-to-text matrices and of their transposes."""
    return (term(a_BB, b_BB) + term(a_BB.T, b_BB.T)) / 2

"""The exponential moving average of a student's weights, which often scores better than the weights themselves.

It is a student of its own beside the one that is trained: validated, kept in the checkpoint and exported with it, and never trained on.
"""

from __future__ import annotations

from copy import deepcopy

import torch
from torch import Tensor, nn


class Average:
    """The average of a student's weights with `decay` per step; after few steps less, min(decay, (1 + step) / (10 + step)), so that the first weights fade.

    Buffers are copied: those of batch norm are averages already.
    """

    def __init__(self, student: nn.Module, decay: float) -> None:
        self.student = deepcopy(student).eval().requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, student: nn.Module, step: int, skipped: Tensor) -> None:
        """Move towards the weights that a student has after `step` steps; stay where `skipped`, a bool on their device, says that the step changed nothing."""
        weights: list[Tensor] = list(self.student.parameters())
        towards = list(torch._foreach_sub(list[Tensor](student.parameters()), weights))
        torch._foreach_mul_(towards, (1 - min(self.decay, (1 + step) / (10 + step))) * ~skipped)
        torch._foreach_add_(weights, towards)
        for mine, its in zip(self.student.buffers(), student.buffers(), strict=True):
            mine.copy_(its)

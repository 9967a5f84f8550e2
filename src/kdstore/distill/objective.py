"""The objective: a weighted sum of loss terms together with everything that losses train.

Projectors and the scale of ICL are parameters like any other. They live in this one module, and the optimiser and the checkpoint take the whole
module, so that a student is never matched through a frozen random projection and a resumed run never draws new ones.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdstore.distill.encoded import Encoded, Supervision
from kdstore.distill.losses import ABSENT, Features, parse_loss, terms_of


class Objective(nn.Module):
    """Weighted sum of the terms of a loss; computes in float32 (float64 if given float64), outside of autocast.

    A projector is Linear(S, D) with bias per modality. It acts on the raw output of the student's tower and its result is normalised again. It exists if a
    term projects and, with `projector` "auto", only where the widths differ; "always" is what comparisons across teachers need.
    """

    def __init__(
        self, loss: str, *, student_dim: int, teacher_dim: int | None = None, teacher_scale: float | None = None, projector: str = "auto", seed: int = 0
    ) -> None:
        super().__init__()
        self.weights = parse_loss(loss)
        self.terms = terms_of(self.weights)
        self.teacher_dim = teacher_dim
        self.teacher_scale = math.nan if teacher_scale is None else teacher_scale
        self.image_projector: nn.Module = nn.Identity()
        self.text_projector: nn.Module = nn.Identity()
        if any(term.projects for term in self.terms.values()) and teacher_dim is not None and (projector == "always" or student_dim != teacher_dim):
            with torch.random.fork_rng(devices=[]):  # the projectors depend on the seed alone, not on what was drawn before
                torch.manual_seed(seed)
                self.image_projector = nn.Linear(student_dim, teacher_dim)
                self.text_projector = nn.Linear(student_dim, teacher_dim)
        has_scale = any(term.cross_scale for term in self.terms.values())
        self.cross_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07))) if has_scale else None

    def forward(self, encoded: Encoded, scale: Tensor, bias: Tensor | None, told: Supervision) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the weighted sum and the unweighted value of each term, of a whole global batch: a pure function of what it is given and its parameters.

        Embeddings are as the towers return them, before normalisation, in any float type; `scale` is exponentiated. No gradient reaches the teachers'.
        """
        image_BS, text_BS = _at_least_float32(encoded.image_BS), _at_least_float32(encoded.text_BS)
        positives_BB = positives(told.caption_ids_B).to(image_BS.dtype)
        features = Features(F.normalize(image_BS, dim=1), F.normalize(text_BS, dim=1), scale, positives_BB)
        for teacher in told.teachers:
            features = replace(
                features,
                teacher_image_BD=F.normalize(_at_least_float32(teacher.image_BD.detach()), dim=1),
                teacher_text_BD=F.normalize(_at_least_float32(teacher.text_BD.detach()), dim=1),
                teacher_scale=self.teacher_scale,
                projected_image_BD=F.normalize(self.image_projector(image_BS), dim=1),
                projected_text_BD=F.normalize(self.text_projector(text_BS), dim=1),
                cross_scale=ABSENT if self.cross_scale is None else self.cross_scale,
            )
        values = {name: term.value(features) for name, term in self.terms.items()}
        return torch.stack([self.weights[name] * value for name, value in values.items()]).sum(), values


def positives(caption_ids_B: Tensor) -> Tensor:
    """Targets [B, B] of contrastive terms, float32, rows sum to 1: uniform over the pairs of an equal caption id.

    There is no option for the published identity: where equal captions have equal embeddings, as in a text tower without dropout, both give the same loss.
    """
    same_BB = (caption_ids_B[:, None] == caption_ids_B[None, :]).float()
    return same_BB / same_BB.sum(dim=1, keepdim=True)


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()

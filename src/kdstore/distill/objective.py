"""The objective: a weighted sum of loss terms together with everything that losses train.

Projectors and the scale of ICL are parameters like any other. They live in this one module, and the optimiser and the checkpoint take the whole
module, so that a student is never matched through a frozen random projection and a resumed run never draws new ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdstore.distill.encoded import Encoded, Supervision, TeacherRows, map_rows
from kdstore.distill.features import ABSENT, Features
from kdstore.distill.losses import Part, Term, feature_weight, parse_loss, parts_of, terms_of
from kdstore.distill.tokens import Standard, Standardise, on_grid


@dataclass(frozen=True, eq=False)
class Teacher:
    """What an objective knows of a teacher before any batch; `scale` and `bias` are its own, `softmax_scale` replaces the scale where a softmax reads it."""

    name: str = "teacher"
    dim: int = 0  # 0: no embeddings
    scale: float | None = None
    bias: float | None = None
    softmax_scale: float | None = None
    weight: float = 1.0
    num_tokens: int = 0
    token_standard: Standard | None = None
    image_standard: Standard | None = None
    families: tuple[str, ...] = ("", "softmax", "sigmoid")  # of the terms in which it takes part


class Objective(nn.Module):
    """Weighted sum of the terms of a loss; computes in float32 (float64 if given float64), outside of autocast.

    A projector is Linear(S, D) with bias per modality and teacher. It acts on the raw output of the student's tower and its result is normalised again. It
    exists if a term projects and, with `projector` "auto", only where the widths differ; "always" is what comparisons across teachers need.
    """

    def __init__(self, loss: str, teachers: Sequence[Teacher] = (), *, student_dim: int, token_width: int = 0, projector: str = "auto", seed: int = 0) -> None:
        super().__init__()
        self.weights = parse_loss(loss)
        self.terms = terms_of(self.weights)
        self.teachers = tuple(teachers)
        self.parts = parts_of(self.weights)
        with torch.random.fork_rng(devices=[]):  # what is drawn depends on the seed alone, not on what was drawn before
            torch.manual_seed(seed)
            self.heads = nn.ModuleList(Head(t, _parts_beside(t, self.terms), student_dim, token_width, projector) for t in teachers)

    def forward(self, encoded: Encoded, scale: Tensor, bias: Tensor | None, told: Supervision) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the weighted sum and the unweighted value of each term, of a whole global batch: a pure function of what it is given and its parameters.

        Embeddings are as the towers return them, before normalisation, in any float type; `scale` is exponentiated. No gradient reaches the teachers'.
        A pair that a teacher lacks is no row and no column of that teacher's terms.
        """
        encoded = map_rows(_at_least_float32, encoded)
        alone = _student(encoded, scale, bias, told)
        beside = [self._beside(k, alone, encoded, scale, bias, told) for k in range(len(told.teachers))]
        values = {name: self._value(term, alone, beside) for name, term in self.terms.items()}
        return torch.stack([self.weights[name] * value for name, value in values.items()]).sum(), values

    def account(self) -> list[dict[str, Any]]:
        """Say of each teacher what a run records: the numbers in which runs of different teachers compare."""
        rows = []
        for teacher, head in zip(self.teachers, self.heads, strict=True):
            projector = head.image_projector
            rows.append(
                {
                    "name": teacher.name,
                    "weight": teacher.weight,
                    "logit_scale": teacher.scale,
                    "logit_bias": teacher.bias,
                    "softmax_scale": teacher.scale if teacher.softmax_scale is None else teacher.softmax_scale,
                    "weight_on_one_minus_cos": teacher.weight * feature_weight(self.weights, teacher.dim) if teacher.dim else None,
                    "projector": [projector.in_features, projector.out_features] if isinstance(projector, nn.Linear) else None,
                }
            )
        return rows

    def _beside(self, k: int, alone: Features, encoded: Encoded, scale: Tensor, bias: Tensor | None, told: Supervision) -> Features:
        rows = map_rows(lambda t: _at_least_float32(t.detach()), told.teachers[k])
        if rows.valid_B is not None:
            held_B = told.teachers[k].valid_B.nonzero()[:, 0]  # type: ignore[union-attr]
            encoded, told, rows = map_rows(lambda t: t[held_B], (encoded, replace(told, teachers=()), rows))
            alone = _student(encoded, scale, bias, told)
        head = self.heads[k]
        assert isinstance(head, Head)
        return head(alone, encoded, rows)

    def _value(self, term: Term, alone: Features, beside: Sequence[Features]) -> Tensor:
        if not term.needs:
            return term.value(alone)
        heard = [f for f, teacher in zip(beside, self.teachers, strict=True) if term.family in teacher.families]
        if term.joint:
            return term.value(heard)
        nothing = alone.image_BS.sum() * 0
        values = [f.weight * term.value(f) if len(f.image_BS) >= term.rows else nothing for f in heard]
        return values[0] if len(values) == 1 else torch.stack(values).sum()


class Head(nn.Module):
    """What losses own and train for one teacher, and how its features and the student's are brought together."""

    def __init__(self, teacher: Teacher, parts: frozenset[Part], student_dim: int, token_width: int, projector: str) -> None:
        super().__init__()
        self.teacher = teacher
        projects = projector == "always" or student_dim != teacher.dim

        def linear(part: Part, width: int, out: int, wanted: bool = True) -> nn.Module:
            return nn.Linear(width, out) if part in parts and wanted else nn.Identity()

        def scale(part: Part) -> nn.Parameter | None:
            return nn.Parameter(torch.tensor(math.log(1 / 0.07))) if part in parts else None

        self.image_projector = linear("image projector", student_dim, teacher.dim, projects)
        self.text_projector = linear("text projector", student_dim, teacher.dim, projects)
        self.cross_scale = scale("cross scale")
        self.image_fusion = linear("fusion", student_dim + teacher.dim, student_dim)
        self.text_fusion = linear("fusion", student_dim + teacher.dim, student_dim)
        self.fusion_scale = scale("fusion")
        self.token_standard = _standardise("tokens" in parts, teacher.token_standard)
        self.token_projector = linear("tokens", token_width, 0 if teacher.token_standard is None else len(teacher.token_standard.mean_W))
        self.summary_standard = _standardise("summary" in parts, teacher.image_standard)
        self.summary_projector = linear("summary", student_dim, teacher.dim)
        self.parts = parts

    def forward(self, student: Features, encoded: Encoded, rows: TeacherRows) -> Features:
        """Return what terms see beside this teacher; rows are float."""
        t, parts = self.teacher, self.parts
        image_BD, text_BD, synthetic_BD = (ABSENT if x is None else F.normalize(x, dim=1) for x in (rows.image_BD, rows.text_BD, rows.synthetic_BD))
        found: dict[str, Tensor] = {"teacher_image_BD": image_BD, "teacher_text_BD": text_BD, "teacher_synthetic_BD": synthetic_BD}
        if "image projector" in parts:
            found["projected_image_BD"] = F.normalize(self.image_projector(encoded.image_BS), dim=1)
        if "text projector" in parts:
            found["projected_text_BD"] = F.normalize(self.text_projector(encoded.text_BS), dim=1)
        if self.cross_scale is not None:
            found["cross_scale"] = self.cross_scale
        if self.fusion_scale is not None:
            found["fused_image_BS"] = F.normalize(self.image_fusion(torch.cat([student.image_BS, image_BD], dim=1)), dim=1)
            found["fused_text_BS"] = F.normalize(self.text_fusion(torch.cat([student.text_BS, text_BD], dim=1)), dim=1)
            found["fusion_scale"] = self.fusion_scale
        if "tokens" in parts:
            assert encoded.tokens_BTW is not None
            found["tokens_BTW"] = on_grid(self.token_projector(encoded.tokens_BTW), t.num_tokens)
            found["teacher_tokens_BTW"] = self.token_standard(rows.tokens_BTW)
        if "summary" in parts:
            found["summary_BD"], found["teacher_summary_BD"] = self.summary_projector(encoded.image_BS), self.summary_standard(rows.image_BD)
        own_scale, own_bias = (math.nan if x is None else x for x in (t.scale, t.bias))
        scales = {"teacher_scale": own_scale if t.softmax_scale is None else t.softmax_scale, "own_scale": own_scale, "own_bias": own_bias}
        return replace(student, **found, **scales, weight=t.weight, draw_B=ABSENT if rows.draw_B is None else rows.draw_B)  # type: ignore[arg-type]


def positives(caption_ids_B: Tensor) -> Tensor:
    """Targets [B, B] of contrastive terms, float32, rows sum to 1: uniform over the pairs of an equal caption id.

    There is no option for the published identity: where equal captions have equal embeddings, as in a text tower without dropout, both give the same loss.
    """
    same_BB = (caption_ids_B[:, None] == caption_ids_B[None, :]).float()
    return same_BB / same_BB.sum(dim=1, keepdim=True)


def _parts_beside(teacher: Teacher, terms: dict[str, Term]) -> frozenset[Part]:
    """Return what is used beside a teacher: what only others' terms read would never be trained."""
    return frozenset(part for term in terms.values() if term.needs and term.family in teacher.families for part in term.uses)


def _student(encoded: Encoded, scale: Tensor, bias: Tensor | None, told: Supervision) -> Features:
    image_BS = F.normalize(encoded.image_BS, dim=1)
    features = Features(image_BS, F.normalize(encoded.text_BS, dim=1), scale, positives(told.caption_ids_B).to(image_BS.dtype))
    if bias is not None:
        features = replace(features, bias=bias)
    if encoded.synthetic_BS is None or told.synthetic_ids_B is None:
        return features
    return replace(features, synthetic_BS=F.normalize(encoded.synthetic_BS, dim=1), synthetic_positives_BB=positives(told.synthetic_ids_B).to(image_BS.dtype))


def _standardise(wanted: bool, standard: Standard | None) -> Callable[..., Tensor]:
    return nn.Identity() if not wanted or standard is None else Standardise(standard)


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()

"""Losses of a student on a batch of image-caption pairs, beside a teacher's embeddings of the same pairs.

A term is a pure function of `Features`; a recipe is a weighted sum of terms. `LOSSES`, at the end, holds both, and `parse_loss` reads either name or
a sum such as "clip + crd + 2000*fd". What losses own and train (projectors, the scale of ICL) is in objective.py, so that nothing here has state.

Every name has one meaning: open_clip's distillation loss is the recipe `soft-ce` (1 : 1 with the task), its soft part alone is the term `teacher-ce`.
A SigLIP teacher is allowed everywhere: its logit bias is one constant, and a constant cancels in the softmax of a row.

Shapes: B pairs in the batch, S width of the student, D width of the teacher.
Notation: Z = scale * image @ text.T, p = softmax of each row; `both ways` = mean of f(Z) and f(Z.T), where the transpose comes before the softmax.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kdstore.errors import ConfigError, UnknownName

AFFINITY_SCALE = 50.0
FD_WEIGHT = 2000.0
FD_COS_WEIGHT = 2 * FD_WEIGHT / 512
"""MSE of unit rows is (2/D)(1 - cos), so this is what the published weight amounts to at D = 512, the width of its authors' teacher."""

ABSENT = torch.empty(0)
EMBEDDINGS = ("image/embedding", "text/embedding")


@dataclass(frozen=True)
class Features:
    """One batch as losses see it: unit rows, and scales that multiply cosines.

    `positives_BB` holds the targets of contrastive terms, one distribution per row: uniform over the pairs with an equal caption.
    `projected_*` are the student's rows in the teacher's space. Without a teacher the last seven are absent; `Term.needs` says who may read them.
    """

    image_BS: Tensor
    text_BS: Tensor
    scale: Tensor
    positives_BB: Tensor
    teacher_image_BD: Tensor = ABSENT
    teacher_text_BD: Tensor = ABSENT
    teacher_scale: float = math.nan
    projected_image_BD: Tensor = ABSENT
    projected_text_BD: Tensor = ABSENT
    cross_scale: Tensor = ABSENT

    @property
    def logits_BB(self) -> Tensor:
        """The student's image-to-text logits."""
        return self.scale * self.image_BS @ self.text_BS.T

    @property
    def teacher_logits_BB(self) -> Tensor:
        """The teacher's image-to-text logits, without its bias."""
        return self.teacher_scale * self.teacher_image_BD @ self.teacher_text_BD.T


@dataclass(frozen=True)
class Term:
    """A loss of its own: its function, what it needs from the store, and which trained parts of the objective it reads."""

    value: Callable[[Features], Tensor]
    needs: tuple[str, ...] = ()
    projects: bool = False
    cross_scale: bool = False

    @property
    def summary(self) -> str:
        """First line of the function's docstring."""
        return (self.value.__doc__ or "").strip().splitlines()[0]


@dataclass(frozen=True)
class Recipe:
    """A weighted sum of terms under one name."""

    sum: str
    about: str

    @property
    def summary(self) -> str:
        """The sum and where it is from."""
        return f"{self.sum}: {self.about}"


def cross_entropy(target_BB: Tensor, logits_BB: Tensor) -> Tensor:
    """Mean over rows of -sum_j target log softmax(logits)."""
    return -(target_BB * logits_BB.log_softmax(dim=1)).sum(dim=1).mean()


def clip(f: Features) -> Tensor:
    """Task: contrast of images and captions, CE(I, p(Z)) both ways.

    Radford et al. 2021, arXiv 2103.00020. Equal captions in a batch are positives of each other: the target of a row is uniform over its positives
    instead of I. Needs nothing from the store.
    """
    return (cross_entropy(f.positives_BB, f.logits_BB) + cross_entropy(f.positives_BB.T, f.logits_BB.T)) / 2


def crd(f: Features) -> Tensor:
    """Contrastive relational distillation: KL(p(Z_teacher), p(Z_student)) both ways, the teacher first, temperature 1.

    CLIP-KD, Yang et al. 2024, arXiv 2307.12732, published weight 1. Needs embeddings and the teacher's logit scale.
    """
    student_BB, teacher_BB = f.logits_BB, f.teacher_logits_BB
    return (_kl(teacher_BB, student_BB) + _kl(teacher_BB.T, student_BB.T)) / 2


def icl(f: Features) -> Tensor:
    """Interactive contrastive learning: student images against teacher texts, and student texts against teacher images.

    (CE(I, p(c n(P_v v_S) s_T')) + CE(I, p(c n(P_s s_S) v_T'))) / 2 with a learnable c. Literal form of CLIP-KD (arXiv 2307.12732, published weight 1):
    c starts at ln(1/0.07) = 2.66 and multiplies as it is, without exp. Targets are those of `clip`. Needs embeddings.
    """
    return _interactive(f, f.cross_scale)


def icl_exp(f: Features) -> Tensor:
    """ICL with its scale as CLIP's: exp(c), starting at 1/0.07 and at most 100.

    What the literal form was probably meant to be; no published weight. Needs embeddings.
    """
    return _interactive(f, f.cross_scale.clamp(max=math.log(100)).exp())


def fd(f: Features) -> Tensor:
    """Feature distillation, literal: MSE(n(P_v v_S), v_T) + MSE(n(P_s s_S), s_T), means over all B * D elements.

    CLIP-KD (arXiv 2307.12732), published weight 2000. For unit rows it is (2/D)(1 - cos), so the weight means less the wider the teacher is. Needs embeddings.
    """
    return F.mse_loss(f.projected_image_BD, f.teacher_image_BD) + F.mse_loss(f.projected_text_BD, f.teacher_text_BD)


def fd_cos(f: Features) -> Tensor:
    """Feature distillation, free of the teacher's width: mean (1 - cos) of images + mean (1 - cos) of texts.

    `7.8125*fd-cos` equals `2000*fd` at D = 512 and keeps its meaning at every other width. Needs embeddings.
    """
    image_B = (f.projected_image_BD * f.teacher_image_BD).sum(dim=1)
    text_B = (f.projected_text_BD * f.teacher_text_BD).sum(dim=1)
    return (1 - image_B).mean() + (1 - text_B).mean()


def affinity(f: Features) -> Tensor:
    """Affinity mimicking: CE(p(50 v_T s_T'), p(50 v_S s_S')) both ways, both scales fixed at 50.

    TinyCLIP, Wu et al. 2023, arXiv 2309.12314, with its defaults alpha = 1 and weight 1: the whole loss, without the task. Needs embeddings.
    """
    student_BB = AFFINITY_SCALE * f.image_BS @ f.text_BS.T
    teacher_BB = AFFINITY_SCALE * f.teacher_image_BD @ f.teacher_text_BD.T
    return _soft_cross_entropy(teacher_BB, student_BB)


def teacher_ce(f: Features) -> Tensor:
    """Soft part of open_clip's distillation loss: CE(p(Z_teacher), p(Z_student)) both ways, each at its own scale.

    open_clip `DistillClipLoss`, published weight 1. Its gradient is that of `crd`; the value differs by the teacher's entropy.
    Needs embeddings and the teacher's logit scale.
    """
    return _soft_cross_entropy(f.teacher_logits_BB, f.logits_BB)


def parse_loss(text: str) -> dict[str, float]:
    """Read a loss, "clip-kd" or "clip + 1*crd + 2000*fd", as weights by name of term; recipes are expanded, equal terms added.

    Raises UnknownName for a name that `LOSSES` does not hold and ConfigError for anything that is no sum of positive multiples.
    """
    weights: dict[str, float] = {}
    position = 0
    while True:
        match = _SUMMAND.match(text, position)
        weight = float(match["weight"] or 1) if match else 0.0
        if match is None or not 0 < weight < math.inf or text[match.end() : match.end() + 1] not in ("", "+"):
            raise ConfigError(f"The loss '{text}' is no sum of weighted names (at '{text[position:]}').", 'Write for example "clip + 1*crd + 2000*fd".')
        entry = LOSSES.get(match["name"])
        if entry is None:
            raise UnknownName.of("loss", match["name"], LOSSES)
        for name, inner in ({match["name"]: 1.0} if isinstance(entry, Term) else parse_loss(entry.sum)).items():
            weights[name] = weights.get(name, 0.0) + weight * inner
        position = match.end() + 1
        if position > len(text):
            return weights


def describe_losses() -> dict[str, str]:
    """Return one line about each loss by name."""
    return {name: entry.summary for name, entry in LOSSES.items()}


def terms_of(weights: dict[str, float]) -> dict[str, Term]:
    """Return the terms of a parsed loss by name."""
    return {name: term for name in weights if isinstance(term := LOSSES[name], Term)}


def needs_of(weights: dict[str, float]) -> tuple[str, ...]:
    """Names of everything that a parsed loss needs from a store: arrays, and `logit_scale`."""
    return tuple(dict.fromkeys(need for term in terms_of(weights).values() for need in term.needs))


def feature_weight(weights: dict[str, float], teacher_dim: int) -> float:
    """What the loss puts on (1 - cos) of each modality through `fd` and `fd-cos`, the only number in which FD runs of different teachers compare."""
    return weights.get("fd", 0.0) * 2 / teacher_dim + weights.get("fd-cos", 0.0)


def _kl(teacher_BB: Tensor, student_BB: Tensor) -> Tensor:
    return F.kl_div(student_BB.log_softmax(dim=1), teacher_BB.log_softmax(dim=1), log_target=True, reduction="batchmean")


def _soft_cross_entropy(teacher_BB: Tensor, student_BB: Tensor) -> Tensor:
    return (cross_entropy(teacher_BB.softmax(dim=1), student_BB) + cross_entropy(teacher_BB.T.softmax(dim=1), student_BB.T)) / 2


def _interactive(f: Features, scale: Tensor) -> Tensor:
    image_to_text = cross_entropy(f.positives_BB, scale * f.projected_image_BD @ f.teacher_text_BD.T)
    return (image_to_text + cross_entropy(f.positives_BB.T, scale * f.projected_text_BD @ f.teacher_image_BD.T)) / 2


_SUMMAND = re.compile(r"\s*(?:(?P<weight>\d+\.?\d*(?:[eE][+-]?\d+)?|\.\d+)\s*(?:\*\s*|\s))?(?P<name>[A-Za-z][\w-]*)\s*")

LOSSES: dict[str, Term | Recipe] = {
    "clip": Term(clip),
    "crd": Term(crd, (*EMBEDDINGS, "logit_scale")),
    "icl": Term(icl, EMBEDDINGS, projects=True, cross_scale=True),
    "icl-exp": Term(icl_exp, EMBEDDINGS, projects=True, cross_scale=True),
    "fd": Term(fd, EMBEDDINGS, projects=True),
    "fd-cos": Term(fd_cos, EMBEDDINGS, projects=True),
    "affinity": Term(affinity, EMBEDDINGS),
    "teacher-ce": Term(teacher_ce, (*EMBEDDINGS, "logit_scale")),
    "none": Recipe("clip", "no teacher, the task alone"),
    "clip-kd": Recipe(f"clip + crd + icl + {FD_WEIGHT:g}*fd", "CLIP-KD as published"),
    "clip-kd-free": Recipe(f"clip + crd + icl + {FD_COS_WEIGHT:g}*fd-cos", "CLIP-KD with an FD weight that is the same for every teacher"),
    "soft-ce": Recipe("clip + teacher-ce", "open_clip's distillation loss"),
}

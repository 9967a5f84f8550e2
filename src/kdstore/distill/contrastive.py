"""Terms that compare images with captions: tasks, and what a teacher says of the same matrix of pairs.

Shapes and notation: features.py. A term of several teachers at once is a function of all their `Features`, the others of one teacher's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kdstore.distill.features import Features, both_ways, cross_entropy, kl, soft_cross_entropy

AFFINITY_SCALE = 50.0
DIME_SCALE = 100.0
PVL_TEMPERATURE, UDIST_TEMPERATURE = 3.0, 7.0
STANDARD_TEMPERATURE = 2.0
EPS = 1e-8


def clip(f: Features) -> Tensor:
    """Task: contrast of images and captions, CE(I, p(Z)) both ways.

    Radford et al. 2021, arXiv 2103.00020. Equal captions in a batch are positives of each other: the target of a row is uniform over its positives
    instead of I. Needs nothing from the store.
    """
    return both_ways(cross_entropy, f.positives_BB, f.logits_BB)


def clip_both(f: Features) -> Tensor:
    """Task on a real and on a synthetic caption of each image: `clip` of both, summed.

    MobileCLIP (Vasu et al. 2024, arXiv 2311.17049): its task term, weight 0 or 0.25. Of a store with one kind of captions it is `clip`.
    """
    if not f.synthetic_BS.numel():
        return clip(f)
    return clip(f) + both_ways(cross_entropy, f.synthetic_positives_BB, f.scale * f.image_BS @ f.synthetic_BS.T)


def siglip(f: Features) -> Tensor:
    """Task: every pair is told apart by itself, mean over rows of sum_j -log sigmoid(l_ij (Z_ij + b)), l = 1 for positives and -1 for others.

    SigLIP, Zhai et al. 2023, arXiv 2303.15343, with the student's learned bias b, which starts at -10. Equal captions are positives of each other.
    Needs nothing from the store.
    """
    return _pairwise(f, f.positives_BB > 0)


def siglip_literal(f: Features) -> Tensor:
    """SigLIP's task as published: positives are the diagonal alone, and an equal caption of another image is a negative.

    Zhai et al. 2023, arXiv 2303.15343. Unlike in a softmax, the choice changes the minimum: the same text is told to be right and wrong.
    """
    return _pairwise(f, torch.eye(len(f.image_BS), dtype=torch.bool, device=f.image_BS.device))


def crd(f: Features) -> Tensor:
    """Contrastive relational distillation: KL(p(Z_teacher), p(Z_student)) both ways, the teacher first, temperature 1.

    CLIP-KD, Yang et al. 2024, arXiv 2307.12732, published weight 1. Needs embeddings and the teacher's logit scale.
    """
    return both_ways(kl, f.teacher_logits_BB, f.logits_BB)


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


def cross_kd(f: Features) -> Tensor:
    """ICL's logits, taught by the teacher: (KL(p(Z_teacher), p(c n(P_v v_S) s_T')) + KL(p(Z_teacher'), p(c n(P_s s_S) v_T'))) / 2.

    CLIP-KD's code (arXiv 2307.12732), published weight 0: it is there and unused. c as in `icl`. Needs embeddings and the teacher's logit scale.
    """
    image_BB, text_BB = _interactive_logits(f, f.cross_scale)
    return (kl(f.teacher_logits_BB, image_BB) + kl(f.teacher_logits_BB.T, text_BB)) / 2


def afd(f: Features) -> Tensor:
    """Augmented feature distillation: the task on rows fused of both models, n(Linear([v_S; v_T])) and n(Linear([s_S; s_T])).

    CLIP-KD (arXiv 2307.12732); no weight is published (its script sets another term's). The layers D + S -> S are trained with the student, and so
    is the scale, which starts at 2.66 and multiplies as it is. Needs embeddings.
    """
    return both_ways(cross_entropy, f.positives_BB, f.fusion_scale * f.fused_image_BS @ f.fused_text_BS.T)


def affinity(f: Features) -> Tensor:
    """Affinity mimicking: CE(p(50 v_T s_T'), p(50 v_S s_S')) both ways, both scales fixed at 50.

    TinyCLIP, Wu et al. 2023, arXiv 2309.12314, with its defaults alpha = 1 and weight 1: the whole loss, without the task. Needs embeddings.
    """
    student_BB = AFFINITY_SCALE * f.image_BS @ f.text_BS.T
    teacher_BB = AFFINITY_SCALE * f.teacher_image_BD @ f.teacher_text_BD.T
    return both_ways(soft_cross_entropy, teacher_BB, student_BB)


def teacher_ce(f: Features) -> Tensor:
    """Soft part of open_clip's distillation loss: CE(p(Z_teacher), p(Z_student)) both ways, each at its own scale.

    open_clip `DistillClipLoss`, published weight 1. Its gradient is that of `crd`; the value differs by the teacher's entropy.
    Needs embeddings and the teacher's logit scale.
    """
    return both_ways(soft_cross_entropy, f.teacher_logits_BB, f.logits_BB)


def reinforced(teachers: Sequence[Features]) -> Tensor:
    """Ensemble of teachers: CE(mean_k p(Z_k), p(Z_student)) both ways, summed over a real and a synthetic caption of each image.

    MobileCLIP, arXiv 2311.17049 (published weight 1 or 0.75): the teachers are averaged, by their weights, after the softmax, and each way has its own
    softmax. Needs embeddings and each teacher's logit scale, published as 100, 100 or 70, 60 (`teacher_temperature`).
    """
    f = teachers[0]
    total = _ensemble(f.logits_BB, [(t.weight, t.teacher_logits_BB) for t in teachers])
    if f.synthetic_BS.numel():
        logits = [(t.weight, t.teacher_scale * t.teacher_image_BD @ t.teacher_synthetic_BD.T) for t in teachers]
        total = total + _ensemble(f.scale * f.image_BS @ f.synthetic_BS.T, logits)
    return total


def siglip_kd(teachers: Sequence[Features]) -> Tensor:
    """SigLIP's loss with soft labels y = mean_k (2 sigmoid(Z_k + b_k) - 1): mean over rows of sum_j -log sigmoid(y_ij (Z_ij + b)).

    MobileCLIP2's code, published weight 1. Not a soft cross-entropy: for y > 0 it falls as long as the student's logit grows, and at y = 0 there is no
    gradient, so its minimum is not the teacher (`siglip-ce` has that). Needs embeddings, each teacher's logit scale and bias.
    """
    weights = sum(t.weight for t in teachers)
    label_BB = torch.stack([t.weight / weights * (2 * t.teacher_odds_BB.sigmoid() - 1) for t in teachers]).sum(dim=0)
    f = teachers[0]
    return -F.logsigmoid(label_BB * (f.logits_BB + f.bias)).sum(dim=1).mean()


def siglip_ce(f: Features) -> Tensor:
    """Binary cross-entropy with the teacher's probability q = sigmoid(Z_teacher + b_teacher) of each pair, summed over a row, mean over rows.

    Ours: the form of `siglip-kd` whose minimum is the teacher; no published weight. Needs embeddings, the teacher's logit scale and bias.
    """
    loss_BB = F.binary_cross_entropy_with_logits(f.logits_BB + f.bias, f.teacher_odds_BB.sigmoid(), reduction="none")
    return loss_BB.sum(dim=1).mean()


def vl(f: Features) -> Tensor:
    """Image-text scores of the student's images and the teacher's texts: KL(p(100 v_T s_T'), p(100 n(P_v v_S) s_T')), sum of both directions.

    DIME-FM, Sun et al. 2023, arXiv 2303.18232: scale 100, temperature 1, default weight 0.7. Its student has the teacher's text tower, so the student's
    own texts get no gradient. Needs embeddings.
    """
    teacher_BB = DIME_SCALE * f.teacher_image_BD @ f.teacher_text_BD.T
    return 2 * both_ways(kl, teacher_BB, DIME_SCALE * f.projected_image_BD @ f.teacher_text_BD.T)


def pvl(f: Features) -> Tensor:
    """The teacher's images as pseudo texts: 2 KL(p(100/3 v_T v_T'), p(100/3 n(P_v v_S) v_T')).

    DIME-FM, arXiv 2303.18232: temperature 3, default weight 0.3. Needs image embeddings.
    """
    scale = DIME_SCALE / PVL_TEMPERATURE
    return 2 * kl(scale * f.teacher_image_BD @ f.teacher_image_BD.T, scale * f.projected_image_BD @ f.teacher_image_BD.T)


def udist(f: Features) -> Tensor:
    """Distances among images: 2 KL(p(100/7 v_T v_T'), p(100/7 v_S v_S')).

    DIME-FM, arXiv 2303.18232: temperature 7, default weight 0. Needs image embeddings.
    """
    scale = DIME_SCALE / UDIST_TEMPERATURE
    return 2 * kl(scale * f.teacher_image_BD @ f.teacher_image_BD.T, scale * f.image_BS @ f.image_BS.T)


def dist(f: Features) -> Tensor:
    """Correlation instead of equality: (1 - mean Pearson of rows) + (1 - mean Pearson of columns) of p(Z_teacher) and p(Z_student), both ways.

    DIST, Huang et al. 2022, arXiv 2205.10536, with beta = gamma = tau = 1; made for teachers much stronger than the student. Its classes are our
    captions of the batch. Needs embeddings and the teacher's logit scale.
    """
    return both_ways(_correlations, f.teacher_logits_BB, f.logits_BB)


def logit_std(f: Features) -> Tensor:
    """KL of standardised logits: 4 KL(p(z(Z_teacher) / 2), p(z(Z_student) / 2)) both ways, z the z-score of a row.

    Logit standardisation, Sun et al. 2024, arXiv 2403.01427, temperature 2, published weight 9 beside 0.1 of the task. No logit scale has an effect.
    Needs embeddings.
    """
    teacher_BB = f.teacher_image_BD @ f.teacher_text_BD.T
    return both_ways(lambda t, s: STANDARD_TEMPERATURE**2 * kl(_standardised(t), _standardised(s)), teacher_BB, f.image_BS @ f.text_BS.T)


def _pairwise(f: Features, same_BB: Tensor) -> Tensor:
    sign_BB = same_BB.to(f.image_BS.dtype) * 2 - 1
    return -F.logsigmoid(sign_BB * (f.logits_BB + f.bias)).sum(dim=1).mean()


def _interactive_logits(f: Features, scale: Tensor) -> tuple[Tensor, Tensor]:
    return scale * f.projected_image_BD @ f.teacher_text_BD.T, scale * f.projected_text_BD @ f.teacher_image_BD.T


def _interactive(f: Features, scale: Tensor) -> Tensor:
    image_BB, text_BB = _interactive_logits(f, scale)
    return (cross_entropy(f.positives_BB, image_BB) + cross_entropy(f.positives_BB.T, text_BB)) / 2


def _ensemble(student_BB: Tensor, teachers: Sequence[tuple[float, Tensor]]) -> Tensor:
    weights = sum(weight for weight, _ in teachers)

    def mean(transposed: bool) -> Tensor:
        return torch.stack([weight / weights * (z_BB.T if transposed else z_BB).softmax(dim=1) for weight, z_BB in teachers]).sum(dim=0)

    return (cross_entropy(mean(False), student_BB) + cross_entropy(mean(True), student_BB.T)) / 2


def _correlations(teacher_BB: Tensor, student_BB: Tensor) -> Tensor:
    t_BB, s_BB = teacher_BB.softmax(dim=1), student_BB.softmax(dim=1)
    return (1 - _pearson(s_BB, t_BB).mean()) + (1 - _pearson(s_BB.T, t_BB.T).mean())


def _pearson(a_BB: Tensor, b_BB: Tensor) -> Tensor:
    a_BB, b_BB = (x - x.mean(dim=1, keepdim=True) for x in (a_BB, b_BB))
    return (a_BB * b_BB).sum(dim=1) / (a_BB.norm(dim=1) * b_BB.norm(dim=1) + EPS)


def _standardised(z_BB: Tensor) -> Tensor:
    return (z_BB - z_BB.mean(dim=1, keepdim=True)) / (z_BB.std(dim=1, keepdim=True) + 1e-7) / STANDARD_TEMPERATURE

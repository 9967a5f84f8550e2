"""Terms that match features: embeddings, their gradients, their distances and angles, and tokens. Shapes and notation: features.py."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kdstore.distill.features import Features

DROP = 0.5  # of UNIC: chance that a teacher other than the worst matched one is left out for a sample
ANGLES = 1 << 22  # numbers in each tensor of one chunk of RKD's angles


def fd(f: Features) -> Tensor:
    """Feature distillation, literal: MSE(n(P_v v_S), v_T) + MSE(n(P_s s_S), s_T), means over all B * D elements.

    CLIP-KD (arXiv 2307.12732), published weight 2000. For unit rows it is (2/D)(1 - cos), so the weight means less the wider the teacher is. Needs embeddings.
    """
    return F.mse_loss(f.projected_image_BD, f.teacher_image_BD) + F.mse_loss(f.projected_text_BD, f.teacher_text_BD)


def mfd(f: Features) -> Tensor:
    """Masked feature distillation: `fd` while the student sees a random 25 % of its patches.

    CLIP-KD (arXiv 2307.12732), published weight 2000, mask 0.75. The mask is the student's input, so it acts on every term of the run; the teacher saw the
    whole view. For open_clip's own vision transformers. Needs embeddings.
    """
    return fd(f)


def fd_cos(f: Features) -> Tensor:
    """Feature distillation, free of the teacher's width: mean (1 - cos) of images + mean (1 - cos) of texts.

    `7.8125*fd-cos` equals `2000*fd` at D = 512 and keeps its meaning at every other width. Needs embeddings.
    """
    image_B = (f.projected_image_BD * f.teacher_image_BD).sum(dim=1)
    text_B = (f.projected_text_BD * f.teacher_text_BD).sum(dim=1)
    return (1 - image_B).mean() + (1 - text_B).mean()


def gd(f: Features) -> Tensor:
    """Gradient distillation, literal: sum of four MSEs between student's and teacher's gradients of the task, with logits divided by the scale.

    CLIP-KD (arXiv 2307.12732), published weight 1e8: with R = p(Z) - I, Z = p k' / t, g_p = R k / (t B), g_k = R' p / (t B) for (p, k) = (images, texts) and
    (texts, images). Dividing by t makes the softmax nearly uniform and these no gradients of the task: `gd-true`. I is the identity, also where captions are
    equal: gradients of single rows, unlike the loss, depend on it. Needs embeddings and the teacher's logit scale.
    """
    return _gradient_mse(f, -1, torch.eye(len(f.positives_BB), dtype=f.positives_BB.dtype, device=f.positives_BB.device))


def gd_true(f: Features) -> Tensor:
    """Gradient distillation with the gradients of the task itself: Z = t p k', g_p = t R k / B, g_k = t R' p / B.

    Ours, after CLIP-KD's, with the targets of `clip`; its weight is not that of `gd`, and none is published. Needs embeddings and the teacher's logit scale.
    """
    return _gradient_mse(f, 1, f.positives_BB)


def rkd_d(f: Features) -> Tensor:
    """Relational distances: SmoothL1(d_S / mean d_S, d_T / mean d_T) of all pairs of images, and of all pairs of texts.

    RKD, Park et al. 2019, arXiv 1904.05068, published weight 1. Euclidean distances of unit rows, the mean over those above 0. Needs embeddings.
    """
    return _distances(f.image_BS, f.teacher_image_BD) + _distances(f.text_BS, f.teacher_text_BD)


def rkd_a(f: Features) -> Tensor:
    """Relational angles: SmoothL1 between the cosines of the angles at j of all triples (i, j, k) of images, and of texts.

    RKD, arXiv 1904.05068, published weight 2. B^3 cosines are computed, in chunks of some 4 million numbers. Needs embeddings.
    """
    return _angles(f.image_BS, f.teacher_image_BD) + _angles(f.text_BS, f.teacher_text_BD)


def theia(f: Features) -> Tensor:
    """Patch tokens as one map: 0.9 (1 - cos of the flattened maps) + 0.1 SmoothL1, on standardised tokens of the teacher.

    Theia, Shang et al. 2024, arXiv 2407.20179, published weight 1. Each teacher has a linear layer per token of the student's. Needs image tokens and their
    statistics.
    """
    student_BF, teacher_BF = f.tokens_BTW.flatten(1), f.teacher_tokens_BTW.flatten(1)
    cosine = F.cosine_similarity(student_BF, teacher_BF, dim=1).mean()
    return 0.9 * (1 - cosine) + 0.1 * F.smooth_l1_loss(student_BF, teacher_BF)


def unic(teachers: Sequence[Features]) -> Tensor:
    """0.5 (1 - cos) + 0.5 SmoothL1 per token, mean over tokens, mean of {image embedding, patches}; some teachers left out for each sample.

    UNIC, Sariyildiz et al. 2024, arXiv 2408.05088, published weight 1. For each sample the teacher with the highest loss stays and each other one is left out
    with probability 0.5; what is left counts equally (or by the teachers' weights). Needs image embeddings, image tokens and the statistics of both.
    """
    loss_KB = torch.stack([(_per_token(t.summary_BD, t.teacher_summary_BD) + _per_token(t.tokens_BTW, t.teacher_tokens_BTW).mean(dim=1)) / 2 for t in teachers])
    with torch.no_grad():
        keep_KB = torch.stack([t.draw_B for t in teachers]) >= DROP
        keep_KB.scatter_(0, loss_KB.argmax(dim=0, keepdim=True), True)
        share_KB = keep_KB * torch.tensor([[t.weight] for t in teachers], dtype=loss_KB.dtype, device=loss_KB.device)
        share_KB /= share_KB.sum()
    return (share_KB * loss_KB).sum()


def _gradient_mse(f: Features, power: int, target_BB: Tensor) -> Tensor:
    student = _task_gradients(f.projected_image_BD, f.projected_text_BD, f.scale**power, target_BB)
    teacher = _task_gradients(f.teacher_image_BD, f.teacher_text_BD, f.teacher_scale**power, target_BB)
    return torch.stack([F.mse_loss(s_BD, t_BD) for s_BD, t_BD in zip(student, teacher, strict=True)]).sum()


def _task_gradients(image_BD: Tensor, text_BD: Tensor, factor: Tensor | float, target_BB: Tensor) -> tuple[Tensor, ...]:
    """Gradients of both directions of the task by both of their inputs; a product of matrices where the published code builds [B, D, B]."""
    gradients = []
    for p_BD, k_BD in ((image_BD, text_BD), (text_BD, image_BD)):
        residual_BB = (factor * p_BD @ k_BD.T).softmax(dim=1) - target_BB
        gradients += [factor * residual_BB @ k_BD / len(p_BD), factor * residual_BB.T @ p_BD / len(p_BD)]
    return tuple(gradients)


def _distances(student_BS: Tensor, teacher_BD: Tensor) -> Tensor:
    return F.smooth_l1_loss(_relative_distances(student_BS), _relative_distances(teacher_BD))


def _relative_distances(x_BD: Tensor) -> Tensor:
    squared_BB = (2 - 2 * x_BD @ x_BD.T).clamp(min=1e-12)
    off_BB = 1 - torch.eye(len(x_BD), dtype=x_BD.dtype, device=x_BD.device)
    distance_BB = squared_BB.sqrt() * off_BB
    return distance_BB / distance_BB.sum() * (len(x_BD) * (len(x_BD) - 1))


def _angles(student_BS: Tensor, teacher_BD: Tensor) -> Tensor:
    """Sum over chunks of vertices j; a chunk is computed again on the way back, so that the memory of the angles is a chunk's."""
    B = len(student_BS)
    chunk = max(1, ANGLES // (B * max(B, student_BS.shape[1], teacher_BD.shape[1])))
    total = student_BS.new_zeros(())
    for start in range(0, B, chunk):
        total = total + checkpoint(_angles_at, student_BS, teacher_BD, slice(start, start + chunk), use_reentrant=False, preserve_rng_state=False)
    return total / B**3


def _angles_at(student_BS: Tensor, teacher_BD: Tensor, vertices: slice) -> Tensor:
    return F.smooth_l1_loss(_cosines(student_BS, vertices), _cosines(teacher_BD, vertices), reduction="sum")


def _cosines(x_BD: Tensor, vertices: slice) -> Tensor:
    """Cosines [C, B, B] of angles at some rows; the direction between equal rows is 0 and has no gradient, which would have no bound."""
    apart_CBD = x_BD[None] - x_BD[vertices, None]
    squared_CB1 = apart_CBD.square().sum(dim=2, keepdim=True)
    equal_CB1 = squared_CB1 < 1e-12
    direction_CBD = (apart_CBD / squared_CB1.masked_fill(equal_CB1, 1).sqrt()).masked_fill(equal_CB1, 0)
    return direction_CBD @ direction_CBD.mT


def _per_token(student: Tensor, teacher: Tensor) -> Tensor:
    """0.5 (1 - cos) + 0.5 SmoothL1 over the last axis."""
    cosine = F.cosine_similarity(student, teacher, dim=-1)
    return 0.5 * (1 - cosine) + 0.5 * F.smooth_l1_loss(student, teacher, reduction="none").mean(dim=-1)

"""Every loss against NumPy in float64, written from the formulas alone: values, and gradients by central differences."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kdstore.distill.contrastive import crd, icl_exp, teacher_ce
from kdstore.distill.contrastive import icl as literal_icl
from kdstore.distill.encoded import Encoded, Supervision, TeacherRows, map_rows
from kdstore.distill.features import Features
from kdstore.distill.losses import LOSSES, Recipe, Term, describe_losses, feature_weight, needs_of, parse_loss, parts_of
from kdstore.distill.objective import Objective, Teacher, positives
from kdstore.distill.tokens import Standard
from kdstore.errors import ConfigError, UnknownName

Array = np.ndarray
TEACHER_SCALE, TEACHER_BIAS, STUDENT_SCALE, STUDENT_BIAS = 37.0, -4.0, 11.0, -1.5
WIDTHS = [(6, 6), (6, 9), (9, 5)]
TOKEN_WIDTH, TEACHER_TOKEN_WIDTH = 3, 4


@dataclasses.dataclass
class Inputs:
    """What the loss of one batch depends on; `params` are those of the objective, by name."""

    image: Array
    text: Array
    synthetic: Array
    tokens: Array
    scale: Array
    bias: Array
    teacher_image: Array
    teacher_text: Array
    teacher_synthetic: Array
    teacher_tokens: Array
    target: Array
    params: dict[str, Array]


STUDENT = ("image", "text", "synthetic", "tokens", "scale", "bias")
TEACHER = ("teacher_image", "teacher_text", "teacher_synthetic", "teacher_tokens")


def unit(x: Array) -> Array:
    return x / np.sqrt((x**2).sum(axis=-1, keepdims=True))


def softmax(z: Array) -> Array:
    e = np.exp(z - z.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def ce(p: Array, z: Array) -> float:
    return float(-(p * np.log(softmax(z))).sum(axis=1).mean())


def kl(p: Array, q: Array) -> float:
    return float((p * np.log(p / q)).sum(axis=1).mean())


def sigmoid(z: Array) -> Array:
    return 1 / (1 + np.exp(-z))


def smooth_l1(a: Array, b: Array) -> Array:
    d = np.abs(a - b)
    return np.where(d < 1, d**2 / 2, d - 0.5)


def cosine(a: Array, b: Array) -> Array:
    return (unit(a) * unit(b)).sum(axis=-1)


def linear(x: Inputs, name: str, rows: Array) -> Array:
    """Apply a layer of the objective's, or nothing where there is none."""
    weight = x.params.get(f"heads.0.{name}.weight")
    return rows if weight is None else rows @ weight.T + x.params[f"heads.0.{name}.bias"]


def student_logits(x: Inputs, scale: float | None = None) -> Array:
    return (x.scale if scale is None else scale) * unit(x.image) @ unit(x.text).T


def teacher_logits(x: Inputs, scale: float = TEACHER_SCALE) -> Array:
    return scale * unit(x.teacher_image) @ unit(x.teacher_text).T


def projected(x: Inputs) -> tuple[Array, Array]:
    return unit(linear(x, "image_projector", x.image)), unit(linear(x, "text_projector", x.text))


def ref_clip(x: Inputs) -> float:
    z = student_logits(x)
    return (ce(x.target, z) + ce(x.target, z.T)) / 2


def ref_clip_both(x: Inputs) -> float:
    z = x.scale * unit(x.image) @ unit(x.synthetic).T
    return ref_clip(x) + (ce(x.target, z) + ce(x.target, z.T)) / 2


def ref_siglip(x: Inputs, same: Array) -> float:
    z = student_logits(x) + x.bias
    return float(-np.log(sigmoid(np.where(same, z, -z))).sum(axis=1).mean())


def ref_crd(x: Inputs) -> float:
    zs, zt = student_logits(x), teacher_logits(x)
    return (kl(softmax(zt), softmax(zs)) + kl(softmax(zt.T), softmax(zs.T))) / 2


def ref_interactive(x: Inputs, c: Array) -> float:
    image, text = projected(x)
    return (ce(x.target, c * image @ unit(x.teacher_text).T) + ce(x.target, c * text @ unit(x.teacher_image).T)) / 2


def ref_cross_kd(x: Inputs) -> float:
    (image, text), c, zt = projected(x), x.params["heads.0.cross_scale"], teacher_logits(x)
    by_image, by_text = softmax(c * image @ unit(x.teacher_text).T), softmax(c * text @ unit(x.teacher_image).T)
    return (kl(softmax(zt), by_image) + kl(softmax(zt.T), by_text)) / 2


def ref_afd(x: Inputs) -> float:
    image = unit(linear(x, "image_fusion", np.concatenate([unit(x.image), unit(x.teacher_image)], axis=1)))
    text = unit(linear(x, "text_fusion", np.concatenate([unit(x.text), unit(x.teacher_text)], axis=1)))
    z = x.params["heads.0.fusion_scale"] * image @ text.T
    return (ce(x.target, z) + ce(x.target, z.T)) / 2


def ref_fd(x: Inputs) -> float:
    image, text = projected(x)
    return float(((image - unit(x.teacher_image)) ** 2).mean() + ((text - unit(x.teacher_text)) ** 2).mean())


def ref_fd_cos(x: Inputs) -> float:
    return ref_fd(x) * x.teacher_image.shape[1] / 2


def ref_gd(x: Inputs, power: int) -> float:
    """As published: gradient vectors as sums over the other side of the batch."""
    image, text = projected(x)
    B = len(image)
    total = 0.0
    for first in (True, False):
        gradients = []
        for p, k, t in ((image, text, float(x.scale)), (unit(x.teacher_image), unit(x.teacher_text), TEACHER_SCALE)):
            p, k = (p, k) if first else (k, p)
            residual = softmax(t**power * p @ k.T) - (x.target if power == 1 else np.eye(B))
            g_p = np.einsum("ij,jd->ijd", residual, k).sum(axis=1) * t**power / B
            g_k = np.einsum("ij,id->ijd", residual, p).sum(axis=0) * t**power / B
            gradients.append((g_p, g_k))
        total += sum(float(((s - t) ** 2).mean()) for s, t in zip(*gradients, strict=True))
    return total


def ref_soft(x: Inputs, student_scale: Array | float, teacher_scale: float) -> float:
    zs, zt = student_logits(x, student_scale), teacher_logits(x, teacher_scale)  # type: ignore[arg-type]
    return (ce(softmax(zt), zs) + ce(softmax(zt.T), zs.T)) / 2


def ref_reinforced(x: Inputs) -> float:
    synthetic = dataclasses.replace(x, text=x.synthetic, teacher_text=x.teacher_synthetic)
    return ref_soft(x, x.scale, TEACHER_SCALE) + ref_soft(synthetic, x.scale, TEACHER_SCALE)


def ref_siglip_kd(x: Inputs) -> float:
    y = 2 * sigmoid(teacher_logits(x) + TEACHER_BIAS) - 1
    return float(-np.log(sigmoid(y * (student_logits(x) + x.bias))).sum(axis=1).mean())


def ref_siglip_ce(x: Inputs) -> float:
    q, z = sigmoid(teacher_logits(x) + TEACHER_BIAS), student_logits(x) + x.bias
    return float(-(q * np.log(sigmoid(z)) + (1 - q) * np.log(sigmoid(-z))).sum(axis=1).mean())


def ref_vl(x: Inputs) -> float:
    zt, zs = teacher_logits(x, 100), 100 * projected(x)[0] @ unit(x.teacher_text).T
    return kl(softmax(zt), softmax(zs)) + kl(softmax(zt.T), softmax(zs.T))


def ref_images(x: Inputs, student: Array, other: Array, temperature: float) -> float:
    teacher = unit(x.teacher_image)
    return 2 * kl(softmax(100 * teacher @ teacher.T / temperature), softmax(100 * student @ other.T / temperature))


def ref_rkd_d(x: Inputs) -> float:
    total = 0.0
    for student, teacher in ((x.image, x.teacher_image), (x.text, x.teacher_text)):
        relative = []
        for rows in (unit(student), unit(teacher)):
            d = np.array([[np.linalg.norm(a - b) for b in rows] for a in rows])
            relative.append(d / d[d > 0].mean())
        total += float(smooth_l1(*relative).mean())
    return total


def ref_rkd_a(x: Inputs) -> float:
    total = 0.0
    for student, teacher in ((x.image, x.teacher_image), (x.text, x.teacher_text)):
        angles = []
        for rows in (unit(student), unit(teacher)):
            apart = rows[None, :, :] - rows[:, None, :]  # of vertex j to i
            apart = apart / np.maximum(np.linalg.norm(apart, axis=2, keepdims=True), 1e-12)
            angles.append(np.einsum("jid,jkd->jik", apart, apart))
        total += float(smooth_l1(*angles).mean())
    return total


def ref_dist(x: Inputs) -> float:
    def pearson(a: Array, b: Array) -> float:
        a, b = a - a.mean(), b - b.mean()
        return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b) + 1e-8))

    def way(zs: Array, zt: Array) -> float:
        s, t = softmax(zs), softmax(zt)
        return 2 - sum(float(np.mean([pearson(a, b) for a, b in zip(p, q, strict=True)])) for p, q in ((s, t), (s.T, t.T)))

    return (way(student_logits(x), teacher_logits(x)) + way(student_logits(x).T, teacher_logits(x).T)) / 2


def ref_logit_std(x: Inputs) -> float:
    def standardised(z: Array) -> Array:
        return (z - z.mean(axis=1, keepdims=True)) / (z.std(axis=1, ddof=1, keepdims=True) + 1e-7)

    zs, zt = student_logits(x), teacher_logits(x)
    return 4 * sum(kl(softmax(standardised(t) / 2), softmax(standardised(s) / 2)) for s, t in ((zs, zt), (zs.T, zt.T))) / 2


def bilinear(tokens: Array, side: int) -> Array:
    """Tokens of a 2 x 2 grid at the centres of a finer grid, clamped at the border: one weight per axis."""
    at = np.clip((np.arange(side) + 0.5) * 2 / side - 0.5, 0, 1)
    axis = np.stack([1 - at, at], axis=1)
    return np.einsum("ai,bj,nijw->nabw", axis, axis, tokens.reshape(len(tokens), 2, 2, -1)).reshape(len(tokens), side * side, -1)


STANDARDS = {
    "tokens": Standard(np.array([1.0, -2.0, 0.5, 3.0]), np.array([0.5, 2.0, 1.0, 0.1])),
    "image": lambda D: Standard(np.linspace(-1, 1, D), np.linspace(0.2, 0.4, D)),
}


def standardised_tokens(x: Inputs) -> tuple[Array, Array]:
    standard = STANDARDS["tokens"]
    return bilinear(linear(x, "token_projector", x.tokens), 3), (x.teacher_tokens - standard.mean_W) * standard.factor


def ref_theia(x: Inputs) -> float:
    student, teacher = (rows.reshape(len(rows), -1) for rows in standardised_tokens(x))
    return float(0.9 * (1 - cosine(student, teacher)).mean() + 0.1 * smooth_l1(student, teacher).mean())


def per_token(student: Array, teacher: Array) -> Array:
    return 0.5 * (1 - cosine(student, teacher)) + 0.5 * smooth_l1(student, teacher).mean(axis=-1)


def ref_unic(x: Inputs) -> float:
    standard = STANDARDS["image"](x.teacher_image.shape[1])
    summary = per_token(linear(x, "summary_projector", x.image), (x.teacher_image - standard.mean_W) * standard.factor)
    return float(((summary + per_token(*standardised_tokens(x)).mean(axis=1)) / 2).mean())


REFERENCE: dict[str, Callable[[Inputs], float]] = {
    "clip": ref_clip,
    "clip-both": ref_clip_both,
    "siglip": lambda x: ref_siglip(x, x.target > 0),
    "siglip-literal": lambda x: ref_siglip(x, np.eye(len(x.image)) > 0),
    "crd": ref_crd,
    "icl": lambda x: ref_interactive(x, x.params["heads.0.cross_scale"]),
    "icl-exp": lambda x: ref_interactive(x, np.exp(x.params["heads.0.cross_scale"])),
    "cross-kd": ref_cross_kd,
    "afd": ref_afd,
    "fd": ref_fd,
    "mfd": ref_fd,
    "fd-cos": ref_fd_cos,
    "gd": lambda x: ref_gd(x, -1),
    "gd-true": lambda x: ref_gd(x, 1),
    "affinity": lambda x: ref_soft(x, 50.0, 50.0),
    "teacher-ce": lambda x: ref_soft(x, x.scale, TEACHER_SCALE),
    "reinforced": ref_reinforced,
    "siglip-kd": ref_siglip_kd,
    "siglip-ce": ref_siglip_ce,
    "vl": ref_vl,
    "pvl": lambda x: ref_images(x, projected(x)[0], unit(x.teacher_image), 3),
    "udist": lambda x: ref_images(x, unit(x.image), unit(x.image), 7),
    "rkd-d": ref_rkd_d,
    "rkd-a": ref_rkd_a,
    "dist": ref_dist,
    "logit-std": ref_logit_std,
    "theia": ref_theia,
    "unic": ref_unic,
    "none": ref_clip,
    "clip-kd": lambda x: ref_clip(x) + ref_crd(x) + ref_interactive(x, x.params["heads.0.cross_scale"]) + 2000 * ref_fd(x),
    "clip-kd-free": lambda x: ref_clip(x) + ref_crd(x) + ref_interactive(x, x.params["heads.0.cross_scale"]) + 4000 / 512 * ref_fd_cos(x),
    "soft-ce": lambda x: ref_clip(x) + ref_soft(x, x.scale, TEACHER_SCALE),
    "mobileclip": ref_reinforced,
    "mobileclip-b": lambda x: 0.25 * ref_clip_both(x) + 0.75 * ref_reinforced(x),
    "dime-fm": lambda x: 0.7 * ref_vl(x) + 0.3 * ref_images(x, projected(x)[0], unit(x.teacher_image), 3),
    "rkd": lambda x: ref_rkd_d(x) + 2 * ref_rkd_a(x),
}

needs_teacher = [name for name in LOSSES if needs_of(parse_loss(name))]


def teacher_of(dim: int) -> Teacher:
    return Teacher(dim=dim, scale=TEACHER_SCALE, bias=TEACHER_BIAS, num_tokens=9, token_standard=STANDARDS["tokens"], image_standard=STANDARDS["image"](dim))


def build(name: str, student_dim: int, teacher_dim: int, *, ids: list[int], projector: str = "auto", seed: int = 0) -> tuple[Objective, Inputs]:
    """A float64 objective and the same inputs for NumPy; no row has norm 1."""
    rng = np.random.default_rng(seed)
    B = len(ids)
    objective = Objective(name, [teacher_of(teacher_dim)], student_dim=student_dim, token_width=TOKEN_WIDTH, projector=projector, seed=seed).double()
    same = np.equal.outer(ids, ids).astype(float)
    return objective, Inputs(
        image=rng.normal(size=(B, student_dim)) * 3,
        text=rng.normal(size=(B, student_dim)) * 0.5,
        scale=np.array(STUDENT_SCALE),
        bias=np.array(STUDENT_BIAS),
        teacher_image=rng.normal(size=(B, teacher_dim)) * 7,
        teacher_text=rng.normal(size=(B, teacher_dim)) * 2,
        target=same / same.sum(axis=1, keepdims=True),
        synthetic=rng.normal(size=(B, student_dim)),
        teacher_synthetic=rng.normal(size=(B, teacher_dim)),
        tokens=rng.normal(size=(B, 4, TOKEN_WIDTH)),
        teacher_tokens=rng.normal(size=(B, 9, TEACHER_TOKEN_WIDTH)) * 2,
        params={n: p.detach().numpy() for n, p in objective.named_parameters()},
    )


def evaluate(objective: Objective, x: Inputs, ids: list[int]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss, and the leaves that gradients are taken of, named as in Inputs."""
    leaves = {n: torch.tensor(getattr(x, n), dtype=torch.float64, requires_grad=True) for n in (*STUDENT, *TEACHER)}
    names = torch.tensor(ids)
    rows = TeacherRows(*(leaves[n] for n in TEACHER[:2]), None, leaves["teacher_synthetic"], leaves["teacher_tokens"], torch.zeros(len(ids)))
    encoded = Encoded(leaves["image"], leaves["text"], leaves["synthetic"], leaves["tokens"])
    loss, _ = objective(encoded, leaves["scale"], leaves["bias"], Supervision(names, names, (rows,)))
    return loss, leaves


def test_every_loss_has_an_independent_reference() -> None:
    assert set(REFERENCE) == set(LOSSES)


CASES = [
    (name, widths, projector)
    for name in LOSSES
    for widths, projector in [*((w, "auto") for w in WIDTHS), ((6, 6), "always")]
    if projector == "auto" or "image projector" in parts_of(parse_loss(name))
]


@pytest.mark.parametrize("ids", [[0, 1, 2, 3, 4], [0, 1, 0, 2, 1]], ids=["unique captions", "equal captions"])
@pytest.mark.parametrize(("name", "widths", "projector"), CASES)
def test_value_and_gradients_are_those_of_the_formula(name: str, widths: tuple[int, int], projector: str, ids: list[int]) -> None:
    objective, x = build(name, *widths, ids=ids, projector=projector)
    loss, leaves = evaluate(objective, x, ids)
    reference = REFERENCE[name]
    assert loss.item() == pytest.approx(reference(x), rel=1e-6)  # positives are built in float32
    loss.backward()

    gradients = {n: leaves[n].grad for n in STUDENT} | {n: p.grad for n, p in objective.named_parameters()}
    for field, gradient in gradients.items():
        expected = central_differences(reference, x, field)
        found = np.zeros_like(expected) if gradient is None else gradient.numpy()
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6 * max(1.0, abs(reference(x))), err_msg=field)


def central_differences(f: Callable[[Inputs], float], x: Inputs, field: str, step: float = 1e-5) -> Array:
    start = np.array(getattr(x, field) if field in STUDENT else x.params[field], dtype=float)
    gradient = np.zeros_like(start)
    for i in np.ndindex(start.shape):
        ends = []
        for sign in (1, -1):
            moved = start.copy()
            moved[i] += sign * step
            ends.append(f(dataclasses.replace(x, **({field: moved} if field in STUDENT else {"params": {**x.params, field: moved}}))))
        gradient[i] = (ends[0] - ends[1]) / (2 * step)
    return gradient


# Contracts: what holds for every entry


@pytest.mark.parametrize("name", LOSSES)
def test_loss_is_a_finite_scalar_and_its_gradient_reaches_the_towers_and_never_the_teacher(name: str) -> None:
    objective, x = build(name, 6, 9, ids=[0, 1, 2, 3])
    loss, leaves = evaluate(objective, x, [0, 1, 2, 3])
    assert loss.shape == ()
    assert torch.isfinite(loss)
    loss.backward()
    images_alone = set(parse_loss(name)) <= {"vl", "pvl", "udist", "theia", "unic"}
    for tower in ("tokens",) if name == "theia" else ("image",) if images_alone else ("image", "text"):
        gradient = leaves[tower].grad
        assert gradient is not None
        assert gradient.abs().sum() > 0
    assert all(leaves[n].grad is None for n in TEACHER)


@pytest.mark.parametrize("name", LOSSES)
def test_loss_does_not_depend_on_the_order_of_the_batch(name: str) -> None:
    ids = [0, 1, 0, 2, 3, 1]
    objective, x = build(name, 6, 9, ids=ids)
    order = np.random.default_rng(1).permutation(len(ids))
    rows = {n: getattr(x, n)[order] for n in (*STUDENT, *TEACHER) if n not in ("scale", "bias")}
    y = dataclasses.replace(x, **rows)
    assert evaluate(objective, y, [ids[i] for i in order])[0].item() == pytest.approx(evaluate(objective, x, ids)[0].item(), rel=1e-9)


@pytest.mark.parametrize("name", [name for name in needs_teacher if "image/tokens" not in needs_of(parse_loss(name))])
def test_loss_does_not_depend_on_the_norm_of_the_teachers_rows(name: str) -> None:
    objective, x = build(name, 6, 9, ids=[0, 1, 2, 3])
    y = dataclasses.replace(x, teacher_image=unit(x.teacher_image), teacher_text=10 * x.teacher_text)
    assert evaluate(objective, y, [0, 1, 2, 3])[0].item() == pytest.approx(evaluate(objective, x, [0, 1, 2, 3])[0].item(), rel=1e-9)


@pytest.mark.parametrize("name", LOSSES)
def test_half_precision_embeddings_give_the_float32_loss(name: str) -> None:
    objective, x = build(name, 6, 9, ids=[0, 1, 2, 3])
    objective.float()
    student = [torch.tensor(getattr(x, n), dtype=torch.float16) for n in STUDENT[:4]]
    image, text, synthetic, tokens = (torch.tensor(getattr(x, n), dtype=torch.float16) for n in TEACHER)
    told = Supervision(torch.arange(4), torch.arange(4), (TeacherRows(image, text, None, synthetic, tokens, torch.zeros(4)),))
    half = Encoded(*student), torch.tensor(STUDENT_SCALE), torch.tensor(STUDENT_BIAS), told
    low, _ = objective(*half)
    high, _ = objective(*map_rows(lambda t: t.float() if t.dtype == torch.float16 else t, half))
    assert low.dtype == torch.float32
    assert low == high


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_has_a_summary_and_a_heading_in_the_docs(name: str) -> None:
    assert describe_losses()[name]
    docs = (Path(__file__).parents[2] / "docs" / "losses.md").read_text()
    assert re.search(rf"^##+ `{re.escape(name)}`", docs, re.MULTILINE)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("widths", WIDTHS)
def test_after_one_step_every_parameter_of_the_loss_has_changed(name: str, widths: tuple[int, int]) -> None:
    objective, x = build(name, *widths, ids=[0, 1, 2, 3])
    before = {n: p.detach().clone() for n, p in objective.named_parameters()}
    if not before:
        return
    optimiser = torch.optim.AdamW(objective.parameters(), lr=1e-2, weight_decay=0.0)
    evaluate(objective, x, [0, 1, 2, 3])[0].backward()
    optimiser.step()
    for n, p in objective.named_parameters():
        assert (p != before[n]).all(), n


# The defects of published code that these losses could share


def features(student_logits: list[list[float]], teacher_logits: list[list[float]]) -> Features:
    """Features whose logits are these 2x2 matrices (texts are the unit vectors), for value tests by hand."""
    eye = torch.eye(2, dtype=torch.float64)
    one = torch.tensor(1.0, dtype=torch.float64)
    teacher = {"teacher_image_BD": torch.tensor(teacher_logits, dtype=torch.float64), "teacher_text_BD": eye, "teacher_scale": 1.0}
    return Features(torch.tensor(student_logits, dtype=torch.float64), eye, one, eye, **teacher)


def test_crd_is_kl_of_teacher_to_student_and_not_the_other_way_round() -> None:
    half, tenth = np.log([[0.5, 0.5], [0.5, 0.5]]), np.log([[0.9, 0.1], [0.9, 0.1]])
    forward = 0.5 * np.log(0.5 / 0.9) + 0.5 * np.log(0.5 / 0.1)  # KL((.5,.5), (.9,.1)) = 0.5108; the transpose of both is uniform and adds nothing
    backward = 0.9 * np.log(0.9 / 0.5) + 0.1 * np.log(0.1 / 0.5)  # 0.3681
    assert crd(features(tenth.tolist(), half.tolist())).item() == pytest.approx(forward / 2, rel=1e-9)
    assert crd(features(half.tolist(), tenth.tolist())).item() == pytest.approx(backward / 2, rel=1e-9)


def test_text_to_image_targets_use_their_own_softmax() -> None:
    logits = [[2.0, -1.0], [0.5, 0.0]]
    z = np.array(logits)
    value = teacher_ce(features(logits, logits)).item()
    assert value == pytest.approx((ce(softmax(z), z) + ce(softmax(z.T), z.T)) / 2, rel=1e-9)
    assert abs(value - (ce(softmax(z), z) + ce(softmax(z).T, z.T)) / 2) > 0.05


@pytest.mark.parametrize("factor", [0.01, 100.0])
@pytest.mark.parametrize("name", ["fd", "fd-cos", "icl"])
def test_projected_features_are_normalised_again(name: str, factor: float) -> None:
    objective, x = build(name, 6, 9, ids=[0, 1, 2, 3])
    before = evaluate(objective, x, [0, 1, 2, 3])[0].item()
    with torch.no_grad():
        for n, p in objective.named_parameters():
            if "projector" in n:
                p *= factor
    assert evaluate(objective, x, [0, 1, 2, 3])[0].item() == pytest.approx(before, rel=1e-9)


def test_literal_icl_uses_its_scale_without_exp_and_icl_exp_with_it() -> None:
    f = dataclasses.replace(features([[0.6, 0.8], [0.8, -0.6]], [[1, 0], [0, 1]]), cross_scale=torch.tensor(2.0, dtype=torch.float64))
    f = dataclasses.replace(f, projected_image_BD=f.image_BS, projected_text_BD=f.text_BS)
    p = np.array([[0.6, 0.8], [0.8, -0.6]])
    for value, c in ((literal_icl(f), 2.0), (icl_exp(f), np.exp(2.0))):
        assert value.item() == pytest.approx((ce(np.eye(2), c * p) + ce(np.eye(2), c * np.eye(2))) / 2, rel=1e-9)


def test_icl_scale_starts_at_the_published_value() -> None:
    for loss, name in (("icl", "cross_scale"), ("afd", "fusion_scale")):
        scale = dict(Objective(loss, [Teacher(dim=4)], student_dim=4).named_parameters())[f"heads.0.{name}"]
        assert scale.item() == pytest.approx(2.6593, abs=1e-4)


@pytest.mark.parametrize("width", [512, 768, 1280])
def test_width_free_fd_equals_the_literal_weight_at_512_and_keeps_it_elsewhere(width: int) -> None:
    ids = [0, 1, 2]
    literal, x = build("2000*fd", width, width, ids=ids)
    free, _ = build("7.8125*fd-cos", width, width, ids=ids)
    ratio = evaluate(free, x, ids)[0].item() / evaluate(literal, x, ids)[0].item()
    assert ratio == pytest.approx(width / 512, rel=1e-9)
    assert feature_weight(parse_loss("clip-kd"), width) == pytest.approx(4000 / width)
    assert feature_weight(parse_loss("clip-kd-free"), width) == 7.8125


def test_crd_teacher_ce_and_affinity_have_the_same_student_gradient_at_equal_scales() -> None:
    ids, gradients, values = [0, 1, 2, 3, 4], {}, {}
    for name in ("crd", "teacher-ce", "affinity"):
        objective, x = build(name, 6, 9, ids=ids)
        objective = Objective(name, [dataclasses.replace(teacher_of(9), softmax_scale=50.0)], student_dim=6).double()
        loss, leaves = evaluate(objective, dataclasses.replace(x, scale=np.array(50.0)), ids)
        loss.backward()
        gradients[name], values[name] = leaves["image"].grad, loss.item()
    torch.testing.assert_close(gradients["crd"], gradients["teacher-ce"], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(gradients["crd"], gradients["affinity"], rtol=1e-9, atol=1e-12)
    zt = teacher_logits(build("crd", 6, 9, ids=ids)[1], 50.0)
    entropy = (ce(softmax(zt), zt) + ce(softmax(zt.T), zt.T)) / 2
    assert values["teacher-ce"] == pytest.approx(values["crd"] + entropy, rel=1e-9)


def test_a_constant_teacher_bias_changes_no_softmax_loss() -> None:
    plain = features([[0.3, -1.0], [2.0, 0.1]], [[1.0, 0.2], [-0.4, 3.0]])
    biased = features([[0.3, -1.0], [2.0, 0.1]], (np.array([[1.0, 0.2], [-0.4, 3.0]]) - 12.9).tolist())
    for loss in (crd, teacher_ce):
        assert loss(biased).item() == pytest.approx(loss(plain).item(), rel=1e-9)


@pytest.mark.parametrize("name", ["crd", "fd", "fd-cos", "gd", "gd-true", "udist", "pvl", "vl", "rkd-d", "rkd-a", "dist", "logit-std"])
def test_matching_losses_vanish_when_the_student_is_the_teacher(name: str) -> None:
    objective, x = build(name, 6, 6, ids=[0, 1, 2])
    twin = dataclasses.replace(x, teacher_image=x.image, teacher_text=x.text, scale=np.array(TEACHER_SCALE))
    assert abs(evaluate(objective, twin, [0, 1, 2])[0].item()) < 1e-7  # of DIST: its denominator has an epsilon


# Projectors


def test_projectors_exist_where_a_term_projects_and_widths_differ_or_always() -> None:
    def projects(loss: str, student: int, teacher: int, projector: str) -> bool:
        objective = Objective(loss, [Teacher(dim=teacher)], student_dim=student, projector=projector)
        return any("projector" in n for n, _ in objective.named_parameters())

    assert projects("clip-kd", 6, 9, "auto")
    assert projects("clip-kd", 6, 6, "always")
    assert not projects("clip-kd", 6, 6, "auto")
    assert not projects("clip + crd", 6, 9, "always"), "a projector that no term reads would never be trained"
    assert not any("text_projector" in n for n, _ in Objective("pvl", [Teacher(dim=9)], student_dim=6).named_parameters())


def test_projectors_depend_on_the_seed_alone() -> None:
    def weights(seed: int) -> torch.Tensor:
        torch.rand(7)
        return torch.cat([p.flatten() for p in Objective("clip-kd", [Teacher(dim=5)], student_dim=4, seed=seed).parameters()])

    assert torch.equal(weights(3), weights(3))
    assert not torch.equal(weights(3), weights(4))


def test_equal_captions_are_positives_of_each_other() -> None:
    ids = torch.tensor([7, 3, 7])
    assert positives(ids).tolist() == [[0.5, 0, 0.5], [0, 1, 0], [0.5, 0, 0.5]]
    assert torch.equal(positives(torch.arange(3)), torch.eye(3))


@pytest.mark.parametrize("name", ["clip", "icl", "icl-exp"])
def test_targets_over_equal_captions_and_the_published_identity_agree_where_equal_captions_have_equal_embeddings(name: str) -> None:
    ids = [0, 1, 0, 2, 1]
    objective, x = build(name, 6, 9, ids=ids)
    x = dataclasses.replace(x, text=x.text[ids], teacher_text=x.teacher_text[ids])
    found = []
    for labels in (ids, [0, 1, 2, 3, 4]):
        image, text = (torch.tensor(a, requires_grad=True) for a in (x.image, x.text))
        told = Supervision(torch.tensor(labels), teachers=(TeacherRows(torch.tensor(x.teacher_image), torch.tensor(x.teacher_text)),))
        loss, _ = objective(Encoded(image, text), torch.tensor(x.scale), None, told)
        (by_image,) = torch.autograd.grad(loss, image, retain_graph=True)
        (by_text,) = torch.autograd.grad(loss, text)
        by_caption = torch.zeros(3, 6, dtype=torch.float64).index_add(0, torch.tensor(ids), by_text)  # one caption is one embedding
        found.append((loss, by_image, by_caption))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


# Reading a loss


@pytest.mark.parametrize(
    ("text", "weights"),
    [
        ("clip", {"clip": 1}),
        ("none", {"clip": 1}),
        ("clip-kd", {"clip": 1, "crd": 1, "icl": 1, "fd": 2000}),
        ("clip-kd-free", {"clip": 1, "crd": 1, "icl": 1, "fd-cos": 7.8125}),
        ("soft-ce", {"clip": 1, "teacher-ce": 1}),
        ("clip + 1*crd + 2000*fd", {"clip": 1, "crd": 1, "fd": 2000}),
        (" clip+.5 * crd+2e+3 fd ", {"clip": 1, "crd": 0.5, "fd": 2000}),
        ("0.5*soft-ce + clip", {"clip": 1.5, "teacher-ce": 0.5}),
    ],
)
def test_loss_is_read_as_a_weighted_sum(text: str, weights: dict[str, float]) -> None:
    assert parse_loss(text) == weights


@pytest.mark.parametrize("text", ["", "clip +", "+ clip", "clip crd", "2000fd", "0*fd", "-1*fd", "clip - crd", "1e999*fd", "3", "2*3*fd", "clip, crd"])
def test_what_is_no_weighted_sum_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="no sum of weighted names"):
        parse_loss(text)


def test_unknown_loss_is_refused_with_the_near_names() -> None:
    with pytest.raises(UnknownName, match="clip-kd"):
        parse_loss("clip-kdd")


@given(st.dictionaries(st.sampled_from([n for n, e in LOSSES.items() if isinstance(e, Term)]), st.floats(1e-6, 1e6), min_size=1))
def test_a_written_sum_reads_back(weights: dict[str, float]) -> None:
    assert parse_loss(" + ".join(f"{w!r}*{n}" for n, w in weights.items())) == weights


@pytest.mark.parametrize("name", [n for n, e in LOSSES.items() if isinstance(e, Recipe)])
def test_a_recipe_says_its_sum(name: str) -> None:
    entry = LOSSES[name]
    assert isinstance(entry, Recipe)
    assert parse_loss(entry.sum) == parse_loss(name)
    assert entry.sum in entry.summary

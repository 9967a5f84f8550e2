"""What an objective is told of its teachers, and every combination of teachers and loss that a run refuses before its first step.

A softmax over logits that were trained with a sigmoid is nobody's published recipe: their bias cancels, and their scale was learned for another question. So
it is refused unless a run allows it, or splits the terms: softmax terms for the softmax teachers, sigmoid terms for the others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch.nn.functional as F

from kdstore.distill.batches import Maker
from kdstore.distill.config import DistillConfig
from kdstore.distill.distributed import World
from kdstore.distill.encoded import TeacherRows
from kdstore.distill.losses import EMBEDDINGS, Term, needs_of, parse_loss, parts_of, terms_of
from kdstore.distill.objective import Teacher
from kdstore.distill.targets import Targets
from kdstore.distill.tokens import check_grid
from kdstore.errors import ConfigError, MissingFeature

Floats = npt.NDArray[np.floating[Any]]
Sample = Sequence[tuple[Floats, Floats]]
"""Unit image rows [Q, D] and text rows [B, D] of some batches."""

MAX_SCALE = 1e6
ENTROPY_BATCHES = 4
ENTROPY_ROWS = 256  # images of each of these, against all of its captions


def check_loss(config: DistillConfig) -> None:
    """Raise ConfigError for a batch too small for a term, for what is no temperature, and for a setting that no term of the loss reads."""
    entropy_of(config)
    weights = parse_loss(config.loss)
    for name, term in terms_of(weights).items():
        if config.batch_size < term.rows:
            raise ConfigError(
                f"{name} compares at least {term.rows} pairs, but a batch takes {config.batch_size}.", f"Raise batch_size to {term.rows} or more."
            )
    if config.teacher_temperature != "own" and "logit_scale" not in needs_of(weights):
        found = f"No term of the loss '{config.loss}' reads a teacher's scale, so teacher_temperature would do nothing."
        raise ConfigError(found, "Leave it out, or add a term that says tT in docs/losses.md.")
    if config.token_standard != "channel" and "tokens" not in parts_of(weights):
        raise ConfigError(f"No term of the loss '{config.loss}' reads tokens, so token_standard would do nothing.", "Leave it out, or add theia or unic.")


def describe_teachers(config: DistillConfig, targets: Sequence[Targets]) -> tuple[Teacher, ...]:
    """Say what the objective needs to know of each teacher, all but matched temperatures; raises ConfigError and MissingFeature."""
    weights, scales = _per_teacher(config.cache_weights, targets, "cache_weights"), _fixed_scales(config, targets)
    loss = parse_loss(config.loss)
    needs, parts = needs_of(loss), parts_of(loss)
    teachers = []
    for t, weight, softmax_scale in zip(targets, weights or [1.0] * len(targets), scales, strict=True):
        kind = config.token_standard
        tokens = t.shape("image/tokens") if "tokens" in parts else (0, 0)
        check_grid(tokens[0], t.name)
        embedding = next((name for name in needs if name.endswith("/embedding")), None)
        teachers.append(
            Teacher(
                name=t.name,
                dim=0 if embedding is None else t.shape(embedding)[-1],
                scale=t.logit_scale,
                bias=t.logit_bias,
                softmax_scale=softmax_scale,
                weight=weight,
                num_tokens=tokens[0],
                token_standard=t.standard("image/tokens", kind) if "tokens" in parts else None,
                image_standard=t.standard("image/embedding", kind) if "summary" in parts else None,
                families=_families(t, terms_of(loss), config.sigmoid_teacher),
            )
        )
        _check_scale(teachers[-1], terms_of(loss), config.teacher_temperature)
    taught = {name: term for name, term in terms_of(loss).items() if term.needs}
    if weights and len(teachers) == 1 and all(term.joint for term in taught.values()):
        raise ConfigError(f"The loss '{config.loss}' averages over teachers and there is one, so cache_weights would do nothing.", "Leave it out.")
    for name, term in taught.items():
        if not any(term.family in teacher.families for teacher in teachers):
            raise ConfigError(f"No teacher is left for {name}: it makes a {term.family} of their logits.", "Leave it out of the loss.")
    for teacher in teachers:
        if taught and not any(term.family in teacher.families for term in taught.values()):
            raise ConfigError(f"{teacher.name} takes part in no term of the loss '{config.loss}'.", "Leave its store out, or add a term of its kind.")
    return tuple(teachers)


def match_temperatures(config: DistillConfig, teachers: Sequence[Teacher], make: Maker, world: World) -> tuple[Teacher, ...]:
    """Find the scale of each teacher's softmax logits where a run asks for their entropy; raises ConfigError if there is none.

    The first process does it alone, with 1,024 images against all captions of their batches, whose number may be large.
    """
    entropy = entropy_of(config)
    if entropy is None:
        return tuple(teachers)
    whole = replace(make, needs=EMBEDDINGS, plan=replace(make.plan, share=None))
    scales = world.from_first(lambda: _matched_scales(teachers, whole, entropy))
    return tuple(replace(teacher, softmax_scale=scale) for teacher, scale in zip(teachers, scales, strict=True))


def _matched_scales(teachers: Sequence[Teacher], make: Maker, entropy: float) -> list[float]:
    samples: list[list[tuple[Floats, Floats]]] = [[] for _ in teachers]
    for step in range(ENTROPY_BATCHES):
        for sample, rows in zip(samples, make.teachers(step), strict=True):
            image_BD, text_BD = _unit_rows(rows)
            if len(image_BD) > 1:
                sample.append((image_BD[:ENTROPY_ROWS], text_BD))
    for teacher, sample in zip(teachers, samples, strict=True):
        if not sample:
            raise ConfigError(f"{teacher.name} has too few pairs of the first {ENTROPY_BATCHES} batches to match an entropy.", "Set its scale as a number.")
    return [scale_of_entropy(sample, entropy) for sample in samples]


def entropy_of(config: DistillConfig) -> float | None:
    """Return the mean entropy, in nats, that the teachers' softmax rows are to have, or None; raises ConfigError for what is no temperature."""
    said = config.teacher_temperature
    if not isinstance(said, str) or said == "own":
        return None
    kind, _, number = said.partition(":")
    try:
        entropy = float(number)
    except ValueError:
        entropy = math.nan
    if kind != "entropy" or not 0 < entropy < math.log(config.batch_size):
        most = f"{math.log(config.batch_size):.2f}, that of {config.batch_size} equal numbers"
        hint = f'Write "own", a scale, one scale per teacher, or "entropy:NATS" below {most}.'
        raise ConfigError(f"The teacher_temperature '{said}' is none.", hint)
    return entropy


def scale_of_entropy(sample: Sample, entropy: float) -> float:
    """Return the scale at which softmax rows of image-to-text cosines have this mean entropy, to nine digits; raises ConfigError if none has.

    The entropy falls as the scale rises, so its logarithm is bisected.
    """
    cosines = [image_QD @ text_BD.T for image_QD, text_BD in sample]
    low, high = 1e-6, MAX_SCALE
    if _mean_entropy(cosines, high) > entropy:
        raise ConfigError(f"No scale up to {MAX_SCALE:g} gives the teacher an entropy of {entropy:g}: equal captions cannot be told apart.", "Raise it.")
    while high / low > 1 + 1e-9:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if _mean_entropy(cosines, middle) > entropy else (low, middle)
    return math.sqrt(low * high)


def _unit_rows(rows: TeacherRows) -> tuple[Floats, Floats]:
    assert rows.image_BD is not None
    assert rows.text_BD is not None
    held_B = slice(None) if rows.valid_B is None else rows.valid_B
    image_BD, text_BD = (F.normalize(x[held_B].float(), dim=1).numpy() for x in (rows.image_BD, rows.text_BD))
    return image_BD, text_BD


def _mean_entropy(cosines: Sequence[Floats], scale: float) -> float:
    rows = []
    for cosine_QB in cosines:
        z_QB = scale * (cosine_QB - cosine_QB.max(axis=1, keepdims=True))
        e_QB = np.exp(z_QB)
        total_Q = e_QB.sum(axis=1)
        rows.append(np.log(total_Q) - (e_QB * z_QB).sum(axis=1) / total_Q)
    return float(np.concatenate(rows).mean())


def _families(t: Targets, terms: dict[str, Term], choice: str) -> tuple[str, ...]:
    """Return the families of terms that a teacher takes part in; raises ConfigError for softmaxes of a sigmoid teacher, MissingFeature for the reverse."""
    own = "softmax" if t.logit_bias is None else "sigmoid"
    if choice == "split":
        return ("", own)
    for name, term in terms.items():
        if term.family == "softmax" and own == "sigmoid" and choice == "refuse":
            raise ConfigError(
                f"{t.name} was trained with a sigmoid (its logit bias is {t.logit_bias:g}), and {name} takes the softmax of its logits.",
                'Choose siglip-ce or siglip-kd, or set sigmoid_teacher="allow", or "split" for such terms to leave it out.',
            )
        if term.family == "sigmoid" and own == "softmax":
            raise MissingFeature(
                f"{name} needs a teacher's logit bias, and {t.name} has none: it was trained with a softmax.",
                'Choose crd or teacher-ce, or set sigmoid_teacher="split" for such terms to leave it out.',
            )
    return ("", "softmax", "sigmoid")


def _check_scale(teacher: Teacher, terms: dict[str, Term], temperature: object) -> None:
    """Raise MissingFeature if a term reads a logit scale that is neither the store's nor the run's to say."""
    for name, term in terms.items():
        own = "logit_bias" in term.needs or ("logit_scale" in term.needs and temperature == "own")
        if own and term.family in teacher.families and teacher.scale is None:
            hint = "Set teacher_temperature, or choose a loss without it." if "logit_scale" in term.needs else "Choose a loss without it."
            raise MissingFeature(f"{teacher.name} does not say the teacher's logit scale, which {name} needs.", hint)


def _per_teacher(values: tuple[float, ...], targets: Sequence[Targets], name: str) -> tuple[float, ...]:
    if values and len(values) != len(targets):
        raise ConfigError(
            f"{name} has {len(values)} numbers for {len(targets)} teachers.",
            "Give one for each teacher in the order of the --cache options; stores of one family are one.",
        )
    return values


def _fixed_scales(config: DistillConfig, targets: Sequence[Targets]) -> tuple[float | None, ...]:
    said = config.teacher_temperature
    if isinstance(said, tuple):
        return _per_teacher(said, targets, "teacher_temperature")
    return (None if isinstance(said, str) else float(said),) * len(targets)

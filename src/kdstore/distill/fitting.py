"""What a loss asks of the student itself: a logit bias, masked patches, tokens on a grid."""

from __future__ import annotations

import math
from typing import Any

from open_clip.transformer import PatchDropout, VisionTransformer

from kdstore.distill.losses import Part
from kdstore.distill.tokens import check_grid
from kdstore.errors import ConfigError
from kdstore.models.encode import image_token_form
from kdstore.models.load import Model

MASKED = 0.75  # share of the patches that masked feature distillation hides
SIGMOID_START = {"init_logit_bias": -10.0, "init_logit_scale": math.log(10)}  # of SigLIP (arXiv 2303.15343)


def config_for(parts: frozenset[Part]) -> dict[str, Any]:
    """Return the entries of a student's config that a loss of these parts decides: one with a bias begins as SigLIP does."""
    return SIGMOID_START if "bias" in parts else {}


def fit_student(model: Model, parts: frozenset[Part]) -> int:
    """Prepare a student for a loss of these parts and return the width of its tokens, 0 if none are used; raises ConfigError, ModelError."""
    visual = model.clip.visual
    if "masked patches" in parts:
        if not isinstance(visual, VisionTransformer):
            kind = type(visual).__name__
            raise ConfigError(
                f"mfd hides patches of open_clip's vision transformers; {model.name.name} has a {kind}.", "Choose fd, or a student such as ViT-T-16."
            )
        visual.patch_dropout = PatchDropout(MASKED)
    if "tokens" not in parts:
        return 0
    if isinstance(getattr(visual, "patch_dropout", None), PatchDropout):
        raise ConfigError(
            f"{model.name.name} drops patches in training, so its tokens lie on no grid.", "Choose a loss without mfd, theia and unic, or patch_dropout 0."
        )
    count, width = image_token_form(model).shape
    check_grid(count, model.name.name)
    return width

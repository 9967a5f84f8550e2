"""The augmented views of a run: what the teacher sees of an image, and the numbers that say so."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from kdstore.data.views import RESAMPLING, Augmentation
from kdstore.extract.config import ExtractConfig
from kdstore.models.load import Model


def augmentation_of(config: ExtractConfig, model: Model) -> Augmentation | None:
    """Return how a run's augmented views are made, None if it has none; raises ConfigError. The teacher's own side and interpolation are the default."""
    if not config.views:
        return None
    own = model.config["preprocess_cfg"].get("interpolation")
    return Augmentation(side=config.view_side or max(model.image_size), interpolation=own if own in RESAMPLING else "bicubic", **config.sampling)


def sampled_views(config: ExtractConfig, row: int) -> tuple[int, int] | None:
    """Return the views that codecs are fitted on: the plain one, which tokens are of, and one of all, so that a sample of rows has its share of each."""
    return (0, row % (1 + config.views)) if config.views else None


def pictures_of(model: Model, augmentation: Augmentation, key: str, image: Image.Image, views: Sequence[int]) -> torch.Tensor:
    """Return an image's views as the teacher reads them [V, C, H, W]."""
    drawn = [augmentation.draw(image, augmentation.parameters(key, view, image.width, image.height)) if view else image for view in views]
    return torch.stack([model.preprocess(picture) for picture in drawn])


def numbers_of(augmentation: Augmentation, images: Iterable[tuple[str, dict[str, Any]]], views: Sequence[int]) -> npt.NDArray[np.float32]:
    """Return the numbers of the views [N, V, P] of images, given as their keys and what the index says of them."""
    return np.array([[augmentation.parameters(key, view, info["width"], info["height"]) for view in views] for key, info in images], np.float32)

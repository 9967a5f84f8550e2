"""An image tower of which the last blocks, or all, are trained together with a head.

Frozen parts run as in evaluation, so that their batch statistics and dropout do not change what they give; trained parts run as in training.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from kdstore.evaluate.datasets.form import VqaSplit
from kdstore.evaluate.features import Images, on_grid
from kdstore.models import towers
from kdstore.models.load import DTYPES, Model
from kdstore.models.pixels import Kept, Pixels, split_preprocess
from kdstore.threads import decoding_threads


class ImageTower(nn.Module):
    """Pixels of preprocessed images to float32 [U, T, W]: tokens, averaged to a grid where one is asked for, or the embedding as one token."""

    def __init__(self, model: Model, blocks: int | None, reads: str, grid: int | None) -> None:
        super().__init__()
        self.visual: nn.Module = model.clip.visual
        self.keep, self.finish = split_preprocess(model.preprocess)
        self._trained = towers.train_last_blocks(model.clip, blocks)
        self._unregistered = (model.clip,)  # its text tower is no part of what is trained and kept
        self.device, self._dtype, self._reads, self._grid = model.device, DTYPES[model.precision], reads, grid

    def train(self, mode: bool = True) -> ImageTower:
        """Put what is trained into this mode; the rest stays in evaluation."""
        super().train(False)
        for module in self._trained:
            module.train(mode)
        return self

    def forward(self, pixels_UCHW: torch.Tensor) -> torch.Tensor:
        (clip,) = self._unregistered
        with torch.autocast(self.device.type, self._dtype, enabled=self._dtype != torch.float32):
            image_UCHW = self.finish(pixels_UCHW.to(self.device))
            if self._reads == "tokens":
                feature_UTW = on_grid(towers.image_tokens(clip, image_UCHW, None)[1], self._grid)
            else:
                feature_UTW = towers.image_embedding(clip, image_UCHW)[:, None]
        return feature_UTW.float()


def tuned_images(tower: ImageTower, split: VqaSplit, pixels_gib: float) -> Images:
    """See the images of a split through a tower as it is at the time; decoded images are kept within a budget of memory."""
    kept = Kept(int(pixels_gib * 2**30))

    def decode(numbers: Sequence[int]) -> list[Pixels]:
        with decoding_threads(tower.device.type) as pool:
            return list(pool.map(lambda i: tower.keep(split.image(i).image), numbers))

    def take(numbers_U: npt.NDArray[np.int64]) -> torch.Tensor:
        feature_UTW: torch.Tensor = tower(torch.from_numpy(kept.get("image", numbers_U.tolist(), decode)))
        return feature_UTW

    with torch.no_grad():
        width = tower.eval()(torch.from_numpy(np.stack(decode([0])))).shape[2]
    return Images(width, take)

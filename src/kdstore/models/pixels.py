"""Preprocessed images, and other arrays, prepared once and kept in memory within a budget.

An image is kept as the uint8 pixels after resize and crop, a quarter of the float tensor; conversion and normalisation happen on the whole batch, on the
device, with the bits that the model's own preprocessing gives.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import Compose, Normalize, ToTensor  # type: ignore[import-untyped]

Pixels = npt.NDArray[Any]


class Kept:
    """Arrays kept by key until `limit` bytes are used; what came first stays, because every epoch needs all of them equally."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._used = 0
        self._arrays: dict[tuple[str, int], npt.NDArray[Any]] = {}
        self._lock = threading.Lock()

    def get(self, kind: str, rows: Sequence[int], make: Callable[[list[int]], Sequence[npt.NDArray[Any]]]) -> npt.NDArray[Any]:
        """Return the arrays of `rows` stacked; `make` gets the rows that are not kept."""
        found = {row: array for row in rows if (array := self._arrays.get((kind, row))) is not None}
        missing = [row for row in dict.fromkeys(rows) if row not in found]
        for row, array in zip(missing, make(missing) if missing else (), strict=True):
            found[row] = array
            with self._lock:
                if self._used + array.nbytes <= self._limit and (kind, row) not in self._arrays:
                    self._used += array.nbytes
                    self._arrays[kind, row] = array
        return np.stack([found[row] for row in rows])


def split_preprocess(preprocess: Callable[[Image.Image], Tensor]) -> tuple[Callable[[Image.Image], Pixels], Callable[[Tensor], Tensor]]:
    """Split a preprocessing into (image -> what is kept, batch of what is kept -> input of the student).

    `finish(stack([keep(a), keep(b)]))` equals `stack([preprocess(a), preprocess(b)])` bit by bit. Where the preprocessing ends with ToTensor and
    Normalize, as open_clip's do, uint8 [C, H, W] is kept; any other is kept as its float32 result.
    """
    steps: Sequence[Any] = getattr(preprocess, "transforms", ())
    if len(steps) < 2 or not isinstance(steps[-1], Normalize) or not isinstance(steps[-2], ToTensor):
        return lambda image: preprocess(image).numpy(), lambda batch: batch
    geometry = Compose(steps[:-2])
    mean, std = (torch.tensor(values, dtype=torch.float32).view(-1, 1, 1) for values in (steps[-1].mean, steps[-1].std))

    def keep(image: Image.Image) -> Pixels:
        pixels_HWC = np.asarray(geometry(image))
        assert pixels_HWC.dtype == np.uint8, "ToTensor divides by 255 only what is uint8"
        return np.ascontiguousarray(pixels_HWC.transpose(2, 0, 1))

    def finish(batch_BCHW: Tensor) -> Tensor:
        return batch_BCHW.float().div_(255).sub_(mean.to(batch_BCHW.device)).div_(std.to(batch_BCHW.device))

    return keep, finish

"""Frozen features for an evaluation: each image decoded once, encoded by each model once, kept as float16; or read from stores (`stored`).

Encoding several models in one pass matters because decoding (or drawing) an image costs as much as a small model's forward pass.

Shape suffixes: N images, U images of a batch, T tokens, W their width.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from kdstore.data.source import LoadedImage
from kdstore.errors import EvaluationError
from kdstore.evaluate.heads import MAX_WORDS
from kdstore.jsonfile import disk_error
from kdstore.models.encode import encode_image, encode_image_tokens, encode_text_tokens
from kdstore.models.load import Model
from kdstore.progress import OnProgress, silent
from kdstore.threads import batches_ahead, decoding_threads

IN_MEMORY = 2 * 1024**3
"""Bytes of one array past which it lies in a temporary file."""


@dataclass(frozen=True, eq=False)
class Images:
    """What a head sees of the images of a split: `take(numbers [U])` gives float32 [U, T, W] on the CPU or on the head's device."""

    width: int
    take: Callable[[np.ndarray], torch.Tensor]


def kept_images(feature_NTW: np.ndarray) -> Images:
    """Look images up in an array."""
    return Images(feature_NTW.shape[2], lambda numbers_U: torch.from_numpy(feature_NTW[numbers_U]).float())


def without_image(images: Images) -> Images:
    """Return what the question-only control sees in place of these: every image is one and the same token of zeros."""
    return Images(images.width, lambda numbers_U: torch.zeros(len(numbers_U), 1, images.width))


def image_features(
    models: Sequence[Model],
    load: Callable[[int], LoadedImage],
    num_images: int,
    *,
    reads: str,
    batch: int,
    grid: int | None = None,
    on_progress: OnProgress = silent,
    stage: str = "encode",
) -> list[np.ndarray]:
    """Encode images 0 to `num_images` by models that share one preprocessing; returns float16 [N, T, W] per model.

    `reads` is `tokens`, or `embedding` for the embedding before normalisation as one token. Raises EvaluationError for features that float16 cannot hold,
    and for a `grid` that tokens cannot be averaged to.
    """
    arrays: list[np.ndarray] = []
    stop = 0
    with decoding_threads(models[0].device.type) as pool:
        for pixels in batches_ahead(pool, lambda i: models[0].preprocess(load(i).image), range(num_images), batch):
            start, stop = stop, stop + len(pixels)
            image_BCHW = torch.stack(pixels)
            for m, model in enumerate(models):
                feature_BTW = encode_image_tokens(model, image_BCHW)[1] if reads == "tokens" else encode_image(model, image_BCHW)[:, None]
                half_BTW = feature_BTW.to(torch.float16)
                if not half_BTW.isfinite().all():
                    found = f"{model.name.name} gives features that are not finite in float16, on images {start} to {stop - 1}."
                    raise EvaluationError(found, "Check its weights and its precision.")
                kept_BTW = on_grid(half_BTW, grid).cpu().numpy()
                if start == 0:
                    arrays.append(_empty((num_images, *kept_BTW.shape[1:])))
                arrays[m][start:stop] = kept_BTW
            on_progress(stage, stop, num_images, "")
    return arrays


def on_grid(token_BTW: torch.Tensor, grid: int | None) -> torch.Tensor:
    """Average tokens of a square grid to `grid` rows and columns, in float32; raises EvaluationError for other tokens, or fewer."""
    B, T, W = token_BTW.shape
    side = math.isqrt(T)
    if grid is None or grid == side:
        return token_BTW
    if side * side != T or side < grid:
        found = f"{T} tokens ({side} x {side})" if side * side == T else f"{T} tokens, which are no square grid"
        raise EvaluationError(f"Tokens are to be averaged to {grid} x {grid}, but this model gives {found}.", "Set a smaller grid, or none.")
    grid_BWHW = token_BTW.float().mT.reshape(B, W, side, side)
    return F.adaptive_avg_pool2d(grid_BWHW, grid).flatten(2).mT.to(token_BTW.dtype)


def question_states(model: Model, texts: Sequence[str], batch: int) -> tuple[torch.Tensor, dict[str, range]]:
    """Encode distinct questions by the model's own text tower; returns all words' states float16 [words, W] and each question's rows among them.

    Padding is left out, and of longer questions what does not fit into MAX_WORDS with their start.
    """
    distinct = list(dict.fromkeys(texts))
    states: list[torch.Tensor] = []
    rows: dict[str, range] = {}
    end = 0
    for start in range(0, len(distinct), batch):
        chunk = distinct[start : start + batch]
        tokens_BLW, length_B = encode_text_tokens(model, chunk)
        for text, tokens_LW, length in zip(chunk, tokens_BLW.cpu().half(), length_B.tolist(), strict=True):
            kept_LW = tokens_LW[: min(length, MAX_WORDS - 1)]
            rows[text] = range(end, end + len(kept_LW))
            end += len(kept_LW)
            states.append(kept_LW)
    return torch.cat(states), rows


def _empty(shape: tuple[int, ...]) -> np.ndarray:
    size = 2 * math.prod(shape)
    if size <= IN_MEMORY:
        return np.empty(shape, np.float16)
    try:
        with tempfile.TemporaryFile() as file:
            os.posix_fallocate(file.fileno(), 0, size)  # a full disk is an error here; in the mapping it would end the process
            return np.memmap(file, np.float16, mode="r+", shape=shape)
    except OSError as e:
        raise disk_error(e, Path(tempfile.gettempdir())) from e

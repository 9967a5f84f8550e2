"""Theia's features: tars of one safetensors per image, of one model."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kdstore.errors import ConfigError, SourceError
from kdstore.store.importing.config import ImportConfig
from kdstore.store.importing.foreign import Arrays, refuse_large, safetensors_arrays
from kdstore.store.importing.found import Found, Pair, Rows, unknown_sha256
from kdstore.store.importing.tars import Places, content_of, first_sample, samples_of, tars_in
from kdstore.store.plan import Side


def theia(folder: Path, config: ImportConfig, read_torch: Any) -> Found:
    """Open Theia's tars of one model: a .safetensors per sample with embedding [C, H, W], and cls_token or pooled_cls_token [1, C] where the model has them.

    The spatial features become tokens [H * W, C], row by row. There are no captions in them.
    """
    places = Places(tars_in(folder))
    suffix, first, file = first_sample(places.tars, ("safetensors",))
    with open(file, "rb") as f:
        shapes = _tensors(content_of(f, file, first.members[suffix]), f"{file}: {first.key}")
    chosen = config.embedding or next((name for name in ("pooled_cls_token", "cls_token") if name in shapes), None)
    if chosen and chosen not in shapes:
        raise ConfigError(f"{file} has no tensor {chosen}; it has {', '.join(shapes)}.", "Name another one with --embedding.")
    if shapes.get("embedding", np.empty(0)).ndim != 3:
        raise SourceError(f"{file}: '{first.key}' has no embedding [C, H, W].", "Name the folder of one model, beside that of the images.")
    grid = shapes["embedding"].shape
    arrays: dict[str, tuple[int, ...]] = {"image/tokens": (grid[1] * grid[2], grid[0])} | ({"image/embedding": (shapes[chosen].size,)} if chosen else {})

    def pairs() -> Iterator[Pair]:
        places.clear()
        for tar, _, sample, path in samples_of(places.tars):
            if suffix not in sample.members:
                raise SourceError(f"{path}: the sample '{sample.key}' has no .{suffix}: found {', '.join(sample.members)}.", "Name the folder of one model.")
            places.add(tar, sample.members[suffix])
            yield sample.key, ()

    def read(side: Side, start: int, stop: int) -> Rows:
        rows: dict[str, list[npt.NDArray[Any]]] = {name: [] for name in arrays}
        for i, path, content in places.contents(start, stop):
            found = _tensors(content, where := f"{path}, image {i}")
            if "embedding" not in found or found["embedding"].shape != grid or (chosen and (chosen not in found or found[chosen].size != shapes[chosen].size)):
                raise SourceError(f"{where}: its tensors are not shaped as those of '{first.key}'.", "Restore the file, or leave it out.")
            rows["image/tokens"].append(found["embedding"].reshape(grid[0], -1).T)
            if chosen:
                rows["image/embedding"].append(found[chosen].reshape(-1))
        return {name: np.stack(values) for name, values in rows.items()}

    encoding: dict[str, Any] = {"norm": "unknown", "precision": "unknown", "views": ["plain"]}
    layers: dict[str, dict[str, Any]] = {"image/tokens": {"layer": "unknown", "prefix_stripped": "unknown"}, "image/embedding": {"layer": chosen}}
    says = {"model": suffix.removesuffix("safetensors").rstrip(".") or None}
    return Found(arrays, {name: encoding | layers[name] for name in arrays}, pairs, read, unknown_sha256, says)


def _tensors(content: bytes, where: str) -> Arrays:
    try:
        found = safetensors_arrays(content)
        refuse_large(sum(4 * math.prod(x.shape) for x in found.values()))
    except ValueError as e:
        raise SourceError(f"{where}: its .safetensors cannot be imported: {e}.", "Restore it, or leave it out.") from e
    return found

"""Where a teacher's embeddings come from during training: an interface, and the store behind it.

The training step knows only `Targets`, so that distilling from a store can be compared with distilling from the live teacher.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from kdstore.errors import MissingFeature
from kdstore.store import Store

Rows = npt.NDArray[np.int64]


class Targets(Protocol):
    """A teacher's embeddings of a set of image-caption pairs, as its towers return them, before normalisation; called from several threads."""

    dim: int
    logit_scale: float | None

    def image_embeddings(self, rows: Rows) -> npt.NDArray[Any]:
        """Return [B, D], any float type, of the plain views of these image rows."""
        ...

    def text_embeddings(self, rows: Rows) -> npt.NDArray[Any]:
        """Return [B, D], any float type, of these text rows."""
        ...


class StoreTargets:
    """Targets read from a store: floats in the type it holds, codes decoded to float32."""

    def __init__(self, store: Store, needs: tuple[str, ...]) -> None:
        """Check that the store holds all that a loss `needs`; raises MissingFeature."""
        store.require(*(name for name in needs if "/" in name))
        scale = store.identity["teacher"].get("logit_scale")
        if "logit_scale" in needs and scale is None:
            raise MissingFeature(f"{store.path} does not say the teacher's logit scale, which this loss needs.", "Choose a loss without crd and teacher-ce.")
        self._store = store
        self.dim: int = store.feature_shape("image/embedding")[-1]
        self.logit_scale: float | None = scale

    def image_embeddings(self, rows: Rows) -> npt.NDArray[Any]:
        return self._read("image/embedding", rows)

    def text_embeddings(self, rows: Rows) -> npt.NDArray[Any]:
        return self._read("text/embedding", rows)

    def _read(self, name: str, rows: Rows) -> npt.NDArray[Any]:
        return self._store.features(name, rows) if name in self._store.codecs else self._store.gather(name, rows)

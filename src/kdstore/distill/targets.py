"""Where a teacher's embeddings come from during training: an interface, and the store behind it.

The training step knows only `Targets`, so that distilling from a store can be compared with distilling from the live teacher.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from kdstore.errors import MissingFeature
from kdstore.store import Store, StoredViews, stored_views

Rows = npt.NDArray[np.int64]


class Targets(Protocol):
    """A teacher's embeddings of a set of image-caption pairs, as its towers return them, before normalisation; called from several threads."""

    dim: int
    logit_scale: float | None

    def image_embeddings(self, rows: Rows, views: Rows) -> npt.NDArray[Any]:
        """Return [B, D], any float type, of these views (0 the plain one) of these image rows: of what the student is shown, and of nothing else."""
        ...

    def text_embeddings(self, rows: Rows) -> npt.NDArray[Any]:
        """Return [B, D], any float type, of these text rows."""
        ...


def views_to_show(choice: str, store: Store | None, needs: tuple[str, ...]) -> StoredViews | None:
    """Return the stored views that a run shows, None for the plain one alone; `choice` is auto, stored or plain.

    Raises MissingFeature if stored ones are asked for and there are none, or if an image array that the loss `needs` lacks targets of some.
    """
    stored = None if store is None or choice == "plain" else stored_views(store)
    if choice == "stored" and stored is None:
        raise MissingFeature(f"{'A run without a store' if store is None else store.path} has no augmented views.", "Extract a store with --views K.")
    for name in needs:
        spec = None if stored is None else stored.store.arrays.get(name)
        if stored is not None and spec is not None and spec.side == "image" and spec.views != stored.count:
            raise MissingFeature(f"{stored.store.path} has {spec.views} of {stored.count} views in {name}.", "Show the plain view alone: --set views=plain.")
    return stored


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

    def image_embeddings(self, rows: Rows, views: Rows) -> npt.NDArray[Any]:
        return self._read("image/embedding", rows, views)

    def text_embeddings(self, rows: Rows) -> npt.NDArray[Any]:
        return self._read("text/embedding", rows)

    def _read(self, name: str, rows: Rows, views: Rows | None = None) -> npt.NDArray[Any]:
        read = self._store.features if name in self._store.codecs else self._store.gather
        return read(name, rows, views)

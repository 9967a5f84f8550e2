"""The augmented views of a store, for whoever must see the pictures that its features are of."""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image

from kdstore.data.views import Augmentation
from kdstore.errors import StoreError
from kdstore.store.reader import Store


@dataclass(frozen=True, eq=False)
class StoredViews:
    """The views of a store's images, `count` of each with the plain view 0."""

    store: Store
    count: int
    augmentation: Augmentation

    def picture(self, image: Image.Image, row: int, view: int) -> Image.Image:
        """Draw a view of the image of a row as the teacher saw it before its preprocessing; raises StoreError for numbers that describe none."""
        if view == 0:
            return image
        (view_P,) = self.store.gather("image/view", [row], view)
        return self.augmentation.draw(image, view_P)


def stored_views(store: Store) -> StoredViews | None:
    """Return the views of a store that has several, or None; raises StoreError if it does not say how they are drawn."""
    spec = store.arrays.get("image/view")
    if spec is None or spec.views == 1:
        return None
    arrays = store.identity.get("arrays")
    said = arrays.get("image/view") if isinstance(arrays, dict) else None
    augmentation = Augmentation.of(said if isinstance(said, dict) else {})
    if spec.row_shape != (augmentation.size,) or spec.dtype != "float32":
        raise StoreError(f"{store.path}: image/view holds {spec.row_shape} {spec.dtype}, expected {augmentation.size} float32 numbers per view.")
    embedding = store.arrays.get("image/embedding")
    if embedding is not None and embedding.views != spec.views:
        raise StoreError(f"{store.path} describes {spec.views} views and has embeddings of {embedding.views}.")
    return StoredViews(store, spec.views, augmentation)

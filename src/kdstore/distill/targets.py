"""Where teachers' features come from during training: an interface, and the stores behind it.

The training step knows only `Targets`, so that distilling from a store can be compared with distilling from the live teacher.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from itertools import combinations, product
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from kdstore.distill.pairs import Pairs
from kdstore.distill.tokens import Standard, channel_standard, phi_s_standard
from kdstore.errors import ConfigError, IdentityMismatch, MissingFeature, StoreError
from kdstore.store import Cache, Store, StoredViews, family_of, open_store, read_stats, sampled_covariance, stored_views

Rows = npt.NDArray[np.int64]
VIEW_ROWS = 1 << 16  # images whose views are compared at once


class Targets(Protocol):
    """A teacher's features of a set of image-caption pairs, as its towers return them, before normalisation; called from several threads.

    Arrays go by the names they have in a store: `image/embedding` and `text/embedding` [B, D], `image/tokens` [B, T, W]; any float type.
    """

    name: str
    logit_scale: float | None
    logit_bias: float | None

    def shape(self, array: str) -> tuple[int, ...]:
        """Return the shape of one row of an array."""
        ...

    def image(self, array: str, rows: Rows, views: Rows) -> npt.NDArray[Any]:
        """Return these views (0 the plain one) of these image rows: of what the student is shown, and of nothing else."""
        ...

    def text(self, array: str, rows: Rows) -> npt.NDArray[Any]:
        """Return these text rows."""
        ...

    def standard(self, array: str, kind: str) -> Standard:
        """Return what brings features of an array to one scale: `channel` or `phi-s`."""
        ...


class StoreTargets:
    """Targets read from a store: floats in the type it holds, codes decoded to float32."""

    def __init__(self, store: Store, needs: tuple[str, ...]) -> None:
        """Check that the store holds all that a loss `needs`; raises MissingFeature."""
        store.require(*(name for name in needs if "/" in name))
        teacher = store.identity["teacher"]
        self.store = store
        self.name = store.path.name
        self.logit_scale: float | None = teacher.get("logit_scale")
        self.logit_bias: float | None = teacher.get("logit_bias")

    def shape(self, array: str) -> tuple[int, ...]:
        return self.store.feature_shape(array)

    def image(self, array: str, rows: Rows, views: Rows) -> npt.NDArray[Any]:
        return self._read(array, rows, views)

    def text(self, array: str, rows: Rows) -> npt.NDArray[Any]:
        return self._read(array, rows)

    def standard(self, array: str, kind: str) -> Standard:
        """Read the statistics of an array; raises MissingFeature with the command that makes them."""
        if kind == "phi-s":
            found = sampled_covariance(self.store, array)
            return phi_s_standard(found.mean_W, found.covariance_WW)
        stats = read_stats(self.store, array)
        return channel_standard(np.array(stats["mean"]), np.array(stats["variance"]))

    def _read(self, name: str, rows: Rows, views: Rows | None = None) -> npt.NDArray[Any]:
        read = self.store.features if name in self.store.codecs else self.store.gather
        return read(name, rows, views)


def open_stores(paths: Sequence[str], cache: Cache | None = None) -> tuple[Store, ...]:
    """Open the stores of a run's teachers, in the order of `paths`: a child together with its parent, which is one of `paths` or lies beside it.

    Raises ConfigError for a store or a teacher that is given twice, IdentityMismatch for a child whose parent is not there, and what `open_family` raises.
    """
    stores = [open_store(path, cache) for path in paths]
    if len({store.digest for store in stores}) < len(stores):
        raise ConfigError(f"One store is given twice among {', '.join(store.place for store in stores)}.", "Give each --cache once.")
    given = {store.digest: store for store in stores}
    roots: dict[str, Store] = {}
    children: dict[str, list[Store]] = {}
    for store in stores:
        parent = parent_digest(store)
        root = store if parent is None else given.get(parent) or _parent_of(store, parent)
        roots.setdefault(root.digest, root)
        children.setdefault(root.digest, []).extend([] if root is store else [store])
    for one, other in combinations(roots.values(), 2):
        if one.identity["teacher"] == other.identity["teacher"]:
            found = f"{one.path} and {other.path} hold features of one teacher, which would count as two."
            raise ConfigError(found, "Make one store of their rows with kdstore store concat, or give one of them.")
    return tuple(family_of(root, children[digest]) if children[digest] else root for digest, root in roots.items())


def parent_digest(store: Store) -> str | None:
    """Return the digest of the store whose rows these are, or None."""
    parent = store.identity.get("parent")
    return parent.get("digest") if isinstance(parent, dict) else None


def _parent_of(child: Store, digest: str) -> Store:
    for manifest in sorted(child.path.absolute().parent.glob("*/manifest.json")):
        with contextlib.suppress(StoreError):
            if (store := open_store(manifest.parent)).digest == digest:
                return store
    found = f"{child.path} holds arrays for the rows of another store ({digest}), which is neither given nor beside it."
    raise IdentityMismatch(found, "Give its parent as another --cache.")


def views_to_show(choice: str, stores: Sequence[Store], needs: tuple[str, ...]) -> tuple[StoredViews, ...]:
    """Return the stored views that a run shows, one of each store, none for the plain view alone; `choice` is auto, stored or plain.

    Raises MissingFeature if stored ones are asked for and there are none, or if an image array that the loss `needs` lacks targets of some;
    IdentityMismatch if stores have other views than each other.
    """
    found = [None if choice in ("plain", "unmatched") else stored_views(store) for store in stores]
    if choice == "stored" and None in (found or [None]):
        lacking = next((str(store.path) for store, views in zip(stores, found, strict=True) if views is None), "A run without a store")
        raise MissingFeature(f"{lacking} has no augmented views.", "Extract a store with --views K.")
    if len({None if views is None else (views.count, str(views.augmentation.identity)) for views in found}) > 1:
        said = ", ".join(f"{store.path} {1 if views is None else views.count}" for store, views in zip(stores, found, strict=True))
        raise IdentityMismatch(f"The stores have other views than each other ({said}, or other numbers).", "Show the plain view alone: --set views=plain.")
    shown = tuple(views for views in found if views is not None)
    for views in shown:
        for name in needs:
            spec = views.store.arrays.get(name)
            if spec is not None and spec.side == "image" and spec.views != views.count:
                hint = "Show the plain view alone: --set views=plain."
                raise MissingFeature(f"{views.store.path} has {spec.views} of {views.count} views in {name}.", hint)
    return shown


def check_views(shown: Sequence[StoredViews], pairs: Pairs) -> None:
    """Raise IdentityMismatch if an image has other views in one store than in another.

    Views follow from an image's key and size, so those of images of another key (joined by content) or size are compared, and of no others.
    """
    for k, j in combinations(range(len(shown)), 2):
        both = (pairs.target_rows[k] >= 0) & (pairs.target_rows[j] >= 0)
        stores, rows = (shown[k].store, shown[j].store), (pairs.target_rows[k][both], pairs.target_rows[j][both])
        unlike = np.logical_or.reduce([_unequal(name, stores, rows) for name in ("key", "width", "height")])
        rows = (rows[0][unlike], rows[1][unlike])
        for view, start in product(range(1, shown[k].count), range(0, len(rows[0]), VIEW_ROWS)):
            one, other = (store.gather("image/view", of_store[start : start + VIEW_ROWS], view) for store, of_store in zip(stores, rows, strict=True))
            if (differ := (one != other).any(axis=1)).any():
                at = start + int(differ.argmax())
                keys = " and ".join(store.index("image", "key")[int(of_store[at])].as_py() for store, of_store in zip(stores, rows, strict=True))
                found = f"{stores[0].path} and {stores[1].path} have other views of the same images (of {keys}): they were drawn for other keys or sizes."
                raise IdentityMismatch(found, "Show the plain view alone: --set views=plain.")


def _unequal(column: str, stores: tuple[Store, Store], rows: tuple[Rows, Rows]) -> npt.NDArray[np.bool_]:
    one, other = (store.index("image", column).take(pa.array(of_store)) for store, of_store in zip(stores, rows, strict=True))
    return pc.not_equal(one, other).to_numpy()

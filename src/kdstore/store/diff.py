"""What differs between two stores: identity and arrays by field, rows by key, and how far the features of common rows lie apart."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from kdstore.jsonfile import flat_fields
from kdstore.progress import OnProgress, silent
from kdstore.store.blocks import Int64, gather_views, in_blocks
from kdstore.store.join import positions
from kdstore.store.reader import Store, open_store


@dataclass(frozen=True)
class ArrayDifference:
    """How one array differs over the rows that both stores hold.

    `max_abs` is the largest difference of values that are numbers in both, `unequal` counts values that differ (NaN equals NaN), `cosine_min`
    and `cosine_mean` are over the vectors of float arrays that are numbers and not all zero in both (None if there are none).
    """

    rows: int
    unequal: int
    max_abs: float
    cosine_min: float | None
    cosine_mean: float | None


@dataclass(frozen=True)
class StoreDifference:
    """Fields are dotted paths with both values (None: absent), as JSON; images are counted by key, texts by key, place and sha256 of the caption."""

    identity: dict[str, tuple[str | None, str | None]]
    layout: dict[str, tuple[str | None, str | None]]
    images_only_in_first: int
    images_only_in_second: int
    images_in_both: int
    texts_only_in_first: int
    texts_only_in_second: int
    texts_in_both: int
    arrays: dict[str, ArrayDifference]
    not_compared: tuple[str, ...]

    @property
    def same(self) -> bool:
        """Whether both hold equal values for the same rows; how they are encoded and where they come from may differ."""
        apart = self.images_only_in_first + self.images_only_in_second + self.texts_only_in_first + self.texts_only_in_second
        return not (apart or self.not_compared or any(found.unequal for found in self.arrays.values()))


def diff_stores(first: str | Path, second: str | Path, *, on_progress: OnProgress = silent) -> StoreDifference:
    """Compare two stores; arrays that one lacks or whose rows have another shape are `not_compared`. Raises what `Store` raises."""
    stores = open_store(first), open_store(second)
    a, b = stores
    images_a, images_b = _common_images(a, b)
    texts_a, texts_b = _common_texts(a, b, images_a, images_b)
    arrays = {}
    comparable = [name for name in a.arrays if name in b.arrays and _shape(a, b, name) == _shape(b, a, name)]
    for name in comparable:
        rows = (images_a, images_b) if a.arrays[name].side == "image" else (texts_a, texts_b)
        arrays[name] = _array_difference(stores, name, *rows, on_progress)
    return StoreDifference(
        _fields(a.identity, b.identity),
        _fields(a.manifest["arrays"], b.manifest["arrays"]),
        a.num_images - len(images_a),
        b.num_images - len(images_b),
        len(images_a),
        a.num_texts - len(texts_a),
        b.num_texts - len(texts_b),
        len(texts_a),
        arrays,
        tuple(sorted((a.arrays.keys() | b.arrays.keys()) - set(comparable))),
    )


def _decoded(a: Store, b: Store, name: str) -> bool:
    """Whether an array must be decoded to be compared: its codes do not mean the same in both."""
    said = [store.identity["arrays"][name]["codec"] if name in store.codecs else None for store in (a, b)]
    return said[0] != said[1]


def _shape(store: Store, other: Store, name: str) -> tuple[int, ...]:
    """Return the views and the shape of what is compared of a row of `store`."""
    spec = store.arrays[name]
    return spec.views, *(store.feature_shape(name) if _decoded(store, other, name) else spec.row_shape)


def _fields(a: Any, b: Any) -> dict[str, tuple[str | None, str | None]]:
    first, second = flat_fields(a), flat_fields(b)
    return {name: (first.get(name), second.get(name)) for name in sorted(first.keys() | second.keys()) if first.get(name) != second.get(name)}


def _common_images(a: Store, b: Store) -> tuple[Int64, Int64]:
    """Return the rows of the images that both hold, in the order of the first."""
    if a.fingerprint == b.fingerprint:
        return np.arange(a.num_images), np.arange(b.num_images)
    found = positions(a.index("image", "key").combine_chunks(), b.index("image", "key").combine_chunks())
    return np.flatnonzero(found >= 0), found[found >= 0]


def _common_texts(a: Store, b: Store, images_a: Int64, images_b: Int64) -> tuple[Int64, Int64]:
    """Return the rows of the texts of common images that have the same place among their image's and the same caption."""
    counts = np.minimum(np.diff(a.offsets)[images_a], np.diff(b.offsets)[images_b])
    place = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    texts_a, texts_b = (np.repeat(store.offsets[images], counts) + place for store, images in ((a, images_a), (b, images_b)))
    captions = [store.index("text", "sha256").take(pa.array(texts)) for store, texts in ((a, texts_a), (b, texts_b))]
    same = pc.equal(*captions).to_numpy().astype(bool)
    return texts_a[same], texts_b[same]


def _array_difference(stores: tuple[Store, Store], name: str, rows_a: Int64, rows_b: Int64, on_progress: OnProgress) -> ArrayDifference:
    unequal, vectors, max_abs, cosine_min, cosine_sum, done = 0, 0, 0.0, math.inf, 0.0, 0
    shape = _shape(*stores, name)[1:]
    for found in in_blocks(functools.partial(_compare_block, stores, name, (rows_a, rows_b)), stores[0].arrays[name], 0, len(rows_a), shape):
        done += found[0]
        unequal += found[1]
        max_abs = max(max_abs, found[2])
        cosine_min = min(cosine_min, found[3])
        cosine_sum += found[4]
        vectors += found[5]
        on_progress(f"rows of {name}", done, len(rows_a), "")
    return ArrayDifference(len(rows_a), unequal, max_abs, cosine_min if vectors else None, cosine_sum / vectors if vectors else None)


def _compare_block(stores: tuple[Store, Store], name: str, rows: tuple[Int64, Int64], start: int, stop: int) -> tuple[int, int, float, float, float, int]:
    """Return rows, values that differ, largest difference, least cosine, sum of cosines and vectors that have one."""
    decoded = _decoded(*stores, name)
    a, b = (gather_views(store, name, part[start:stop], decoded=decoded) for store, part in zip(stores, rows, strict=True))
    unequal = int(((a != b) & ~((a != a) & (b != b))).sum())
    if not np.issubdtype(a.dtype, np.floating) or not np.issubdtype(b.dtype, np.floating):
        apart = np.abs(a.astype(np.float64) - b.astype(np.float64))
        return stop - start, unequal, float(apart.max(initial=0)), math.inf, 0.0, 0
    a, b = _vectors(a), _vectors(b)
    with np.errstate(invalid="ignore"):
        apart = np.abs(a - b)
    finite = np.isfinite(a).all(axis=1) & np.isfinite(b).all(axis=1)
    a, b = a[finite], b[finite]
    norms = np.sqrt(np.einsum("nw,nw->n", a, a)) * np.sqrt(np.einsum("nw,nw->n", b, b))
    cosines = np.einsum("nw,nw->n", a, b)[norms > 0] / norms[norms > 0]
    return stop - start, unequal, float(np.fmax.reduce(apart, axis=None, initial=0)), float(cosines.min(initial=math.inf)), float(cosines.sum()), len(cosines)


def _vectors(values: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    return values.reshape(-1, values.shape[-1]).astype(np.float64)

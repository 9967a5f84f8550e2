"""Some rows, some arrays of a store as a store of their own; rows keep their order, so that reading goes once through the old one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from kdstore.errors import ConfigError
from kdstore.progress import OnProgress, silent
from kdstore.store.derive import DerivedStore, Part, choose, derived_identity, fitted, plan_of, rows_of_keys, write_parts
from kdstore.store.reader import open_store


def subset_store(
    path: str | Path,
    out: str | Path,
    *,
    rows: slice | None = None,
    keys: Sequence[str] | None = None,
    arrays: Sequence[str] = (),
    on_progress: OnProgress = silent,
) -> DerivedStore:
    """Write the images in `rows` (start and stop as NumPy has them) or with these `keys`, with their texts and `arrays` (default: all).

    `text/length` comes with `text/tokens`, `image/view` with arrays of several views. Raises ConfigError, UnknownName, JoinError for keys
    that the store does not hold, and what `StoreWriter` and `Store.gather` raise.
    """
    store = open_store(path)
    if rows is None and keys is None and not arrays:
        raise ConfigError("Nothing to leave out: no rows, keys or arrays are given.", "Give --rows, --keys or --arrays.")
    if rows is not None and keys is not None:
        raise ConfigError("Rows and keys both say which images to take.", "Give one of them.")
    images = rows_of_keys(store, keys) if keys is not None else np.arange(store.num_images)[rows or slice(None)]
    if not len(images):
        raise ConfigError(f"No row of {path} is chosen; it holds {store.num_images}.", "Choose other rows.")
    parts = [Part.of(store, images)]
    plan, names = plan_of(parts, store.unit_rows), choose(store.arrays, arrays)
    identity = derived_identity(parts, plan, "subset", names)
    return write_parts(out, parts, plan, [fitted(store.arrays[name], plan) for name in names], identity, on_progress=on_progress)

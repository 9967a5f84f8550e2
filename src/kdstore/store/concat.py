"""Stores of the same features one after the other as one store; what they are must be equal, which rows they hold must differ."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from kdstore.errors import ConfigError, IdentityMismatch, JoinError
from kdstore.jsonfile import differing_fields
from kdstore.progress import OnProgress, silent
from kdstore.store.derive import DerivedStore, Part, choose, derived_identity, fitted, plan_of, write_parts
from kdstore.store.plan import repeated
from kdstore.store.reader import Store, open_store


def concat_stores(paths: Sequence[str | Path], out: str | Path, *, on_progress: OnProgress = silent) -> DerivedStore:
    """Write the rows of all stores, in the order of `paths`, as one store; chunks, shards and codecs are those of the first.

    Raises IdentityMismatch with the differing fields unless all hold the same features (identities are equal but for source, lineage, parent and what was
    withdrawn, arrays but for their encoding), JoinError for a key that comes twice, and what `StoreWriter` and `Store.gather` raise.
    """
    if len(paths) < 2:
        raise ConfigError("There is nothing to put together.", "Name two stores or more.")
    stores = [open_store(path) for path in paths]
    for other in stores[1:]:
        _refuse_differences(stores[0], other)
    keys = pa.concat_arrays([chunk.cast(pa.large_string()) for store in stores for chunk in store.index("image", "key").chunks])
    if twice := repeated(keys):
        raise JoinError(f"{len(twice)} keys are in more than one of the stores: {', '.join(twice[:5])}.", "Take them out of one with: kdstore store subset.")
    parts = [Part.of(store) for store in stores]
    plan, names = plan_of(parts, max(store.unit_rows for store in stores)), choose(stores[0].arrays, ())
    identity = derived_identity(parts, plan, "concat", names)
    identity.pop("parent", None)  # of the first one's rows alone
    return write_parts(out, parts, plan, [fitted(stores[0].arrays[name], plan) for name in names], identity, on_progress=on_progress)


def _refuse_differences(first: Store, other: Store) -> None:
    if differs := differing_fields(_features(first), _features(other)):
        raise IdentityMismatch(f"{first.path} and {other.path} hold other features ({differs}).", "Recode or subset them until they agree.")


def _features(store: Store) -> dict[str, Any]:
    """Return what two stores must have in common to be one."""
    arrays = {name: {"dtype": spec.dtype, "row": list(spec.shape[1:]), "dims": list(spec.dims)} for name, spec in store.arrays.items()}
    return {"identity": {name: value for name, value in store.identity.items() if name not in ("source", "lineage", "parent", "withdrawn")}, "arrays": arrays}

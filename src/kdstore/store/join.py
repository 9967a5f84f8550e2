"""Joining a store with a source: which source row belongs to which store row, by fingerprint or by key, never by position."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from kdstore.data.source import Source
from kdstore.errors import JoinError
from kdstore.store.plan import fingerprint_of, repeated
from kdstore.store.reader import Store


@dataclass(frozen=True, eq=False)
class Join:
    """Row maps between a store of N images and a source of S pairs; -1 where the other side has no such key."""

    source_row_of_store: npt.NDArray[np.int64]
    """[N]"""
    store_row_of_source: npt.NDArray[np.int64]
    """[S]"""
    by: Literal["fingerprint", "key"]

    @property
    def matched(self) -> int:
        """Images that both hold."""
        return int((self.source_row_of_store >= 0).sum())

    @property
    def missing_in_source(self) -> int:
        """Images of the store that the source does not hold."""
        return len(self.source_row_of_store) - self.matched

    @property
    def missing_in_store(self) -> int:
        """Pairs of the source that the store has no features of."""
        return len(self.store_row_of_source) - self.matched


def join_sources(store: Store, source: Source) -> Join:
    """Match the rows of a store and a source; raises JoinError if no key matches or a key of the source comes twice.

    Equal fingerprints (same keys and captions in the same order) need no matching. Otherwise rows match by key alone: the captions
    that belong to the features are those of the store's index.
    """
    num_store, num_source = store.num_images, len(source)
    if num_store == num_source and fingerprint_of((source.key(i), source.captions(i)) for i in range(num_source)) == store.fingerprint:
        return Join(np.arange(num_store), np.arange(num_source), "fingerprint")
    source_keys = pa.array((source.key(i) for i in range(num_source)), pa.large_string())
    store_keys = store.index("image", "key").combine_chunks()
    if twice := repeated(source_keys):
        raise JoinError(f"{len(twice)} keys of {source.spec} come more than once: {', '.join(twice[:5])}.", "Choose a key column that is unique.")
    join = Join(positions(store_keys, source_keys), positions(source_keys, store_keys), "key")
    if not join.matched:
        raise JoinError(
            f"No key of {source.spec} ({_some(source_keys)}) is in {store.path} ({_some(store_keys)}).", "Name the source that the store was extracted from."
        )
    return join


def positions(keys: pa.Array, among: pa.Array) -> npt.NDArray[np.int64]:
    """Return where each of `keys` lies in `among`, -1 if nowhere."""
    return pc.index_in(keys, value_set=among).fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)


def _some(keys: pa.Array) -> str:
    return ", ".join(keys[:3].to_pylist()) + (", ..." if len(keys) > 3 else "") if len(keys) else "no keys"

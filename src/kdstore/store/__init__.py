"""The feature store: plan, write, read, join and verify (no torch; the only package that imports zarr)."""

from __future__ import annotations

from kdstore.store.join import Join, join_sources
from kdstore.store.layout import ArraySpec, embedding_array, scalar_array, token_array
from kdstore.store.plan import Plan, Unit
from kdstore.store.reader import Store, open_store
from kdstore.store.writer import Attempt, StoreWriter

__all__ = [
    "ArraySpec",
    "Attempt",
    "Join",
    "Plan",
    "Store",
    "StoreWriter",
    "Unit",
    "embedding_array",
    "join_sources",
    "open_store",
    "scalar_array",
    "token_array",
]

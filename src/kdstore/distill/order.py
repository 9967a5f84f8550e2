"""In which order a run shows its pairs, and what that asks of stores that are used where they are.

A full shuffle reads every shard in every batch, which is right for what lies here, or fits into the cache. For more, pairs are shuffled in windows of whole
shards (`store.order`): a window is read while the next one is fetched, each file about once in an epoch. Which of both it is follows from the sizes of the
stores and of the cache alone, before any pair is known, and is a setting of the run, so a resumed run has the same order or is refused.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence

import numpy as np

from kdstore.distill.batches import BatchPlan
from kdstore.distill.config import DistillConfig
from kdstore.distill.pairs import Pairs, Rows
from kdstore.errors import ConfigError
from kdstore.store import Store
from kdstore.store.ahead import stop_fetching, will_need
from kdstore.store.cache import GIB, Cache
from kdstore.store.demand import Demand, local_block, remote_bytes
from kdstore.store.order import Batches

WINDOW_SHARE = 8  # a window takes this part of the cache: two must fit in, and blocks of pairs share shards with their neighbours


def shuffle_of(config: DistillConfig, stores: Sequence[Store], arrays: Sequence[str], cache: Cache) -> str:
    """Return `full`, or `windows:ROWS` with its number, for a run that reads these arrays; raises ConfigError for windows without a store."""
    if config.shuffle == "full" or (config.shuffle == "auto" and sum(remote_bytes(store, arrays) for store in stores) <= cache.max_bytes):
        return "full"
    if config.shuffle != "auto":
        if not stores or not arrays:
            raise ConfigError(f"shuffle={config.shuffle} follows the shards of a store, and none is read.", "Leave it out.")
        return config.shuffle
    block = local_block(stores[0], arrays)
    bytes_per_pair = sum(remote_bytes(store, arrays) / max(store.num_images, 1) for store in stores)
    rows = max(cache.max_bytes / WINDOW_SHARE / bytes_per_pair, config.batch_size)
    return f"windows:{max(1, int(rows // block), math.ceil(config.batch_size / block)) * block}"


def windows_of(shuffle: str, stores: Sequence[Store], arrays: Sequence[str]) -> tuple[int, int | None]:
    """Return the pairs of a block, and of a window; None for a full shuffle."""
    _, _, window = shuffle.partition(":")
    return (local_block(stores[0], arrays), int(window)) if window else (1, None)


def check_cache(plan: BatchPlan, pairs: Pairs, stores: Sequence[Store], arrays: Sequence[str], cache: Cache, *, permuted: bool = False) -> bool:
    """Tell whether a run reads anything by way of the cache; one whose targets are `permuted` reads all of it in every batch, whatever the order.

    Raises ConfigError if what it reads at once does not fit into it, with what would, and DiskFull if the disk has no room for it.
    """
    block = plan.block if plan.windowed else local_block(stores[0], arrays) if stores else 1
    demand = Demand(-(-len(pairs) // block))
    for store, array, of_pair, rows in _reads(pairs, stores, arrays):
        demand.add(store, array, rows, of_pair // block)

    def needed(blocks: int) -> int:
        return min(demand.at_once(2 * blocks + 1), demand.bytes)  # two windows, and what else a batch in both may read

    windowed = plan.windowed and not permuted
    here = needed(-(-(plan.window or 0) // block)) if windowed else demand.bytes
    if here > cache.max_bytes:
        order = f"A shuffle in windows of {plan.window}" if windowed else "A full shuffle of all"
        found = f"{order} pairs reads {_gib(here)} GiB at once of stores that are elsewhere, and their cache holds {_gib(cache.max_bytes)} GiB."
        least = math.ceil(plan.batch_size / block)
        if permuted:
            raise ConfigError(found, f"Raise cache_gib to {_gib(here)}, or pull the store.")
        if needed(least) > cache.max_bytes:
            raise ConfigError(found, f"A batch of {plan.batch_size} needs {_gib(needed(least))} GiB: raise cache_gib, or pull the store.")
        most = next(blocks for blocks in range(len(demand.of_block), 0, -1) if needed(blocks) <= cache.max_bytes)
        raise ConfigError(found, f'Raise cache_gib to {_gib(here)}, set shuffle="windows:{most * block}", or pull the store.')
    if demand.bytes:
        cache.require_room(min(demand.bytes, cache.max_bytes))
    return demand.bytes > 0


class Announcer:
    """Tells the stores of a run, as its batches are made, which rows come: in windows those of the next one, block after block, else all at once."""

    def __init__(self, plan: BatchPlan, pairs: Pairs, stores: Sequence[Store], arrays: Sequence[str]) -> None:
        self._plan, self._num_pairs = plan, len(pairs)
        self._rows = [(store, array, rows[np.unique(of_pair, return_index=True)[1]]) for store, array, of_pair, rows in _reads(pairs, stores, arrays)]
        self._one_thread = threading.Lock()
        self._coming: Iterator[Sequence[int]] | None = None

    def __call__(self, step: int) -> None:
        """Announce what comes when one more batch is made, of this step or one beside it."""
        with self._one_thread:
            if self._coming is None:
                order, size = self._plan.order, self._plan.batch_size
                self._coming = Batches(order, size, steps=2**62, first=step).coming() if self._plan.windowed else iter([range(self._num_pairs)])
            coming = np.array(next(self._coming, ()), np.int64)
        for store, array, rows in self._rows if len(coming) else ():
            soon = rows[coming]
            will_need(store, array, soon[soon >= 0])

    def stop(self) -> None:
        """End what is being fetched, and all that waits for it, with Interrupted."""
        for store, array, _ in self._rows:
            stop_fetching(store, array)


def _reads(pairs: Pairs, stores: Sequence[Store], arrays: Sequence[str]) -> Iterator[tuple[Store, str, Rows, Rows]]:
    """Yield what is read of each store and array: the pairs [R], ascending, and the rows [R] that they may ask for, -1 for none."""
    for k, store in enumerate(stores):
        for array in arrays:
            if array.startswith("image/"):
                yield store, array, np.arange(len(pairs)), pairs.target_rows[k]
            else:
                yield from ((store, array, texts.images, texts.rows[k]) for texts in pairs.all_texts)


def _gib(size: int) -> str:
    """Say a size in GiB, rounded up, so that a bound of as much holds it."""
    return f"{math.ceil(size / GIB * 1e4) / 1e4:.4g}" if size < 100 * GIB else str(math.ceil(size / GIB))

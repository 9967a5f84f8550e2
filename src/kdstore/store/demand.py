"""How many bytes a run reads of stores that are elsewhere: in all, and of the files that blocks of its rows lie in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from kdstore.store.layout import ArraySpec
from kdstore.store.reader import Store

Int64 = npt.NDArray[np.int64]
NO_ROWS = np.empty(0, np.int64)


def remote_bytes(store: Store, names: Sequence[str]) -> int:
    """Sum the bytes of those of some arrays whose shards come through a cache."""
    return sum(int(sizes.sum()) for _, sizes in _remote(store, names))


def local_block(store: Store, names: Sequence[str]) -> int:
    """Return how many images in a row share a shard of those of some arrays that most bytes are in: read together, hardly any file is read twice."""
    specs = [store.arrays[name] for name in names if name in store.arrays]
    sizes = [spec.row_bytes * spec.views * spec.shape[0] for spec in specs]
    images = [spec.shard[0] * store.num_images // max(spec.shape[0], 1) for spec, size in zip(specs, sizes, strict=True) if size * 8 >= max(sizes)]
    return max([1, *images])


class Demand:
    """The shards that a run reads, by blocks of its rows; `bytes` of all shards, `of_block` [blocks] those of each block."""

    def __init__(self, num_blocks: int) -> None:
        self.bytes = 0
        self.of_block: Int64 = np.zeros(num_blocks, np.int64)

    def add(self, store: Store, name: str, rows: Int64, blocks: Int64) -> None:
        """Count that rows [R] of an array, none if negative, are read in these blocks [R]."""
        rows, blocks = rows[rows >= 0], blocks[rows >= 0]
        for spec, sizes in _remote(store, [name]):
            places = np.asarray(store.located(name, rows)[1], np.int64)
            keys = blocks * len(sizes) + places // spec.shard[0]
            keys = np.unique(keys[np.flatnonzero(np.diff(keys, prepend=-1))])
            np.add.at(self.of_block, keys // len(sizes), sizes[keys % len(sizes)])
            self.bytes += int(sizes[np.unique(keys % len(sizes))].sum())

    def at_once(self, blocks: int) -> int:
        """Return the most bytes that any so many blocks can read."""
        return int(np.sort(self.of_block)[::-1][:blocks].sum())


def _remote(store: Store, names: Sequence[str]) -> Iterator[tuple[ArraySpec, Int64]]:
    """Yield the arrays whose shards come through a cache: the layout of each where it lies, and the size of every shard."""
    for name in names:
        if name in store.arrays:
            holder, _ = store.located(name, NO_ROWS)
            spec = holder.arrays[name]
            if holder._manifest.supply is not None:
                yield spec, np.array([holder._manifest.entry(spec.shard_path(number)).size for number in range(spec.num_shards)], np.int64)

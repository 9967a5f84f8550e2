"""Work on a store block by block: rows that take little memory, reduced through dask, results in the order of the rows.

Results come in order and a block's borders follow from the array alone, so what is merged or written is the same to the bit for any
number of workers. Few blocks are in flight at a time, whatever the size of the store. Which workers run them is dask's own
configuration: threads of this process, unless a client of a cluster is active or `dask.config` says otherwise.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from dask.base import compute
from dask.delayed import delayed

from kdstore.store.layout import ArraySpec
from kdstore.store.reader import Store

BLOCK_VALUES = 1 << 18  # 2 MiB as float64
IN_FLIGHT = 16

T = TypeVar("T")
Int64 = npt.NDArray[np.int64]


def in_blocks(work: Callable[[int, int], T], spec: ArraySpec, start: int, stop: int, row_shape: tuple[int, ...] | None = None) -> Iterator[T]:
    """Yield `work(first, last)` for blocks of some 260,000 values of rows `start:stop` of an array, in their order; `row_shape` if not the stored one."""
    step = max(1, BLOCK_VALUES // (spec.views * math.prod(row_shape or spec.row_shape)))
    step -= step % spec.chunk[0] if step > spec.chunk[0] else 0  # a chunk that must be decoded is so once
    return in_order(work, ((first, min(first + step, stop)) for first in range(start, stop, step)))


def in_order(work: Callable[[int, int], T], blocks: Iterable[tuple[int, int]]) -> Iterator[T]:
    """Yield `work(first, last)` for all blocks in their order, at most 16 of them computed and not yet taken."""
    task = delayed(work, pure=False, traverse=False)
    remaining = iter(blocks)
    while window := list(itertools.islice(remaining, IN_FLIGHT)):
        yield from compute(*(task(first, last) for first, last in window))


def gather_views(store: Store, name: str, rows: Int64, *, decoded: bool = False) -> npt.NDArray[Any]:
    """Return rows [B, V, ...] of an image array with all of its views, or rows [B, ...] of another; `decoded`: as the features that codes stand for."""
    spec, read = store.arrays[name], store.features if decoded and name in store.codecs else store.gather
    if not spec.has_views:
        return read(name, rows)
    views = np.tile(np.arange(spec.views), len(rows))
    values = read(name, np.repeat(rows, spec.views), views)
    return values.reshape(len(rows), spec.views, *values.shape[1:])

"""Reading the coming batches while the caller works on this one.

Threads suffice: a gather spends its time in copies, reads and checksums that release the GIL, and many reads at once are what a cold disk wants. A sampler
knows its batches, so nothing is guessed, and memory is bounded by buffers that take turns: what a batch lies in is written again once the next is asked for.
Where the disk is the limit, the kernel is told what comes (`will_need`), so that it reads without anyone waiting; of no use for what is in memory already.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from kdstore.errors import DamagedStore
from kdstore.store.reader import Store
from kdstore.store.shard import index_bytes

Made = TypeVar("Made")
Item = TypeVar("Item")
Request = Mapping[str, npt.ArrayLike]
Arrays = dict[str, npt.NDArray[Any]]
Allocate = Callable[[tuple[int, ...], np.dtype[Any]], npt.NDArray[Any]]


def read_ahead(make: Callable[[Item], Made], items: Iterable[Item], threads: int, depth: int | None = None) -> Generator[Made, None, None]:
    """Yield `make(item)` for all items in order, each made by one of `threads` threads, at most `depth` (twice the threads) ahead of the one yielded.

    What `make` raises is raised in its turn. Closing the generator, or an exception while it waits, ends the threads after the items they are at.
    """
    waiting: deque[Future[Made]] = deque()
    remaining = iter(items)
    pool = ThreadPoolExecutor(threads, thread_name_prefix="ahead")
    end = weakref.finalize(waiting, pool.shutdown, wait=True, cancel_futures=True)  # at exit too: a generator left open is closed after modules are gone
    try:
        waiting.extend(pool.submit(make, item) for item in itertools.islice(remaining, 2 * threads if depth is None else depth))
        while waiting:
            made = waiting.popleft().result()
            waiting.extend(pool.submit(make, item) for item in itertools.islice(remaining, 1))
            yield made
    finally:
        end()


def gather_ahead(
    store: Store, requests: Iterable[Request], *, threads: int = 2, depth: int = 4, allocate: Allocate = np.empty, coming: Iterable[Request] = ()
) -> Generator[Arrays, None, None]:
    """Yield {array: its rows [B, ...]} for requests {array: rows [B]}, in their order, gathered by `threads` threads at most `depth` requests ahead.

    The arrays of a request are valid until the next is asked for: they lie in depth + 1 sets of buffers, made by `allocate(shape, dtype)` (of pinned memory,
    say), which grow to the largest batch. With the n-th request the rows of the n-th of `coming` are announced to the kernel (see `Batches.coming`).
    Raises what `Store.gather` raises, at the request that caused it.
    """
    if depth < 1:
        raise ValueError(f"depth must be at least 1, found {depth}")
    buffers: list[Arrays] = [{} for _ in range(depth + 1)]

    def gather(item: tuple[int, Request, Request]) -> Arrays:
        number, request, soon = item
        for name, rows in soon.items():
            will_need(store, name, rows)
        return {name: _gather_into(store, name, np.asarray(rows), buffers[number % len(buffers)], allocate) for name, rows in request.items()}

    nothing: Iterator[Request] = itertools.repeat({})
    return read_ahead(gather, zip(itertools.count(), requests, itertools.chain(coming, nothing), strict=False), threads, depth)


def will_need(store: Store, name: str, rows: npt.ArrayLike) -> None:
    """Announce the chunks of rows (of the plain view) to the kernel, or their shards to the cache of a store that is elsewhere.

    A hint only: damage and failures are left to the gather, and the place of compressed chunks is a guess.
    """
    if name not in store.arrays:
        return
    store, rows = store.located(name, rows)
    spec, supply = store.arrays[name], store._manifest.supply
    if supply is not None:
        shards, first = np.unique(np.asarray(rows, np.int64) % max(spec.shape[0], 1) // spec.shard[0], return_index=True)
        paths = [spec.shard_path(number) for number in shards[np.argsort(first)].tolist()]
        supply.announce({path: store._manifest.files[path] for path in paths if path in store._manifest.files})
    if supply is not None or not hasattr(os, "posix_fadvise"):
        return
    blocks = np.unique(np.asarray(rows, np.int64) % max(spec.shape[0], 1) // spec.chunk[0])
    blocks_per_shard = spec.shard[0] // spec.chunk[0]
    for number in np.unique(blocks // blocks_per_shard).tolist():
        start, stop = spec.shard_rows(number)
        path, used = spec.shard_path(number), -(-(stop - start) // spec.chunk[0]) * spec.views
        with contextlib.suppress(DamagedStore, OSError), store._manifest.open(path) as fd:
            stride = (os.fstat(fd).st_size - index_bytes(spec)) / used
            for place in (blocks[blocks // blocks_per_shard == number] % blocks_per_shard * spec.views).tolist():
                os.posix_fadvise(fd, int(place * stride), int(stride), os.POSIX_FADV_WILLNEED)


def stop_fetching(store: Store, name: str) -> None:
    """End the transfers of the store that holds an array, if it is elsewhere: whoever waits for one of its files gets Interrupted."""
    supply = store.located(name, np.empty(0, np.int64))[0]._manifest.supply
    if supply is not None:
        supply.stop()


def _gather_into(store: Store, name: str, rows_B: npt.NDArray[Any], buffers: Arrays, allocate: Allocate) -> npt.NDArray[Any]:
    store.require(name)
    spec = store.arrays[name]
    if name not in buffers or len(buffers[name]) < len(rows_B):
        buffers[name] = allocate((len(rows_B), *spec.row_shape), np.dtype(spec.dtype).newbyteorder("<"))
    return store.gather(name, rows_B, out=buffers[name][: len(rows_B)])

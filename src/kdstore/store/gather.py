"""Gathering rows of one array straight from its shards.

Small plain chunks (embeddings) are mapped and copied by address; big or compressed ones (tokens), and all of them where mapping is
not safe, are read with preadv. One table per array says where each inner chunk lies and, by being filled only after the chunk's
crc32c agreed with the manifest's, which chunks have been checked: later epochs pay nothing but a look at the last four bytes of
each shard, after its rows were copied, which a file cut in the meantime no longer has.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import threading
import time
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from kdstore.errors import DamagedStore
from kdstore.store.kernel import COPIED, UNKNOWN, Int64, copy_rows
from kdstore.store.layout import BLOSC, PLAIN, ZSTD, ArraySpec, rows_said
from kdstore.store.manifest import RESTORE, Manifest, let_go
from kdstore.store.mapping import CAN_MAP, guard, map_file, will_need
from kdstore.store.shard import CRC_BYTES, Bytes, crc32c, decode_chunk, decode_chunk_with_zarr, index_bytes, parse_index

MAPPED_CHUNK_BYTES = 1 << 18  # larger chunks gain nothing from a mapping
OPEN_SHARDS = 128
PIECE_BYTES = 320_000  # threads take such pieces of a batch in turn: who began late or shares its core takes fewer
THREAD_BYTES = 1_200_000  # a batch is worth a thread for each of these; with less, waking it costs more than it saves
DECODING_THREAD_BYTES = 1 << 18  # the same for chunks that must be decoded
LARGE_BYTES = 16 << 20  # whatever waking threads costs, a batch from here on is worth it
ROUND, TRIAL = 128, 12  # smaller ones: of so many gathers, so many try one thread, as many try several, and the rest do what was faster
MAX_THREADS = 16  # of one gather: memory gives no more
DECODED_HERE = (PLAIN, ZSTD, BLOSC)
PINNED = hasattr(os, "sched_setaffinity")  # Linux
_NEVER = 1 << 32  # no four bytes are this seal

T = TypeVar("T")


class ArrayReader:
    """Gathers (row, view) pairs of one array; any number of threads may call it at once."""

    def __init__(self, manifest: Manifest, spec: ArraySpec) -> None:
        self._manifest = manifest
        self._spec = spec
        self._crcs = manifest.load(spec.checks_path, spec.num_chunks, "<u4")
        self._remote = manifest.supply is not None  # its files may go when nobody reads them, so none stays mapped or open
        self._mapped = CAN_MAP and not self._remote and spec.codecs == PLAIN and spec.chunk[0] * spec.row_bytes <= MAPPED_CHUNK_BYTES
        self._addresses = np.zeros(spec.num_chunks if self._mapped else 0, np.uint64)  # of mapped chunks; 0 = not yet checked
        self._checked = np.zeros(0 if self._mapped else spec.num_chunks, bool)
        self._ends = np.zeros(spec.num_shards if self._mapped else 0, np.uint64)  # addresses of the last four bytes
        self._pace = _Pace()
        self._seals = np.zeros(spec.num_shards, np.uint64)  # what these bytes must be
        self._indices: dict[int, Int64] = {}
        self._maps: dict[int, Bytes] = {}
        self._open: weakref.WeakValueDictionary[int, _Descriptor] = weakref.WeakValueDictionary()
        self._recent: OrderedDict[int, _Descriptor] = OrderedDict()

    def gather(self, rows: npt.ArrayLike, views: npt.ArrayLike | None, out: npt.NDArray[Any] | None) -> npt.NDArray[Any]:
        """Do what `Store.gather` says."""
        rows_B = integers(rows, "row")
        views_B = self._views(views, len(rows_B))
        out = self._output(len(rows_B), out)
        if not len(rows_B) or (self._mapped and self._copy_mapped(rows_B, views_B, out)):
            return out  # once all chunks were checked, a gather ends here
        rows_B, views_B = wrapped(rows_B, self._spec.shape[0], "row"), wrapped(views_B, self._spec.views, "view")
        chunks_B = rows_B // self._spec.chunk[0] * self._spec.views + views_B
        if self._mapped:
            self._check_mapped(chunks_B)
            copied = self._copy_mapped(rows_B, views_B, out)
            assert copied
        elif self._remote:
            self._read_by_shard(chunks_B, rows_B % self._spec.chunk[0] * self._spec.row_bytes, _as_bytes(out))
        else:
            self._read(chunks_B, rows_B % self._spec.chunk[0] * self._spec.row_bytes, _as_bytes(out))
        return out

    def _views(self, views: npt.ArrayLike | None, size: int) -> Int64:
        if views is None:
            return np.zeros(size, np.int64)
        if not self._spec.has_views:
            raise ValueError(f"{self._spec.name} has no views")
        return integers(np.broadcast_to(views, (size,)), "view")

    def _output(self, size: int, out: npt.NDArray[Any] | None) -> npt.NDArray[Any]:
        shape, dtype = (size, *self._spec.row_shape), np.dtype(self._spec.dtype).newbyteorder("<")
        if out is None:
            return np.empty(shape, dtype)
        if out.shape != shape or out.dtype != dtype or not out.flags.c_contiguous or not out.flags.writeable:
            raise ValueError(f"out must be a writable C-contiguous array {shape} {dtype}, found {out.shape} {out.dtype}")
        return out

    def _copy_mapped(self, rows_B: Int64, views_B: Int64, out: npt.NDArray[Any]) -> bool:
        """Copy all rows if all indices are in bounds and all their chunks were checked before; raises DamagedStore if a shard was cut."""
        guard()
        rows, views = self._spec.shape[0], self._spec.views
        chunk_shift, shard_shift = self._spec.chunk[0].bit_length() - 1, self._spec.shard[0].bit_length() - 1
        target = _as_bytes(out)

        def copy(start: int, stop: int) -> int:
            part = slice(start, stop)
            return copy_rows(rows_B[part], views_B[part], self._addresses, self._ends, self._seals, rows, views, chunk_shift, shard_shift, target[part])

        results = self._pace.run(copy, target)
        if max(results) > COPIED:
            raise self._cut(max(results))
        return UNKNOWN not in results

    def _check_mapped(self, chunks_B: Int64) -> None:
        """Check the chunks that were not checked yet and enter their addresses."""
        chunks = np.unique(chunks_B[self._addresses[chunks_B] == 0])
        shards = chunks // self._spec.chunks_per_shard
        apart = np.flatnonzero((np.diff(chunks) != 1) | (np.diff(shards) != 0)) + 1
        for run in np.split(chunks, apart) if len(chunks) else ():
            (begin, _), (end, length) = self._extent(int(run[0])), self._extent(int(run[-1]))
            will_need(self._maps[int(run[0]) // self._spec.chunks_per_shard][begin : end + length])
        for chunk in chunks.tolist():
            self._addresses[chunk] = self._checked_payload(chunk).ctypes.data

    def _read_by_shard(self, chunks_B: Int64, starts_B: Int64, out: Bytes) -> None:
        """Read one shard after the other: whoever waits for room in a cache holds none of its files, so nobody waits for ever."""
        assert self._manifest.supply is not None
        shards_B = chunks_B // self._spec.chunks_per_shard
        numbers = np.unique(shards_B).tolist()
        paths = [self._spec.shard_path(number) for number in numbers[1:]]
        self._manifest.supply.announce({path: self._manifest.entry(path) for path in paths})
        for number in numbers:
            part = np.flatnonzero(shards_B == number)
            held = _Descriptor(self._manifest.descriptor(self._spec.shard_path(number)))  # may take a download, so not under the lock
            with _opening:
                self._open[number] = held
            rows = np.empty((len(part), out.shape[1]), np.uint8)
            self._read(chunks_B[part], starts_B[part], rows)
            out[part] = rows
            del held

    def _read(self, chunks_B: Int64, starts_B: Int64, out: Bytes) -> None:
        """Read row after row in the order of the file; a chunk that must be decoded or checked is so once for all of its rows."""
        order = np.argsort(chunks_B, kind="stable")

        def read(start: int, stop: int) -> None:
            decoded, raw = -1, np.empty(0, np.uint8)
            for i in order[start:stop].tolist():
                chunk, begin = int(chunks_B[i]), int(starts_B[i])
                if chunk == decoded:
                    out[i] = raw[begin : begin + out.shape[1]]
                elif self._spec.codecs == PLAIN and self._checked[chunk]:
                    offset, _ = self._extent(chunk)
                    self._read_into(chunk, out[i], offset + begin)
                else:
                    decoded, raw = chunk, self._decoded(chunk)
                    out[i] = raw[begin : begin + out.shape[1]]

        plain = self._spec.codecs == PLAIN
        if plain:
            _in_pieces(read, _bounds(out, threads := _threads(out, THREAD_BYTES)), threads)
        elif self._spec.codecs in DECODED_HERE:
            begins = np.flatnonzero(np.diff(chunks_B[order], prepend=-1))  # a piece begins with a chunk, which is decoded once
            bounds = _bounds(out, threads := _threads(out, DECODING_THREAD_BYTES))
            snapped = [0, *np.unique(begins[np.searchsorted(begins, bounds[1:-1], side="right") - 1]).tolist(), len(out)]
            _in_pieces(read, list(dict.fromkeys(snapped)), threads)
        else:
            read(0, len(out))  # zarr has threads of its own
        if plain:  # others were compared with their crc32c after they were read
            for number in np.unique(chunks_B // self._spec.chunks_per_shard).tolist():
                descriptor = self._descriptor(number)  # held while it is read
                end = os.pread(descriptor.fd, CRC_BYTES, self._manifest.entry(self._spec.shard_path(number)).size - CRC_BYTES)
                if len(end) < CRC_BYTES or int.from_bytes(end, "little") != self._seals[number]:
                    raise self._cut(number)

    def _decoded(self, chunk: int) -> Bytes:
        payload = self._checked_payload(chunk)
        try:
            if self._spec.codecs in DECODED_HERE:
                raw = decode_chunk(self._spec, payload)
            else:
                raw = decode_chunk_with_zarr(self._spec, self._manifest.content["arrays"][self._spec.name], payload)
        except ValueError as e:
            raise self._damaged(chunk, f"does not decode ({e})") from e
        self._checked[chunk] = True
        return raw

    def _checked_payload(self, chunk: int) -> Bytes:
        """Return the encoded bytes of a chunk without their trailer, both compared with the crc32c that the manifest's file expects."""
        offset, length = self._extent(chunk)
        number = chunk // self._spec.chunks_per_shard
        if self._mapped:
            encoded = self._maps[number][offset : offset + length]
        else:
            encoded = np.empty(length, np.uint8)
            self._read_into(chunk, encoded, offset)
        payload, trailer = encoded[:-CRC_BYTES], encoded[-CRC_BYTES:]
        expected = int(self._crcs[chunk])
        if crc32c(payload) != expected or int.from_bytes(trailer.tobytes(), "little") != expected:
            raise self._damaged(chunk, "does not match its crc32c")
        return payload

    def _extent(self, chunk: int) -> tuple[int, int]:
        """Return (offset, length with trailer) of a chunk in its shard."""
        number, place = divmod(chunk, self._spec.chunks_per_shard)
        index = self._indices.get(number)
        if index is None:
            index = self._open_shard(number)
        return int(index[place, 0]), int(index[place, 1])

    def _open_shard(self, number: int) -> Int64:
        """Read a shard's index, once, and map the shard if this array is mapped; raises DamagedStore."""
        with _opening:
            if number not in self._indices:
                path = self._spec.shard_path(number)
                entry, where = self._manifest.entry(path), self._manifest.where(path)
                if self._spec.codecs == PLAIN and entry.size != self._spec.plain_shard_bytes(number):
                    raise DamagedStore(
                        f"{where} is listed with {entry.size} bytes, its shape needs {self._spec.plain_shard_bytes(number)}{entry.said()}.", RESTORE
                    )
                if entry.size < index_bytes(self._spec):
                    raise DamagedStore(f"{where} is shorter than a shard's index{entry.said()}.", RESTORE)
                with self._manifest.open(path) as fd:
                    content = os.pread(fd, index_bytes(self._spec), entry.size - index_bytes(self._spec))
                    index = parse_index(self._spec, number, content, entry.size, str(where))
                    self._seals[number] = int.from_bytes(content[-CRC_BYTES:], "little")
                    if self._mapped:
                        self._maps[number] = map_file(self, fd, entry.size)
                        self._ends[number] = self._maps[number][-CRC_BYTES:].ctypes.data
                self._indices[number] = index
            return self._indices[number]

    def _descriptor(self, number: int) -> _Descriptor:
        """Return the open descriptor of a shard; one that falls out of the table is closed when its last reader lets go."""
        with _opening:
            descriptor = self._open.get(number)
            if descriptor is None:
                descriptor = self._open[number] = _Descriptor(self._manifest.descriptor(self._spec.shard_path(number)))
            if not self._remote:
                self._recent[number] = descriptor
                self._recent.move_to_end(number)
                if len(self._recent) > OPEN_SHARDS:
                    self._recent.popitem(last=False)
            return descriptor

    def _read_into(self, chunk: int, target: Bytes, offset: int) -> None:
        descriptor = self._descriptor(chunk // self._spec.chunks_per_shard)
        done = 0
        while done < len(target):
            read = os.preadv(descriptor.fd, [target[done:].data], offset + done)
            if read == 0:
                raise self._damaged(chunk, "ends early")
            done += read

    def _damaged(self, chunk: int, what: str) -> DamagedStore:
        path = self._manifest.where(self._spec.shard_path(chunk // self._spec.chunks_per_shard))
        start = chunk // self._spec.views * self._spec.chunk[0]
        stop = min(start + self._spec.chunk[0], self._spec.shape[0])
        return DamagedStore(f"{path}: the chunk of {rows_said(start, stop)} {what}.", self._manifest.restore)

    def _cut(self, number: int) -> DamagedStore:
        """Say that a shard is not what it was when it was opened, now and for every later row of it."""
        self._seals[number] = _NEVER
        path = self._spec.shard_path(number)
        start, stop = self._spec.shard_rows(number)
        return DamagedStore(f"{self._manifest.where(path)} was cut or replaced while it was read ({rows_said(start, stop)}).", self._manifest.restore)


class _Descriptor:
    """A file descriptor that is closed with its last reference."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        weakref.finalize(self, let_go, fd).atexit = False


def integers(indices: npt.ArrayLike, what: str) -> Int64:
    """Return a contiguous, writable copy of indices as int64 [B], as the compiled loop takes them; raises IndexError."""
    array = np.asarray(indices)
    if array.ndim != 1 or (array.dtype.kind not in "iu" and array.size):
        raise IndexError(f"{what}s must be a one-dimensional list of integers, found {array.dtype} of shape {array.shape}")
    return np.array(array, np.int64)


def wrapped(indices_B: Int64, size: int, what: str) -> Int64:
    """Return indices in 0..size-1, negative ones counted from the end; raises IndexError."""
    outside = indices_B[(indices_B < -size) | (indices_B >= size)]
    if len(outside):
        raise IndexError(f"{what} {outside[0]} is out of bounds for {size} {what}s")
    return np.where(indices_B < 0, indices_B + size, indices_B)


def _as_bytes(out: npt.NDArray[Any]) -> Bytes:
    return out.reshape(len(out), -1).view(np.uint8)


_libc = ctypes.CDLL(None)
_opening = threading.Lock()
_helpers: dict[int, ThreadPoolExecutor] = {}


class _Pace:
    """Finds out whether threads are worth waking for a batch: a core that slept, or has other work, begins so late that one alone ends sooner."""

    def __init__(self) -> None:
        self._gathers = 0
        self._seconds = [0.0, 0.0]  # per byte, lately: alone, in threads

    def run(self, copy: Callable[[int, int], int], out: Bytes) -> list[int]:
        threads = _threads(out, THREAD_BYTES)
        if threads == 1 or out.nbytes >= LARGE_BYTES:
            return _in_pieces(copy, _bounds(out, threads), threads)
        trial = self._gathers % ROUND // TRIAL  # several in a row: a core that is woken often wakes sooner
        together = bool(trial) if trial < 2 else self._seconds[True] < self._seconds[False]
        start = time.perf_counter()
        results = _in_pieces(copy, _bounds(out, threads if together else 1), threads if together else 1)
        if set(results) == {COPIED}:
            self._gathers += 1
            self._seconds[together] += ((time.perf_counter() - start) / out.nbytes - self._seconds[together]) / 4
        return results


def _threads(out: Bytes, thread_bytes: int) -> int:
    wanted = min(out.nbytes // thread_bytes, MAX_THREADS)
    return 1 if wanted < 2 else min(wanted, len(_cpus()))


def _bounds(out: Bytes, threads: int) -> list[int]:
    """Return where the pieces of a batch begin, and its end."""
    if threads == 1:
        return [0, len(out)]
    rounds = max(1, out.nbytes // PIECE_BYTES // threads)
    count = min(rounds * threads + 1, len(out))  # the one more is for the calling thread: another would have to wake it
    return [len(out) * i // count for i in range(count + 1)]


def _in_pieces(work: Callable[[int, int], T], bounds: list[int], threads: int) -> list[T]:
    """Call `work(start, stop)` for all pieces between bounds, on up to `threads` threads of which this is one, and return the results."""
    pieces = iter(list(itertools.pairwise(bounds)))  # one iterator for all threads: a piece goes to who asks first

    def take() -> list[T]:
        try:
            return [work(start, stop) for start, stop in pieces]
        finally:
            deque(pieces, maxlen=0)  # after an exception nobody begins another

    others: list[Future[list[T]]] = []
    try:
        with suppress(RuntimeError):  # no thread can be started, or none any more: those that run do it all
            others.extend(_helper(cpu).submit(take) for cpu in (_other_cpus()[: threads - 1] if threads > 1 else ()))
        results = take()
    finally:
        started = [future for future in others if not future.cancel()]
        wait(started)  # nobody may write into `out` after this function has ended
    return [*results, *(result for future in started for result in future.result())]


def _cpus() -> list[int]:
    return sorted(os.sched_getaffinity(0)) if PINNED else list(range(os.cpu_count() or 1))


def _other_cpus() -> list[int]:
    """Return the processors that this thread may use but is not on, the next one first."""
    here, cpus = _libc.sched_getcpu() if PINNED else 0, _cpus()
    return [cpu for cpu in cpus if cpu > here] + [cpu for cpu in cpus if cpu < here]


def _helper(cpu: int) -> ThreadPoolExecutor:
    """Return the thread of a processor. It stays there: the kernel often wakes a thread on the very processor that it is to relieve."""
    with _opening:
        if cpu not in _helpers:
            _helpers[cpu] = ThreadPoolExecutor(1, f"gather-{cpu}", _stay_on, (cpu,))
        return _helpers[cpu]


def _stay_on(cpu: int) -> None:
    with suppress(OSError):  # taken from this process since
        if PINNED:
            os.sched_setaffinity(0, {cpu})


def _after_fork() -> None:
    """Threads and held locks do not survive a fork; maps, tables and descriptors do."""
    global _opening, _helpers
    _opening, _helpers = threading.Lock(), {}


os.register_at_fork(after_in_child=_after_fork)

"""Tables and numbers in unnamed files instead of in memory: mapped, so that pages come and go and a run over 100 M rows needs no more memory than one over a
thousand. The files vanish with the tables, and with the process."""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from kdstore.jsonfile import disk_errors

Int64 = npt.NDArray[np.int64]
_AT_ONCE = 1 << 20  # numbers
_KEYS = 1 << 16  # that are Python objects at once


def unnamed_file(folder: Path | None) -> IO[bytes]:
    """Open a file without a name in `folder`, or where temporary files go if that is None or cannot be written to; raises DiskFull, CannotWrite."""
    folder = folder if folder is not None and os.access(folder, os.W_OK) else Path(tempfile.gettempdir())
    with disk_errors(folder):
        return tempfile.TemporaryFile(dir=folder)


def mapped_table(batches: Iterable[pa.RecordBatch], schema: pa.Schema, folder: Path | None = None) -> pa.Table:
    """Return the table of all batches, none of it in memory; raises DiskFull, CannotWrite, and what making the batches raises."""
    with unnamed_file(folder) as f:
        write_batches(f, batches, schema, folder or Path(tempfile.gettempdir()))
        table = map_table(f)
    pa.default_memory_pool().release_unused()  # what making them has taken
    return table


def write_batches(file: IO[bytes], batches: Iterable[pa.RecordBatch], schema: pa.Schema, where: Path) -> None:
    """Write an Arrow file; raises DiskFull, CannotWrite, and what making the batches raises."""
    with pa.ipc.new_file(file, schema) as writer:
        for batch in batches:
            with disk_errors(where):
                writer.write_batch(batch)
        with disk_errors(where):
            writer.close()
            file.flush()


def map_table(file: IO[bytes]) -> pa.Table:
    """Map an Arrow file; raises ArrowInvalid for a file that is none, and ValueError for an empty one."""
    reader = pa.ipc.open_file(pa.py_buffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)))
    return pa.Table.from_batches([reader.get_batch(i) for i in range(reader.num_record_batches)], reader.schema)


def mapped_int64(count: int, folder: Path | None) -> Int64:
    """Return `count` zeros in a mapped file; raises DiskFull, CannotWrite."""
    if not count:
        return np.zeros(0, np.int64)
    with disk_errors(folder or Path(tempfile.gettempdir())), unnamed_file(folder) as f:
        os.posix_fallocate(f.fileno(), 0, 8 * count)  # a full disk is an error here, and would be a signal later
        return np.asarray(np.memmap(f, np.int64, "r+", shape=(count,)))


def repeated_hashes(keys: pa.ChunkedArray, folder: Path | None = None) -> Int64:
    """Return the hashes, as `hash` gives them in this process, that more than one of the keys has; raises DiskFull, CannotWrite."""
    spans = (keys[start : start + _KEYS].to_pylist() for start in range(0, len(keys), _KEYS))
    return repeats((np.fromiter(map(hash, span), np.int64, len(span)) for span in spans), len(keys), folder)


def repeats(parts: Iterable[Int64], count: int, folder: Path | None = None) -> Int64:
    """Return each of at most `count` values that came before, as often as it did, ascending; raises DiskFull, CannotWrite."""
    held, filled = mapped_int64(count, folder), 0
    for part in parts:
        held[filled : filled + len(part)] = part
        filled += len(part)
    values = held[:filled]
    values.sort()
    spans = (values[start : start + _AT_ONCE + 1] for start in range(0, filled, _AT_ONCE))
    return np.concatenate([np.zeros(0, np.int64), *(span[1:][span[1:] == span[:-1]] for span in spans)])

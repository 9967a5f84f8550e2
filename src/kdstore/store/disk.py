"""Numbers of which there is one per row, in unnamed mapped files as the tables of data/mapped.py."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from kdstore.data.mapped import unnamed_file
from kdstore.jsonfile import disk_errors

Int64 = npt.NDArray[np.int64]
_AT_ONCE = 1 << 20


def mapped_int64(count: int, folder: Path | None) -> Int64:
    """Return `count` zeros in a mapped file; raises DiskFull, CannotWrite."""
    if not count:
        return np.zeros(0, np.int64)
    with disk_errors(folder or Path(tempfile.gettempdir())), unnamed_file(folder) as f:
        os.posix_fallocate(f.fileno(), 0, 8 * count)  # a full disk is an error here, and would be a signal later
        return np.asarray(np.memmap(f, np.int64, "r+", shape=(count,)))


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

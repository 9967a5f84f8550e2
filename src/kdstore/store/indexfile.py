"""Reading one column of an index file, which a stranger may have written to burst.

`kdstore.parquet` bounds what is decoded; besides, texts stay a dictionary until it is known how long they are together.
"""

from __future__ import annotations

import os

import pyarrow as pa
import pyarrow.compute as pc

from kdstore.errors import DamagedStore
from kdstore.parquet import REFUSALS, bounded_column, first_line, is_text, open_parquet
from kdstore.store.manifest import RESTORE, Manifest

ROW_BYTES = 1 << 14  # what a row may take in one column, on average
SLACK_BYTES = 1 << 24  # and what a file of few rows may take beyond
TEXTS = ("key", "sha256", "reason", "kind", "caption")  # columns of texts; all others are of integers


def read_column(manifest: Manifest, path: str, column: str) -> pa.ChunkedArray:
    """Return one column of a listed index file, its sha256 compared; raises DamagedStore, and allocates no more than 16 KiB per row and 16 MiB."""
    start, stop = manifest.entry(path).rows or (0, 0)
    limit = (stop - start) * ROW_BYTES + SLACK_BYTES
    content = manifest.read(path, limit)
    try:
        file = open_parquet(pa.BufferReader(content), stop - start, limit, [column])
        values = bounded_column(file, content, column, limit, is_text if column in TEXTS else pa.types.is_integer)
        return _dense(values, limit) if pa.types.is_dictionary(values.type) else values
    except REFUSALS as e:
        raise DamagedStore(f"{manifest.where(path)} has no column {column} that can be read ({first_line(e)}).", RESTORE) from e


def check_rows(manifest: Manifest, path: str, fd: int) -> None:
    """Raise DamagedStore unless the footer of a listed index file, open as `fd`, says as many rows as the manifest."""
    start, stop = manifest.entry(path).rows or (0, 0)
    with os.fdopen(fd, "rb", closefd=False) as f:
        try:
            open_parquet(f, stop - start, (stop - start) * ROW_BYTES + SLACK_BYTES)
        except REFUSALS as e:
            raise DamagedStore(f"{manifest.where(path)} is not an index file ({first_line(e)}).", RESTORE) from e


def _dense(values: pa.ChunkedArray, limit: int) -> pa.ChunkedArray:
    """Write texts out of their dictionary unless that takes more than `limit` bytes."""
    size = 0
    for chunk in values.chunks:
        size += pc.sum(pc.take(pc.binary_length(chunk.dictionary), chunk.indices)).as_py() or 0
    if size > limit:
        raise ValueError(f"its texts hold more than {limit} bytes")
    return values.cast(values.type.value_type)

"""Reading one column of an index file, which a stranger may have written to burst.

Parquet says its sizes twice, in the footer and before every page, and Arrow allocates what it reads there; equal values are stored
once and multiply when they are decoded. So the footer is compared with the rows that the manifest says, the pages' own sizes are
walked before Arrow sees them, and texts stay a dictionary until it is known how long they are together.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from kdstore.errors import DamagedStore
from kdstore.store.manifest import RESTORE, Manifest

ROW_BYTES = 1 << 14  # what a row may take in one column, on average
SLACK_BYTES = 1 << 24  # and what a file of few rows may take beyond
TEXTS = ("key", "sha256", "reason", "kind", "caption")  # columns of texts; all others are of integers
_REFUSALS = (pa.ArrowException, LookupError, ValueError, OSError)  # Arrow's own are some of each
_INTEGERS, _NO_BYTES, _FIXED, _BINARY, _STRUCT = (4, 5, 6), (1, 2), {3: 1, 7: 8}, 8, 12  # types of thrift's compact protocol


def read_column(manifest: Manifest, path: str, column: str) -> pa.ChunkedArray:
    """Return one column of a listed index file, its sha256 compared; raises DamagedStore, and allocates no more than 16 KiB per row and 16 MiB."""
    start, stop = manifest.entry(path).rows or (0, 0)
    limit = (stop - start) * ROW_BYTES + SLACK_BYTES
    content = manifest.read(path, limit)
    try:
        file = _open(pa.BufferReader(content), stop - start, limit, [column])
        metadata = file.metadata
        place = metadata.schema.names.index(column)
        if len(set(metadata.schema.names)) != len(file.schema_arrow.names) or not _is_flat(file.schema_arrow.field(column).type, column in TEXTS):
            raise ValueError("it is not of the type that the format says")
        chunks = [metadata.row_group(group).column(place) for group in range(metadata.num_row_groups)]
        if sum(_decoded_bytes(content, chunk, limit) for chunk in chunks) > limit:
            raise ValueError(f"its pages hold more than {limit} bytes")
        values = file.read(columns=[column], use_threads=False)[column]
        if values.null_count:
            raise ValueError("it has rows without a value")
        return _dense(values, limit) if pa.types.is_dictionary(values.type) else values
    except _REFUSALS as e:
        raise DamagedStore(f"{manifest.root / path} has no column {column} that can be read ({_line(e)}).", RESTORE) from e


def check_rows(manifest: Manifest, path: str, fd: int) -> None:
    """Raise DamagedStore unless the footer of a listed index file, open as `fd`, says as many rows as the manifest."""
    start, stop = manifest.entry(path).rows or (0, 0)
    with os.fdopen(fd, "rb", closefd=False) as f:
        try:
            _open(f, stop - start, (stop - start) * ROW_BYTES + SLACK_BYTES)
        except _REFUSALS as e:
            raise DamagedStore(f"{manifest.root / path} is not an index file ({_line(e)}).", RESTORE) from e


def _open(stream: Any, rows: int, limit: int, dictionaries: Sequence[str] = ()) -> pq.ParquetFile:
    file = pq.ParquetFile(stream, read_dictionary=dictionaries, thrift_string_size_limit=limit, thrift_container_size_limit=1 << 16)
    if file.metadata.num_rows != rows:
        raise ValueError(f"it holds {file.metadata.num_rows} rows, expected {rows}")
    return file


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:200]


def _is_flat(kind: pa.DataType, text: bool) -> bool:
    if not text:
        return pa.types.is_integer(kind)
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or (pa.types.is_dictionary(kind) and _is_flat(kind.value_type, text))


def _dense(values: pa.ChunkedArray, limit: int) -> pa.ChunkedArray:
    """Write texts out of their dictionary unless that takes more than `limit` bytes."""
    size = 0
    for chunk in values.chunks:
        size += pc.sum(pc.take(pc.binary_length(chunk.dictionary), chunk.indices)).as_py() or 0
    if size > limit:
        raise ValueError(f"its texts hold more than {limit} bytes")
    return values.cast(values.type.value_type)


def _decoded_bytes(content: bytes, chunk: Any, limit: int) -> int:
    """Add up the decoded sizes that stand before the pages of a column chunk (thrift's compact protocol: parquet.thrift, PageHeader)."""
    at = chunk.dictionary_page_offset if chunk.has_dictionary_page else chunk.data_page_offset
    end, total = at + chunk.total_compressed_size, 0
    if not 0 <= at <= end <= len(content):
        raise ValueError("a page lies outside the file")
    while at < end and total <= limit:
        header, at = _thrift_struct(content, at)
        decoded, encoded = header.get(2), header.get(3)  # uncompressed_page_size, compressed_page_size
        if decoded is None or encoded is None or decoded < 0 or encoded < 0:
            raise ValueError("a page has no size")
        total, at = total + decoded, at + encoded
    return total


def _thrift_struct(content: bytes, at: int, depth: int = 0) -> tuple[dict[int, int], int]:
    """Return the integer fields of a struct by their number, and where it ends; raises IndexError or ValueError."""
    fields: dict[int, int] = {}
    number = 0
    while kind := content[at]:
        delta, kind, at = kind >> 4, kind & 15, at + 1
        if delta:
            number += delta
        else:
            value, at = _varint(content, at)
            number = value >> 1 ^ -(value & 1)
        if kind in _INTEGERS:
            value, at = _varint(content, at)
            fields[number] = value >> 1 ^ -(value & 1)
        else:
            at = _after(content, at, kind, depth)
    return fields, at + 1


def _after(content: bytes, at: int, kind: int, depth: int) -> int:
    """Return where a value that is no integer ends."""
    if depth > 8:
        raise ValueError("a page's header is nested too deep")
    if kind in _NO_BYTES:
        return at
    if kind in _FIXED:
        return at + _FIXED[kind]
    if kind == _BINARY:
        size, at = _varint(content, at)
        return at + size
    if kind == _STRUCT:
        return _thrift_struct(content, at, depth + 1)[1]
    raise ValueError("a page's header holds what no page has")


def _varint(content: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = content[at]
        value, shift, at = value | (byte & 127) << shift, shift + 7, at + 1
        if byte < 128:
            return value, at
        if shift > 63:
            raise ValueError("a page's header holds a number that is too long")

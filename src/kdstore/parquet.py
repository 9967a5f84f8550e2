"""Reading a column of a parquet file that a stranger may have written to burst.

Parquet says its sizes twice, in the footer and before every page, and Arrow allocates what it reads there; equal values are stored
once and multiply when they are decoded. So the footer is compared with the rows that are expected, and the pages' own sizes are
walked before Arrow sees them. What is refused is an error of `REFUSALS`, for the caller to say in its own words.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

REFUSALS = (pa.ArrowException, LookupError, ValueError, OSError)  # Arrow's own are some of each
_INTEGERS, _NO_BYTES, _FIXED, _BINARY, _STRUCT = (4, 5, 6), (1, 2), {3: 1, 7: 8}, 8, 12  # types of thrift's compact protocol


def open_parquet(stream: Any, rows: int, limit: int, dictionaries: Sequence[str] = ()) -> pq.ParquetFile:
    """Open a file of exactly `rows` rows, its footer at most `limit` bytes; the columns in `dictionaries` stay dictionaries when they are read."""
    file = pq.ParquetFile(stream, read_dictionary=dictionaries, thrift_string_size_limit=limit, thrift_container_size_limit=1 << 16)
    if file.metadata.num_rows != rows:
        raise ValueError(f"it holds {file.metadata.num_rows} rows, expected {rows}")
    return file


def bounded_column(file: pq.ParquetFile, content: bytes, name: str, limit: int, accepts: Callable[[pa.DataType], bool]) -> pa.ChunkedArray:
    """Return a column of the opened `content` that has a type which `accepts` takes, a value in every row, and pages of at most `limit` bytes."""
    metadata = file.metadata
    place = metadata.schema.names.index(name)
    if len(set(metadata.schema.names)) != len(file.schema_arrow.names) or not accepts(file.schema_arrow.field(name).type):
        raise ValueError("it is not of the type that the format says")
    chunks = [metadata.row_group(group).column(place) for group in range(metadata.num_row_groups)]
    if sum(_decoded_bytes(content, chunk, limit) for chunk in chunks) > limit:
        raise ValueError(f"its pages hold more than {limit} bytes")
    values = file.read(columns=[name], use_threads=False)[name]
    if values.null_count:
        raise ValueError("it has rows without a value")
    return values


def is_text(kind: pa.DataType) -> bool:
    """Whether a column holds texts, dictionary or not."""
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or (pa.types.is_dictionary(kind) and is_text(kind.value_type))


def first_line(error: Exception) -> str:
    """Return what an error of `REFUSALS` says, short."""
    return (str(error).splitlines() or [""])[0][:200]


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

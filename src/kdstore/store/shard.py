"""The bytes of one shard: a streaming writer, and the index and chunk decoding that readers share.

Zarr's sharding codec: inner chunks in any order, then a table of (offset, length) uint64 pairs, then its crc32c. zarr-python
rewrites a shard for every partial write and holds it whole; here chunk follows chunk in constant memory, hashed on the way.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt
from numcodecs import blosc
from numcodecs.zstd import Zstd

from kdstore.errors import DamagedStore
from kdstore.jsonfile import disk_error
from kdstore.store.layout import PLAIN, ZSTD, ArraySpec, rows_said

CRC_BYTES = 4
WRITE_BYTES = 4 << 20  # written at once and at multiples of it, so that the page cache may hold and map a shard in huge pages
_MISSING = 2**64 - 1
_ZSTD = Zstd(level=1, checksum=False)
Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class WrittenFile:
    """Size in bytes and sha256 (hex) of a file, taken while it was written."""

    size: int
    sha256: str


class HashedFile:
    """A new file in a folder that must be there, hashed as it is written; `close` makes it durable. All methods raise DiskFull or CannotWrite."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._sha256 = hashlib.sha256()
        self.size = 0
        try:
            self._file = open(path, "xb", buffering=WRITE_BYTES)  # noqa: SIM115 - closed by close or abandon
        except OSError as e:
            raise disk_error(e, path) from e

    def write(self, content: bytes | memoryview) -> None:
        room = WRITE_BYTES - self.size % WRITE_BYTES
        try:
            self._file.write(content[:room])
            self._file.write(content[room:])
        except OSError as e:
            raise disk_error(e, self._path) from e
        self._sha256.update(content)
        self.size += len(content)

    def close(self) -> WrittenFile:
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
        except OSError as e:
            raise disk_error(e, self._path) from e
        return WrittenFile(self.size, self._sha256.hexdigest())

    def abandon(self) -> None:
        """Close without caring whether the last bytes arrive."""
        with contextlib.suppress(OSError):
            self._file.close()


def write_file(path: Path, content: bytes) -> WrittenFile:
    """Write a new small file durably."""
    file = HashedFile(path)
    try:
        file.write(content)
        return file.close()
    finally:
        file.abandon()


class ShardWriter:
    """Writes shard `number` of an array from blocks of rows given in order."""

    def __init__(self, path: Path, spec: ArraySpec, number: int) -> None:
        self._spec = spec
        start, stop = spec.shard_rows(number)
        self._rows_left = stop - start
        self._file = HashedFile(path)
        self._buffer = np.empty((spec.chunk[0], *spec.shape[1:]), np.dtype(spec.dtype).newbyteorder("<"))
        self._buffered = 0
        self._index = np.full((spec.chunks_per_shard, 2), _MISSING, "<u8")
        self._crcs: list[int] = []

    def append(self, block: npt.NDArray[np.generic]) -> int:
        """Take as many leading rows of `block` [rows, ...] as this shard still needs; returns how many."""
        taken = min(len(block), self._rows_left)
        done = 0
        while done < taken:
            n = min(taken - done, len(self._buffer) - self._buffered)
            self._buffer[self._buffered : self._buffered + n] = block[done : done + n]
            self._buffered += n
            done += n
            if self._buffered == len(self._buffer):
                self._flush()
        self._rows_left -= taken
        return taken

    @property
    def full(self) -> bool:
        return self._rows_left == 0

    def close(self) -> tuple[WrittenFile, npt.NDArray[np.uint32]]:
        """End the shard (its last chunk padded with the fill value); returns the file and the crc32c of its chunks."""
        assert self.full, f"{self._rows_left} rows of the shard were never appended"
        if self._buffered:
            self._buffer[self._buffered :] = self._spec.fill
            self._flush()
        index = self._index.tobytes()
        self._file.write(index)
        self._file.write(crc32c(index).to_bytes(CRC_BYTES, "little"))
        return self._file.close(), np.array(self._crcs, "<u4")

    def abandon(self) -> None:
        self._file.abandon()

    def _flush(self) -> None:
        for view in range(self._spec.views):
            rows = np.ascontiguousarray(self._buffer[:, view]) if self._spec.has_views else self._buffer
            payload = rows.reshape(-1).view(np.uint8)
            encoded = payload if self._spec.codecs == PLAIN else np.frombuffer(_ZSTD.encode(payload), np.uint8)
            crc = crc32c(encoded)
            self._index[len(self._crcs)] = self._file.size, len(encoded) + CRC_BYTES
            self._file.write(encoded.data)
            self._file.write(crc.to_bytes(CRC_BYTES, "little"))
            self._crcs.append(crc)
        self._buffered = 0


def index_bytes(spec: ArraySpec) -> int:
    """Size of a shard's index with its crc32c, at the end of the file."""
    return spec.chunks_per_shard * 16 + CRC_BYTES


def parse_index(spec: ArraySpec, number: int, content: bytes, file_size: int, where: str) -> npt.NDArray[np.int64]:
    """Decode a shard's index to int64 [chunks, 2] (offset, length with trailer) of the chunks that hold rows; raises DamagedStore.

    Checked: the index's crc32c, that every chunk of the array is there, that it lies in the file, and for plain chunks its length.
    """
    start, stop = spec.shard_rows(number)
    hint = "Restore this file or extract its rows again."
    if crc32c(content[:-CRC_BYTES]) != int.from_bytes(content[-CRC_BYTES:], "little"):
        raise DamagedStore(f"{where}: the shard's index does not match its crc32c ({rows_said(start, stop)}).", hint)
    used = -(-(stop - start) // spec.chunk[0]) * spec.views
    index = np.frombuffer(content[:-CRC_BYTES], "<u8").reshape(-1, 2)[:used]
    offset, length = index[:, 0], index[:, 1]
    limit = np.uint64(file_size - len(content))
    inside = (offset <= limit) & (length <= limit) & (offset + np.minimum(length, limit) <= limit) & (length >= CRC_BYTES)
    decoded = spec.chunk[0] * spec.row_bytes
    inside &= length == decoded + CRC_BYTES if spec.codecs == PLAIN else length <= decoded + decoded // 64 + 4096  # no compressor adds as much
    if not inside.all():
        first = start + int(np.argmin(inside)) // spec.views * spec.chunk[0]
        raise DamagedStore(f"{where}: the chunk of row {first} is missing or lies outside the file ({rows_said(start, stop)}).", hint)
    return index.astype(np.int64)


def decode_chunk(spec: ArraySpec, payload: Bytes) -> Bytes:
    """Return the raw bytes of a checked chunk [chunk rows * row_bytes] from its encoded form without trailer; raises ValueError."""
    if spec.codecs == PLAIN:
        return payload
    _refuse_other_size(spec, payload)
    raw = np.empty(spec.chunk[0] * spec.row_bytes, np.uint8)
    try:
        (_ZSTD.decode if spec.codecs == ZSTD else blosc.decompress)(payload, raw)
    except RuntimeError as e:  # what numcodecs raises for a damaged frame
        raise ValueError(str(e)) from e
    return raw


def decode_chunk_with_zarr(spec: ArraySpec, metadata: dict[str, Any], payload: Bytes) -> Bytes:
    """Do as `decode_chunk` for the chains of `metadata` (a `zarr.json`) that it does not know.

    zarr-python gets the checked bytes as the one chunk of an array in memory, so that it can neither read other bytes nor put fill in their place.
    """
    import zarr  # here: a seventh of the time that all else takes to import, for chains that hardly any store has
    from zarr.buffer import default_buffer_prototype

    _refuse_other_size(spec, payload)
    chunk = {"name": "regular", "configuration": {"chunk_shape": spec.chunk}}
    codecs = metadata["codecs"][0]["configuration"]["codecs"][:-1]  # the trailer is off
    described = json.dumps({**metadata, "shape": spec.chunk, "chunk_grid": chunk, "codecs": codecs}).encode()
    contents = {"zarr.json": described, "/".join(["c", *("0" for _ in spec.chunk)]): payload.tobytes()}
    try:
        store = zarr.storage.MemoryStore({name: default_buffer_prototype().buffer.from_bytes(content) for name, content in contents.items()})
        values = zarr.open_array(store, mode="r")[...]
    except (ValueError, TypeError, LookupError, RuntimeError, OSError) as e:  # also for a chain whose configuration is not one
        raise ValueError(str(e)) from e
    return np.ascontiguousarray(values, np.dtype(spec.dtype).newbyteorder("<")).reshape(-1).view(np.uint8)


def _refuse_other_size(spec: ArraySpec, payload: Bytes) -> None:
    """Raise ValueError unless a compressed chunk says that it holds a chunk's bytes, before anything is allocated for them."""
    expected, compressor = spec.chunk[0] * spec.row_bytes, spec.codecs[-2]
    found = len(payload)
    if compressor == "zstd":
        found = zstd_content_size(payload)
    elif compressor == "blosc":
        found = blosc_content_size(payload)
    elif compressor == "gzip":
        found = gzip_content_size(payload, expected)
    if found != expected:
        raise ValueError(f"its {compressor} frame does not hold {expected} bytes")


def zstd_content_size(frame: Bytes) -> int:
    """Return the decoded size that a zstd frame's header states, -1 if none (RFC 8878, section 3.1.1.1); numcodecs would leave a longer buffer half filled."""
    header = frame[:18].tobytes().ljust(18, b"\0")
    descriptor = header[4]
    single_segment = descriptor >> 5 & 1
    start = 5 + (1 - single_segment) + (0, 1, 2, 4)[descriptor & 3]
    width = (single_segment, 2, 4, 8)[descriptor >> 6]
    return int.from_bytes(header[start : start + width], "little") + (256 if width == 2 else 0) if width else -1


def blosc_content_size(frame: Bytes) -> int:
    """Return the decoded size that a blosc header states, -1 if the frame is not as long as its header says (c-blosc, README_CHUNK_FORMAT)."""
    decoded, _, encoded = np.frombuffer(frame[4:16].tobytes().ljust(12, b"\0"), "<u4").tolist()
    return decoded if encoded == len(frame) else -1


def gzip_content_size(stream: Bytes, limit: int) -> int:
    """Return the decoded size of a gzip stream, found by decoding at most `limit` + 1 bytes (its trailer may lie); -1 if it does not end there."""
    inflate = zlib.decompressobj(wbits=31)
    try:
        size = len(inflate.decompress(stream.tobytes(), limit + 1))
    except zlib.error:
        return -1
    return size if inflate.eof and not inflate.unused_data else -1


def crc32c(content: bytes | Bytes) -> int:
    """Return the CRC-32C (Castagnoli, RFC 3720) of some bytes."""
    return int(google_crc32c.value(content))

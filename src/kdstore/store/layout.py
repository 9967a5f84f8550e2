"""Where things lie in a store: arrays as Zarr v3 metadata, shards, inner chunks, and the names of all files.

Every array is sharded, and an inner chunk covers whole rows: r rows of one view. That is narrower than Zarr allows and is what
lets a reader find a row by arithmetic alone. Chunk shapes follow the read pattern, not the write pattern: 16 embeddings are
some 40 KB, one token grid is a chunk of its own.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from kdstore.errors import StoreError
from kdstore.store.plan import MAX_SHARDS, Plan, Side, Unit

FORMAT = 1
MANIFEST = "manifest.json"
BUILD = "_build"
PULL = "pull"  # folder of a pull below BUILD
IN_TRANSIT = "~"  # at the end of the name of a file that is being received; no file of a store can have such a name
PART = "part.json"
OFFSETS = "index/offsets.npy"
SIGNATURE = "manifest.json.sig"
BESIDE = (SIGNATURE, "run.json", "stats.json", "README.md", "croissant.json")
DTYPES = ("float16", "float32", "int8", "uint8", "uint16", "uint32", "int64")
CHUNK_ROWS = 16
TOKEN_SHARD_BYTES = 1 << 30
MAX_CHUNK_BYTES = 1 << 31  # what a reader agrees to allocate for one decoded chunk
MAX_SHARD_CHUNKS = 1 << 20  # and for the index of one shard: 16 MiB
GROUP_METADATA = {"zarr_format": 3, "node_type": "group", "attributes": {}}

_LITTLE_BYTES = {"name": "bytes", "configuration": {"endian": "little"}}
_CODECS: dict[str, dict[str, Any]] = {
    "bytes": _LITTLE_BYTES,
    "zstd": {"name": "zstd", "configuration": {"level": 1, "checksum": False}},
    "crc32c": {"name": "crc32c"},
}
PLAIN = ("bytes", "crc32c")
ZSTD = ("bytes", "zstd", "crc32c")
BLOSC = ("bytes", "blosc", "crc32c")
COMPRESSORS = ("zstd", "blosc", "gzip")


@dataclass(frozen=True)
class ArraySpec:
    """One array: shape, dtype, inner chunk and shard shapes, names of the inner codecs and of the dimensions."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    chunk: tuple[int, ...]
    shard: tuple[int, ...]
    codecs: tuple[str, ...]
    dims: tuple[str, ...]

    @property
    def side(self) -> Side:
        return "image" if self.name.startswith("image/") else "text"

    @property
    def has_views(self) -> bool:
        return len(self.dims) > 1 and self.dims[1] == "view"

    @property
    def views(self) -> int:
        return self.shape[1] if self.has_views else 1

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Shape of one row of one view."""
        return self.shape[2:] if self.has_views else self.shape[1:]

    @property
    def row_bytes(self) -> int:
        return math.prod(self.row_shape) * np.dtype(self.dtype).itemsize

    @property
    def fill(self) -> float | int:
        return math.nan if self.dtype.startswith("float") else 0

    @property
    def num_shards(self) -> int:
        return -(-self.shape[0] // self.shard[0])

    @property
    def chunks_per_shard(self) -> int:
        """Inner chunks of a full shard: `shard rows / chunk rows * views`."""
        return self.shard[0] // self.chunk[0] * self.views

    @property
    def num_chunks(self) -> int:
        """Inner chunks that hold at least one row; chunk c holds rows from `c // views * chunk rows` of view `c % views`."""
        return -(-self.shape[0] // self.chunk[0]) * self.views

    @property
    def metadata_path(self) -> str:
        return f"{self.name}/zarr.json"

    @property
    def checks_path(self) -> str:
        """File of the crc32c expected of every inner chunk."""
        return f"checks/{self.name}.npy"

    def plain_shard_bytes(self, number: int) -> int:
        """Exact size of a shard whose chunks are not compressed."""
        start, stop = self.shard_rows(number)
        used = -(-(stop - start) // self.chunk[0]) * self.views
        return used * (self.chunk[0] * self.row_bytes + 4) + self.chunks_per_shard * 16 + 4

    def shard_path(self, number: int) -> str:
        return f"{self.name}/c/{number}" + "/0" * (len(self.shape) - 1)

    def shard_rows(self, number: int) -> tuple[int, int]:
        return number * self.shard[0], min((number + 1) * self.shard[0], self.shape[0])

    def to_metadata(self) -> dict[str, Any]:
        """Return the array's `zarr.json`."""
        sharding = {
            "chunk_shape": list(self.chunk),
            "codecs": [_CODECS[name] for name in self.codecs],
            "index_codecs": [_LITTLE_BYTES, {"name": "crc32c"}],
            "index_location": "end",
        }
        return {
            "zarr_format": 3,
            "node_type": "array",
            "shape": list(self.shape),
            "data_type": self.dtype,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(self.shard)}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "fill_value": "NaN" if self.dtype.startswith("float") else 0,
            "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
            "attributes": {},
            "dimension_names": list(self.dims),
        }

    @classmethod
    def from_metadata(cls, name: str, metadata: dict[str, Any]) -> ArraySpec:
        """Read an array's `zarr.json`; raises StoreError for what format 1 does not allow.

        Allowed are the codecs of Zarr's core, with one compressor at most: only their decoded size is known before they are decoded.
        """
        try:
            (sharding,) = metadata["codecs"]
            inner = sharding["configuration"]
            spec = cls(
                name,
                tuple(metadata["shape"]),
                metadata["data_type"],
                tuple(inner["chunk_shape"]),
                tuple(metadata["chunk_grid"]["configuration"]["chunk_shape"]),
                tuple(_codec_name(codec) for codec in inner["codecs"]),
                tuple(metadata["dimension_names"]),
            )
            allowed = (
                metadata["zarr_format"] == 3
                and metadata["node_type"] == "array"
                and sharding["name"] == "sharding_indexed"
                and inner.get("index_location", "end") == "end"
                and inner["index_codecs"] == [_LITTLE_BYTES, {"name": "crc32c"}]
                and metadata["chunk_key_encoding"] == {"name": "default", "configuration": {"separator": "/"}}
                and _is_core_chain([str(codec["name"]) for codec in inner["codecs"]])
                and _is_row_layout(spec)
            )
        except (LookupError, TypeError, ValueError, AttributeError) as e:
            raise StoreError(f"{name}/zarr.json is not an array of format {FORMAT} ({type(e).__name__}: {str(e)[:200]}).") from e
        if not allowed:
            raise StoreError(f"{name}/zarr.json is not an array of format {FORMAT}: found {json.dumps(metadata)[:300]}.")
        return spec


def embedding_array(plan: Plan, side: Side, dim: int, *, dtype: str = "float16", views: int = 1, zstd: bool = False) -> ArraySpec:
    """Describe `image/embedding` [N, V, D] or `text/embedding` [M, D]: chunks of 16 rows of one view, one shard per unit."""
    return _array(plan, f"{side}/embedding", ("channel",), (dim,), dtype, views, zstd, min(CHUNK_ROWS, plan.unit_rows), plan.unit_rows)


def token_array(plan: Plan, side: Side, tokens: int, width: int, *, dtype: str = "float16", views: int = 1, zstd: bool = False) -> ArraySpec:
    """Describe `image/tokens` [N, V, T, W] or `text/tokens` [M, L, W]: a chunk per sample, shards of at most 1 GiB (or what 8,192 shards need)."""
    bytes_per_row = (views if side == "image" else 1) * tokens * width * np.dtype(dtype).itemsize
    shard_rows = plan.unit_rows
    while shard_rows > 1 and shard_rows * bytes_per_row > TOKEN_SHARD_BYTES and -(-plan.rows(side) // (shard_rows // 2)) <= MAX_SHARDS:
        shard_rows //= 2
    return _array(plan, f"{side}/tokens", ("token", "channel"), (tokens, width), dtype, views, zstd, 1, shard_rows)


def view_array(plan: Plan, views: int, numbers: int) -> ArraySpec:
    """Describe `image/view` [N, V, P]: the parameters of each view."""
    return _array(plan, "image/view", ("parameter",), (numbers,), "float32", views, False, min(CHUNK_ROWS, plan.unit_rows), plan.unit_rows)


def scalar_array(plan: Plan, name: str, dtype: str) -> ArraySpec:
    """Describe one number per row, such as `image/valid` [N] or `text/length` [M]: a shard of one chunk per unit."""
    side: Side = "image" if name.startswith("image/") else "text"
    return ArraySpec(name, (plan.rows(side),), dtype, (plan.unit_rows,), (plan.unit_rows,), PLAIN, (side,))


def rows_said(start: int, stop: int) -> str:
    """Say which rows `start:stop` are, with the last one named."""
    return f"row {start}" if stop == start + 1 else f"rows {start} to {stop - 1}"


def index_path(unit: Unit) -> str:
    return f"index/{unit.side}/{unit.number:05d}.parquet"


def _array(
    plan: Plan, name: str, dims: tuple[str, ...], row_shape: tuple[int, ...], dtype: str, views: int, zstd: bool, chunk_rows: int, shard_rows: int
) -> ArraySpec:
    side: Side = "image" if name.startswith("image/") else "text"
    in_shard, in_chunk, view_dim = ((views,), (1,), ("view",)) if side == "image" else ((), (), ())
    return ArraySpec(
        name,
        (plan.rows(side), *in_shard, *row_shape),
        dtype,
        (chunk_rows, *in_chunk, *row_shape),
        (shard_rows, *in_shard, *row_shape),
        ZSTD if zstd else PLAIN,
        (side, *view_dim, *dims),
    )


def _codec_name(codec: dict[str, Any]) -> str:
    """Name of a codec; with its configuration where that changes what the bytes mean."""
    name = str(codec["name"])
    return name if name != "bytes" or codec.get("configuration", {"endian": "little"}) == {"endian": "little"} else json.dumps(codec, sort_keys=True)


def _is_core_chain(names: list[str]) -> bool:
    """Whether a chain is any `transpose`, `bytes`, a compressor or none, `crc32c`."""
    while names[:1] == ["transpose"]:
        names = names[1:]
    return names[:1] == ["bytes"] and names[-1:] == ["crc32c"] and (len(names) == 2 or (len(names) == 3 and names[1] in COMPRESSORS))


def _is_row_layout(spec: ArraySpec) -> bool:
    ranks_agree = len({len(spec.shape), len(spec.chunk), len(spec.shard), len(spec.dims)}) == 1 and len(spec.shape) >= 1
    whole = all(type(n) is int and n >= (0 if i == 0 else 1) for i, n in enumerate(spec.shape)) and all(  # True is no number of rows
        type(n) is int and n >= 1 for n in (*spec.chunk, *spec.shard)
    )
    if not (ranks_agree and whole and spec.dtype in DTYPES):
        return False
    in_chunk = (1, *spec.shape[2:]) if spec.has_views else spec.shape[1:]
    rows = (spec.chunk[0], spec.shard[0])
    powers = rows[0] <= rows[1] and all(n & (n - 1) == 0 for n in rows)
    small = spec.chunk[0] * spec.row_bytes <= MAX_CHUNK_BYTES and spec.num_shards <= MAX_SHARDS and spec.chunks_per_shard <= MAX_SHARD_CHUNKS
    return powers and small and spec.chunk[1:] == in_chunk and spec.shard[1:] == spec.shape[1:]

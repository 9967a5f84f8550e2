"""The plan of a store: which rows it has and which rows one unit of work covers, frozen before any image is read.

Rows are numbered here once and for all; an image that cannot be decoded later keeps its row. Texts are numbered by image, so the
offsets alone say which texts belong to which image. A plan may hold 100 M keys: its columns are Arrow arrays in a mapped file, and no row of it stays in
memory.
"""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from kdstore.data.mapped import map_table, mapped_int64, mapped_table, repeated_hashes, write_batches
from kdstore.data.source import Caption
from kdstore.errors import ConfigError, DamagedStore, SourceError
from kdstore.jsonfile import canonical_json, replacing

Side = Literal["image", "text"]
SIDES: tuple[Side, Side] = ("image", "text")
MAX_SHARDS = 8192
_BATCH = 16384  # images per Arrow batch


@dataclass(frozen=True)
class Unit:
    """Rows `start:stop` of one side: the least piece of work that is committed."""

    side: Side
    number: int
    start: int
    stop: int

    @property
    def name(self) -> str:
        return f"{self.side}-{self.number:05d}"

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, eq=False)
class Plan:
    """Keys [N], captions [M] with their kinds, offsets int64 [N + 1] (texts of image i are `offsets[i]:offsets[i + 1]`)."""

    keys: pa.ChunkedArray
    captions: pa.ChunkedArray
    kinds: pa.ChunkedArray
    offsets: npt.NDArray[np.int64] = field(repr=False)
    unit_rows: int
    fingerprint: str

    @classmethod
    def freeze(cls, source_rows: Iterable[tuple[str, tuple[Caption, ...]]], *, unit_rows: int = 16384, folder: Path | None = None) -> Plan:
        """Number the (key, captions) pairs of a source; `folder` is where the unnamed file of its columns goes, by default where temporary files go.

        `unit_rows` is a power of two, doubled until no side has more than 8,192 units. Raises SourceError for a key that comes twice, ConfigError for a bad
        `unit_rows`, DiskFull, CannotWrite.
        """
        if unit_rows < 1 or unit_rows & (unit_rows - 1):
            raise ConfigError(f"unit_rows must be a power of two, found {unit_rows}.")
        digest = hashlib.sha256()

        def batches() -> Iterator[pa.RecordBatch]:
            for pairs in _batches(source_rows):
                for pair in pairs:
                    digest.update(_fingerprint_line(*pair))
                yield _as_batch(pairs)

        table = mapped_table(batches(), _SCHEMA, folder)
        if twice := _repeated_keys(table["key"], folder):
            raise SourceError(f"Keys must be unique, but these come more than once: {', '.join(twice)}.", "Choose another key column.")
        return _from_columns(table, f"sha256:{digest.hexdigest()}", unit_rows, folder).within_limits()

    def within_limits(self) -> Plan:
        """Return this plan with `unit_rows` doubled until no side has more than 8,192 units."""
        unit_rows = self.unit_rows
        while max(self.num_images, self.num_texts) > MAX_SHARDS * unit_rows:
            unit_rows *= 2
        return replace(self, unit_rows=unit_rows)

    @property
    def num_images(self) -> int:
        return len(self.keys)

    @property
    def num_texts(self) -> int:
        return len(self.captions)

    def rows(self, side: Side) -> int:
        """Return N or M."""
        return self.num_images if side == "image" else self.num_texts

    @cached_property
    def units(self) -> tuple[Unit, ...]:
        """All units, images first; the last of a side may be partial."""
        return tuple(
            Unit(side, number, start, min(start + self.unit_rows, self.rows(side)))
            for side in SIDES
            for number, start in enumerate(range(0, self.rows(side), self.unit_rows))
        )

    def texts(self, start: int, stop: int) -> list[str]:
        """Return the captions of text rows `start:stop`."""
        return self.captions[start:stop].to_pylist()

    def row(self, i: int) -> tuple[str, tuple[Caption, ...]]:
        """Return key and captions of image `i`."""
        texts = slice(int(self.offsets[i]), int(self.offsets[i + 1]))
        return self.keys[i].as_py(), tuple(map(Caption, self.captions[texts].to_pylist(), self.kinds[texts].to_pylist()))

    def summary(self) -> dict[str, int | str]:
        """What the manifest says of the plan."""
        return {"images": self.num_images, "texts": self.num_texts, "unit_rows": self.unit_rows, "fingerprint": self.fingerprint}

    def save(self, path: Path) -> str:
        """Write the columns as one Arrow file, atomically; returns its sha256 in hex. Raises DiskFull, CannotWrite."""
        with replacing(path) as f:
            write_batches(f, self._record_batches(), _SCHEMA, path)
        return _sha256(path)

    @classmethod
    def load(cls, path: Path, fingerprint: str, unit_rows: int, sha256: str) -> Plan:
        """Map a saved plan, whose file is known by its hash; raises DamagedStore."""
        try:
            found = _sha256(path)
            if found != sha256:
                raise ValueError(f"expected sha256 {sha256}, found {found}")
            with open(path, "rb") as f:
                return _from_columns(map_table(f), fingerprint, unit_rows, path.parent)
        except (OSError, ValueError) as e:
            raise DamagedStore(f"{path} is not the plan that was written ({e}).", "Remove the folder and extract again.") from e

    def _record_batches(self) -> Iterator[pa.RecordBatch]:
        for start in range(0, self.num_images, _BATCH):
            offsets = self.offsets[start : start + _BATCH + 1]
            texts = slice(int(offsets[0]), int(offsets[-1]))
            pairs = pa.StructArray.from_arrays([_one(self.captions[texts]), _one(self.kinds[texts])], ["text", "kind"])
            captions = pa.LargeListArray.from_arrays(pa.array(offsets - offsets[0]), pairs)
            yield pa.record_batch([_one(self.keys[start : start + _BATCH]), captions], schema=_SCHEMA)


def fingerprint_of(source_rows: Iterable[tuple[str, tuple[Caption, ...]]]) -> str:
    """Return `sha256:<hex>` over one line `[key,[[text,kind],...]]` of canonical JSON per image, in order, each ended by a newline."""
    digest = hashlib.sha256()
    for pair in source_rows:
        digest.update(_fingerprint_line(*pair))
    return f"sha256:{digest.hexdigest()}"


def repeated(keys: pa.Array) -> list[str]:
    """Return the keys that occur more than once."""
    counts = pc.value_counts(keys)
    return counts.field("values").filter(pc.greater(counts.field("counts"), 1)).to_pylist()


def parquet_bytes(table: pa.Table) -> pa.Buffer:
    """Encode a table as parquet in memory, so that the one writer of files sees disk errors and hashes what it writes."""
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd", write_statistics=False)
    return sink.getvalue()


_SCHEMA = pa.schema(
    [
        ("key", pa.large_string()),
        ("captions", pa.large_list(pa.struct([("text", pa.large_string()), ("kind", pa.large_string())]))),
    ]
)


def _fingerprint_line(key: str, captions: tuple[Caption, ...]) -> bytes:
    return canonical_json([key, [[c.text, c.kind] for c in captions]]) + b"\n"


def _batches(source_rows: Iterable[tuple[str, tuple[Caption, ...]]]) -> Iterator[list[tuple[str, tuple[Caption, ...]]]]:
    batch = []
    for pair in source_rows:
        batch.append(pair)
        if len(batch) == _BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def _as_batch(pairs: list[tuple[str, tuple[Caption, ...]]]) -> pa.RecordBatch:
    captions = [[{"text": c.text, "kind": c.kind} for c in pair[1]] for pair in pairs]
    return pa.record_batch([pa.array([key for key, _ in pairs], _SCHEMA.field(0).type), pa.array(captions, _SCHEMA.field(1).type)], schema=_SCHEMA)


def _sha256(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _from_columns(table: pa.Table, fingerprint: str, unit_rows: int, folder: Path | None) -> Plan:
    offsets, start = mapped_int64(len(table) + 1, folder), 0
    for lists in table["captions"].chunks:
        ends = offsets[start + 1 : start + 1 + len(lists)]
        np.cumsum(pc.list_value_length(lists).to_numpy(zero_copy_only=False), out=ends)
        ends += offsets[start]
        start += len(lists)
    flat = [lists.flatten() for lists in table["captions"].chunks]
    captions, kinds = (pa.chunked_array([part.field(name) for part in flat], pa.large_string()) for name in ("text", "kind"))
    return Plan(table["key"], captions, kinds, offsets, unit_rows, fingerprint)


def _repeated_keys(keys: pa.ChunkedArray, folder: Path | None, at_most: int = 5) -> list[str]:
    """Return some of the keys that come more than once: those of equal hashes, compared in full."""
    suspect = set(repeated_hashes(keys, folder)[:_BATCH].tolist())
    if not suspect:
        return []
    counts = Counter(key for key in chain.from_iterable(chunk.to_pylist() for chunk in keys.chunks) if hash(key) in suspect)
    return [key for key, count in counts.items() if count > 1][:at_most]


def _one(column: pa.ChunkedArray | pa.Array) -> pa.Array:
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column

"""New stores out of old ones: rows and arrays of one or several stores, encoded as asked, written by the store's own writer.

Blocks are read and cast through dask; this process appends them in order and commits unit by unit, so that an interrupted
operation goes on where it stopped and memory holds a few blocks, whatever the size of the stores. Rows keep the order of their store.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from kdstore.data.source import Caption
from kdstore.errors import ConfigError, JoinError, SourceError, StoreError, UnknownName
from kdstore.progress import OnProgress, silent
from kdstore.store.blocks import Int64, gather_views, in_blocks
from kdstore.store.codecfile import codec_files
from kdstore.store.join import positions
from kdstore.store.layout import PLAIN, ZSTD, ArraySpec, scalar_array
from kdstore.store.plan import MAX_SHARDS, Plan, Side
from kdstore.store.reader import Store
from kdstore.store.writer import StoreWriter

_PLANNED: tuple[tuple[Side, str], ...] = (("image", "key"), ("text", "caption"), ("text", "kind"))
_PAIRS = 65536  # rows of which keys and captions become Python objects at once


@dataclass(frozen=True, eq=False)
class Part:
    """Rows of a store that a new one takes: image rows [n] and text rows [m], both ascending."""

    store: Store
    images: Int64
    texts: Int64

    @classmethod
    def of(cls, store: Store, images: Int64 | None = None) -> Part:
        """Take some images (or all) with their texts."""
        if images is None:
            return cls(store, np.arange(store.num_images), np.arange(store.num_texts))
        chosen = np.zeros(store.num_images, bool)
        chosen[images] = True
        return cls(store, np.flatnonzero(chosen), np.flatnonzero(np.repeat(chosen, np.diff(store.offsets))))

    def rows(self, side: Side) -> Int64:
        return self.images if side == "image" else self.texts


def rows_of_keys(store: Store, keys: Sequence[str]) -> Int64:
    """Return the image rows of these keys, ascending and each once; raises JoinError for keys that the store does not hold."""
    found = positions(pa.array(keys, pa.large_string()), store.index("image", "key").combine_chunks())
    if (found < 0).any():
        missing = [key for key, row in zip(keys, found.tolist(), strict=True) if row < 0]
        raise JoinError(f"{store.path} holds no {', '.join(missing[:5])}: {len(missing)} of {len(keys)} keys.", "Leave them out, or name another store.")
    return np.unique(found)


def read_keys(path: str | Path) -> list[str]:
    """Return the lines of a text file with a key per line; raises ConfigError."""
    try:
        return [line for line in Path(path).read_text(encoding="utf-8").split("\n") if line]
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"Cannot read the keys in {path}: {getattr(e, 'strerror', e)}.", "Name a text file with a key per line.") from e


@dataclass(frozen=True)
class DerivedStore:
    """A store that was made from others."""

    path: str
    digest: str
    images: int
    texts: int
    arrays: tuple[str, ...]


def plan_of(parts: Sequence[Part], unit_rows: int) -> Plan:
    """Plan the rows of all parts, one after the other, in units of `unit_rows` (more if 8,192 units would not do); keys must be unique."""
    if len(parts) == 1 and len(parts[0].images) == (store := parts[0].store).num_images:
        keys, captions, kinds = (pa.chunked_array([_column(store, side, name)]) for side, name in _PLANNED)
        return Plan(keys, captions, kinds, store.offsets, unit_rows, store.fingerprint).within_limits()
    return Plan.freeze((pair for part in parts for pair in pairs_of(part)), unit_rows=unit_rows)


def fitted(spec: ArraySpec, plan: Plan, **changes: Any) -> ArraySpec:
    """Describe an array for the rows of another plan and with other `dtype`, `codecs`, `chunk_rows` or `shard_rows`; raises ConfigError."""
    if len(spec.shape) == 1:
        return scalar_array(plan, spec.name, spec.dtype)
    codecs = changes.get("codecs") or (spec.codecs if spec.codecs in (PLAIN, ZSTD) else ZSTD)
    rows = plan.rows(spec.side)
    shard = min(changes.get("shard_rows") or spec.shard[0], plan.unit_rows)  # a shard never spans units
    while -(-rows // shard) > MAX_SHARDS and shard < plan.unit_rows:
        shard *= 2
    chunk = changes.get("chunk_rows") or min(spec.chunk[0], shard)
    new = dataclasses.replace(
        spec,
        shape=(rows, *spec.shape[1:]),
        dtype=changes.get("dtype") or spec.dtype,
        chunk=(chunk, *spec.chunk[1:]),
        shard=(shard, *spec.shard[1:]),
        codecs=codecs,
    )
    try:
        return ArraySpec.from_metadata(spec.name, new.to_metadata())
    except StoreError as e:
        raise ConfigError(f"{spec.name} cannot have chunks of {chunk} rows in shards of {shard}.", "Both are powers of two, and chunks the smaller.") from e


def derived_identity(parts: Sequence[Part], plan: Plan, operation: str, arrays: Sequence[str]) -> dict[str, Any]:
    """Build the identity of a store made from others: what the first one's features are, other rows, and in `lineage` where they came from."""
    first = {name: part for name, part in parts[0].store.identity.items() if name != "withdrawn"}  # whose row numbers hold for that store alone
    identity = {**first, "lineage": {"operation": operation, "of": [_ancestor(part.store) for part in parts]}}
    if "source" in first:
        identity["source"] = {"fingerprint": plan.fingerprint}
    if "arrays" in first:
        identity["arrays"] = {name: encoding for name, encoding in first["arrays"].items() if name in arrays}
    return identity


def choose(arrays: Mapping[str, ArraySpec], names: Sequence[str]) -> list[str]:
    """Return those of a store's arrays that these need to be read, in its order, without `valid`; raises UnknownName. No names: all."""
    known = [name for name in arrays if not name.endswith("/valid")]
    for name in names:
        if name not in known:
            raise UnknownName.of("array", name, known)
    chosen = set(names or known)
    if "text/tokens" in chosen:
        chosen.add("text/length")
    if any(arrays[name].views > 1 for name in chosen):
        chosen.add("image/view")
    return [name for name in known if name in chosen]


def write_parts(
    out: str | Path,
    parts: Sequence[Part],
    plan: Plan,
    specs: Sequence[ArraySpec],
    identity: dict[str, Any],
    *,
    allow_overflow: bool = False,
    on_progress: OnProgress = silent,
) -> DerivedStore:
    """Write the rows of all parts as a store, or go on with one; raises what `StoreWriter` and `Store.gather` raise, StoreError for an overflow.

    Of a part of a store without some of these rows nothing is written: MissingFeature.
    """
    if Path(out).resolve() in {part.store.path.resolve() for part in parts}:
        raise ConfigError(f"{out} is the store that is read.", "Name a new one with --out.")
    for spec in specs:
        for store, rows in _pieces(parts, spec.side, 0, plan.rows(spec.side)):
            if store.part is not None and not store.holds(spec.name)[rows].all():
                store.require_whole()  # before anything is written that could not be ended
    started = time.perf_counter()
    operation = identity["lineage"]["operation"]
    first = parts[0].store  # codes mean the same in all parts: their identities agree
    coded = [spec.name for spec in specs if spec.name in first.codecs]
    constants = {path: content for name in coded for path, content in codec_files(name, first.codec(name)).items()}
    with StoreWriter.open(out, plan=plan, arrays=specs, identity=identity, constants=constants, on_progress=on_progress) as writer:
        pending = writer.pending()
        done, total = 0, sum(len(unit) * sum(spec.side == unit.side for spec in specs) for unit in pending)
        for unit in pending:
            with writer.attempt(unit) as attempt:
                for store, rows in _pieces(parts, unit.side, unit.start, unit.stop):
                    attempt.index(index_rows(store, unit.side, rows))
                for spec in specs:
                    if spec.side == unit.side:
                        for block in in_blocks(functools.partial(_block, parts, spec, allow_overflow), spec, unit.start, unit.stop):
                            attempt.append(spec.name, block)
                            done += len(block)
                            on_progress(f"{operation}: rows of arrays", done, total, spec.name)
        sources = {source_of(part.store) for part in parts}
        run = {"operation": operation, "from": [part.store.digest for part in parts], "seconds": round(time.perf_counter() - started, 3)}
        digest = writer.finalise(run | ({"source": sources.pop()} if len(sources) == 1 and None not in sources else {}))
    return DerivedStore(str(out), digest, plan.num_images, plan.num_texts, tuple(spec.name for spec in specs))


def _block(parts: Sequence[Part], spec: ArraySpec, allow_overflow: bool, start: int, stop: int) -> npt.NDArray[Any]:
    """Return rows `start:stop` of an array of the new store."""
    return np.concatenate([_cast(store, spec, rows, allow_overflow) for store, rows in _pieces(parts, spec.side, start, stop)])


def _cast(store: Store, spec: ArraySpec, rows: Int64, allow_overflow: bool) -> npt.NDArray[Any]:
    values = gather_views(store, spec.name, rows)
    with np.errstate(over="ignore"):
        cast = values.astype(spec.dtype, copy=False)
    if cast is not values and not allow_overflow:
        overflown = (np.isinf(cast) & np.isfinite(values)).reshape(len(rows), -1).any(axis=1)
        if overflown.any():
            row = rows[int(np.argmax(overflown))]
            raise StoreError(
                f"{store.path}: row {row} of {spec.name} holds values beyond the range of {spec.dtype}.",
                "With --allow-overflow they become infinite.",
            )
    return cast


def _pieces(parts: Sequence[Part], side: Side, start: int, stop: int) -> Iterator[tuple[Store, Int64]]:
    """Yield the stores and their rows that rows `start:stop` of the new store come from, in order."""
    for part in parts:
        rows = part.rows(side)
        if start < len(rows) and stop > 0:
            yield part.store, rows[max(start, 0) : stop]
        start, stop = start - len(rows), stop - len(rows)


def index_rows(store: Store, side: Side, rows: Int64) -> list[dict[str, Any]]:
    """Return what a store's index knows of ascending rows, as `Attempt.index` takes it."""
    valid = store.gather(f"{side}/valid", rows).tolist()
    if side == "text":
        return [{"valid": v} for v in valid]
    first, last = (int(row) // store.unit_rows for row in rows[[0, -1]])
    units, places = slice(first, last + 1), pa.array(rows - first * store.unit_rows)
    columns = {name: store.index(side, name, units).take(places).to_pylist() for name in ("sha256", "reason", "width", "height")}
    return [dict(zip(("valid", *columns), row, strict=True)) for row in zip(valid, *columns.values(), strict=True)]


def pairs_of(part: Part) -> Iterator[tuple[str, tuple[Caption, ...]]]:
    """Yield (key, captions) of a part's rows."""
    keys, captions, kinds = (_column(part.store, side, name).take(pa.array(part.rows(side))) for side, name in _PLANNED)
    counts = np.diff(part.store.offsets)[part.images]
    offsets = np.concatenate([[0], np.cumsum(counts)])
    for start in range(0, len(keys), _PAIRS):
        first, last = int(offsets[start]), int(offsets[min(start + _PAIRS, len(keys))])
        texts = [Caption(*pair) for pair in zip(captions[first:last].to_pylist(), kinds[first:last].to_pylist(), strict=True)]
        for i, key in enumerate(keys[start : start + _PAIRS].to_pylist(), start):
            yield key, tuple(texts[offsets[i] - first : offsets[i + 1] - first])


def _column(store: Store, side: Side, name: str) -> pa.Array:
    column = store.index(side, name).cast(pa.large_string())
    return pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)


def _ancestor(store: Store) -> dict[str, Any]:
    lineage = store.identity.get("lineage")
    return {"digest": store.digest} | ({"lineage": lineage} if lineage else {})


def source_of(store: Store) -> str | None:
    """Return the data that a store's run was given, None if it does not say."""
    with suppress(SourceError):
        return store.recorded_source
    return None

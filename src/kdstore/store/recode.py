"""The same rows and features in other bytes: another codec, chunks and shards, or another precision."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdstore.errors import ConfigError
from kdstore.progress import OnProgress, silent
from kdstore.store.derive import DerivedStore, Part, choose, derived_identity, fitted, plan_of, write_parts
from kdstore.store.layout import PLAIN, ZSTD
from kdstore.store.reader import open_store

_CODECS = {"bytes": PLAIN, "zstd": ZSTD}


@dataclass(frozen=True)
class Encoding:
    """What `recode_store` changes; None leaves it as it is. Codec bytes or zstd, dtype float16 or float32; rows of a chunk and of a shard are powers of two."""

    codec: str | None = None
    dtype: str | None = None
    chunk_rows: int | None = None
    shard_rows: int | None = None


def recode_store(
    path: str | Path,
    out: str | Path,
    encoding: Encoding,
    *,
    arrays: Sequence[str] = (),
    allow_overflow: bool = False,
    on_progress: OnProgress = silent,
) -> DerivedStore:
    """Write a store with the same rows whose `arrays` (default: all embeddings and tokens) are encoded otherwise; the rest is kept as it is.

    A new dtype casts as NumPy does. Raises ConfigError, UnknownName, StoreError for values beyond the range of the dtype unless
    `allow_overflow`, and what `StoreWriter` and `Store.gather` raise.
    """
    store = open_store(path)
    changes = _changes(encoding)
    recoded = [name for name in choose(store.arrays, arrays) if (name in arrays if arrays else name.endswith(("/embedding", "/tokens")))]
    if encoding.dtype and (codes := [name for name in recoded if name == "image/view" or not store.arrays[name].dtype.startswith("float")]):
        raise ConfigError(f"{', '.join(codes)} hold no floats of features, so they cannot become {encoding.dtype}.", "Name the arrays to recode with --arrays.")
    parts = [Part.of(store)]
    plan = plan_of(parts, max(store.unit_rows, encoding.shard_rows or 1))
    names = choose(store.arrays, ())
    specs = [fitted(store.arrays[name], plan, **(changes if name in recoded else {})) for name in names]
    identity = derived_identity(parts, plan, "recode", names)
    for spec in specs:
        if spec.dtype != store.arrays[spec.name].dtype and "arrays" in identity:
            identity["arrays"][spec.name] = {**identity["arrays"].get(spec.name, {}), "dtype": spec.dtype}
    return write_parts(out, parts, plan, specs, identity, allow_overflow=allow_overflow, on_progress=on_progress)


def _changes(encoding: Encoding) -> dict[str, Any]:
    """Return the changes as `fitted` takes them; raises ConfigError."""
    if encoding == Encoding():
        raise ConfigError("Nothing to change: no codec, dtype, chunk_rows or shard_rows is given.", "Give one of them.")
    if encoding.codec not in (None, *_CODECS):
        raise ConfigError(f"Expected codec bytes or zstd, found {encoding.codec}.", "Give another --codec.")
    if encoding.dtype not in (None, "float16", "float32"):
        raise ConfigError(f"Expected dtype float16 or float32, found {encoding.dtype}.", "Codes such as int8 are made by: kdstore extract --encode int8.")
    for rows in (encoding.chunk_rows, encoding.shard_rows):
        if rows is not None and (rows < 1 or rows & (rows - 1)):
            raise ConfigError(f"Rows of a chunk and of a shard are powers of two, found {rows}.")
    return {
        "codecs": _CODECS[encoding.codec] if encoding.codec else None,
        "dtype": encoding.dtype,
        "chunk_rows": encoding.chunk_rows,
        "shard_rows": encoding.shard_rows,
    }

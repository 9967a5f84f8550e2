"""Opening a store and reading rows of it.

`open_store` reads the manifest and the arrays' metadata only; keys, captions, offsets and checks are read when first asked for,
so that opening costs the same whatever the number of rows.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from kdstore.address import is_address
from kdstore.errors import DamagedStore, MissingFeature, SourceError, StoreError
from kdstore.jsonfile import read_json
from kdstore.store.cache import Cache
from kdstore.store.codecfile import StoredCodec, stored_codecs
from kdstore.store.codecs import Codec
from kdstore.store.gather import ArrayReader
from kdstore.store.indexfile import read_column
from kdstore.store.layout import OFFSETS, ArraySpec
from kdstore.store.manifest import MAX_METADATA_BYTES, RESTORE, Manifest, read_manifest
from kdstore.store.plan import Side

BLOCK_ROWS = 1 << 20


class Store:
    """A complete store, open for reading; safe across threads and forks, pickled as its path and digest."""

    def __init__(self, manifest: Manifest) -> None:
        self.path = manifest.root
        self.manifest = manifest.content
        self._manifest = manifest
        groups = {"", *(name.rpartition("/")[0] + "/" for name in manifest.content["arrays"])}
        manifest.bring(f"{folder}zarr.json" for folder in {*groups, *(f"{name}/" for name in manifest.content["arrays"])})
        specs = {name: array_spec(manifest, name) for name in manifest.content["arrays"]}
        self.arrays: dict[str, ArraySpec] = {name: spec for name, spec in specs.items() if manifest.part is None or _held_shards(manifest, spec).any()}
        for group in groups:
            manifest.read(f"{group}zarr.json", MAX_METADATA_BYTES)  # for other readers, but what is damaged is said at once
        self.codecs: dict[str, StoredCodec] = stored_codecs(manifest, self.arrays)
        self._readers: dict[str, ArrayReader] = {}
        self._fitted: dict[str, Codec] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        if self._manifest.supply is not None:
            return self._manifest.supply.reopening(self.digest)
        return _open_again, (self.path.absolute(), self.digest)

    @property
    def place(self) -> str:
        """Where the store lies, as it may be shown: a folder, or an address without credentials."""
        return str(self.path) if self._manifest.supply is None else self._manifest.supply.name

    @property
    def identity(self) -> dict[str, Any]:
        return self.manifest["identity"]

    @property
    def digest(self) -> str:
        return self._manifest.digest

    @property
    def digests(self) -> list[str]:
        """The digests of all that is read through this store."""
        return [self.digest]

    @property
    def fingerprint(self) -> str:
        """The plan's fingerprint: stores of equal fingerprint hold the same rows in the same order."""
        return str(self.manifest["plan"]["fingerprint"])

    @property
    def num_images(self) -> int:
        return int(self.manifest["plan"]["images"])

    @property
    def num_texts(self) -> int:
        return int(self.manifest["plan"]["texts"])

    @property
    def unit_rows(self) -> int:
        """Rows of a unit: of one file of the index, and as many as those of a shard at most."""
        return int(self.manifest["plan"]["unit_rows"])

    @property
    def num_bytes(self) -> int:
        """Bytes of all files that the manifest lists and that are there."""
        return sum(entry.size for entry in self._manifest.held.values())

    @property
    def part(self) -> dict[str, int] | None:
        """Files and bytes that a part has of its store's; None for a whole store."""
        if self._manifest.part is None:
            return None
        files = self._manifest.files
        return {"files": len(self._manifest.held), "of_files": len(files), "bytes": self.num_bytes, "of_bytes": sum(entry.size for entry in files.values())}

    @property
    def withdrawn(self) -> npt.NDArray[np.int64]:
        """The image rows that were withdrawn, ascending; they are not valid."""
        return np.array(self.identity.get("withdrawn", {}).get("rows", []), np.int64)

    @property
    def recorded_source(self) -> str:
        """The data that the store's run was given, as `run.json` beside the manifest has it; raises SourceError if it does not say.

        Where the data lay is no part of what the features are.
        """
        record = self.path / "run.json"
        source = read_json(record).get("source") if record.is_file() else None
        if not source:
            raise SourceError(f"{self.path} does not say which data it was extracted from.", "Give --data SOURCE.")
        return str(source)

    def summary(self) -> dict[str, Any]:
        """Tell in a few JSON values what the store holds."""
        teacher = self.identity.get("teacher", {})
        encoded = self.identity.get("arrays", {})
        return {
            "path": self.place,
            "digest": self.digest,
            "teacher": teacher.get("name"),
            "weights": teacher.get("weights_sha256"),
            "parent": self.identity.get("parent", {}).get("digest"),
            "images": self.num_images,
            "undecodable": int((~self.image_valid).sum()) - len(self.withdrawn),
            "withdrawn": len(self.withdrawn),
            "texts": self.num_texts,
            "arrays": {name: f"{list(spec.shape)} {spec.dtype}{_said(encoded.get(name))}" for name, spec in self.arrays.items()},
            "codecs": {name: {"codec": str(coded.chain), **coded.record} for name, coded in self.codecs.items()},
            "bytes": self.num_bytes,
            "fingerprint": self.fingerprint,
        } | ({"part": self.part} if self.part else {})

    def require_whole(self) -> None:
        """Raise MissingFeature for a part of a store."""
        if self.part is not None:
            raise MissingFeature(f"{self.path} is a part of its store.", self._manifest.pull_hint())

    def require(self, *names: str) -> None:
        """Raise MissingFeature unless the store holds all these arrays."""
        if missing := [name for name in names if name not in self.arrays]:
            raise MissingFeature(
                f"{self.path} holds no {', '.join(missing)}; it holds {', '.join(sorted(self.arrays))}.",
                self._manifest.pull_hint() or "Extract the missing features into a store, or choose a loss that needs less.",
            )

    def holds(self, name: str) -> npt.NDArray[np.bool_]:
        """Tell which rows of an array there are, bool [N] or [M]: of a part not all."""
        self.require(name)
        spec = self.arrays[name]
        if self._manifest.part is None:
            return np.ones(spec.shape[0], bool)
        return np.repeat(_held_shards(self._manifest, spec), spec.shard[0])[: spec.shape[0]]

    def located(self, name: str, rows: npt.ArrayLike) -> tuple[Store, npt.ArrayLike]:
        """Return the store whose files hold an array, and where rows lie in it."""
        self.require(name)
        return self, rows

    def gather(self, name: str, rows: npt.ArrayLike, views: npt.ArrayLike | None = None, out: npt.NDArray[Any] | None = None) -> npt.NDArray[Any]:
        """Return rows [B, ...] of an array in its stored dtype, into `out` if given.

        `rows` [B] may repeat, and be negative as in NumPy; `views` (one number or [B], for image arrays) defaults to the plain view 0.
        Every inner chunk is compared with its expected crc32c when first touched. Raises MissingFeature, IndexError, DamagedStore,
        and ValueError for an `out` that does not fit.
        """
        if name not in self._readers:
            self.require(name)
            self._readers.setdefault(name, ArrayReader(self._manifest, self.arrays[name]))
        return self._readers[name].gather(rows, views, out)

    def feature_shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of what `features` gives for one row."""
        self.require(name)
        return self.codecs[name].feature_shape if name in self.codecs else self.arrays[name].row_shape

    def codec(self, name: str) -> Codec:
        """Return the codec of an array in `codecs`, its parameters read once."""
        if name not in self._fitted:
            self._fitted.setdefault(name, self.codecs[name].load(self._manifest))
        return self._fitted[name]

    def features(
        self, name: str, rows: npt.ArrayLike, views: npt.ArrayLike | None = None, out: npt.NDArray[np.float32] | None = None
    ) -> npt.NDArray[np.float32]:
        """Return rows float32 [B, ...] of an array as the features that it stands for: decoded if it holds codes, into `out` if given.

        Rows that are not valid are NaN, tokens beyond a text's length zero. `rows` and `views` are those of `gather`; raises what it raises, and
        MissingFeature for an array of whole numbers without a codec.
        """
        stored = self.gather(name, rows, views)
        shape = (len(stored), *self.feature_shape(name))
        if name not in self.codecs and not self.arrays[name].dtype.startswith("float"):
            raise MissingFeature(f"{self.path}: {name} holds {self.arrays[name].dtype} without a codec that says what they mean.", "Read them with gather.")
        if out is None:
            out = np.empty(shape, np.float32)
        elif out.shape != shape or out.dtype != np.float32 or not out.flags.c_contiguous or not out.flags.writeable:
            raise ValueError(f"out must be a writable C-contiguous array {shape} float32, found {out.shape} {out.dtype}")
        if name not in self.codecs:
            out[...] = stored
            return out
        self.codec(name).decode(stored, out)
        if name == "text/tokens":
            out[np.arange(shape[1]) >= self.gather("text/length", rows)[:, None]] = 0
        out[self.gather(f"{self.arrays[name].side}/valid", rows) == 0] = np.nan
        return out

    @cached_property
    def offsets(self) -> npt.NDArray[np.int64]:
        """Offsets int64 [N + 1]: the texts of image i are rows `offsets[i]:offsets[i + 1]`."""
        offsets = self._manifest.load(OFFSETS, self.num_images + 1, "<i8")
        if offsets[0] != 0 or offsets[-1] != self.num_texts or (offsets[:-1] > offsets[1:]).any():
            raise DamagedStore(f"{self.path / OFFSETS} does not ascend from 0 to {self.num_texts}.", RESTORE)
        return offsets

    @cached_property
    def image_valid(self) -> npt.NDArray[np.bool_]:
        """Which images could be decoded, bool [N]."""
        return self._numbers("image/valid").astype(bool)

    @cached_property
    def text_valid(self) -> npt.NDArray[np.bool_]:
        """Which texts hold features, bool [M]."""
        return self._numbers("text/valid").astype(bool)

    def _numbers(self, name: str) -> npt.NDArray[Any]:
        """Return all of an array of one number per row, gathered in blocks: row numbers are eight times as wide as what they fetch."""
        self._manifest.bring(self.arrays[name].shard_path(number) for number in np.flatnonzero(_held_shards(self._manifest, self.arrays[name])).tolist())
        self.gather(name, [])  # compares the declared shape with the files before anything is allocated from it
        out = np.empty(self.arrays[name].shape, self.arrays[name].dtype)
        for start in range(0, len(out), BLOCK_ROWS):
            rows = np.arange(start, min(start + BLOCK_ROWS, len(out)))
            self.gather(name, rows, out=out[start : start + len(rows)])
        return out

    def checks(self, name: str) -> npt.NDArray[np.uint32]:
        """Return the crc32c of every inner chunk of an array."""
        return self._manifest.load(self.arrays[name].checks_path, self.arrays[name].num_chunks, "<u4")

    @contextlib.contextmanager
    def listed(self, path: str) -> Iterator[Path]:
        """Yield where a file of the manifest lies, after a look at its kind, place and size; raises DamagedStore, CannotRead."""
        with self._manifest.open(path):
            yield self._manifest.where(path)

    def keys(self) -> npt.NDArray[np.str_]:
        """Return the keys of all images [N]."""
        return np.array(self.index("image", "key").to_pylist(), np.str_)

    def image_sha256(self) -> npt.NDArray[np.str_]:
        """Return the sha256 (hex) of the encoded images [N], '' where there were no bytes."""
        return np.array(self.index("image", "sha256").to_pylist(), np.str_)

    def captions(self) -> list[str]:
        """Return the captions of all text rows [M]."""
        return self.index("text", "caption").to_pylist()

    def index(self, side: Side, column: str, units: slice = slice(None)) -> pa.ChunkedArray:
        """Return one column of `index/<side>/*.parquet` in row order, of all rows or those of some units; raises DamagedStore."""
        paths = sorted(path for path in self._manifest.files if path.startswith(f"index/{side}/"))
        rows = self.num_images if side == "image" else self.num_texts
        if units != slice(None):
            start, stop, _ = units.indices(len(paths))
            paths, rows = paths[units], min(stop * self.unit_rows, rows) - start * self.unit_rows
        self._manifest.bring(paths)
        parts = [read_column(self._manifest, path, column) for path in paths]
        found = sum(len(part) for part in parts)
        if found != rows:
            raise DamagedStore(f"{self.path}/index/{side} holds {found} rows, expected {rows}.", RESTORE)
        return pa.chunked_array([chunk for part in parts for chunk in part.chunks], parts[0].type if parts else pa.large_string())


def _held_shards(manifest: Manifest, spec: ArraySpec) -> npt.NDArray[np.bool_]:
    """Tell which shards of an array there are."""
    return np.array([manifest.holds(spec.shard_path(number)) for number in range(spec.num_shards)], bool)


def _said(encoding: Any) -> str:
    """Say in a few words what an identity says of an array."""
    if not isinstance(encoding, dict):
        return ""
    codec = encoding.get("codec")
    words = [f"layer {encoding['layer']}"] if "layer" in encoding else []
    words += [str(encoding["precision"])] if "precision" in encoding else []
    words += [str(codec.get("name"))] if isinstance(codec, dict) else []
    return f" ({', '.join(words)})" if words else ""


def open_store(path: str | Path, cache: Cache | None = None) -> Store:
    """Open a complete store in a folder, or one at an address whose files come into a cache as they are read (docs/sharing.md, Used in place).

    Raises StoreNotFound, IncompleteStore, DamagedStore; of one at an address also IdentityMismatch, TransferError, DiskFull, CannotWrite.
    """
    if is_address(str(path)):
        from kdstore.store.share.remote import remote_manifest  # what it takes to ask a server is imported by those who do

        return Store(remote_manifest(str(path), cache or Cache.default()))
    return Store(read_manifest(Path(path)))


def _open_again(path: Path, digest: str) -> Store:
    """Open in another process the store that was pickled; raises StoreError if the path holds another one by now."""
    store = open_store(path)
    if store.digest != digest:
        raise StoreError(f"{path} has the digest {store.digest}, expected {digest}: another store took its place.", "Start again with the store that is there.")
    return store


def array_spec(manifest: Manifest, name: str) -> ArraySpec:
    """Read an array's `zarr.json`; raises DamagedStore unless it is what the manifest says, StoreError for what format 1 does not allow."""
    try:
        metadata = json.loads(manifest.read(f"{name}/zarr.json", MAX_METADATA_BYTES))
    except (ValueError, RecursionError) as e:
        raise DamagedStore(f"{manifest.root / name}/zarr.json is not JSON ({e}).", RESTORE) from e
    if metadata != manifest.content["arrays"][name]:
        raise DamagedStore(f"{manifest.root / name}/zarr.json is not what the manifest says of {name}.", RESTORE)
    spec = ArraySpec.from_metadata(name, metadata)
    rows = int(manifest.content["plan"]["images" if spec.side == "image" else "texts"])
    if spec.shape[0] != rows:
        raise DamagedStore(f"{name} has {spec.shape[0]} rows, expected {rows}.", RESTORE)
    return spec

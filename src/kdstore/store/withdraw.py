"""A version of a store without some of its images: of these nothing remains but a row that is not valid and, so that others can drop them too, their hashes.

Rows never shift, so only the shards and index files that hold withdrawn rows are written again; all others are the same files, as hard links where the disk
allows. Captions of an image go with it, and so do other images of the same bytes. The version is a store of its own that names those before it.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from kdstore.data.source import Caption
from kdstore.errors import ConfigError, IdentityMismatch, JoinError
from kdstore.jsonfile import disk_errors
from kdstore.progress import OnProgress, silent
from kdstore.store.attempt import image_index, open_attempt, staged_path, text_index
from kdstore.store.blocks import gather_views
from kdstore.store.codecfile import codec_files
from kdstore.store.derive import Part, index_rows, pairs_of, source_of
from kdstore.store.layout import PLAIN, ZSTD, ArraySpec, index_path, scalar_array
from kdstore.store.manifest import Manifest
from kdstore.store.plan import SIDES, Plan, Side, Unit, fingerprint_of, parquet_bytes
from kdstore.store.reader import Store, open_store
from kdstore.store.shard import ShardWriter, WrittenFile, write_file
from kdstore.store.writer import StoreWriter

MAX_WITHDRAWN = 1 << 18  # images of all versions: their hashes take 17 MiB of the manifest
BLOCK_BYTES = 1 << 24
REASON = "withdrawn"
NOTHING = {"sha256": "", "valid": 0, "reason": REASON, "width": 0, "height": 0}
_SHA256 = re.compile("[0-9a-f]{64}")
_OF_VERSION = ("source", "withdrawn", "parent")  # parts of an identity in which versions differ
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Withdrawal:
    """A version without some images: how many were withdrawn now, with their texts, and the files that differ from those of the version before (`parent`).

    `absent` are keys and hashes that the store does not hold. Where there was nothing to withdraw, `path` is the store as it was and nothing was written.
    """

    path: str
    digest: str
    parent: str
    images: int
    texts: int
    absent: tuple[str, ...]
    files_written: int
    files_kept: int


def withdraw_rows(
    path: str | Path,
    out: str | Path,
    *,
    keys: Sequence[str] = (),
    sha256: Sequence[str] = (),
    parent: str | Path | None = None,
    on_progress: OnProgress = silent,
) -> Withdrawal:
    """Write a version of a store without the images of these keys or contents, or go on with one.

    Images with the bytes of a withdrawn one go too. `parent` names the new version of the store whose rows a child has arrays for. Raises JoinError if the
    store holds none of them (one that has withdrawn rows already is left as it is), ConfigError, IdentityMismatch, and what `StoreWriter` and `Store.gather`
    raise.
    """
    store, started = open_store(path), time.perf_counter()
    store.require_whole()
    gone, absent = _chosen(store, keys, [text.strip().removeprefix("sha256:").lower() for text in sha256])
    if absent:
        on_progress("warning", 0, 0, f"{path} does not hold {len(absent)} of what is to be withdrawn: {', '.join(absent[:5])}.")
    if not gone.any():
        if not len(store.withdrawn):
            raise JoinError(
                f"{path} holds none of the {len(keys) + len(sha256)} images that are to be withdrawn.", "Check the list: a line is a key, or a sha256."
            )
        on_progress("notice", 0, 0, f"There is nothing to withdraw from {path}; nothing was written.")
        return Withdrawal(str(path), store.digest, store.digest, 0, 0, absent, 0, 0)
    if Path(out).resolve() == store.path.resolve():
        raise ConfigError(f"{out} is the store that is read.", "Name a new one with --out.")
    all_gone = gone.copy()
    all_gone[store.withdrawn] = True
    plan = Plan.freeze(_pairs_without(store, all_gone), unit_rows=store.unit_rows)
    _check_layout(store, plan)
    counts = np.diff(store.offsets)
    rows_gone: dict[Side, Bools] = {"image": gone, "text": np.repeat(gone, counts)}
    stage = _Stage(store, plan, rows_gone, functools.cache(store.checks))
    arrays = [spec for name, spec in store.arrays.items() if not name.endswith("/valid")]
    constants = {file: content for name in store.codecs for file, content in codec_files(name, store.codec(name)).items()}
    identity = _identity(store, plan, all_gone, parent)
    with StoreWriter.open(out, plan=plan, arrays=arrays, identity=identity, constants=constants, on_progress=on_progress) as writer:
        for done, unit in enumerate(pending := writer.pending(), 1):
            with open_attempt(writer.path, plan, writer.arrays, unit) as attempt:
                writer.commit(attempt.folder, {"unit": unit.name, **stage.unit(unit, attempt.folder)})
            on_progress("withdraw: units", done, len(pending), unit.name)
        run = {"operation": "withdraw", "from": store.digest, "source": source_of(store), "seconds": round(time.perf_counter() - started, 3)}
        digest = writer.finalise(run)
    before, after = ({name: entry["sha256"] for name, entry in of.manifest["files"].items()} for of in (store, open_store(out)))
    kept = sum(before.get(name) == found for name, found in after.items())
    return Withdrawal(str(out), digest, store.digest, int(gone.sum()), int(counts[gone].sum()), absent, len(after) - kept, kept)


def is_successor(new: Manifest, old: Manifest) -> bool:
    """Tell whether `new` is a version of `old` with rows withdrawn, in one step or several: it says so, and all else is equal.

    Anybody can write such a manifest: whose it is, its digest or its signature must say.
    """
    said, before = new.content["identity"].get("withdrawn"), old.content["identity"].get("withdrawn", {"rows": []})
    if said is None or old.digest not in said["versions"] or not set(before["rows"]) < set(said["rows"]):
        return False
    of_new, of_old = (
        {
            "identity": {name: part for name, part in of.content["identity"].items() if name not in _OF_VERSION},
            "plan": {name: number for name, number in of.content["plan"].items() if name != "fingerprint"},
            "arrays": of.content["arrays"],
        }
        for of in (new, old)
    )
    return of_new == of_old


@dataclass(frozen=True, eq=False)
class _Stage:
    """What units of the new version are made of: the store, the new plan and by side the rows that go now; `checks` gives the crc32c of an array's chunks."""

    store: Store
    plan: Plan
    gone: dict[Side, Bools]
    checks: Callable[[str], npt.NDArray[np.uint32]]

    def unit(self, unit: Unit, folder: Path) -> dict[str, Any]:
        """Stage all files of a unit in `folder`; returns their entries and the crc32c of the chunks by array, as records of units have them."""
        files: dict[str, dict[str, Any]] = {}
        crcs: dict[str, str] = {}
        for spec in (spec for spec in self.store.arrays.values() if spec.side == unit.side):
            parts = []
            for number in range(unit.start // spec.shard[0], -(-unit.stop // spec.shard[0])):
                path, (start, stop) = spec.shard_path(number), spec.shard_rows(number)
                if self.gone[unit.side][start:stop].any():
                    written, found = self._rewritten(spec, number, staged_path(folder, path))
                    files[path] = {"size": written.size, "sha256": written.sha256, "rows": [start, stop]}
                else:
                    found = self.checks(spec.name)[number * spec.chunks_per_shard : (number + 1) * spec.chunks_per_shard]
                    files[path] = self._linked(path, folder)
                parts.append(found)
            crcs[spec.name] = np.concatenate(parts).tobytes().hex()
        path = index_path(unit)
        if self.gone[unit.side][unit.start : unit.stop].any():
            written = write_file(staged_path(folder, path), parquet_bytes(self._index(unit)))
            files[path] = {"size": written.size, "sha256": written.sha256, "rows": [unit.start, unit.stop]}
        else:
            files[path] = self._linked(path, folder)
        valid = self.store.gather(f"{unit.side}/valid", np.arange(unit.start, unit.stop)).astype(bool)
        return {"valid": int((valid & ~self.gone[unit.side][unit.start : unit.stop]).sum()), "files": files, "crcs": crcs}

    def _rewritten(self, spec: ArraySpec, number: int, file: Path) -> tuple[WrittenFile, npt.NDArray[np.uint32]]:
        """Write a shard again with the fill value in the rows that go."""
        shard, (start, stop) = ShardWriter(file, spec, number), spec.shard_rows(number)
        step = max(1, BLOCK_BYTES // (spec.chunk[0] * spec.views * spec.row_bytes)) * spec.chunk[0]
        try:
            for first in range(start, stop, step):
                rows = np.arange(first, min(first + step, stop))
                values = gather_views(self.store, spec.name, rows)
                values[self.gone[spec.side][rows]] = spec.fill
                shard.append(values)
            return shard.close()
        finally:
            shard.abandon()

    def _linked(self, path: str, folder: Path) -> dict[str, Any]:
        """Take a file of the store as it is."""
        target = staged_path(folder, path)
        with self.store.listed(path) as file, disk_errors(target):
            try:
                os.link(file, target, follow_symlinks=False)
            except OSError:  # another disk, or one without hard links
                shutil.copyfile(file, target)
                with open(target, "rb") as f:
                    os.fsync(f.fileno())
        return dict(self.store.manifest["files"][path])

    def _index(self, unit: Unit) -> pa.Table:
        if unit.side == "text":
            return text_index(self.plan, unit)
        rows = index_rows(self.store, "image", np.arange(unit.start, unit.stop))
        for i in np.flatnonzero(self.gone["image"][unit.start : unit.stop]).tolist():
            rows[i] = NOTHING
        return image_index(self.plan, unit, rows, np.array([row["valid"] for row in rows], np.uint8))


def _chosen(store: Store, keys: Sequence[str], sha256: Sequence[str]) -> tuple[Bools, tuple[str, ...]]:
    """Return which images go [N], those with the bytes of others among them, and what is not in the store."""
    if wrong := [text for text in sha256 if not _SHA256.fullmatch(text)]:
        raise ConfigError(f"'{wrong[0][:80]}' is no sha256.", "Give a file with 64 hexadecimal digits per line.")
    key_column, hash_column = store.index("image", "key").combine_chunks(), store.index("image", "sha256").combine_chunks()
    gone = _among(key_column, keys)
    contents = {*sha256, *hash_column.filter(pa.array(gone)).to_pylist()} - {""}
    gone |= _among(hash_column, contents)
    gone[store.withdrawn] = False
    known = {*key_column.filter(pc.is_in(key_column, pa.array(keys, key_column.type))).to_pylist()} if keys else set()
    held = {*hash_column.filter(pa.array(_among(hash_column, sha256))).to_pylist(), *store.identity.get("withdrawn", {}).get("sha256", [])}
    if gone.sum() + len(store.withdrawn) > MAX_WITHDRAWN:
        raise ConfigError(
            f"A store names at most {MAX_WITHDRAWN} withdrawn images.", "Write those that remain into a new store: kdstore store subset --keys FILE."
        )
    return gone, (*(key for key in keys if key not in known), *(text for text in sha256 if text not in held))


def _among(column: pa.Array, values: Sequence[str] | set[str]) -> Bools:
    return pc.is_in(column, pa.array(sorted(values), column.type)).to_numpy(zero_copy_only=False).astype(bool)


def _pairs_without(store: Store, gone: Bools) -> Iterator[tuple[str, tuple[Caption, ...]]]:
    """Yield the rows of a store; those that are gone have empty captions and a key that says nothing but of which data they were which row.

    The data is named by what remains of it: by the fingerprint before, guesses at a key or a caption could be tried. Stores of the same data have equal keys
    there, and those of other data, which may be put together, do not. Keys that an earlier version put there stay.
    """
    gone = gone.copy()
    gone[store.withdrawn] = False
    rest = fingerprint_of(("", ()) if gone[i] else pair for i, pair in enumerate(pairs_of(Part.of(store))))
    for i, (key, captions) in enumerate(pairs_of(Part.of(store))):
        yield (f"{REASON}:{rest[7:19]}:{i}", tuple(Caption("", caption.kind) for caption in captions)) if gone[i] else (key, captions)


def _identity(store: Store, plan: Plan, gone: Bools, parent: str | Path | None) -> dict[str, Any]:
    """Build the identity of the version without the images that are `gone` in it."""
    before = store.identity.get("withdrawn", {"sha256": [], "versions": []})
    hashes = store.index("image", "sha256").filter(pa.array(gone)).to_pylist()
    said = {
        "rows": np.flatnonzero(gone).tolist(),
        "sha256": sorted({*before["sha256"], *hashes} - {""}),
        "versions": [*before["versions"], store.digest],
    }
    identity = {**store.identity, "withdrawn": said}
    if "source" in identity:
        identity["source"] = {"fingerprint": plan.fingerprint}
    of = store.identity.get("parent")
    if (of is None) != (parent is None):
        found = f"{store.path} holds arrays for the rows of another store." if of else f"{store.path} is no child of another store."
        raise ConfigError(found, "Withdraw from that one first and name the new version with --parent." if of else "Leave --parent out.")
    if of and parent is not None:
        new = open_store(parent)
        if of.get("digest") not in new.identity.get("withdrawn", {}).get("versions", []) or new.fingerprint != plan.fingerprint:
            raise IdentityMismatch(
                f"{parent} is not the store of these rows without the same images.",
                "Withdraw the same ones from both; a child of some rows is extracted again.",
            )
        identity["parent"] = {"digest": new.digest}
    return identity


def _check_layout(store: Store, plan: Plan) -> None:
    """Refuse a store of other writers whose shards cannot be written again by themselves."""
    other = [name for name, spec in store.arrays.items() if spec.codecs not in (PLAIN, ZSTD)]
    other += [name for side in SIDES if store.arrays.get(name := f"{side}/valid") != scalar_array(plan, name, "uint8")]
    if other:
        raise ConfigError(f"{store.path} holds {', '.join(other)} in a form that is not written here.", "Recode it first: kdstore store recode --codec zstd.")

"""Writing a store: units of rows are staged by attempts, committed by one writer, and sealed by the manifest.

An attempt writes into a folder of its own, so that one that dies harms nothing. A commit moves its files into place and then
writes the unit's record, all under the lock; files without a record do not count and are written again. `zarr.json` files and the manifest come
last: an unfinished store opens neither with us nor with a Zarr reader, so unwritten rows can never be read as fill values.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any

import numpy as np

from kdstore.errors import CannotWrite, DamagedStore, IdentityMismatch, IncompleteStore, KdstoreError, StoreError, StoreNotFound
from kdstore.jsonfile import canonical_json, differing_fields, digest_of, disk_errors, fsync_folder, make_folders, read_json, write_bytes, write_json
from kdstore.progress import OnProgress, silent
from kdstore.store.attempt import ATTEMPTS, Attempt, open_attempt, staged_path
from kdstore.store.codecfile import npy_bytes
from kdstore.store.layout import BUILD, FORMAT, GROUP_METADATA, MANIFEST, OFFSETS, ArraySpec, scalar_array
from kdstore.store.lock import Lock, take_lock
from kdstore.store.manifest import read_manifest
from kdstore.store.plan import SIDES, Plan, Unit

UNITS = "units"
PARTS = "parts"
BUILD_JSON = "build.json"
GROUP = "zarr.json"
PLAN = "plan.arrow"


@dataclass(frozen=True, eq=False)
class Begun:
    """What a store that is being written shall be."""

    plan: Plan
    arrays: tuple[ArraySpec, ...]
    identity: dict[str, Any]


def read_begun(path: str | Path) -> Begun:
    """Read the build folder of an unfinished store; raises StoreNotFound if none was begun, DamagedStore."""
    build = Path(path) / BUILD
    if not (build / BUILD_JSON).is_file():
        raise StoreNotFound(f"No store is being written at {path}.", "Check the path, or begin one with: kdstore extract --out PATH.")
    said = read_json(build / BUILD_JSON)
    arrays = tuple(ArraySpec.from_metadata(name, metadata) for name, metadata in said["arrays"].items())
    plan = Plan.load(build / PLAN, said["plan"]["fingerprint"], said["plan"]["unit_rows"], said["plan_sha256"])
    return Begun(plan, arrays, said["identity"])


class StoreWriter:
    """The one committer of a store; `open` resumes what an earlier one recorded."""

    def __init__(self, path: Path, plan: Plan, specs: dict[str, ArraySpec], asked: dict[str, Any], lock: Lock | None, constants: Mapping[str, bytes]) -> None:
        self.path = path
        self.plan = plan
        self._specs = specs
        self._asked = asked
        self._lock = lock
        self._constants = dict(sorted(constants.items()))
        self._created = False
        self._digest: str | None = None

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        plan: Plan,
        arrays: Sequence[ArraySpec],
        identity: dict[str, Any],
        constants: Mapping[str, bytes] | None = None,
        on_progress: OnProgress = silent,
    ) -> StoreWriter:
        """Create the store, resume an unfinished one, or find it complete.

        Raises IdentityMismatch with the differing fields when identity, plan or arrays are not those found; StoreLocked; DamagedStore; DiskFull; CannotWrite.
        `image/valid` and `text/valid` are added to `arrays`. `constants` are small files of the store that the identity speaks for, by path: what value
        codecs learned. They lie in the build folder from the start, for those who resume.
        """
        path = Path(path)
        specs = {spec.name: spec for spec in (*arrays, *(scalar_array(plan, f"{side}/valid", "uint8") for side in SIDES))}
        said = {
            "format": FORMAT,
            "identity": identity,
            "identity_digest": digest_of(identity),
            "plan": plan.summary(),
            "arrays": {name: spec.to_metadata() for name, spec in specs.items()},
        }
        asked = json.loads(canonical_json(said))  # sorted: the manifest's bytes must not depend on the order of a caller's dict
        check_place(path)
        with disk_errors(path):
            created, lock = not path.exists(), None
            while lock is None and not (path / MANIFEST).is_file():
                make_folders(path / BUILD)
                with contextlib.suppress(FileNotFoundError):  # its committer sealed the store, or gave up, and removed the folder just now
                    lock = take_lock(path / BUILD, on_progress)
            writer = cls(path, plan, specs, asked, lock, constants or {})
            writer._created = created
            try:
                writer._prepare()
            except BaseException:
                writer.close()
                raise
        return writer

    @classmethod
    def reopen(cls, path: str | Path, *, on_progress: OnProgress = silent) -> StoreWriter:
        """Go on with an unfinished store as its build folder describes it; raises StoreNotFound if none was begun, and what `open` raises."""
        begun, build = read_begun(path), Path(path) / BUILD
        constants = {str(file.relative_to(build)): file.read_bytes() for file in (build / "codecs").rglob("*") if file.is_file()}
        return cls.open(path, plan=begun.plan, arrays=begun.arrays, identity=begun.identity, constants=constants, on_progress=on_progress)

    def _prepare(self) -> None:
        """Compare with what the folder holds and remove what dead attempts left; without a record of what it shall be, write one."""
        if (self.path / MANIFEST).is_file():
            self.close()  # sealed by another process before we had the lock
            manifest = read_manifest(self.path)
            _refuse_differences(self.path, self._asked, manifest.content)
            shutil.rmtree(self.path / BUILD, ignore_errors=True)  # left by a process that ended between manifest and this
            self._digest = manifest.digest
            return
        build = self.path / BUILD
        if (build / BUILD_JSON).is_file():
            _refuse_differences(self.path, self._asked, read_json(build / BUILD_JSON))
        _sweep(self.path)
        for folder in (ATTEMPTS, UNITS):
            make_folders(build / folder)
        if not (build / BUILD_JSON).is_file():
            plan_sha256 = self.plan.save(build / PLAN)
            for name, content in self._constants.items():
                make_folders((build / name).parent)
                write_bytes(build / name, content)
            write_json(build / BUILD_JSON, {**self._asked, "plan_sha256": plan_sha256})

    @property
    def arrays(self) -> tuple[ArraySpec, ...]:
        """All arrays of the store, those that say what is valid too."""
        return tuple(self._specs.values())

    @property
    def digest(self) -> str | None:
        """The digest of a complete store."""
        return self._digest

    @property
    def complete(self) -> bool:
        """Whether the manifest is written: nothing is pending and nothing can be added."""
        return self._digest is not None

    def pending(self) -> tuple[Unit, ...]:
        """Return the units without a record, in order."""
        return () if self.complete else tuple(unit for unit in self.plan.units if not self._record_path(unit).is_file())

    def recorded(self, side: str) -> tuple[int, int]:
        """Count the rows of one side in the recorded units of a store that is not complete yet, and those of them that are not valid."""
        pending = set(self.pending())
        units = [unit for unit in self.plan.units if unit.side == side and unit not in pending]
        rows = sum(len(unit) for unit in units)
        return rows, rows - sum(read_json(self._record_path(unit))["valid"] for unit in units)

    @contextlib.contextmanager
    def attempt(self, unit: Unit) -> Iterator[Attempt]:
        """Stage one unit; leaving the block commits it, an exception discards it. A unit that is recorded by then stays as it is."""
        with open_attempt(self.path, self.plan, self.arrays, unit) as attempt:
            try:
                yield attempt
                self.commit(attempt.folder, attempt.close())
            except CannotWrite:
                if self.complete:
                    return  # sealed while this attempt was late, and its folder removed
                with self._committing():
                    pass  # a committer that took the lock has swept the folder: then this says so
                raise

    def commit(self, folder: Path, record: dict[str, Any]) -> None:
        """Record the unit that an attempt has staged in `folder`, unless it is recorded by now, and remove the folder.

        `record` is what `Attempt.close` returned, here or elsewhere. Raises StoreLocked if this process no longer has the lock, DiskFull, CannotWrite.
        """
        unit = self.path / BUILD / UNITS / f"{record['unit']}.json"
        if not self.complete:  # else it was sealed while this attempt was late
            with self._committing():
                if not unit.is_file():
                    for name in record["files"]:
                        target = self.path / name
                        target.parent.mkdir(parents=True, exist_ok=True)
                        os.replace(staged_path(folder, name), target)
                    _sync_folders(self.path, record["files"])
                    write_json(unit, record)
        shutil.rmtree(folder, ignore_errors=True)

    def finalise(self, run: dict[str, Any], stats: dict[str, Any] | None = None) -> str:
        """Write metadata, checks and offsets, then the manifest, and return its digest; raises IncompleteStore, StoreLocked, DiskFull, CannotWrite.

        `run` (times, hosts, versions) and `stats` go beside the manifest and never change the digest.
        """
        if self._digest is not None:
            return self._digest
        with self._committing():
            if pending := self.pending():
                found = f"{self.path}: {len(pending)} of {len(self.plan.units)} units are not recorded."
                raise IncompleteStore(found, "Run the extraction again to resume it.")
            records = [read_json(self._record_path(unit)) for unit in self.plan.units]
            files = {path: entry for record in records for path, entry in record["files"].items()}
            sealing = []
            for path, content in self._sealing_files(records):
                (self.path / path).parent.mkdir(parents=True, exist_ok=True)
                write_bytes(self.path / path, content)
                files[path] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
                sealing.append(path)
            _sync_folders(self.path, sealing)
            write_json(self.path / "run.json", run)
            if stats is not None:
                write_json(self.path / "stats.json", stats)
            digest = write_json(self.path / MANIFEST, {**self._asked, "files": dict(sorted(files.items()))})
        self._digest = digest
        self.close()
        shutil.rmtree(self.path / BUILD, ignore_errors=True)
        return digest

    def close(self) -> None:
        """Give the lock back."""
        if self._lock is not None:
            self._lock.release()

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if error is not None and not self.complete:
                self._discard_unrecorded()
        finally:
            self.close()

    def _discard_unrecorded(self) -> None:
        """Remove the folder's content if no unit has come so far, staged ones counted, so that a run with corrected settings may take the same path."""
        with contextlib.suppress(OSError, KdstoreError), self._committing():
            if [p.name for p in self.path.iterdir()] == [BUILD] and not (
                any((self.path / BUILD / UNITS).glob("*.json")) or (self.path / BUILD / PARTS).exists()
            ):
                shutil.rmtree(self.path / BUILD, ignore_errors=True)
                if self._created:
                    self.path.rmdir()

    def _record_path(self, unit: Unit) -> Path:
        return self.path / BUILD / UNITS / f"{unit.name}.json"

    @contextlib.contextmanager
    def _committing(self) -> Iterator[None]:
        """Change the store as the one that may; raises StoreLocked if this process no longer has the lock, DiskFull, CannotWrite."""
        assert self._lock is not None
        with disk_errors(self.path), self._lock.held():
            yield

    def _sealing_files(self, records: list[dict[str, Any]]) -> Iterator[tuple[str, bytes]]:
        for folder in ("", *sorted({f"{name.rpartition('/')[0]}/" for name in self._specs})):
            yield f"{folder}zarr.json", canonical_json(GROUP_METADATA)
        for spec in self._specs.values():
            yield spec.metadata_path, canonical_json(spec.to_metadata())
            crcs = b"".join(bytes.fromhex(record["crcs"][spec.name]) for record in records if spec.name in record["crcs"])
            yield spec.checks_path, npy_bytes(np.frombuffer(crcs, "<u4"))
        yield from self._constants.items()
        yield OFFSETS, npy_bytes(self.plan.offsets.astype("<i8"))


def _sync_folders(root: Path, names: Iterable[str]) -> None:
    """Make renames durable: fsync every folder on the way from `root` to the named files."""
    folders = {parent for name in names for parent in PurePosixPath(name).parents}
    for folder in sorted(folders):
        fsync_folder(root / folder)


def _refuse_differences(path: Path, asked: dict[str, Any], found: dict[str, Any]) -> None:
    """Raise IdentityMismatch with the fields that differ between what is asked for and what `path` holds."""
    there, here = ({part: content[part] for part in ("format", "identity", "plan", "arrays")} for content in (found, asked))
    if differs := differing_fields(there, here, ("there", "asked")):
        same_units = there["plan"]["unit_rows"] == here["plan"]["unit_rows"]  # else chunks and shards differ by that alone
        differs = differing_fields(_in_words(there, same_units), _in_words(here, same_units), ("there", "asked")) or differs
        raise IdentityMismatch(f"{path} holds other features ({differs}).", "Choose another path with --out, or remove that folder.")


def _in_words(said: dict[str, Any], with_chunks: bool) -> dict[str, Any]:
    """Say of arrays what users choose instead of their metadata, which repeats it."""
    arrays: dict[str, dict[str, Any]] = {}
    for name, metadata in said["arrays"].items():
        spec = ArraySpec.from_metadata(name, metadata)
        arrays[name] = {"data_type": spec.dtype, "row": list(spec.shape[1:]), "codecs": "+".join(spec.codecs)}
        arrays[name] |= {"chunk_rows": spec.chunk[0], "shard_rows": spec.shard[0]} if with_chunks else {}
    return {**said, "arrays": arrays}


def check_place(path: Path) -> None:
    """Refuse a path where no store can be written; raises StoreError for what holds something else or lies in a store, CannotWrite."""
    for folder in path.absolute().parents:
        if (folder / BUILD / BUILD_JSON).is_file() or ((folder / MANIFEST).is_file() and (folder / GROUP).is_file()):
            raise StoreError(f"{path} lies in the store {folder}.", "Choose a folder beside it.")
    with disk_errors(path):
        if (path / MANIFEST).is_file():
            return  # to be read only
        if path.exists() and not (path / BUILD).is_dir() and any(path.iterdir()):
            raise StoreError(f"{path} is neither empty nor a store.", "Choose another path.")
        above = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())
        if not above.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(above))
        if not os.access(above, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(above))


def _sweep(path: Path) -> None:
    """Remove what dead attempts and dead writes left, and the records of units that are not whole."""
    shutil.rmtree(path / BUILD / ATTEMPTS, ignore_errors=True)
    for temp in path.rglob(".*.tmp"):
        if (path / BUILD / PARTS) not in temp.parents:  # a part may be at it
            temp.unlink(missing_ok=True)
    for record in (path / BUILD / UNITS).glob("*.json"):
        if not _is_whole(path, record):
            record.unlink()


def _is_whole(path: Path, record: Path) -> bool:
    """Tell whether a unit's record can be read and its files are there in full."""
    try:
        return all((path / name).stat().st_size == entry["size"] for name, entry in read_json(record)["files"].items())
    except (DamagedStore, FileNotFoundError, NotADirectoryError):
        return False

"""Where a pull keeps what has come until the store can be shown: `_build/pull` in the target, and how it becomes the store.

Files are only renamed into place when all of them are there and right. Where the target has the same store, its manifest stays; that of a store that is
replaced goes first, so that a reader sees the old store, for a moment none, or the new one, and never files of both.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from kdstore.errors import DamagedStore, DiskFull, StoreError
from kdstore.jsonfile import fsync_folder, make_folders, write_bytes, write_json
from kdstore.progress import OnProgress
from kdstore.store.layout import BESIDE, BUILD, FORMAT, IN_TRANSIT, MANIFEST, PART, PULL
from kdstore.store.manifest import FileEntry, Manifest, parse_manifest, read_manifest

REPLACED = "replaced~"  # the manifest of the store that was there; no file of a store can have this name


@dataclass(frozen=True)
class Staging:
    """The staging folder of a target, for one manifest."""

    target: Path
    manifest: Manifest
    encoded: bytes

    @property
    def folder(self) -> Path:
        return self.target / BUILD / PULL

    def begin(self) -> None:
        """Make the folder; of what an earlier pull left, keep the files that this manifest lists alike.

        A pull of another store may have been stopped while it put its files into place: those that this one lacks would be in no manifest.
        """
        make_folders(self.folder)
        in_place = not (self.target / MANIFEST).exists()
        with contextlib.suppress(OSError, StoreError):
            before = parse_manifest((self.folder / MANIFEST).read_bytes(), self.folder / MANIFEST)
            for path, entry in before.files.items():
                if self.manifest.files.get(path) != entry:
                    for name in (path, path + IN_TRANSIT):
                        (self.folder / name).unlink(missing_ok=True)
                if in_place and path not in self.manifest.files and _inside(self.target, path) and is_file_of(self.target / path, entry):
                    self._remove(path)
        write_bytes(self.folder / MANIFEST, self.encoded)

    def show(self, files: Iterable[str], origin: str) -> Manifest:
        """Make the staging folder a store in part, of files that are all there, and return its manifest."""
        for path in files:
            self._borrow(path)
        write_part(self.folder, self.manifest, files, origin)
        return read_manifest(self.folder)

    def _borrow(self, path: str) -> None:
        """Have a file of the target in the staging folder too."""
        if not (self.folder / path).exists():
            (self.folder / path).parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(self.target / path, self.folder / path)
            except OSError:  # a file system without links
                shutil.copyfile(self.target / path, self.folder / path)

    def found(self, files: Iterable[str], on_progress: OnProgress) -> set[str]:
        """Return which files lie here or in the target as they should be: their bytes are hashed."""
        names = [path for path in files if self._lies(path)]
        right = set()
        with ThreadPoolExecutor(os.cpu_count(), "kdstore-found") as pool:
            for done, (path, is_right) in enumerate(zip(names, pool.map(self._is_right, names), strict=True), 1):
                on_progress("files there", done, len(names), "")
                if is_right:
                    right.add(path)
        return right

    def partial_bytes(self, files: Iterable[str]) -> int:
        """Sum the bytes of files in transit."""
        return sum(_size(self.folder / (path + IN_TRANSIT)) or 0 for path in files)

    def sized(self, files: Iterable[str]) -> set[str]:
        """Return which files lie here or in the target with the size that they should have."""
        return {path for path in files if self._lies(path)}

    def _lies(self, path: str) -> bool:
        size = self.manifest.files[path].size
        return size in (_size(self.folder / path), _size(self.target / path))

    def _is_right(self, path: str) -> bool:
        """Compare a file with its hash where it lies; one in the staging folder that is not right is removed."""
        entry = self.manifest.files[path]
        if is_file_of(self.folder / path, entry):
            return True
        (self.folder / path).unlink(missing_ok=True)
        return _inside(self.target, path) and is_file_of(self.target / path, entry)

    def commit(self, files: set[str], old: Manifest | None, origin: str) -> Manifest:
        """Put the files, all of which are there and right, into place and make them the store; returns what it is then.

        `old` is the manifest of the store that is there. Its other files stay if it is the same store, and go if it is another. One that a stopped pull has
        taken away is another: some of its files may be gone.
        """
        same = old is not None and old.digest == self.manifest.digest and (self.target / MANIFEST).is_file()
        staged = [path for path in sorted(files) if (self.folder / path).exists()]
        for name in staged:
            if not _inside(self.target, name):
                raise DamagedStore(f"{self.target / name} would lie outside {self.target}: a folder on the way is a link.", "Remove the link.")
        if old is not None and not same:
            self._withdraw()
        for name in (*staged, *(name for name in BESIDE if (self.folder / name).is_file())):
            (self.target / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(self.folder / name, self.target / name)
        _sync(self.target, staged)
        held = files | (set(old.held) if old is not None and same else set())
        self._remove_replaced(held)
        if held == self.manifest.files.keys():
            (self.target / PART).unlink(missing_ok=True)
        else:
            write_part(self.target, self.manifest, held, origin)
        if not same:
            write_bytes(self.target / MANIFEST, self.encoded)
        fsync_folder(self.target)
        shutil.rmtree(self.folder, ignore_errors=True)
        return read_manifest(self.target)

    def _withdraw(self) -> None:
        """Take the store away that is to be replaced; which files it had is kept until they are gone."""
        with contextlib.suppress(FileNotFoundError):
            os.replace(self.target / MANIFEST, self.folder / REPLACED)
        for name in (PART, *BESIDE):
            (self.target / name).unlink(missing_ok=True)
        fsync_folder(self.target)

    def _remove_replaced(self, held: set[str]) -> None:
        """Remove files of a replaced store that the new one does not have here, and nothing else."""
        replaced = read_replaced(self.target)
        for path in set(replaced.files if replaced else ()) - held:
            if _inside(self.target, path):
                self._remove(path)

    def _remove(self, path: str) -> None:
        """Remove a file of the target, and the folders that are empty then."""
        (self.target / path).unlink(missing_ok=True)
        for folder in (self.target / path).parents:
            if folder == self.target:
                break
            with contextlib.suppress(OSError):
                folder.rmdir()


def read_replaced(target: Path) -> Manifest | None:
    """Return the manifest of a store that a pull had begun to replace when it was stopped."""
    path = target / BUILD / PULL / REPLACED
    return replace(parse_manifest(path.read_bytes(), path), root=target) if path.is_file() else None


def write_part(root: Path, manifest: Manifest, files: Iterable[str], origin: str) -> None:
    """Write `part.json`: which files of its store a part has."""
    write_json(root / PART, {"format": FORMAT, "store": manifest.digest, "from": origin, "files": sorted(files)})


def check_space(target: Path, needed: int) -> None:
    """Raise DiskFull unless the disk of a folder, or of where it will be, has room for so many bytes."""
    there = next(folder for folder in (target.absolute(), *target.absolute().parents) if folder.exists())
    free = shutil.disk_usage(there).free
    if needed > free:
        raise DiskFull(
            f"{target} needs {needed} bytes more, and its disk has {free} free.", "Free space, choose another path, or pull a part: --arrays, --rows."
        )


def is_file_of(path: Path, entry: FileEntry) -> bool:
    """Tell whether a regular file has the size and sha256 of a manifest's entry."""
    if _size(path) != entry.size:
        return False
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest() == entry.sha256


def bytes_of(files: Mapping[str, FileEntry], names: Iterable[str]) -> int:
    return sum(files[name].size for name in names)


def _size(path: Path) -> int | None:
    """Return the size of a regular file that is no link, else None."""
    with contextlib.suppress(OSError):
        if path.is_file() and not path.is_symlink():
            return path.stat().st_size
    return None


def _inside(root: Path, path: str) -> bool:
    """Tell whether no folder on the way to a file is a link."""
    parent = os.path.dirname(path)
    return os.path.realpath(root / parent) == os.path.normpath(os.path.join(os.path.realpath(root), parent))


def _sync(root: Path, names: Sequence[str]) -> None:
    """Make renames durable: a shard has a folder of its own, and a file system answers many such calls at once."""
    folders = {parent for name in names for parent in PurePosixPath(name).parents}
    with ThreadPoolExecutor(32, "kdstore-sync") as pool:
        list(pool.map(lambda folder: fsync_folder(root / folder), sorted(folders)))

"""Checking a whole store: every file's size and sha256 against the manifest, and nothing else beside them."""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from kdstore.errors import DamagedStore
from kdstore.progress import OnProgress, silent
from kdstore.store.layout import BESIDE, BUILD, MANIFEST
from kdstore.store.manifest import FileEntry, Manifest, read_manifest


@dataclass(frozen=True)
class Damage:
    """A file that is not as it was written; `rows` of its side are affected (None: the whole store)."""

    path: str
    rows: tuple[int, int] | None
    reason: str


@dataclass(frozen=True)
class VerifyReport:
    """What `verify_store` found; files in the manifest and their bytes, damaged files in order of their path."""

    path: Path
    digest: str
    num_files: int
    num_bytes: int
    damaged: tuple[Damage, ...]

    @property
    def ok(self) -> bool:
        return not self.damaged


def verify_store(path: str | Path, *, on_progress: OnProgress = silent) -> VerifyReport:
    """Hash all files of a store on all cores and report those that are missing, changed, links, or not in the manifest.

    Raises StoreNotFound, IncompleteStore, and DamagedStore if the manifest itself does not match its digest.
    """
    manifest = read_manifest(Path(path))
    damaged = [Damage(extra, None, "is not in the manifest") for extra in _files_beyond(manifest)]
    total = sum(entry.size for entry in manifest.files.values())
    done = 0
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # hashlib lets go of the GIL
        found = pool.map(lambda item: _damage(manifest, *item), manifest.files.items())
        for (name, entry), damage in zip(manifest.files.items(), found, strict=True):
            done += entry.size
            on_progress("verify", done, total, name)
            if damage:
                damaged.append(damage)
    return VerifyReport(manifest.root, manifest.digest, len(manifest.files), total, tuple(sorted(damaged, key=lambda damage: damage.path)))


def _damage(manifest: Manifest, path: str, entry: FileEntry) -> Damage | None:
    try:
        with manifest.open(path) as fd, os.fdopen(fd, "rb", closefd=False) as f:
            sha256 = hashlib.file_digest(f, "sha256").hexdigest()
    except DamagedStore as e:
        return Damage(path, entry.rows, e.message)
    return None if sha256 == entry.sha256 else Damage(path, entry.rows, f"has sha256 {sha256}, expected {entry.sha256}")


def _files_beyond(manifest: Manifest) -> list[str]:
    """Return the files in the folder that the manifest does not list and that are not ours beside it."""
    found = []
    for folder, folders, names in os.walk(manifest.root):
        relative = Path(folder).relative_to(manifest.root)
        if relative == Path():
            folders[:] = [name for name in folders if name != BUILD]
        links = [name for name in folders if os.path.islink(os.path.join(folder, name))]
        found += [(relative / name).as_posix() for name in names + links]
    return [name for name in found if name not in manifest.files and name not in (MANIFEST, *BESIDE)]

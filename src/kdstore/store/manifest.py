"""The manifest: identity, plan, arrays and every file's size, sha256 and rows; and how its files are opened safely.

A store may come from a stranger. So a path in a manifest is checked before it is opened, and a declared size is compared with
the file's before anything is allocated from it.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kdstore.errors import DamagedStore, IncompleteStore, StoreError, StoreNotFound
from kdstore.jsonfile import digest_of, read_json
from kdstore.store.layout import BUILD, FORMAT, MANIFEST

_INSIDE = re.compile(r"(?!/)(?:(?:\A|/)(?!\.\.?(?:/|\Z))[^/\\\0]+)+")  # parts that are not empty, `.` or `..`; a manifest may list 50,000 paths
RESTORE = "Restore this file or extract its rows again."


@dataclass(frozen=True)
class FileEntry:
    """What the manifest says of a file: bytes, sha256 (hex) and the rows of its side (or None for files of the whole store)."""

    size: int
    sha256: str
    rows: tuple[int, int] | None

    def said(self) -> str:
        return f" (rows {self.rows[0]} to {self.rows[1]})" if self.rows else ""


@dataclass(frozen=True)
class Manifest:
    """A checked manifest and the folder it describes."""

    root: Path
    content: dict[str, Any]
    files: dict[str, FileEntry]

    @property
    def digest(self) -> str:
        return str(self.content["digest"])

    def entry(self, path: str) -> FileEntry:
        """Return the entry of a file that the format asks for; raises DamagedStore if the manifest lists none."""
        if path not in self.files:
            raise DamagedStore(f"{self.root / MANIFEST} lists no {path}.", RESTORE)
        return self.files[path]

    @contextlib.contextmanager
    def open(self, path: str) -> Iterator[int]:
        """Yield a descriptor of a listed file of the right size inside the store; raises DamagedStore."""
        fd = self.descriptor(path)
        try:
            yield fd
        finally:
            os.close(fd)

    def descriptor(self, path: str) -> int:
        """Open a listed file for reading, the caller closes it; raises DamagedStore if it is missing, of another size, or outside the store."""
        entry = self.entry(path)
        full = self.root / path
        root = os.path.realpath(self.root)
        if os.path.realpath(full) != os.path.join(root, path):
            raise DamagedStore(f"{full} is a link; files of a store must lie in its folder{entry.said()}.", "Copy the file into the store.")
        try:
            fd = os.open(full, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except (FileNotFoundError, NotADirectoryError) as e:
            raise DamagedStore(f"{full} is missing{entry.said()}.", RESTORE) from e
        size = os.fstat(fd).st_size
        if size != entry.size:
            os.close(fd)
            raise DamagedStore(f"{full} has {size} bytes, expected {entry.size}{entry.said()}.", RESTORE)
        return fd

    def read(self, path: str) -> bytes:
        """Return a whole listed file after comparing its sha256; raises DamagedStore."""
        with self.open(path) as fd, os.fdopen(fd, "rb", closefd=False) as f:
            content = f.read()
        entry = self.files[path]
        if len(content) != entry.size or hashlib.sha256(content).hexdigest() != entry.sha256:
            raise DamagedStore(f"{self.root / path} does not match its sha256{entry.said()}.", RESTORE)
        return content

    def load(self, path: str, length: int, dtype: str) -> npt.NDArray[Any]:
        """Return the array of a listed .npy file, read-only, its sha256 compared; raises DamagedStore if it is not `length` numbers of `dtype`."""
        content = self.read(path)
        stream = io.BytesIO(content)
        try:
            if np.lib.format.read_magic(stream) != (1, 0):
                raise ValueError("not of version 1.0")
            shape, _, found = np.lib.format.read_array_header_1_0(stream)
            array = np.frombuffer(content, found, offset=stream.tell())
        except ValueError as e:
            raise DamagedStore(f"{self.root / path} is not a NumPy file ({e}).", RESTORE) from e
        if shape != (length,) or array.shape != shape or found != np.dtype(dtype):
            raise DamagedStore(f"{self.root / path} holds {shape} {found}, expected {length} {np.dtype(dtype)}.", RESTORE)
        return array


def read_manifest(root: Path) -> Manifest:
    """Read and check `root/manifest.json`; raises StoreNotFound, IncompleteStore, DamagedStore, StoreError (another format)."""
    path = root / MANIFEST
    if not path.is_file():
        if (root / BUILD).is_dir():
            raise IncompleteStore(f"{root} has no {MANIFEST}: its extraction has not ended.", "Run the same extract command again to resume it.")
        raise StoreNotFound(f"There is no store at {root}.", "Check the path, or make one with: kdstore extract --out PATH.")
    content = read_json(path)
    if content.get("format") != FORMAT:
        raise StoreError(f"{path} is of format {content.get('format')!r}, expected {FORMAT}.", "Read it with the version of kdstore that wrote it.")
    try:
        files = {_checked_path(name): _entry(entry) for name, entry in content["files"].items()}
        if content["identity_digest"] != digest_of(content["identity"]):
            raise ValueError("identity_digest is not that of identity")
        content["plan"]["images"], content["plan"]["texts"], content["arrays"].items()
    except (LookupError, TypeError, ValueError, AttributeError) as e:
        raise DamagedStore(f"{path} is not a manifest of format {FORMAT} ({type(e).__name__}: {e}).", "Restore the file from its origin.") from e
    return Manifest(root, content, files)


def _checked_path(name: str) -> str:
    if not _INSIDE.fullmatch(name) or name == MANIFEST:
        raise ValueError(f"{name!r} is not a path inside a store")
    return name


def _entry(entry: dict[str, Any]) -> FileEntry:
    size, sha256, rows = entry["size"], entry["sha256"], entry.get("rows")
    if not isinstance(size, int) or size < 0 or not isinstance(sha256, str):
        raise ValueError(f"not a file entry: {entry}")
    return FileEntry(size, sha256, (int(rows[0]), int(rows[1])) if rows else None)

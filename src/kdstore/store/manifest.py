"""The manifest: identity, plan, arrays and every file's size, sha256 and rows; and how its files are opened safely.

A store may come from a stranger. So the manifest's own size is looked at before it is read, a path in it is checked before it is
opened, and a declared size is compared with the file's, and with what the format needs, before anything is allocated from it.
Paths are of lower-case ASCII only: no two of them are one file on a disk that ignores case, and none means more than its letters.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from kdstore.errors import CannotRead, ConfigError, DamagedStore, IncompleteStore, MissingFeature, StoreError, StoreNotFound
from kdstore.jsonfile import digest_of, parse_json, read_json
from kdstore.store.layout import BESIDE, BUILD, FORMAT, MANIFEST, PART, PULL, rows_said
from kdstore.store.plan import MAX_SHARDS

MAX_MANIFEST_BYTES = 1 << 26  # twice that of 14 arrays of 8,192 shards
MAX_MANIFEST_VALUES = 1 << 22  # an empty list takes 3 bytes of JSON and 64 of memory
MAX_ROWS = 1 << 48  # row numbers times bytes per row stay within int64
MAX_ARRAYS = 64
MAX_FILE_BYTES = 1 << 60  # no disk has it, and a sum of a few is an int64
MAX_METADATA_BYTES = 1 << 20
_PART = "[a-z0-9_][a-z0-9_.-]*"
_INSIDE = re.compile(f"{_PART}(?:/{_PART})*")
_SHA256 = re.compile("[0-9a-f]{64}")
_SCHEME = re.compile("(https?|hf|s3|gs):(?=/)")
_RESERVED = {name.lower() for name in (MANIFEST, BUILD, PART, *BESIDE)}
NPY_HEADER_BYTES = 10 + 65535  # at most, in version 1.0
RESTORE = "Restore this file or extract its rows again."


@dataclass(frozen=True)
class FileEntry:
    """What the manifest says of a file: bytes, sha256 (hex) and the rows of its side (or None for files of the whole store)."""

    size: int
    sha256: str
    rows: tuple[int, int] | None

    def said(self) -> str:
        return f" ({rows_said(*self.rows)})" if self.rows else ""


@dataclass(frozen=True)
class Held:
    """What `part.json` says of a store that was pulled in part: the files that are there, and where the others are."""

    files: frozenset[str]
    origin: str


class Supply(Protocol):
    """Where the files of a store come from that is not in a folder of its own."""

    @property
    def name(self) -> str:
        """The place as it may be shown."""
        ...

    def where(self, entry: FileEntry) -> Path:
        """Return where a file lies once it is here."""
        ...

    def descriptor(self, path: str, entry: FileEntry) -> int:
        """Open a file, fetched and compared with its sha256 if it is not here; it stays here until `let_go`. Raises TransferError, DiskFull, CannotWrite."""
        ...

    def bring(self, files: Mapping[str, FileEntry]) -> None:
        """Fetch files, several at once; raises what `descriptor` raises."""
        ...

    def announce(self, files: Mapping[str, FileEntry]) -> None:
        """Fetch files meanwhile, the first ones first."""
        ...

    def stop(self) -> None:
        """End all transfers for good: whoever waits for a file gets Interrupted."""
        ...

    def reopening(self, digest: str) -> tuple[Any, ...]:
        """Return how another process opens the store of this digest from here, as `__reduce__` does."""
        ...


@dataclass(frozen=True)
class Manifest:
    """A checked manifest and the folder it describes; `part` is None if all of its files are there, `supply` brings those of a store that is elsewhere."""

    root: Path
    content: dict[str, Any]
    files: dict[str, FileEntry]
    part: Held | None = None
    supply: Supply | None = None

    @property
    def digest(self) -> str:
        return str(self.content["digest"])

    @cached_property
    def _real_root(self) -> str:
        return os.path.realpath(self.root).rstrip("/")

    @property
    def held(self) -> dict[str, FileEntry]:
        """The files that are there."""
        return self.files if self.part is None else {path: entry for path, entry in self.files.items() if path in self.part.files}

    def holds(self, path: str) -> bool:
        """Tell whether a file is there by what the manifest and `part.json` say."""
        return path in self.files and (self.part is None or path in self.part.files)

    def where(self, path: str) -> Path:
        """Return where a listed file lies."""
        return self.root / path if self.supply is None else self.supply.where(self.files[path])

    @property
    def restore(self) -> str:
        """Say what to do about a damaged file."""
        return RESTORE if self.supply is None else "Remove this file of the cache: it is fetched again."

    def bring(self, paths: Iterable[str]) -> None:
        """Have files here that are read next; raises TransferError, DiskFull, CannotWrite."""
        if self.supply is not None:
            self.supply.bring({path: self.entry(path) for path in paths})

    def pull_hint(self) -> str:
        """Say how a part is completed; '' for a whole store."""
        return f"Pull more of it: kdstore store pull {self.part.origin} {self.root}" if self.part else ""

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
            let_go(fd)

    def descriptor(self, path: str) -> int:
        """Open a listed file for reading, the caller lets it go.

        Raises DamagedStore if it is missing, no regular file, of another size, or outside the store; CannotRead; MissingFeature if a part leaves it out.
        """
        entry = self.entry(path)
        if not self.holds(path):
            raise MissingFeature(f"{self.root} is a part of its store, without {path}{entry.said()}.", self.pull_hint())
        if self.supply is not None:
            return self.supply.descriptor(path, entry)
        full = self.root / path
        if os.path.realpath(full) != f"{self._real_root}/{path}":
            raise DamagedStore(f"{full} is a link; files of a store must lie in its folder{entry.said()}.", "Copy the file into the store.")
        fd = _open_file(full, entry.said())
        size = os.fstat(fd).st_size
        if size != entry.size:
            os.close(fd)
            raise DamagedStore(f"{full} has {size} bytes, expected {entry.size}{entry.said()}.", RESTORE)
        return fd

    def read(self, path: str, at_most: int) -> bytes:
        """Return a whole listed file of at most that many bytes after comparing its sha256; raises DamagedStore, CannotRead."""
        entry = self.entry(path)
        if entry.size > at_most:
            raise DamagedStore(f"{self.where(path)} has {entry.size} bytes, expected {at_most} at most{entry.said()}.", RESTORE)
        with self.open(path) as fd:
            content = _read(fd, entry.size, self.where(path))
        if len(content) != entry.size or hashlib.sha256(content).hexdigest() != entry.sha256:
            raise DamagedStore(f"{self.where(path)} does not match its sha256{entry.said()}.", self.restore)
        return content

    def load(self, path: str, length: int, dtype: str) -> npt.NDArray[Any]:
        """Return the array of a listed .npy file, read-only, its sha256 compared; raises DamagedStore if it is not `length` numbers of `dtype`."""
        content = self.read(path, length * np.dtype(dtype).itemsize + NPY_HEADER_BYTES)
        return np.frombuffer(content, dtype, offset=self.npy_offset(path, content, length, dtype))

    def npy_offset(self, path: str, head: bytes, length: int, dtype: str) -> int:
        """Return where the numbers of a listed .npy file begin, from its first bytes; raises DamagedStore if they are not `length` numbers of `dtype`."""
        start, number = 10 + int.from_bytes(head[8:10], "little"), np.dtype(dtype)
        expected = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': ({length},), }}"  # compared and never parsed: NumPy's parser takes any literal
        found = head[10:start].decode("latin-1").strip()
        if head[:8] != b"\x93NUMPY\x01\x00" or found != expected or self.entry(path).size != start + length * number.itemsize:
            raise DamagedStore(f"{self.where(path)} is not a NumPy file of {length} {number}: its header is {found[:80]!r}.", RESTORE)
        return start


def let_go(fd: int) -> None:
    """Close a descriptor; its lease of a file in a cache ends too, also where a forked process has the same one."""
    with contextlib.suppress(OSError):  # a file system without flock
        fcntl.flock(fd, fcntl.LOCK_UN)
    os.close(fd)


def read_manifest(root: Path) -> Manifest:
    """Read and check `root/manifest.json`; raises StoreNotFound, IncompleteStore, DamagedStore, CannotRead, StoreError (another format), ConfigError."""
    if found := _SCHEME.match(str(root)):
        raise ConfigError(f"A store at {found[0]}// cannot be used in place by this command.", "Pull it into a folder first: kdstore store pull PLACE FOLDER.")
    manifest = parse_manifest(_manifest_bytes(root), root / MANIFEST)
    return replace(manifest, part=_read_part(manifest)) if (root / PART).is_file() else manifest


def parse_manifest(encoded: bytes, path: Path) -> Manifest:
    """Check a manifest that was read from `path`; raises DamagedStore, StoreError (another format)."""
    if len(encoded) > MAX_MANIFEST_BYTES or sum(map(encoded.count, (b",", b"[", b"{"))) > MAX_MANIFEST_VALUES:
        raise DamagedStore(f"{path} is larger than any manifest.", "Restore the file from its origin.")
    content = parse_json(encoded, path)
    if content.get("format") != FORMAT:
        raise StoreError(f"{path} is of format {str(content.get('format'))[:20]}, expected {FORMAT}.", "Read it with the version of kdstore that wrote it.")
    try:
        _check_plan(content["plan"])
        files = {_checked_path(name): _entry(entry) for name, entry in content["files"].items()}
        if content["identity_digest"] != digest_of(content["identity"]):
            raise ValueError("identity_digest is not that of identity")
        for part in ("teacher", "parent"):
            if not isinstance(content["identity"].get(part, {}), dict):
                raise ValueError(f"identity.{part} is not an object")
        _check_withdrawn(content["identity"].get("withdrawn"), content["plan"]["images"])
        if len([_checked_path(name) for name, _ in content["arrays"].items()]) > MAX_ARRAYS:
            raise ValueError(f"more than {MAX_ARRAYS} arrays")
    except (LookupError, TypeError, ValueError, AttributeError) as e:
        raise DamagedStore(f"{path} is not a manifest of format {FORMAT} ({type(e).__name__}: {str(e)[:200]}).", "Restore the file from its origin.") from e
    return Manifest(path.parent, content, files)


def _read_part(manifest: Manifest) -> Held:
    """Read `part.json`; raises DamagedStore unless it is of this manifest."""
    path = manifest.root / PART
    said = read_json(path)
    files, origin = said.get("files"), said.get("from")
    if said.get("store") != manifest.digest or not isinstance(origin, str) or not isinstance(files, list) or not set(map(str, files)) <= manifest.files.keys():
        raise DamagedStore(f"{path} is not of the store {manifest.digest}.", "Pull the part again.")
    return Held(frozenset(files), origin)


def _manifest_bytes(root: Path) -> bytes:
    """Read the manifest after a look at its size."""
    path = root / MANIFEST
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError) as e:
        if (root / BUILD / PULL).is_dir():
            raise IncompleteStore(f"{root} has no {MANIFEST}: its pull has not ended.", "Run the same pull command again: it goes on.") from e
        if (root / BUILD).is_dir():
            raise IncompleteStore(f"{root} has no {MANIFEST}: its extraction has not ended.", "Run the same extract command again to resume it.") from e
        raise StoreNotFound(f"There is no store at {root}.", "Check the path, or make one with: kdstore extract --out PATH.") from e
    except OSError as e:
        raise cannot_read(e, path) from e
    fd = _open_file(path)
    try:
        size = os.fstat(fd).st_size
        content = _read(fd, size, path) if size <= MAX_MANIFEST_BYTES else b""
    finally:
        os.close(fd)
    if size > MAX_MANIFEST_BYTES:
        raise DamagedStore(f"{path} is larger than any manifest ({size} bytes).", "Restore the file from its origin.")
    return content


def _open_file(path: Path, said: str = "") -> int:
    """Open a regular file, never waiting for one that is something else (a FIFO waits for a writer); raises DamagedStore, CannotRead."""
    try:
        if not stat.S_ISREG(os.lstat(path).st_mode):
            raise DamagedStore(f"{path} is not a regular file{said}.", RESTORE)
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except (FileNotFoundError, NotADirectoryError) as e:
        raise DamagedStore(f"{path} is missing{said}.", RESTORE) from e
    except OSError as e:
        raise cannot_read(e, path, said) from e


def cannot_read(error: OSError, path: Path, said: str = "") -> CannotRead:
    """Turn an error of the file system on reading `path` into ours."""
    return CannotRead(f"Cannot read {path}{said}: {error.strerror or error}.", "Check the rights and the disk, then try again; the file may be whole.")


def _read(fd: int, size: int, path: Path) -> bytes:
    try:
        with os.fdopen(fd, "rb", closefd=False) as f:
            return f.read(size)
    except OSError as e:
        raise cannot_read(e, path) from e
    except MemoryError as e:
        raise StoreError(f"{path} does not fit into memory ({size} bytes).", "Read it where there is more.") from e


def _check_plan(plan: dict[str, Any]) -> None:
    for name in ("images", "texts", "unit_rows"):
        if type(plan[name]) is not int or not 0 <= plan[name] <= MAX_ROWS:
            raise ValueError(f"plan.{name} is {str(plan[name])[:40]}")
    if max(plan["images"], plan["texts"]) > MAX_SHARDS * plan["unit_rows"]:
        raise ValueError(f"plan.unit_rows of {plan['unit_rows']} makes more than {MAX_SHARDS} units")
    if plan["unit_rows"].bit_count() != 1 or not isinstance(plan["fingerprint"], str):
        raise ValueError("plan.unit_rows is not a power of two, or plan.fingerprint no text")


def _check_withdrawn(said: Any, images: int) -> None:
    if said is None:
        return
    rows = said["rows"]
    if not all(type(row) is int for row in rows) or sorted(set(rows)) != rows or (rows and not 0 <= rows[0] <= rows[-1] < images):
        raise ValueError("identity.withdrawn.rows are no ascending rows of images")
    if not all(_SHA256.fullmatch(text) for text in said["sha256"]) or not all(isinstance(text, str) for text in said["versions"]):
        raise ValueError("identity.withdrawn is not as the format says")


def _checked_path(name: str) -> str:
    if not _INSIDE.fullmatch(name) or name.partition("/")[0] in _RESERVED:
        raise ValueError(f"{name[:80]!r} is not a path inside a store")
    return name


def _entry(entry: dict[str, Any]) -> FileEntry:
    size, sha256, rows = entry["size"], entry["sha256"], entry.get("rows")
    if type(size) is not int or not 0 <= size <= MAX_FILE_BYTES or not _SHA256.fullmatch(sha256):
        raise ValueError(f"not a file entry: {str(entry)[:200]}")
    if rows is None:
        return FileEntry(size, sha256, None)
    start, stop = rows
    if type(start) is not int or type(stop) is not int or not 0 <= start <= stop <= MAX_ROWS:
        raise ValueError(f"not a range of rows: {str(rows)[:200]}")
    return FileEntry(size, sha256, (start, stop))

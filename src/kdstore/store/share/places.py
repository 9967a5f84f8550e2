"""Places by their names: folders, `s3://`, `gs://`, `http(s)://`, `hf://`."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from kdstore.errors import UnknownName
from kdstore.store.share.bucket import PART_BYTES, Bucket
from kdstore.store.share.folder import Folder
from kdstore.store.share.hub import Hub
from kdstore.store.share.transport import BLOCK_BYTES, Patience, Place, Stored
from kdstore.store.share.web import Web


class Writable(Place, Protocol):
    """A place that takes files, so many of them in a call and so many calls at once."""

    files_at_once: int
    parallel: int

    def listing(self) -> dict[str, Stored]:
        """Return what is there; raises Failure."""
        ...

    def commit(self, add: Sequence[tuple[str, Path]], remove: Sequence[str] = ()) -> None:
        """Add files as (path, local file) and remove others; raises Failure. A file appears whole."""
        ...


def open_place(name: str, patience: Patience) -> Place:
    """Open a place to read from; nothing is asked of it yet. Raises UnknownName for a scheme that is none of ours, ConfigError."""
    scheme, sign, _ = name.partition("://")
    if not sign:
        return Folder(name)
    if scheme not in PLACES:
        raise UnknownName.of("kind of place", f"{scheme}://", [f"{known}://" for known in PLACES])
    return PLACES[scheme](name, patience)


def matches(stored: Stored, file: Path, sha256: str) -> bool:
    """Tell whether a place has this file, as far as it says: by its size and hash, which is computed here where it is not a sha256."""
    size = file.stat().st_size
    if stored.size != size:
        return False
    if stored.algorithm == "sha256":
        return stored.value == sha256
    if stored.algorithm == "git":
        return stored.value == _hash(file, "sha1", f"blob {size}\0".encode())
    if stored.algorithm == "md5":
        return stored.value == _hash(file, "md5")
    return stored.algorithm == "s3" and stored.value == _hash_of_parts(file)


def _hash(file: Path, algorithm: str, before: bytes = b"") -> str:
    found = hashlib.new(algorithm, before, usedforsecurity=False)
    with open(file, "rb") as f:
        while block := f.read(BLOCK_BYTES):
            found.update(block)
    return found.hexdigest()


def _hash_of_parts(file: Path) -> str:
    """Return the ETag that S3 gives an object that came in parts of PART_BYTES."""
    with open(file, "rb") as f:
        parts = [hashlib.md5(part, usedforsecurity=False).digest() for part in iter(lambda: f.read(PART_BYTES), b"")]
    return f"{hashlib.md5(b''.join(parts), usedforsecurity=False).hexdigest()}-{len(parts)}"


PLACES: dict[str, Callable[[str, Patience], Any]] = {"http": Web, "https": Web, "s3": Bucket, "gs": Bucket, "hf": Hub}

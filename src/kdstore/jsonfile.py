"""JSON files that prove themselves: canonical bytes, a digest inside, atomic writes.

Canonical means sorted keys, no spaces, UTF-8, no NaN. The digest of a file is the sha256 of its canonical content without the
`digest` field, so that a flipped bit in any of our JSON files is found when it is read.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from kdstore.errors import CannotWrite, DamagedStore, DiskFull, KdstoreError

MAX_BYTES = 1 << 28  # of a file that is read whole: files beside a store are a stranger's too


def canonical_json(value: Any) -> bytes:
    """Encode a JSON value in the one form that digests are taken of."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def digest_of(value: Any) -> str:
    """Return `sha256:<hex>` of a JSON value's canonical form."""
    return "sha256:" + hashlib.sha256(canonical_json(value)).hexdigest()


def flat_fields(value: Any, prefix: str = "") -> dict[str, str]:
    """Return {dotted path: canonical JSON} of the leaves of a JSON value, to say in which fields two of them differ."""
    if isinstance(value, dict) and value and prefix.count(".") < 64:  # a stranger's may be as deep as Python goes
        return {k: v for name, part in value.items() for k, v in flat_fields(part, f"{prefix}.{name}" if prefix else name).items()}
    return {prefix: canonical_json(value).decode()}


def differing_fields(there: Any, here: Any, named: tuple[str, str] = ("there", "here"), at_most: int = 8) -> str:
    """Say in which fields two JSON values differ, those of `identity` first; '' if in none."""
    first, second = flat_fields(there), flat_fields(here)
    fields = [name for name in first.keys() | second.keys() if first.get(name) != second.get(name)]
    fields.sort(key=lambda name: (not name.startswith("identity"), name))
    said = "; ".join(f"{name}: {named[0]} {first.get(name, 'nothing')[:200]}, {named[1]} {second.get(name, 'nothing')[:200]}" for name in fields[:at_most])
    return said + (f"; and {len(fields) - at_most} more" if len(fields) > at_most else "")


def write_bytes(path: Path, content: bytes) -> None:
    """Replace `path` by `content` as `replacing` does."""
    with replacing(path) as f:
        f.write(content)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Replace `path` by what the block writes so that a crash leaves the old or the new file: temp, fsync, rename, fsync of the folder.

    Raises DiskFull, CannotWrite.
    """
    temp = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temp, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(temp, path)
        fsync_folder(path.parent)
    except BaseException as e:
        with contextlib.suppress(OSError):
            temp.unlink()
        if isinstance(e, OSError):
            raise disk_error(e, path) from e
        raise


def make_folders(path: Path) -> None:
    """Create a folder and those above it that are missing, each of them durable."""
    if not path.is_dir():
        make_folders(path.parent)
        with contextlib.suppress(FileExistsError):
            path.mkdir()
        fsync_folder(path.parent)


def fsync_folder(folder: Path) -> None:
    """Make renames in `folder` durable."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn the errors of the file system in this block into ours; `path` is named where they name no file."""
    try:
        yield
    except KdstoreError:
        raise
    except OSError as e:
        raise disk_error(e, Path(e.filename) if isinstance(e.filename, str) else path) from e


def disk_error(error: OSError, path: Path) -> DiskFull | CannotWrite:
    """Turn an error of the file system on writing `path` into ours."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return DiskFull(f"No space left to write {path} ({error.strerror}).", "Free space there or choose another path, then run the same command again.")
    return CannotWrite(f"Cannot write {path}: {error.strerror or error}.", "Choose another path, or make this one writable.")


def write_json(path: Path, content: dict[str, Any]) -> str:
    """Write a JSON object with its digest inside, atomically; returns the digest."""
    encoded, digest = encode_json(content)
    write_bytes(path, encoded)
    return digest


def encode_json(content: dict[str, Any]) -> tuple[bytes, str]:
    """Return a JSON object as `write_json` writes it, with its digest inside, and that digest."""
    body = {k: v for k, v in content.items() if k != "digest"}
    digest = digest_of(body)
    return json.dumps({**body, "digest": digest}, indent=1, ensure_ascii=False, allow_nan=False).encode() + b"\n", digest


def read_json(path: Path, error: type[KdstoreError] = DamagedStore) -> dict[str, Any]:
    """Read a JSON object written by `write_json`; raises `error` if it is not what was written."""
    if path.stat().st_size > MAX_BYTES:
        raise error(f"{path} is larger than any JSON that kdstore writes.", "Restore the file from its origin.")
    return parse_json(path.read_bytes(), path, error)


def parse_json(encoded: bytes, path: Path, error: type[KdstoreError] = DamagedStore) -> dict[str, Any]:
    """Do as `read_json` for bytes that were read from `path`."""
    try:
        content = json.loads(encoded)
        if not isinstance(content, dict):
            raise ValueError("not an object")
        found = content.pop("digest", None)
        expected = digest_of(content)
    except (ValueError, RecursionError) as e:  # UnicodeDecodeError is a ValueError
        raise error(f"{path} is not JSON as kdstore writes it ({e}).", "Restore the file from its origin.") from e
    if found != expected:
        raise error(f"{path} does not match the digest inside it: expected {found}, found {expected}.", "Restore the file from its origin.")
    return {**content, "digest": expected}

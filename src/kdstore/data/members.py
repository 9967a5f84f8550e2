"""The samples of a tar as webdataset groups them: neighbouring members whose names are equal up to the first dot of the last part.

Only names, places and sizes are read; a tar that does not end as a tar ends is refused, because `tarfile` takes damage for the end.
"""

from __future__ import annotations

import itertools
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from kdstore.errors import SourceError

COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"\x04\x22\x4d\x18": "lz4"}
HINT = "Fetch it again, or leave it out of the pattern."


@dataclass(frozen=True)
class Member:
    """A file inside a tar: what follows the first dot of its name, in lower case, and the place of its bytes."""

    suffix: str
    offset: int
    size: int


@dataclass(frozen=True)
class Sample:
    """Members of one key, by suffix."""

    key: str
    members: dict[str, Member]


def samples(file: BinaryIO, path: Path) -> Iterator[Sample]:
    """Yield the samples of a plain tar in order; between two of them the file may be read anywhere. Raises SourceError."""
    for key, group in itertools.groupby(_members(file, path), lambda found: found[0]):
        members: dict[str, Member] = {}
        for _, member in group:
            if member.suffix in members:
                raise SourceError(f"{path}: the sample '{key}' has two members .{member.suffix}.", "Give every sample a name of its own.")
            members[member.suffix] = member
        yield Sample(key, members)


def _members(file: BinaryIO, path: Path) -> Iterator[tuple[str, Member]]:
    """Yield (key, member) of the regular files whose names have a key and a suffix."""
    start = file.read(8)
    for magic, name in COMPRESSED.items():
        if start.startswith(magic):
            raise SourceError(f"{path} is compressed by {name}; only plain tars can be read at any place.", "Unpack it to a .tar: images gain nothing by it.")
    size = file.seek(0, 2)
    file.seek(0)
    try:
        with tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="surrogateescape") as tar:
            while (info := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # otherwise every header stays in memory
                if info.issparse():
                    raise SourceError(f"{path}: the member '{_shown(info.name)}' is a sparse file.", "Write the tar without --sparse.")
                if info.offset_data + info.size > size:
                    raise tarfile.ReadError(f"a member ends at {info.offset_data + info.size:,} of {size:,} bytes")
                key, suffix = _parts(info.name)
                if info.isreg() and key:
                    yield key, Member(suffix, info.offset_data, info.size)
            file.seek(tar.offset)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError(f"no end mark and no further member at byte {tar.offset:,} of {size:,}")
    except (tarfile.TarError, ValueError, OverflowError) as e:
        raise SourceError(f"{path} is not a whole tar: {e}.", HINT) from e
    except OSError as e:
        raise SourceError(f"Cannot read {path}: {e.strerror}.", HINT) from e


def _parts(name: str) -> tuple[str, str]:
    """Split a member's name into key and suffix; '' for the key of a name that has none."""
    folder, slash, last = name.rpartition("/")
    stem, dot, suffix = last.partition(".")
    return (_shown(folder + slash + stem) if stem and dot else ""), _shown(suffix.lower())


def _shown(name: str) -> str:
    """Spell bytes that are not UTF-8 as `\\xff`."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")

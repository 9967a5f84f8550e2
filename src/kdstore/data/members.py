"""The samples of a tar as webdataset groups them: neighbouring members whose names are equal up to the first dot of the last part.

Only names, places and sizes are read; a tar that does not end as a tar ends is refused, because `tarfile` takes damage for the end.
"""

from __future__ import annotations

import itertools
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

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
        for name, offset, length in _files(file):
            if offset + length > size:
                raise tarfile.ReadError(f"a member ends at {offset + length:,} of {size:,} bytes")
            key, suffix = _parts(name)
            if key:
                yield key, Member(suffix, offset, length)
    except (tarfile.TarError, ValueError, OverflowError) as e:
        raise SourceError(f"{path} is not a whole tar: {e}.", HINT) from e
    except OSError as e:
        raise SourceError(f"Cannot read {path}: {e.strerror}.", HINT) from e


def _files(file: BinaryIO) -> Iterator[tuple[str, int, int]]:
    """Yield name, offset and size of every regular file, up to the end mark; raises tarfile.TarError."""
    position = 0
    tar: Any  # the stubs of tarfile leave out what is needed here
    with tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="surrogateescape") as tar:
        tar.firstmember = None  # read at opening, and read again below
        while True:
            file.seek(position)
            header = file.read(tarfile.BLOCKSIZE)
            plain = None if tar.pax_headers else _plain(header)
            if plain:
                name, size = plain
                yield name, position + tarfile.BLOCKSIZE, size
                position += tarfile.BLOCKSIZE * (1 + -(-size // tarfile.BLOCKSIZE))
                continue
            file.seek(position)
            tar.offset = position
            info = tar.next()
            if info is None:
                break
            tar.members.clear()  # otherwise every header stays in memory
            if info.issparse():
                raise tarfile.ReadError(f"the member '{_shown(info.name)}' is a sparse file")
            if info.isreg():
                yield info.name, info.offset_data, info.size
            position = tar.offset
        if header != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError(f"no end mark and no further member at byte {position:,}")


def _plain(header: bytes) -> tuple[str, int] | None:
    """Read name and size of a common header in a third of the time of `tarfile`, to which all others are left (None)."""
    size, check = header[124:136].strip(b" \0"), header[148:156].strip(b" \0")
    if header[156:157] != b"0" or not size.isdigit() or not check.isdigit():
        return None
    if int(check, 8) != sum(header) - sum(header[148:156]) + 8 * ord(" "):
        return None
    name, prefix = header[:100].partition(b"\0")[0], header[345:500].partition(b"\0")[0]
    return (prefix + b"/" + name if prefix else name).decode("utf-8", "surrogateescape"), int(size, 8)


def _parts(name: str) -> tuple[str, str]:
    """Split a member's name into key and suffix; '' for the key of a name that has none."""
    folder, slash, last = name.rpartition("/")
    stem, dot, suffix = last.partition(".")
    return (_shown(folder + slash + stem) if stem and dot else ""), _shown(suffix.lower())


def _shown(name: str) -> str:
    """Spell bytes that are not UTF-8 as `\\xff`."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")

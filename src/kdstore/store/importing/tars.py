"""Tars with the features of a sample per member, read where they lie, by offset; one pass finds the samples."""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kdstore.data.members import Member, Sample, samples
from kdstore.errors import SourceError
from kdstore.store.importing.foreign import MAX_SAMPLE_BYTES
from kdstore.store.importing.found import checked_sha256

MAX_TEXT_BYTES = 1 << 24


@dataclass(eq=False)
class Places:
    """Where the features of every image lie, found in the pass over the tars: 8 bytes each for tar, offset, size and first text, 32 for a hash."""

    tars: Sequence[Path]
    tar: array[int] = field(default_factory=lambda: array("q"))
    offset: array[int] = field(default_factory=lambda: array("q"))
    size: array[int] = field(default_factory=lambda: array("q"))
    texts: array[int] = field(default_factory=lambda: array("q", [0]))
    sha256: bytearray = field(default_factory=bytearray)

    def clear(self) -> None:
        for part in (self.tar, self.offset, self.size, self.texts, self.sha256):
            del part[:]
        self.texts.append(0)

    def add(self, tar: int, member: Member, texts: int = 0, sha256: str = "") -> None:
        self.tar.append(tar)
        self.offset.append(member.offset)
        self.size.append(member.size)
        self.texts.append(self.texts[-1] + texts)
        self.sha256 += bytes.fromhex(checked_sha256(sha256))

    def hashes(self, start: int, stop: int) -> list[str]:
        return [self.sha256[32 * i : 32 * i + 32].hex() for i in range(start, stop)]

    def contents(self, start: int, stop: int) -> Iterator[tuple[int, Path, bytes]]:
        """Yield the tar and the bytes of the members of images `start:stop`; raises SourceError."""
        for i in range(start, stop):
            path = self.tars[self.tar[i]]
            try:
                with open(path, "rb") as f:
                    yield i, path, content_of(f, path, Member("", self.offset[i], self.size[i]))
            except OSError as e:
                raise SourceError(f"Cannot read {path}: {e.strerror}.", "Restore the file.") from e


def tars_in(folder: Path) -> list[Path]:
    found = sorted(folder.rglob("*.tar")) if folder.is_dir() else [folder] if folder.suffix == ".tar" else []
    if not found:
        raise SourceError(f"There is no .tar in {folder}.", "Name a folder of tars.")
    return found


def samples_of(tars: Sequence[Path]) -> Iterator[tuple[int, Any, Sample, Path]]:
    """Yield number and file of a tar, a sample of it, and the tar's path."""
    for number, path in enumerate(tars):
        try:
            with open(path, "rb") as file:
                for sample in samples(file, path):
                    yield number, file, sample, path
        except OSError as e:
            raise SourceError(f"Cannot read {path}: {e.strerror}.", "Restore the file.") from e


def first_sample(tars: Sequence[Path], endings: Sequence[str]) -> tuple[str, Sample, Path]:
    """Return the first sample, and the suffix of its member that has one of these endings."""
    for _, _, sample, path in samples_of(tars):
        for suffix in sample.members:
            if suffix.endswith(tuple(endings)):
                return suffix, sample, path
        raise SourceError(
            f"{path}: the sample '{sample.key}' has no .{' and no .'.join(endings)}: found {', '.join(sample.members)}.", "Name another --format."
        )
    raise SourceError(f"There is no sample in {tars[0].parent}.", "Name another folder.")


def content_of(file: Any, path: Path, member: Member) -> bytes:
    if member.size > MAX_SAMPLE_BYTES:
        raise SourceError(f"{path}: a sample has {member.size} bytes of features; {MAX_SAMPLE_BYTES} are the most.", "Leave it out.")
    file.seek(member.offset)
    content: bytes = file.read(member.size)
    if len(content) != member.size:
        raise SourceError(f"{path} was cut.", "Restore the file.")
    return content


def text_of(file: Any, path: Path, member: Member) -> str:
    try:
        if member.size > MAX_TEXT_BYTES:
            raise ValueError("it is too long")
        return content_of(file, path, member).decode()
    except ValueError as e:
        raise SourceError(f"{path}: a text cannot be read ({e}).", "Restore the file.") from e


def json_of(file: Any, path: Path, sample: Sample, suffix: str) -> dict[str, Any]:
    if suffix not in sample.members:
        return {}
    try:
        found = json.loads(text_of(file, path, sample.members[suffix]))
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise SourceError(f"{path}: .{suffix} of '{sample.key}' is no JSON object.", "Restore the file.")
    return found


def field_of(fields: dict[str, Any], name: str, sample: Sample, path: Path) -> str:
    value = fields.get(name)
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise SourceError(f"{path}: the sample '{sample.key}' has no text or number '{name}' in its .json.", "Give --key name for the name of the sample.")
    return str(value)

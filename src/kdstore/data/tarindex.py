"""The index of a tar: key, captions and the place of the image of every sample, as an Arrow file that is mapped, not loaded.

It is built in one pass and kept in `.kdstore-index` beside the tar, or in the user's cache where that cannot be written. It holds for
the tar's size and time and for what was asked of it (columns); a tar that changed gets a new one. An index may come with somebody's
data, so it is checked before it is believed.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.compute as pc

from kdstore.data.columns import CONTENT, KINDS, texts_of, well_formed
from kdstore.data.members import Member, Sample, samples
from kdstore.errors import CannotWrite, DiskFull, SourceError
from kdstore.jsonfile import canonical_json, write_bytes

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif")
FOLDER = ".kdstore-index"
VERSION = 1
MAX_TEXT = 2**24  # bytes of a member with text
_BATCH = 4096  # rows that are Python objects while an index is built
_MOST_NAMES = 64  # suffixes and fields that are counted, so that an error can list them


@dataclass(frozen=True)
class Choice:
    """What is taken of a sample: suffix of the image ('' for the first usual one), key (see `_key`), and captions by kind.

    A caption is named by its json field, or by a dot and the suffix of its member; no name means .txt or else the json's caption.
    """

    image: str
    key: str
    captions: tuple[tuple[str, tuple[str, ...]], ...]

    @classmethod
    def of(cls, options: dict[str, str]) -> Choice:
        """Read the options of a spec."""
        captions = tuple((kind, tuple(options[option].split(","))) for option, kind in KINDS.items() if option in options)
        return cls(options.get("image", "").lstrip(".").lower(), options.get("key", ""), captions or (("human", ()),))

    @property
    def fields(self) -> tuple[str, ...]:
        """Names of json fields, and dots with suffixes, that must be somewhere in the data."""
        return (*((self.key,) if self.key not in ("", CONTENT) else ()), *(name for _, names in self.captions for name in names))

    @property
    def schema(self) -> pa.Schema:
        texts = pa.large_list(pa.large_string())
        return pa.schema([("key", pa.large_string()), ("offset", pa.int64()), ("size", pa.int64()), *((kind, texts) for kind, _ in self.captions)])


@dataclass
class Found:
    """What the pass over a tar met: samples, those without an image or with unreadable text, suffixes (with their dots) and json fields."""

    samples: int = 0
    without_image: int = 0
    unreadable: int = 0
    names: dict[str, int] = field(default_factory=dict)

    def count(self, name: str) -> None:
        if name in self.names or len(self.names) < _MOST_NAMES:
            self.names[name] = self.names.get(name, 0) + 1

    def add(self, other: Found) -> None:
        self.samples += other.samples
        self.without_image += other.without_image
        self.unreadable += other.unreadable
        for name, count in other.names.items():
            self.names[name] = self.names.get(name, 0) + count


@dataclass(frozen=True, eq=False)
class Index:
    """Key, offset, size [rows] and a list of texts [rows] per kind of caption; `stamp` is the tar's size and time."""

    table: pa.Table
    found: Found
    stamp: str


def index_of(tar: Path, choice: Choice) -> Index:
    """Return the index of a tar, built where there is none that fits; raises SourceError."""
    try:
        stat = tar.stat()
    except OSError as e:
        raise SourceError(f"Cannot read {tar}: {e.strerror}.", "Correct the pattern, or restore the file.") from e
    stamp, schema = stamp_of(stat), choice.schema
    digest = hashlib.sha256(canonical_json([VERSION, choice.image, choice.key, choice.captions])).hexdigest()[:8]
    places = [folder / f"{tar.name}.{digest}.arrow" for folder in (tar.parent / FOLDER, _user_cache(tar.parent))]
    for place in places:
        if index := _mapped(place, schema, stamp, stat.st_size):
            return index
    index = _build(tar, choice, stamp)
    content = _encoded(index)
    for place in places:
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            write_bytes(place, content)
        except (OSError, CannotWrite, DiskFull):
            continue
        return _mapped(place, schema, stamp, stat.st_size) or index
    return index


def stamp_of(stat: os.stat_result) -> str:
    """Name one state of a file."""
    return f"{stat.st_size} {stat.st_mtime_ns}"


def _user_cache(folder: Path) -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "kdstore/tars" / hashlib.sha256(os.fsencode(folder.absolute())).hexdigest()[:16]


def _encoded(index: Index) -> pa.Buffer:
    sink = pa.BufferOutputStream()
    schema = index.table.schema.with_metadata({"stamp": index.stamp, "found": json.dumps(asdict(index.found))})
    with pa.ipc.new_file(sink, schema) as writer:
        writer.write_table(index.table)
    return sink.getvalue()


def _mapped(place: Path, schema: pa.Schema, stamp: str, tar_size: int) -> Index | None:
    """Map an index file; None where it is not there, not of this state of the tar, or damaged."""
    try:
        table = pa.ipc.open_file(pa.memory_map(str(place))).read_all()
        metadata = table.schema.metadata or {}
        if metadata.get(b"stamp") != stamp.encode() or not table.schema.equals(schema):
            return None
        table.validate(full=True)
        places = [table["offset"], table["size"], pc.subtract(tar_size, pc.add_checked(table["offset"], table["size"]))]
        if any(column.null_count for column in table.columns) or any(pc.any(pc.less(column, 0)).as_py() for column in places):
            return None
        return Index(table.replace_schema_metadata(), Found(**json.loads(metadata[b"found"])), stamp)
    except (OSError, KeyError, ValueError, TypeError, pa.ArrowException):
        return None


def _build(tar: Path, choice: Choice, stamp: str) -> Index:
    found = Found()
    try:
        with open(tar, "rb") as file:
            rows = _rows(file, tar, choice, found)
            batches = [pa.RecordBatch.from_pylist(some, choice.schema) for some in iter(lambda: list(itertools.islice(rows, _BATCH)), [])]
            return Index(pa.Table.from_batches(batches, choice.schema).combine_chunks(), found, stamp)
    except OSError as e:
        raise SourceError(f"Cannot read {tar}: {e.strerror}.", "Restore the file.") from e


def _rows(file: BinaryIO, tar: Path, choice: Choice, found: Found) -> Iterator[dict[str, Any]]:
    """Yield a row for every sample that has an image."""
    for sample in samples(file, tar):
        found.samples += 1
        for suffix in sample.members:
            found.count(f".{suffix}")
        usual = (choice.image,) if choice.image else IMAGE_SUFFIXES
        image = next((sample.members[suffix] for suffix in usual if suffix in sample.members), None)
        if image is None:
            found.without_image += 1
            continue
        fields = _fields(file, sample, found)
        for name in fields:
            found.count(name)
        captions = {
            kind: [text for name in names or _usual_captions(sample) for text in texts_of(_value(file, sample, fields, name, found))]
            for kind, names in choice.captions
        }
        yield {"key": _key(file, tar, sample, image, choice, fields), "offset": image.offset, "size": image.size, **captions}


def _usual_captions(sample: Sample) -> tuple[str]:
    return (".txt",) if "txt" in sample.members else ("caption",)


def _value(file: BinaryIO, sample: Sample, fields: dict[str, Any], name: str, found: Found) -> Any:
    """Return a json field, or the text of a member that is named by its dot and suffix."""
    if not name.startswith("."):
        return fields.get(name)
    member = sample.members.get(name[1:].lower())
    text = _text(file, member) if member else ""
    found.unreadable += text is None
    return text


def _fields(file: BinaryIO, sample: Sample, found: Found) -> dict[str, Any]:
    """Read a sample's json object; one that cannot be read has no fields and is counted."""
    if "json" not in sample.members:
        return {}
    try:
        fields = json.loads(_text(file, sample.members["json"]) or "")
    except (ValueError, RecursionError):
        fields = None
    found.unreadable += not isinstance(fields, dict)
    return fields if isinstance(fields, dict) else {}


def _text(file: BinaryIO, member: Member) -> str | None:
    """Read a text member; None where it is too long or not UTF-8."""
    if member.size > MAX_TEXT:
        return None
    try:
        return _content(file, member).decode()
    except UnicodeDecodeError:
        return None


def _content(file: BinaryIO, member: Member) -> bytes:
    file.seek(member.offset)
    return file.read(member.size)


def _key(file: BinaryIO, tar: Path, sample: Sample, image: Member, choice: Choice, fields: dict[str, Any]) -> str:
    """Return the sample's name, the hash of its encoded image, or a json field."""
    if not choice.key:
        return sample.key
    if choice.key == CONTENT:
        return hashlib.sha256(_content(file, image)).hexdigest()
    key = fields.get(choice.key)
    if isinstance(key, bool) or not isinstance(key, str | int) or key == "":
        raise SourceError(f"{tar}: the sample '{sample.key}' has no text or number in its json field '{choice.key}'.", f"Take ?key={CONTENT}.")
    return well_formed(str(key))

"""webdataset and img2dataset tars as they lie: an index says where each image stands, and images are read in place, in any order.

Nothing is ever unpacked, so the names inside a tar are keys and nothing else. Compressed tars are refused: there is no way into their
middle.
"""

from __future__ import annotations

import functools
import glob
import itertools
import os
import re
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from kdstore.data.columns import CONTENT, KINDS, ColumnSource, by_content, distinct, group
from kdstore.data.images import MAX_BYTES
from kdstore.data.source import UndecodableImage
from kdstore.data.tarindex import IMAGE_SUFFIXES, Choice, Found, Index, index_of, stamp_of
from kdstore.errors import SourceError, UnknownName
from kdstore.progress import OnProgress, silent

OPTIONS = ("image", *KINDS, "key")
_AT_ONCE = 8  # tars that are indexed at a time: network disks answer slowly
_OPEN_TARS = 32
_MOST_TARS = 1_000_000


def open_tars(spec: str, tars: list[Path], options: dict[str, str], on_progress: OnProgress = silent) -> ColumnSource:
    """Open tars as one source, rows in the order of tars and members; raises SourceError, UnknownName."""
    choice, indexes, found = Choice.of(options), list[Index](), Found()
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for index in pool.map(lambda tar: index_of(tar, choice), tars):
            indexes.append(index)
            found.add(index.found)
            on_progress("index", len(indexes), len(tars), "")
    _refuse_missing(spec, choice, found)
    table = pa.concat_tables([index.table for index in indexes])
    stamps = [index.stamp for index in indexes]
    starts = np.cumsum([0, *(index.table.num_rows for index in indexes)])

    def tar_of(row: int) -> int:
        return int(np.searchsorted(starts, row, "right")) - 1

    def read(row: int) -> bytes:
        offset, size = table["offset"][row].as_py(), table["size"][row].as_py()
        if size > MAX_BYTES:
            raise UndecodableImage(f"the file has more than {MAX_BYTES:,} bytes")
        tar = tar_of(row)
        return _opened(tars[tar], stamps[tar]).read(offset, size)

    notices = _notices(choice, found)
    groups = None
    if choice.key == CONTENT:
        groups = group(table["key"])
        notices += by_content(groups)
    else:
        distinct(spec, table["key"], lambda row: tars[tar_of(row)].name, f"Take ?key={CONTENT} (of the image) or ?key=FIELD (of the json).")
    return ColumnSource(spec, table["key"], tuple((kind, table[kind]) for kind, _ in choice.captions), read, groups, notices)


def _refuse_missing(spec: str, choice: Choice, found: Found) -> None:
    """Raise where no sample has an image, or none has a name that was asked for."""
    met = ", ".join(sorted(name for name in found.names if name.startswith("."))) or "nothing"
    if found.without_image == found.samples:
        wanted = choice.image or ", ".join(IMAGE_SUFFIXES)
        raise SourceError(f"No sample of {spec} has an image ({wanted}): found {met}.", "Name its suffix: ?image=SUFFIX.")
    for name in choice.fields:
        if name in found.names:
            continue
        if name.startswith("."):
            raise UnknownName.of(f"member of the samples in {spec}", name, [n for n in found.names if n.startswith(".")])
        fields = [n for n in found.names if not n.startswith(".")]
        if not fields:
            raise SourceError(f"'{name}' in {spec} is a json field, but no sample has any: found {met}.", "A member is named by its suffix: ?caption=.txt.")
        raise UnknownName.of(f"json field in {spec}", name, fields)


def _notices(choice: Choice, found: Found) -> tuple[str, ...]:
    wanted = f".{choice.image}" if choice.image else "image"
    said = {
        f"{found.without_image} of {found.samples} samples have no {wanted} and are left out.": found.without_image,
        f"{found.unreadable} members with text cannot be read (no UTF-8, no JSON object, or too long); what they hold is left out.": found.unreadable,
    }
    return tuple(text for text, count in said.items() if count)


@dataclass(frozen=True)
class _Tar:
    """An open tar; its descriptor is closed when nobody holds it any more."""

    path: Path
    descriptor: int

    def read(self, offset: int, size: int) -> bytes:
        content = os.pread(self.descriptor, size, offset)
        if len(content) != size:
            raise SourceError(f"{self.path} was cut while it was read.", "Restore the file, then run the same command again.")
        return content


@functools.lru_cache(maxsize=_OPEN_TARS)
def _opened(path: Path, stamp: str) -> _Tar:
    """Open a tar that must be in the state that its index is of."""
    try:
        tar = _Tar(path, os.open(path, os.O_RDONLY))
        weakref.finalize(tar, os.close, tar.descriptor)
        found = stamp_of(os.fstat(tar.descriptor))
    except OSError as e:
        raise SourceError(f"Cannot read {path}: {e.strerror}.", "Restore the file, then run the same command again.") from e
    if found != stamp:
        raise SourceError(f"{path} changed since it was indexed: size and time were {stamp}, now {found}.", "Run the same command again to index it anew.")
    return tar


# Patterns


def is_tar(name: str) -> bool:
    """Whether the last part of a name or pattern is that of a tar, compressed or not."""
    return re.search(r"\.(tar|tar\.(gz|bz2|xz|zst|lz4)|tgz|tbz2|txz)$", name.rstrip("}")) is not None


def tars_of(pattern: str) -> list[Path]:
    """Expand braces (`{00000..00012}`, `{a,b}`) and globs to files, braces in their order and globs sorted; raises SourceError."""
    if Path(pattern).is_file():
        return [Path(pattern)]
    names = list(_braces(pattern))
    missing = []
    found: list[Path] = []
    for name in names:
        matches = [name] if os.path.isfile(name) else sorted(glob.glob(name))
        found += map(Path, matches)
        missing += [] if matches else [name]
    if missing:
        raise SourceError(f"{len(missing)} of {len(names)} tars of {pattern} are missing, the first: {missing[0]}.", "Correct the pattern, or fetch them.")
    return found


def _braces(pattern: str) -> list[str]:
    """Expand the braces of a pattern as a shell does; numbers keep their leading zeros."""
    parts = re.split(r"\{([^{}]*)\}", pattern)
    choices = [[part] if i % 2 == 0 else _alternatives(part) for i, part in enumerate(parts)]
    if np.prod([len(c) for c in choices], dtype=np.float64) > _MOST_TARS:
        raise SourceError(f"{pattern} names more than {_MOST_TARS:,} tars.", "Correct the numbers in its braces.")
    return ["".join(chosen) for chosen in itertools.product(*choices)]


def _alternatives(inside: str) -> list[str]:
    span = re.fullmatch(r"(\d+)\.\.(\d+)", inside)
    if span is None:
        return inside.split(",")
    first, last = map(int, span.groups())
    if abs(last - first) > _MOST_TARS:
        raise SourceError(f"{{{inside}}} names more than {_MOST_TARS:,} tars.", "Correct the numbers in the braces.")
    padded = any(text.startswith("0") and len(text) > 1 for text in span.groups())
    width = max(map(len, span.groups())) if padded else 0
    return [f"{n:0{width}}" for n in range(first, last + (1 if last >= first else -1), 1 if last >= first else -1)]

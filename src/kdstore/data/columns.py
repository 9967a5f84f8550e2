"""A source whose keys and captions are Arrow columns and whose images are bytes fetched by row: what tables, tars and COCO have in common.

Nothing is held per row in Python: columns stay where they are (mapped files where the data is on disk), and cells are read when asked
for. Rows of one key can be one image with all their captions; only then are two integers per row kept.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from kdstore.data.images import decode_image
from kdstore.data.mapped import repeated_hashes
from kdstore.data.source import PROBE, Caption, LoadedImage, UndecodableImage
from kdstore.errors import SourceError

KINDS = {"caption": "human", "synthetic": "synthetic", "probe": PROBE}
"""Option of a spec -> kind of the captions in the columns that it names."""
CONTENT = "sha256"
"""`?key=sha256`: keys are hashes of the encoded images."""
_HASHED_AHEAD = 1024  # rows


@dataclass(frozen=True, eq=False)
class ColumnSource:
    """Keys [R], caption columns [R] with their kinds (cells: texts, lists of texts, or lists as JSON), and `read(row)` -> encoded image."""

    spec: str
    keys: pa.ChunkedArray
    captions_of: tuple[tuple[str, pa.ChunkedArray], ...]
    read: Callable[[int], bytes]
    groups: Groups | None = None
    notices: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.groups) if self.groups else len(self.keys)

    def rows(self, i: int) -> list[int]:
        """Return the rows that are image `i`."""
        return self.groups.rows(i) if self.groups else [range(len(self.keys))[i]]

    def key(self, i: int) -> str:
        key: str = self.keys[self.rows(i)[0]].as_py()
        return key

    def captions(self, i: int) -> tuple[Caption, ...]:
        return tuple(Caption(text, kind) for row in self.rows(i) for kind, column in self.captions_of for text in texts_of(column[row].as_py()))

    def image(self, i: int) -> LoadedImage:
        return decode_image(self.read(self.rows(i)[0]))


@dataclass(frozen=True, eq=False)
class Groups:
    """Rows of equal keys, in the order of their first rows: image i is rows `order[starts[i]:starts[i + 1]]`."""

    order: npt.NDArray[np.int64]
    starts: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.starts) - 1

    def rows(self, i: int) -> list[int]:
        i = range(len(self))[i]  # past the end is an IndexError, as in a list
        rows: list[int] = self.order[self.starts[i] : self.starts[i + 1]].tolist()
        return rows


def group(keys: pa.ChunkedArray) -> Groups | None:
    """Group rows of equal keys; None where all differ, which takes no memory to find out: they ascend, as img2dataset writes them, or their hashes differ."""
    if pc.all(pc.less(keys[:-1], keys[1:])).as_py() is not False:
        return None
    if not len(repeated_hashes(keys)):
        return None
    codes = pa.chunked_array([chunk.indices for chunk in keys.dictionary_encode().chunks]).to_numpy()
    counts = np.bincount(codes)
    if len(counts) == len(codes):
        return None
    starts = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts, out=starts[1:])
    return Groups(np.argsort(codes, kind="stable"), starts)


def distinct(spec: str, keys: pa.ChunkedArray, place: Callable[[int], str], hint: str) -> None:
    """Raise SourceError where keys are equal, naming the first ones and the `place` of their rows."""
    groups = group(keys)
    if groups is None:
        return
    repeated = np.flatnonzero(np.diff(groups.starts) > 1)
    rows = groups.rows(int(repeated[0]))
    more = f", and {len(repeated) - 1} other keys are repeated" if len(repeated) > 1 else ""
    raise SourceError(f"{spec}: the key '{keys[rows[0]].as_py()}' stands in {place(rows[0])} and {place(rows[1])}{more}.", hint)


def by_content(groups: Groups | None) -> tuple[str, ...]:
    """Say how many rows were joined with others of equal content."""
    if groups is None:
        return ()
    joined = len(groups.order) - len(groups)
    return (f"{joined} of {len(groups.order)} images have the content of another; their captions are joined.",)


def content_keys(read: Callable[[int], bytes], num_rows: int) -> pa.ChunkedArray:
    """Hash the images of all rows, which reads every one; a row without an image gets a key of its own."""

    def key(row: int) -> str:
        try:
            return hashlib.sha256(read(row)).hexdigest()
        except UndecodableImage:
            return f"no-image-{row}"

    with ThreadPoolExecutor(8) as pool:  # hashing and reading leave the interpreter's lock
        spans = (range(start, min(start + _HASHED_AHEAD, num_rows)) for start in range(0, num_rows, _HASHED_AHEAD))
        return pa.chunked_array([pa.array(pool.map(key, span), pa.large_string()) for span in spans], pa.large_string())


def texts_of(value: Any) -> list[str]:
    """Read a caption cell: a text, a list of texts, or such a list written as JSON; empty ones are left out."""
    if isinstance(value, str) and value.startswith("["):
        with contextlib.suppress(ValueError, RecursionError):
            listed = json.loads(value)
            value = listed if all(isinstance(t, str) for t in listed) else value
    texts = value if isinstance(value, list) else [value]
    return [well_formed(t.strip()) for t in texts if isinstance(t, str) and t.strip()]


def well_formed(text: str) -> str:
    """Replace halves of surrogate pairs, which JSON can spell and UTF-8 cannot."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode()

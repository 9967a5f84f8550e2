"""Folders of .npy files: those of clip-retrieval, and plain ones with a list of keys."""

from __future__ import annotations

import bisect
import itertools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from kdstore.data.source import Caption
from kdstore.errors import SourceError, UnknownName
from kdstore.store.importing.config import ImportConfig
from kdstore.store.importing.foreign import NpyFile, open_npy
from kdstore.store.importing.found import Found, Pair, Rows, checked_sha256, unknown_sha256
from kdstore.store.plan import Side

_PARTITION = re.compile(r".*_(\d+)\.(npy|parquet)")
_BATCH = 16_384
_AS_GIVEN = {"norm": "unknown", "precision": "unknown", "views": ["unknown"], "layer": "unknown"}


@dataclass(frozen=True)
class _Files:
    """Rows of several .npy files of one width, one after the other."""

    files: Sequence[NpyFile]

    @cached_property
    def starts(self) -> list[int]:
        return list(itertools.accumulate((len(file) for file in self.files), initial=0))

    def rows(self, start: int, stop: int) -> npt.NDArray[Any]:
        parts, at = [], bisect.bisect_right(self.starts, start) - 1
        while start < stop:
            first, end = self.starts[at : at + 2]
            parts.append(self.files[at].rows(start - first, min(stop, end) - first))
            start, at = min(stop, end), at + 1
        return np.concatenate(parts)


def clip_retrieval(folder: Path, config: ImportConfig, read_torch: Any) -> Found:
    """Open the output of `clip-retrieval inference`: img_emb/img_emb_I.npy, text_emb/text_emb_I.npy and metadata/metadata_I.parquet of partitions I.

    Row k of the three belongs together; the key is the column image_path, or another one. Embeddings were normalised (clip_inference/mapper.py of 2.45).
    """
    metadata = _partitions(folder / "metadata", "parquet")
    if not metadata:
        raise SourceError(
            f"{folder} has no metadata/metadata_0.parquet, without which no row has a key.", "Name the output folder of clip-retrieval inference."
        )
    arrays = {}
    for name, place in (("image/embedding", "img_emb"), ("text/embedding", "text_emb")):
        if found := _partitions(folder / place, "npy"):
            if found.keys() != metadata.keys():
                raise SourceError(f"{folder}: {place} and metadata have other partitions ({len(found)} and {len(metadata)}).", "Restore what is missing.")
            arrays[name] = [open_npy(file, 2) for file in found.values()]
    if "image/embedding" not in arrays:
        raise SourceError(f"{folder} has no img_emb/img_emb_0.npy.", "Name the output folder of clip-retrieval inference.")
    tables = [_table(file) for file in metadata.values()]
    names = [*tables[0].schema_arrow.names]
    columns = {"key": config.key or "image_path", "sha256": config.sha256, "caption": "caption" if "caption" in names else None}
    for what in ("key", "sha256"):
        if (column := columns[what]) and column not in names:
            raise UnknownName.of(f"column of {folder / 'metadata'}", column, names)
    for files in arrays.values():
        for file, table in zip(files, tables, strict=True):
            if len(file) != table.metadata.num_rows or file.shape[1] != files[0].shape[1]:
                raise SourceError(
                    f"{file.path} is {list(file.shape)}, and its metadata has {table.metadata.num_rows} rows of {files[0].shape[1]} channels.", "Restore both."
                )
    if "text/embedding" in arrays and columns["caption"] is None:
        raise SourceError(f"{folder} has text_emb but no captions in its metadata.", "Take text_emb away, or restore the metadata.")

    def pairs() -> Iterator[Pair]:
        for file, table in zip(metadata.values(), tables, strict=True):
            for row in _cells(file, table, [name for name in (columns["key"], columns["caption"]) if name]):
                if row[0] is None:
                    raise SourceError(f"{file} has a row without {columns['key']}.", "Name another --key.")
                yield str(row[0]), tuple(Caption(text or "") for text in row[1:])

    hashes = _Column(list(metadata.values()), tables, columns["sha256"]) if columns["sha256"] else None
    encoding = {name: {**_AS_GIVEN, "norm": "l2", "views": ["plain"], "layer": "output"} for name in arrays}
    shapes = {name: files[0].shape[1:] for name, files in arrays.items()}
    return Found(shapes, encoding, pairs, _reader({name: _Files(files) for name, files in arrays.items()}), hashes.rows if hashes else unknown_sha256)


def plain(folder: Path, config: ImportConfig, read_torch: Any) -> Found:
    """Open a folder of keys.txt (a key per line), image.npy [N, D] and, if they are there, image_tokens.npy [N, T, W], captions.jsonl and text.npy [M, D].

    A line of captions.jsonl is a JSON list of the captions of the image of that line; rows of text.npy are those of all captions, in order.
    """
    files = {"image/embedding": ("image.npy", 2), "image/tokens": ("image_tokens.npy", 3), "text/embedding": ("text.npy", 2)}
    arrays = {name: _Files([open_npy(folder / file, ndim)]) for name, (file, ndim) in files.items() if (folder / file).is_file()}
    if not arrays or not (folder / "keys.txt").is_file():
        raise SourceError(f"{folder} has no keys.txt, or no image.npy, image_tokens.npy or text.npy beside it.", "See docs/sharing.md, Import.")

    def pairs() -> Iterator[Pair]:
        images = texts = 0
        for key, captions in itertools.zip_longest(_lines(folder / "keys.txt"), _captions(folder / "captions.jsonl"), fillvalue=None):
            if key is None:
                raise SourceError(f"{folder / 'captions.jsonl'} has more lines than keys.txt.", "Give a line per key.")
            images, texts = images + 1, texts + len(captions or ())
            yield key, tuple(Caption(text) for text in captions or ())
        for name, array in arrays.items():
            if array.starts[-1] != (expected := images if name.startswith("image/") else texts):
                raise SourceError(f"{array.files[0].path} has {array.starts[-1]} rows, and there are {expected} keys or captions.", "Restore the files.")

    shapes = {name: array.files[0].shape[1:] for name, array in arrays.items()}
    return Found(shapes, {name: dict(_AS_GIVEN) for name in arrays}, pairs, _reader(arrays), unknown_sha256)


def _reader(arrays: dict[str, _Files]) -> Callable[[Side, int, int], Rows]:
    def read(side: Side, start: int, stop: int) -> Rows:
        return {name: files.rows(start, stop) for name, files in arrays.items() if name.startswith(f"{side}/")}

    return read


def _partitions(folder: Path, suffix: str) -> dict[int, Path]:
    """Return the files of a folder by the number at the end of their names, in its order."""
    matches = {file: _PARTITION.fullmatch(file.name) for file in folder.glob(f"*.{suffix}")}
    found = {int(match[1]): file for file, match in matches.items() if match}
    if len(found) != sum(match is not None for match in matches.values()):
        raise SourceError(f"{folder} has two files of one partition.", "Take away those of another run.")
    return dict(sorted(found.items()))


def _table(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path, thrift_string_size_limit=1 << 24, thrift_container_size_limit=1 << 20)
    except (pa.ArrowException, OSError) as e:
        raise SourceError(f"{path} is not a parquet file ({str(e).splitlines()[0][:200]}).", "Restore the file.") from e


def _cells(path: Path, table: pq.ParquetFile, columns: list[str]) -> Iterator[tuple[Any, ...]]:
    """Yield the values of some columns, row by row, a batch in memory at a time."""
    try:
        for batch in table.iter_batches(_BATCH, columns=columns):
            yield from zip(*(batch.column(name).to_pylist() for name in columns), strict=True)
    except (pa.ArrowException, OSError, ValueError) as e:
        raise SourceError(f"Cannot read {path} ({str(e).splitlines()[0][:200]}).", "Restore the file.") from e


@dataclass(frozen=True, eq=False)
class _Column:
    """A column of several parquet files, of which the one that was asked for last is in memory."""

    paths: list[Path]
    tables: list[pq.ParquetFile]
    name: str
    _last: dict[Path, pa.Array] = field(default_factory=dict)

    def rows(self, start: int, stop: int) -> list[str]:
        found, first = [], 0
        for path, table in zip(self.paths, self.tables, strict=True):
            end = first + table.metadata.num_rows
            if start < end and first < stop:
                if self._last.get(path) is None:
                    self._last.clear()
                    self._last[path] = pa.array((checked_sha256(str(value or "")) for (value,) in _cells(path, table, [self.name])), pa.string())
                found += self._last[path][max(0, start - first) : min(stop, end) - first].to_pylist()
            first = end
        return found


def _lines(path: Path) -> Iterator[str]:
    try:
        with open(path, encoding="utf-8", newline="\n") as f:
            yield from (line.removesuffix("\n").removesuffix("\r") for line in f)
    except (OSError, UnicodeDecodeError) as e:
        raise SourceError(f"Cannot read {path}: {getattr(e, 'strerror', None) or e}.", "Save it as UTF-8.") from e


def _captions(path: Path) -> Iterator[list[str]]:
    if not path.is_file():
        return
    for number, line in enumerate(_lines(path), 1):
        try:
            found = json.loads(line)
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
            raise SourceError(f"Line {number} of {path} is no JSON list of texts.", "Write one list of captions per image, [] for none.")
        yield found

"""Tables with an image column (paths or encoded images), caption columns and keys: csv, json, parquet, and datasets of the Hub.

Parquet, JSON and the Hub go through `datasets`, which maps them from its cache; cells of a csv are read as they are written.
"""

from __future__ import annotations

import errno
import functools
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from kdstore.data.columns import CONTENT, KINDS, ColumnSource, by_content, content_keys, distinct, group
from kdstore.data.images import MAX_BYTES
from kdstore.data.mapped import mapped_table
from kdstore.data.source import PROBE, UndecodableImage
from kdstore.errors import SourceError, UnknownName

IMAGE_COLUMNS = ("image", "file_name", "image_path", "filepath", "path", "img", "jpg", "png")
CAPTION_COLUMNS = ("captions", "caption", "text", "sentences", "txt")
KEY_COLUMNS = ("key", "uid", "__key__")
FORMATS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
NO_FILE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP)
OPTIONS = ("image", *KINDS, "key")


def open_table(spec: str, path: Path, options: dict[str, str]) -> ColumnSource:
    """Open a file of rows; paths in its cells are read inside its folder only."""
    return table_source(spec, _read_table(path, options), path.parent.resolve(), options)


def open_hub(spec: str, name: str, options: dict[str, str]) -> ColumnSource:
    """Open `ORG/NAME[/CONFIG][:SPLIT]` of the Hugging Face Hub (SPLIT: train)."""
    return table_source(spec, _with_class_names(hub_rows(name), options), None, options)


def hub_rows(name: str) -> Any:
    """Return `ORG/NAME[/CONFIG][:SPLIT]` as a dataset mapped from the cache of `datasets`; raises SourceError."""
    import datasets

    path, _, split = name.partition(":")
    parts = path.split("/")
    repo, config = "/".join(parts[:2]), "/".join(parts[2:]) or None
    try:
        rows = datasets.load_dataset(repo, config, split=split or "train")
    except Exception as e:  # the hub client raises its own, the network's and the builder's errors
        lines = str(e).strip().splitlines() or [type(e).__name__]
        raise SourceError(f"Cannot open the hub dataset {name}: {lines[0][:200]}", "Check the name, the configuration, the split and the network.") from e
    return rows


def _read_table(path: Path, options: dict[str, str]) -> pa.Table:
    import datasets

    try:
        if FORMATS[path.suffix] == "csv":
            return _read_texts(path, "\t" if path.suffix == ".tsv" else ",")
        return _with_class_names(datasets.load_dataset(FORMATS[path.suffix], data_files=str(path), split="train"), options)
    except Exception as e:  # builders raise pandas', Arrow's and their own errors
        cause = e.__cause__ or e
        raise SourceError(f"Cannot read {path}: {str(cause).strip().splitlines()[0][:200]}", "Check that it is a whole table.") from e


def _with_class_names(rows: Any, options: dict[str, str]) -> pa.Table:
    """Return the table of a `datasets.Dataset`, its columns of labels as texts: the names that a ClassLabel has, else the numbers (-1, no label, as none)."""
    table = rows.data.table
    for name in (n for n in options.get(PROBE, "").split(",") if n in table.column_names and pa.types.is_integer(table[n].type)):
        names = getattr(rows.features[name], "names", None)
        known = pc.if_else(pc.greater_equal(table[name], 0), table[name], None)
        texts = known.cast(pa.large_string()) if names is None else pc.take(pa.array(names, pa.large_string()), known)
        table = table.set_column(table.column_names.index(name), name, texts)
    return table


def _read_texts(path: Path, separator: str) -> pa.Table:
    """Read every cell as it is written: a caption may be 'None' or '7', and a key may begin with zeros."""
    parse = pa.csv.ParseOptions(delimiter=separator, newlines_in_values=True)
    with pa.csv.open_csv(path, parse_options=parse) as start:
        texts = pa.schema([(name, pa.large_string()) for name in start.schema.names])
    with pa.csv.open_csv(path, parse_options=parse, convert_options=pa.csv.ConvertOptions(column_types=texts)) as rows:
        return mapped_table(rows, texts)


def table_source(spec: str, table: pa.Table, folder: Path | None, options: dict[str, str]) -> ColumnSource:
    """Make a source of a table; rows of one path are one image. Raises SourceError, UnknownName.

    A hub dataset has no `folder`: its image column says where `datasets` put the files.
    """
    if not table.num_rows:
        raise SourceError(f"{spec} has no rows.", "Give a table with images and captions.")
    images = table[_column(spec, table, "image", IMAGE_COLUMNS, options.get("image"))]
    read = functools.partial(read_cell, images, folder)
    by_kind = {kind: options[option].split(",") for option, kind in KINDS.items() if option in options}
    if not by_kind:
        by_kind = {"human": [_column(spec, table, "caption", CAPTION_COLUMNS, None)]}
    captions = tuple((kind, table[_column(spec, table, "caption", (), name)]) for kind, names in by_kind.items() for name in names)
    if options.get("key") == CONTENT:
        keys = content_keys(read, table.num_rows)
        groups = group(keys)
        return ColumnSource(spec, keys, captions, read, groups, by_content(groups))
    if name := _column(spec, table, "key", KEY_COLUMNS, options.get("key"), needed=False):
        keys = _named_keys(spec, table[name], name)
        distinct(spec, keys, lambda row: f"row {row}", f"Name a column of unique keys, or take ?key={CONTENT}.")
        return ColumnSource(spec, keys, captions, read)
    keys, notices = _or_numbers(_image_names(images, folder), table.num_rows)
    return ColumnSource(spec, keys, captions, read, group(keys), notices)


def _column(spec: str, table: pa.Table, what: str, usual: tuple[str, ...], asked: str | None, *, needed: bool = True) -> str:
    """Choose a column; '' where none is needed and none of the usual ones is there."""
    found = table.column_names
    if asked and asked not in found:
        raise UnknownName.of(f"column in {spec}", asked, found)
    chosen = asked or next((c for c in usual if c in found), "")
    if needed and not chosen:
        raise SourceError(f"{spec} has no {what} column: found {', '.join(found)}.", f"Name it: --data '{spec}?{what}=COLUMN'.")
    return chosen


def _named_keys(spec: str, column: pa.ChunkedArray, name: str) -> pa.ChunkedArray:
    try:
        keys = column.cast(pa.large_string())
    except pa.ArrowException as e:
        raise SourceError(f"{spec}: the key column '{name}' holds {column.type}, not texts or numbers.", "Name another with ?key=COLUMN.") from e
    if keys.null_count:
        row = pc.index(pc.is_null(keys), True).as_py()
        raise SourceError(f"{spec}: row {row} has no key in the column '{name}' ({keys.null_count} rows have none).", "Name another with ?key=COLUMN.")
    return keys


def _image_names(images: pa.ChunkedArray, folder: Path | None) -> pa.ChunkedArray | None:
    """Name images by their paths without reading their bytes; None where they have no name of their own.

    Beside encoded images stands a file name that need not be unique, or, in a hub dataset of files, a path of this machine: only its end
    is a name. A path into the table's own folder is named from there, so that the same data has the same keys wherever it lies.
    """
    if pa.types.is_struct(images.type) and images.type.get_field_index("path") >= 0:
        paths = pa.chunked_array([pc.struct_field(chunk, "path") for chunk in images.chunks], images.type.field("path").type)
        names = pc.replace_substring_regex(paths.cast(pa.large_string()), "^.*/", "")
        return names if not names.null_count and pc.all(pc.not_equal(names, "")).as_py() and group(names) is None else None
    if not (pa.types.is_string(images.type) or pa.types.is_large_string(images.type)):
        return None
    names = images.cast(pa.large_string())
    if folder and pc.any(pc.starts_with(names, f"{folder}/")).as_py():  # otherwise the column's own bytes serve
        return pc.replace_substring_regex(names, f"^{re.escape(f'{folder}/')}", "")
    return names


def _or_numbers(names: pa.ChunkedArray | None, num_rows: int) -> tuple[pa.ChunkedArray, tuple[str, ...]]:
    """Name rows that have no name by their numbers, and say so."""
    if names is not None:
        nameless = pc.or_kleene(pc.is_null(names), pc.equal(names, ""))
        count = pc.sum(nameless).as_py()
        if not count:
            return names, ()
    numbers = pa.array(np.arange(num_rows)).cast(pa.large_string())
    if names is None:
        return pa.chunked_array([numbers]), (f"The images have no names: their keys are row numbers. ?key={CONTENT} names them by content instead.",)
    return pc.if_else(nameless, numbers, names), (f"{count} of {num_rows} rows name no image: their keys are row numbers.",)


def read_cell(images: pa.ChunkedArray, folder: Path | None, row: int) -> bytes:
    """Return the encoded image of a cell: bytes, the path of a file, or both as `datasets` keeps them."""
    value: Any = images[row].as_py()
    made_by_datasets = isinstance(value, dict) and folder is None
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str) and value:
        value = read_file(Path(value) if made_by_datasets else inside(folder, value))
    if not isinstance(value, bytes):
        raise UndecodableImage("the row has no image")
    return value


def inside(folder: Path | None, name: str) -> Path:
    """Return the file that `name` means in `folder`; raises UndecodableImage where it would leave it."""
    if folder is None:
        raise UndecodableImage("a hub dataset holds no file that a text cell could name")
    try:
        path = (folder / name).resolve()
    except (OSError, ValueError, RuntimeError) as e:  # a name with a NUL, a loop of links
        raise UndecodableImage("the path names no file") from e
    if folder not in path.parents:
        raise UndecodableImage(f"the path leaves {folder.name}")
    return path


def read_file(path: Path) -> bytes:
    """Read an image file; raises UndecodableImage where there is none, and SourceError where disk or rights fail, which says nothing of the image."""
    try:
        with open(path, "rb") as f:
            if os.fstat(f.fileno()).st_size > MAX_BYTES:
                raise UndecodableImage(f"the file has more than {MAX_BYTES:,} bytes")
            return f.read()
    except OSError as e:
        if e.errno not in NO_FILE:
            raise SourceError(f"Cannot read {path}: {e.strerror or e}.", "See to the disk; the same command goes on from there.") from e
        raise UndecodableImage(f"{e.strerror}: {path.name}") from e

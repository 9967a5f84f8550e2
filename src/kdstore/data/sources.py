"""Open a source by its name: the built-in scenes, files of rows, an image folder, or a dataset of the Hugging Face Hub.

All but the built-in one go through `datasets`. Images stay encoded until they are asked for, so that one bad file is one bad row.
A spec is text that names the data completely; options that are not part of it (columns) ride along as `?column=name`.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlencode

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from kdstore.data.scenes import SPLITS, Scenes
from kdstore.data.source import Caption, LoadedImage, Source, UndecodableImage, decode_image
from kdstore.errors import SourceError, UnknownName

IMAGE_COLUMNS = ("image", "file_name", "image_path", "filepath", "path", "img", "jpg", "png")
CAPTION_COLUMNS = ("captions", "caption", "text", "sentences", "txt")
KEY_COLUMNS = ("key", "uid", "__key__")
TABLES = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
COLUMN_OPTIONS = ("image", "caption", "key")


def open_source(spec: str) -> Source:
    """Open the source that `spec` names; raises SourceError or UnknownName.

    `scenes[/SPLIT][:N]`, `hf:ORG/NAME[/CONFIG][:SPLIT]`, a folder with metadata.csv, .jsonl or .parquet, or such a file;
    `?image=...&caption=...&key=...` behind it names the columns.
    """
    name, _, query = spec.partition("?")
    try:
        columns = dict(parse_qsl(query, strict_parsing=True)) if query else {}
    except ValueError as e:
        raise SourceError(f"'?{query}' in {spec} does not name columns.", "Write ?image=COLUMN&caption=COLUMN&key=COLUMN.") from e
    for option in columns:
        if option not in COLUMN_OPTIONS:
            raise UnknownName.of("column option", option, COLUMN_OPTIONS)
    for prefix, opener in SOURCES.items():
        if name.split(":")[0].split("/")[0] == prefix:
            return opener(name, columns)
    return _open_files(name, columns)


def _open_scenes(name: str, columns: dict[str, str]) -> Source:
    if columns:
        raise SourceError(f"The built-in scenes have no columns, but {', '.join(columns)} was given.", f"Write {name}.")
    world, _, size = name.partition(":")
    split = world.partition("/")[2] or "train"
    if split not in SPLITS:
        raise UnknownName.of("scenes split", split, SPLITS)
    if size and not size.isdigit():
        raise SourceError(f"'{size}' in {name} is not a number of scenes.", "Write scenes:N or scenes/SPLIT:N.")
    return Scenes(split, int(size) if size else None)


def _open_hub(name: str, columns: dict[str, str]) -> Source:
    import datasets

    path, _, split = name.removeprefix("hf:").partition(":")
    parts = path.split("/")
    repo, config = "/".join(parts[:2]), "/".join(parts[2:]) or None
    try:
        rows = datasets.load_dataset(repo, config, split=split or "train")
    except Exception as e:  # the hub client raises its own, the network's and the builder's errors
        lines = str(e).strip().splitlines() or [type(e).__name__]
        raise SourceError(f"Cannot open the hub dataset {name}: {lines[0][:200]}", "Check the name, the configuration, the split and the network.") from e
    return TableSource(name, rows, None, columns)


def _open_files(name: str, columns: dict[str, str]) -> Source:
    path = Path(name)
    if path.is_dir():
        tables = [path / f"metadata{suffix}" for suffix in TABLES if (path / f"metadata{suffix}").is_file()]
        if not tables:
            found = ", ".join(sorted(p.name for p in path.iterdir())[:6])
            raise SourceError(f"No metadata.csv, .jsonl or .parquet in {path} (found {found or 'nothing'}).", "Put file_name and caption columns there.")
        path = tables[0]
    if not path.is_file():
        raise SourceError(f"No data at {name}.", f"Give a folder, a {', '.join(TABLES)} file, or one of: {', '.join(f'{s}...' for s in SOURCES)}.")
    if path.suffix not in TABLES:
        raise SourceError(f"{path} has no suffix that names a table.", f"Known: {', '.join(TABLES)}.")
    return TableSource(str(Path(name).resolve()), _read_table(path), path.parent, columns)


def _read_table(path: Path) -> Any:
    import datasets

    try:
        if TABLES[path.suffix] == "csv":
            return datasets.Dataset(datasets.table.InMemoryTable(_read_texts(path, "\t" if path.suffix == ".tsv" else ",")))
        return datasets.load_dataset(TABLES[path.suffix], data_files=str(path), split="train")
    except Exception as e:  # builders raise pandas', Arrow's and their own errors
        cause = e.__cause__ or e
        raise SourceError(f"Cannot read {path}: {str(cause).strip().splitlines()[0][:200]}", "Check that it is a whole table.") from e


def _read_texts(path: Path, separator: str) -> pa.Table:
    """Read every cell as it is written: a caption may be 'None' or '7', and a key may begin with zeros."""
    parse = pa.csv.ParseOptions(delimiter=separator, newlines_in_values=True)
    with pa.csv.open_csv(path, parse_options=parse) as start:
        texts = dict.fromkeys(start.schema.names, pa.string())
    return pa.csv.read_csv(path, parse_options=parse, convert_options=pa.csv.ConvertOptions(column_types=texts))


class TableSource:
    """A table with an image column (paths or bytes), a caption column, and keys; rows of one path are one image.

    Paths in text cells are read inside `folder` only; a hub dataset has None, and its image column says where `datasets` put the files.
    """

    def __init__(self, spec: str, rows: Any, folder: Path | None, columns: dict[str, str]) -> None:
        import datasets

        chosen = {
            "image": _column(spec, rows.column_names, "image", IMAGE_COLUMNS, columns.get("image")),
            "caption": _column(spec, rows.column_names, "caption", CAPTION_COLUMNS, columns.get("caption")),
        }
        key = _column(spec, rows.column_names, "key", KEY_COLUMNS, columns.get("key"), needed=False)
        self.spec = f"{spec}?{urlencode(columns)}" if columns else spec
        self._folder = folder.resolve() if folder else None
        if isinstance(rows.features[chosen["image"]], datasets.Image):
            rows = rows.cast_column(chosen["image"], datasets.Image(decode=False))
        self._images = rows.select_columns([chosen["image"]])
        self._column = chosen["image"]
        self._rows: list[int] = []
        self._keys: list[str] = []
        self._captions: list[tuple[Caption, ...]] = []
        names = rows.data.column(key).to_pylist() if key else _image_names(rows.data.column(self._column))
        self._group(names, rows.data.column(chosen["caption"]).to_pylist(), named=bool(key))

    def _group(self, names: list[Any], captions: Iterable[Any], *, named: bool) -> None:
        """Give every image its key and its captions; a path that stands in several rows is one image."""
        place: dict[str, int] = {}
        for row, (name, value) in enumerate(zip(names, captions, strict=True)):
            key = str(name) if named or name else str(row)
            if key in place and named:
                raise SourceError(f"{self.spec}: the key '{key}' stands in rows {self._rows[place[key]]} and {row}.", "Give a column of unique keys.")
            texts = tuple(Caption(text) for text in _texts(value))
            if key in place:
                self._captions[place[key]] += texts
            else:
                place[key] = len(self._rows)
                self._rows.append(row)
                self._keys.append(key)
                self._captions.append(texts)
        if not self._rows:
            raise SourceError(f"{self.spec} has no rows.", "Give a table with images and captions.")

    def __len__(self) -> int:
        return len(self._rows)

    def key(self, i: int) -> str:
        return self._keys[i]

    def captions(self, i: int) -> tuple[Caption, ...]:
        return self._captions[i]

    def image(self, i: int) -> LoadedImage:
        value = self._images[self._rows[i]][self._column]
        made_by_datasets = isinstance(value, dict) and self._folder is None
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path")
        if isinstance(value, str) and value:
            value = _read_file(Path(value) if made_by_datasets else self._inside(value))
        if not isinstance(value, bytes):
            raise UndecodableImage("the row has no image")
        return decode_image(value)

    def _inside(self, name: str) -> Path:
        if self._folder is None:
            raise UndecodableImage("a hub dataset holds no file that a text cell could name")
        path = (self._folder / name).resolve()
        if self._folder not in path.parents:
            raise UndecodableImage(f"the path leaves {self._folder.name}")
        return path


def _read_file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as e:
        raise UndecodableImage(f"{e.strerror}: {path.name}") from e


def _image_names(images: pa.ChunkedArray) -> list[str | None]:
    """Name images by their paths without reading their bytes; None where they have no name.

    Beside encoded images stands a file name that need not be unique, or, in a hub dataset of files, a path of this machine: only its end is a name.
    """
    if pa.types.is_struct(images.type) and images.type.get_field_index("path") >= 0:
        names = [path and path.rpartition("/")[2] for path in pc.struct_field(images, "path").to_pylist()]
        return names if all(names) and len(set(names)) == len(names) else [None] * len(names)
    is_text = pa.types.is_string(images.type) or pa.types.is_large_string(images.type)
    return images.to_pylist() if is_text else [None] * len(images)


def _column(spec: str, found: list[str], what: str, usual: tuple[str, ...], asked: str | None, *, needed: bool = True) -> str:
    """Choose a column; '' where none is needed and none of the usual ones is there."""
    if asked and asked not in found:
        raise UnknownName.of(f"column in {spec}", asked, found)
    chosen = asked or next((c for c in usual if c in found), "")
    if needed and not chosen:
        raise SourceError(f"{spec} has no {what} column: found {', '.join(found)}.", f"Name it: --data '{spec}?{what}=COLUMN'.")
    return chosen


def _texts(value: Any) -> list[str]:
    """Read a caption cell: a text, a list of texts, or a list written as JSON; empty ones are left out."""
    if isinstance(value, str) and value.startswith("["):
        with contextlib.suppress(ValueError):
            value = json.loads(value)
    texts = value if isinstance(value, list) else [value]
    return [t.strip() for t in texts if isinstance(t, str) and t.strip()]


SOURCES: dict[str, Callable[[str, dict[str, str]], Source]] = {"scenes": _open_scenes, "hf": _open_hub}

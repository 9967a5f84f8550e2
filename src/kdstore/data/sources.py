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
    columns = dict(parse_qsl(query, strict_parsing=True)) if query else {}
    for option in columns:
        if option not in COLUMN_OPTIONS:
            raise UnknownName.of("column option", option, COLUMN_OPTIONS)
    for prefix, opener in SOURCES.items():
        if name.split(":")[0].split("/")[0] == prefix:
            return opener(name, columns)
    return _open_files(name, columns)


def _open_scenes(name: str, columns: dict[str, str]) -> Source:
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
    return TableSource(name, rows, Path(), columns)


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

    options = {"sep": "\t"} if path.suffix == ".tsv" else {}
    try:
        return datasets.load_dataset(TABLES[path.suffix], data_files=str(path), split="train", **options)
    except Exception as e:  # builders raise pandas', Arrow's and their own errors
        cause = e.__cause__ or e
        raise SourceError(f"Cannot read {path}: {str(cause).strip().splitlines()[0][:200]}", "Check that it is a whole table.") from e


class TableSource:
    """A table with an image column (paths or bytes), caption columns, and keys; rows of one path are one image."""

    def __init__(self, spec: str, rows: Any, folder: Path, columns: dict[str, str]) -> None:
        import datasets

        chosen = {
            "image": _column(spec, rows.column_names, "image", IMAGE_COLUMNS, columns.get("image")),
            "caption": _column(spec, rows.column_names, "caption", CAPTION_COLUMNS, columns.get("caption")),
        }
        key = _column(spec, rows.column_names, "key", KEY_COLUMNS, columns.get("key"), needed=False)
        self.spec = f"{spec}?{urlencode(columns)}" if columns else spec
        self._folder = folder.resolve()
        if isinstance(rows.features[chosen["image"]], datasets.Image):
            rows = rows.cast_column(chosen["image"], datasets.Image(decode=False))
        self._images = rows.select_columns([chosen["image"]])
        self._column = chosen["image"]
        paths = rows[self._column] if not key else rows[key]
        self._rows: list[int] = []
        self._keys: list[str] = []
        self._captions: list[tuple[Caption, ...]] = []
        self._group(list(paths), rows[chosen["caption"]], named=bool(key))

    def _group(self, names: list[Any], captions: Iterable[Any], *, named: bool) -> None:
        """Give every image its key and its captions; a path that stands in several rows is one image."""
        place: dict[str, int] = {}
        for row, (name, value) in enumerate(zip(names, captions, strict=True)):
            by_name = named or isinstance(name, str)
            key = str(name) if by_name else str(row)
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
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path")
        if isinstance(value, str):
            value = self._read(value)
        if not isinstance(value, bytes):
            raise UndecodableImage("the row has no image")
        return decode_image(value)

    def _read(self, name: str) -> bytes:
        path = (self._folder / name).resolve()
        if self._folder not in path.parents:
            raise UndecodableImage(f"the path leaves {self._folder.name}")
        try:
            return path.read_bytes()
        except OSError as e:
            raise UndecodableImage(f"{e.strerror}: {name}") from e


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

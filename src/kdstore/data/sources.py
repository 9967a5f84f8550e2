"""Open a source by its name: the built-in scenes, tars, tables, COCO captions, an image folder, or a dataset of the Hugging Face Hub.

A spec is text that names the data completely; options ride along as `?option=name`. Images stay encoded until they are asked for, so
that one bad file is one bad row. Where data lies is no part of its keys: a source has one fingerprint on every machine.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from urllib.parse import parse_qsl, urlencode

from kdstore.data import classfolders, coco, swaps, tables, tars
from kdstore.data.folder import PREFIX, open_folder
from kdstore.data.scenes import SPLITS, Scenes
from kdstore.data.source import PROBE, Source
from kdstore.errors import SourceError, UnknownName
from kdstore.progress import OnProgress, silent


def open_source(spec: str, *, on_progress: OnProgress = silent) -> Source:
    """Open the source that `spec` names; raises SourceError or UnknownName. docs/sources.md has the forms and their options."""
    name, _, query = spec.partition("?")
    try:
        options = dict(parse_qsl(query, strict_parsing=True)) if query else {}
    except ValueError as e:
        raise SourceError(f"'?{query}' in {spec} does not name columns.", "Write ?image=COLUMN&caption=COLUMN&key=COLUMN.") from e
    for prefix, opener in SOURCES.items():
        if name.split(":")[0].split("/")[0] == prefix:
            return opener(name, options)
    return _open_files(name, options, on_progress)


def _open_scenes(name: str, options: dict[str, str]) -> Source:
    _spec(name, options, (PROBE, swaps.OPTION))
    world, _, size = name.partition(":")
    split = world.partition("/")[2] or "train"
    if split not in SPLITS:
        raise UnknownName.of("scenes split", split, SPLITS)
    if size and not size.isdigit():
        raise SourceError(f"'{size}' in {name} is not a number of scenes.", "Write scenes:N or scenes/SPLIT:N.")
    scenes = Scenes(split, int(size) if size else None, options.get(PROBE))
    return swaps.SwappedScenes(scenes, options[swaps.OPTION].split(",")) if swaps.OPTION in options else scenes


def _open_hub(name: str, options: dict[str, str]) -> Source:
    return tables.open_hub(_spec(name, options, tables.OPTIONS), name.removeprefix("hf:"), options)


def _open_images(name: str, options: dict[str, str]) -> Source:
    if not name.startswith(PREFIX):  # a folder of that name
        return _open_files(name, options, silent)
    _spec(name, options, ())
    return open_folder(name.removeprefix(PREFIX))


def _open_files(name: str, options: dict[str, str], on_progress: OnProgress) -> Source:
    path = Path(name)
    if "://" in name or name.startswith("pipe:") or name == "-" or (path.exists() and not path.is_file() and not path.is_dir()):
        raise SourceError(
            f"{name} is a stream: its length is unknown and its rows cannot be read again, in any order, by several workers.",
            "Fetch it first (img2dataset, 'aws s3 cp', 'hf download'), then name the files.",
        )
    where = os.path.abspath(name)
    if path.is_dir():
        path = _listed(path)
    if path.is_dir() and not any(path.glob("*.tar")):
        return classfolders.open_class_folders(_spec(where, options, ()), path)
    if path.is_dir():
        return tars.open_tars(_spec(where, options, tars.OPTIONS), sorted(Path(where).glob("*.tar")), options, on_progress)
    if tars.is_tar(name):
        return tars.open_tars(_spec(where, options, tars.OPTIONS), tars.tars_of(where), options, on_progress)
    if not path.is_file():
        raise SourceError(
            f"No data at {name}.", f"Give a folder, tars, a {', '.join(tables.FORMATS)} file, or one of: {', '.join(f'{s}...' for s in SOURCES)}."
        )
    if path.suffix not in tables.FORMATS:
        raise SourceError(f"{path} has no suffix that names a table or tars.", f"Known: .tar, {', '.join(tables.FORMATS)}.")
    if path.suffix == ".json" and coco.is_coco(path):
        if "images" in options:
            options = {**options, "images": os.path.abspath(options["images"])}
        return coco.open_coco(_spec(where, options, coco.OPTIONS), path, options)
    return tables.open_table(_spec(where, options, tables.OPTIONS), path, options)


def _listed(folder: Path) -> Path:
    """Return a folder's list of images, or the folder itself where it holds tars or a folder per class."""
    found = sorted(path.name for path in folder.iterdir())
    lists = [f"metadata{suffix}" for suffix in tables.FORMATS if f"metadata{suffix}" in found]
    if lists:
        return folder / lists[0]
    if any(name.endswith(".tar") for name in found) or classfolders.has_class_folders(folder):
        return folder
    shown = ", ".join(found[:6]) or "nothing"
    raise SourceError(
        f"No metadata.csv, .jsonl or .parquet, no .tar and no folders of images in {folder} (found {shown}).", "Put file_name and caption columns there."
    )


def _spec(name: str, options: dict[str, str], known: tuple[str, ...]) -> str:
    """Write a spec with its options; raises UnknownName for one that this kind of source does not have."""
    for option in options:
        if option not in known:
            raise UnknownName.of("option", option, known)
    return f"{name}?{urlencode(options, safe=',/')}" if options else name


SOURCES: dict[str, Callable[[str, dict[str, str]], Source]] = {"scenes": _open_scenes, "hf": _open_hub, "images": _open_images}

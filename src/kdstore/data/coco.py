"""COCO caption files (`captions_train2017.json`) with their image folder: one image, five captions.

Keys are file names, as in any folder of images; `?key=id` takes the image ids, which the 2014 and the 2017 files share.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa

from kdstore.data.columns import CONTENT, ColumnSource, by_content, content_keys, distinct, group
from kdstore.data.tables import inside, read_file
from kdstore.errors import SourceError, UnknownName

OPTIONS = ("images", "key")
KEYS = ("file_name", "id", CONTENT)
_HEAD = 2**16
_LOOKED_FOR = 100  # images, one of which must be in the folder


def is_coco(path: Path) -> bool:
    """Whether a .json file begins like one of COCO's: an object with a list of images or annotations."""
    with open(path, "rb") as f:
        head = f.read(_HEAD)
    return head.lstrip().startswith(b"{") and re.search(rb'"(images|annotations)"\s*:\s*\[\s*[{\]]', head) is not None


def open_coco(spec: str, path: Path, options: dict[str, str]) -> ColumnSource:
    """Open the images of a COCO caption file in its order, each with its captions in the order of the annotations; raises SourceError, UnknownName."""
    images, captions = _read(path)
    key = options.get("key", "file_name")
    if key not in KEYS:
        raise UnknownName.of("key of a COCO file", key, KEYS)
    folder = _folder(path, [image["file_name"] for image in images[:_LOOKED_FOR]], options.get("images")).resolve()
    names = pa.array([image["file_name"] for image in images], pa.large_string())

    def read(row: int) -> bytes:
        return read_file(inside(folder, names[row].as_py()))

    column = pa.chunked_array([pa.array([captions[image["id"]] for image in images], pa.large_list(pa.large_string()))])
    if key == CONTENT:
        keys = content_keys(read, len(images))
        groups = group(keys)
        return ColumnSource(spec, keys, (("human", column),), read, groups, by_content(groups))
    keys = pa.chunked_array([names if key == "file_name" else pa.array([str(image["id"]) for image in images], pa.large_string())])
    distinct(spec, keys, lambda row: f"image {row}", "Take another ?key: " + ", ".join(KEYS) + ".")
    return ColumnSource(spec, keys, (("human", column),), read)


def _read(path: Path) -> tuple[list[dict[str, Any]], dict[int, list[str]]]:
    """Read the images, and the captions of each image id."""
    try:
        content = json.loads(path.read_bytes())
        images = [{"id": image["id"], "file_name": image["file_name"]} for image in content["images"]]
        captions: dict[int, list[str]] = {image["id"]: [] for image in images}
        for annotation in content["annotations"]:
            captions[annotation["image_id"]].append(annotation["caption"])
        pa.array(list(captions.values()), pa.list_(pa.string()))
        pa.array([image["file_name"] for image in images], pa.string())
    except (ValueError, KeyError, TypeError, RecursionError, pa.ArrowException) as e:
        found = f"no {e}" if isinstance(e, KeyError) else str(e)
        raise SourceError(f"{path} is not a file of COCO captions ({found}).", "Give one like captions_train2017.json.") from e
    if not images:
        raise SourceError(f"{path} names no images.", "Give a file like captions_train2017.json.")
    return images, captions


def _folder(path: Path, names: list[str], asked: str | None) -> Path:
    """Find the folder that holds one of the images: called as the file is (`captions_NAME.json`), beside it or one level up."""
    name = path.stem.partition("_")[2]
    near = [Path(asked)] if asked else [base / n for base in (path.parent, path.parent.parent) for n in (name, f"images/{name}", "images", "")]
    for folder in near:
        if any((folder / image).is_file() for image in names):
            return folder
    looked = ", ".join(dict.fromkeys(str(folder) for folder in near))
    raise SourceError(f"No folder with the images of {path}: {names[0]} and the next ones are not in {looked}.", f"Name it: --data '{path}?images=FOLDER'.")

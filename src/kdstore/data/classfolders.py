"""A folder with a folder per class, as torchvision's ImageFolder and ImageNet have it: each image has its class's name as a caption of the kind `probe`.

Keys are paths relative to the folder, in sorted order.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from kdstore.data.columns import ColumnSource
from kdstore.data.source import PROBE
from kdstore.data.tables import inside, read_file

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm")


def has_class_folders(folder: Path) -> bool:
    """Whether a folder below this one holds an image."""
    return next(_images(folder), None) is not None


def open_class_folders(spec: str, folder: Path) -> ColumnSource:
    """Open the images of all class folders."""
    folder = folder.resolve()
    names = sorted(path.relative_to(folder).as_posix() for path in _images(folder))

    def read(row: int) -> bytes:
        return read_file(inside(folder, names[row]))

    classes = pa.chunked_array([pa.array([name.partition("/")[0] for name in names], pa.large_string())])
    return ColumnSource(spec, pa.chunked_array([pa.array(names, pa.large_string())]), ((PROBE, classes),), read)


def _images(folder: Path) -> Iterator[Path]:
    classes = (path for path in sorted(folder.iterdir()) if path.is_dir() and not path.name.startswith("."))
    return (path for of_class in classes for path in of_class.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())

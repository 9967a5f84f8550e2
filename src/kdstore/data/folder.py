"""Images of a folder and those below it, without captions: what a question answering data set asks about.

Keys are paths from the folder, in sorted order.
"""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa

from kdstore.data.classfolders import SUFFIXES
from kdstore.data.columns import ColumnSource
from kdstore.data.tables import inside, read_file
from kdstore.errors import SourceError

PREFIX = "images:"


def open_folder(path: str) -> ColumnSource:
    """Open the images in and below a folder; raises SourceError if there is none."""
    root = Path(path).resolve()
    names = sorted(p.relative_to(root).as_posix() for p in root.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file()) if root.is_dir() else []
    if not names:
        raise SourceError(f"No image in {path} ({', '.join(SUFFIXES)}).", f"Write {PREFIX}FOLDER.")
    keys = pa.chunked_array([pa.array(names, pa.large_string())])
    return ColumnSource(f"{PREFIX}{root}", keys, (), lambda row: read_file(inside(root, names[row])))

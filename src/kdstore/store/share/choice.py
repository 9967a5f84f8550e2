"""Which files of a store a pull takes: all, or those that hold some arrays and some rows.

The grain is the shard. Metadata, the index, offsets, checks, codecs and what says which rows are valid always come whole: they are some 200 bytes a pair, and
with them a part can be joined, verified and completed like a whole store.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from kdstore.data.source import Source
from kdstore.errors import ConfigError, JoinError
from kdstore.progress import OnProgress
from kdstore.store.derive import choose
from kdstore.store.join import join_sources, positions
from kdstore.store.layout import ArraySpec
from kdstore.store.manifest import Manifest
from kdstore.store.reader import Store


@dataclass(frozen=True)
class Choice:
    """What to pull: some arrays (none named: all), and the image rows of a slice, of keys, or of what joins with a source (`by_content`: by its images too)."""

    arrays: tuple[str, ...] = ()
    rows: slice | None = None
    keys: tuple[str, ...] | None = None
    source: Source | None = None
    by_content: bool = False

    def __post_init__(self) -> None:
        if sum(way is not None for way in (self.rows, self.keys, self.source)) > 1:
            raise ConfigError("--rows, --keys and --for each choose rows.", "Give one of them.")

    @property
    def all_rows(self) -> bool:
        return self.rows is None and self.keys is None and self.source is None


def specs_of(manifest: Manifest) -> dict[str, ArraySpec]:
    """Return the arrays that a manifest describes; raises StoreError for what format 1 does not allow."""
    return {name: ArraySpec.from_metadata(name, metadata) for name, metadata in manifest.content["arrays"].items()}


def frame_files(manifest: Manifest, specs: dict[str, ArraySpec]) -> set[str]:
    """Return the files that every part has."""
    return {path for path in manifest.files if not any(path.startswith(f"{name}/c/") for name in specs if not name.endswith("/valid"))}


def chosen_files(choice: Choice, manifest: Manifest, specs: dict[str, ArraySpec], frame: Store | None, on_progress: OnProgress) -> set[str]:
    """Return the files of a choice; `frame` is the store with the files that every part has, needed unless all rows are chosen.

    Raises UnknownName for an array, JoinError if nothing joins, ConfigError for rows that are none, DamagedStore for a manifest without one of the files.
    """
    names = {*choose(specs, choice.arrays), "image/valid", "text/valid"}
    chosen = {path for path in manifest.files if not any(path.startswith(f"{name}/c/") for name in specs)}
    rows = None if choice.all_rows or frame is None else _rows(choice, frame, on_progress)
    for name, spec in specs.items():
        if name in names:
            held = np.ones(spec.num_shards, bool)
            if rows is not None and not name.endswith("/valid"):
                held[:] = False
                held[np.unique(np.flatnonzero(rows[spec.side]) // spec.shard[0])] = True
            chosen |= {spec.shard_path(number) for number in np.flatnonzero(held).tolist()}
    for path in chosen:
        manifest.entry(path)
    return chosen


def _rows(choice: Choice, frame: Store, on_progress: OnProgress) -> dict[str, npt.NDArray[np.bool_]]:
    """Return which rows of each side are chosen: images, and all of their texts."""
    texts = np.diff(frame.offsets)  # compares the declared number of images with a file before anything is allocated from it
    images = np.zeros(frame.num_images, bool)
    if choice.rows is not None:
        images[choice.rows] = True
        if not images.any():
            raise ConfigError(f"There is no image among the chosen rows: the store has {frame.num_images}.", "Give --rows START:STOP within them.")
    elif choice.keys is not None:
        images[_found(choice.keys, frame, on_progress)] = True
    elif choice.source is not None:
        images |= join_sources(frame, choice.source, by_content=choice.by_content, on_progress=on_progress).source_row_of_store >= 0
    return {"image": images, "text": np.repeat(images, texts)}


def _found(keys: Sequence[str], frame: Store, on_progress: OnProgress) -> npt.NDArray[np.int64]:
    rows = positions(pa.array(keys, pa.large_string()), frame.index("image", "key").combine_chunks())
    if not (rows >= 0).any():
        raise JoinError(f"None of the {len(keys)} keys is in the store.", "Look at its keys: they are the column key of index/image/*.parquet.")
    if (rows < 0).any():
        on_progress("notice", 0, 0, f"{int((rows < 0).sum())} of {len(keys)} keys are not in the store")
    return rows[rows >= 0]

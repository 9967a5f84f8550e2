"""The rows of a store as the source of new arrays for them: its captions, and the images that it was made from or none."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np

from kdstore.data.source import Caption, LoadedImage, Source, UndecodableImage
from kdstore.errors import JoinError
from kdstore.store import Plan, Store, join_sources

_UNITS = 8  # of the index, kept in memory


class RowsOfStore:
    """Images of a source in the order of a store's rows; one with other bytes than the teacher saw is an error and not a feature."""

    def __init__(self, parent: Store, rows: np.ndarray, plan: Plan, source: Source) -> None:
        """Find the rows by fingerprint or key; raises JoinError for those that the source lacks."""
        self._source, self._plan, self._rows = source, plan, rows
        self._places = join_sources(parent, source).source_row_of_store[rows]
        self._sha256 = index_of(parent, "image", "sha256")
        self._where = f"{source.spec}: the image '{{}}' is not the one that {parent.path} has features of."
        if (self._places < 0).any():
            missing = plan.keys.take(np.flatnonzero(self._places < 0)[:3]).to_pylist()
            raise JoinError(
                f"{source.spec} lacks {int((self._places < 0).sum())} of {len(rows)} images of {parent.path}: {', '.join(missing)}.",
                "Name the data that it was made from with --data, or the keys that are there with --keys.",
            )

    @property
    def spec(self) -> str:
        return self._source.spec

    @property
    def notices(self) -> tuple[str, ...]:
        return self._source.notices

    def __len__(self) -> int:
        return len(self._rows)

    def key(self, i: int) -> str:
        return str(self._plan.keys[i].as_py())

    def captions(self, i: int) -> tuple[Caption, ...]:
        texts = slice(int(self._plan.offsets[i]), int(self._plan.offsets[i + 1]))
        return tuple(map(Caption, self._plan.captions[texts].to_pylist(), self._plan.kinds[texts].to_pylist()))

    def image(self, i: int) -> LoadedImage:
        """Decode image `i`; raises UndecodableImage, and JoinError for another image under its key."""
        try:
            loaded = self._source.image(int(self._places[i]))
        except UndecodableImage as e:
            self._compare(i, e.sha256)
            raise
        self._compare(i, loaded.sha256)
        return loaded

    def _compare(self, i: int, sha256: str) -> None:
        if sha256 != self._sha256(int(self._rows[i])):
            raise JoinError(self._where.format(self.key(i)), "Restore the image, or leave its key out with --keys.")


def index_of(store: Store, side: Any, column: str) -> Callable[[int], str]:
    """Return a function that looks a row of the index up, reading only the file of its unit."""

    @lru_cache(_UNITS)
    def of_unit(unit: int) -> Any:
        return store.index(side, column, slice(unit, unit + 1))

    return lambda row: of_unit(row // store.unit_rows)[row % store.unit_rows].as_py()

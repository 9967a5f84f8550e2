"""The rows of a store as the source of new arrays for them: its captions, and the images that it was made from or none."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from kdstore.data.source import Caption, LoadedImage, Source, UndecodableImage
from kdstore.errors import JoinError
from kdstore.store import Plan, Store, index_rows, join_sources

_UNITS = 8  # of the index, kept in memory


class RowsOfStore:
    """Images of a source in the order of a store's rows; one with other bytes than the teacher saw is an error and not a feature."""

    def __init__(self, parent: Store, rows: np.ndarray, plan: Plan, source: Source) -> None:
        self._parent, self._source, self._plan, self._rows = parent, source, plan, rows
        self._sha256 = index_of(parent, "image", "sha256")
        self._where = f"{source.spec}: the image '{{}}' is not the one that {parent.path} has features of."

    def find(self) -> None:
        """Find the images in the source by fingerprint or key, before any is asked for; raises JoinError for those that it lacks, but for withdrawn ones."""
        places = self._places
        lacking = (places < 0) & ~np.isin(self._rows, self._parent.withdrawn)
        if lacking.any():
            missing = self._plan.keys.take(np.flatnonzero(lacking)[:3]).to_pylist()
            raise JoinError(
                f"{self.spec} lacks {int(lacking.sum())} of {len(places)} images of {self._parent.path}: {', '.join(missing)}.",
                "Name the data that it was made from with --data, or the keys that are there with --keys.",
            )

    @cached_property
    def _places(self) -> npt.NDArray[np.int64]:
        return join_sources(self._parent, self._source).source_row_of_store[self._rows]

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
        return self._plan.row(i)[1]

    def index_rows(self, start: int, stop: int) -> list[dict[str, Any]]:
        """Return what the parent's index says of some images, for arrays that need no look at them."""
        return index_rows(self._parent, "image", self._rows[start:stop])

    def image(self, i: int) -> LoadedImage:
        """Decode image `i`; raises UndecodableImage, and JoinError for another image under its key."""
        if self._places[i] < 0:
            raise UndecodableImage("withdrawn")
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

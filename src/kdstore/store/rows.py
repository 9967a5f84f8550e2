"""The rows of one array as a map-style dataset: what a PyTorch DataLoader takes, made without PyTorch.

One array each: `torch.utils.data.StackDataset` puts several together and `Subset` leaves rows out, both batch by batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kdstore.store.reader import Store


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows [...] of one view of an array; raises MissingFeature if the store does not hold it. Pickled as the store's path, so it goes to spawned processes."""

    store: Store
    name: str
    view: int = 0

    def __post_init__(self) -> None:
        self.store.require(self.name)

    def __len__(self) -> int:
        return self.store.arrays[self.name].shape[0]

    def __getitem__(self, row: int) -> npt.NDArray[Any]:
        return self.__getitems__([row])[0]

    def __getitems__(self, rows: Sequence[int]) -> npt.NDArray[Any]:
        """Return a batch [B, ...] in one gather: PyTorch asks for this with the list that its batch sampler gave."""
        views = self.view if self.store.arrays[self.name].has_views else None
        return self.store.gather(self.name, np.asarray(rows), views)

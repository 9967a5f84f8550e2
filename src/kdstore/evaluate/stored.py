"""Features of a data set's images from stores, found by the images' contents: a model is scored without its weights.

Names are not trusted: 'images/0.png' is there in every split. Reading all encoded images once to hash them costs less than decoding them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from kdstore.errors import EvaluationError, JoinError
from kdstore.evaluate.datasets.form import VqaSplit
from kdstore.evaluate.features import Images, on_grid
from kdstore.jsonfile import differing_fields
from kdstore.progress import OnProgress, silent
from kdstore.store import Store, open_store
from kdstore.store.join import as_digests, match_digests


def open_stores(paths: Sequence[str], array: str) -> tuple[Store, ...]:
    """Open stores of one model's features; raises MissingFeature for one without this array, EvaluationError for those of different features."""
    stores = tuple(map(open_store, paths))
    said = []
    for store in stores:
        store.require(array)
        made = {name: store.identity[name]["digest"] for name in ("teacher", "preprocessing")}
        said.append({**made, "decoding": store.identity.get("decoding"), array: store.identity["arrays"][array]})
    for store, other in zip(stores[1:], said[1:], strict=True):
        if differing := differing_fields(said[0], other, (stores[0].place, store.place)):
            raise EvaluationError(f"The stores hold features of different kinds: {differing}.", "Give stores that one model's extraction wrote.")
    return stores


def stored_images(stores: Sequence[Store], array: str, split: VqaSplit, grid: int | None, *, on_progress: OnProgress = silent) -> Images:
    """Find the features of all images of a split in stores; raises JoinError if one is missing, EvaluationError for tokens that do not fit the grid."""
    digest_N = as_digests([split.sha256(i) for i in _counted(split, on_progress)])
    place_N2 = np.full((split.num_images, 2), -1)
    for s, store in enumerate(stores):
        rows_N = match_digests(digest_N, as_digests(store.image_sha256().tolist()))
        held_N = (rows_N >= 0) & store.image_valid[rows_N] & (place_N2[:, 0] < 0)
        place_N2[held_N] = np.stack([np.full(held_N.sum(), s), rows_N[held_N]], axis=1)
    if missing := int((place_N2[:, 0] < 0).sum()):
        first = split.image_names[int((place_N2[:, 0] < 0).argmax())]
        teacher, option = stores[0].identity["teacher"]["name"], " --tokens image" if array == "image/tokens" else ""
        data = split.name if split.name.startswith("scenes/") else "images:FOLDER"
        raise JoinError(
            f"{missing} of {split.num_images} images of {split.name} are in none of the stores {', '.join(str(s.path) for s in stores)} (first: {first}).",
            f"Extract them: kdstore extract --teacher {teacher} --data {data}{option} --out STORE, and give --features STORE too.",
        )

    def take(numbers_U: npt.NDArray[Any]) -> torch.Tensor:
        place_U2 = place_N2[numbers_U]
        out = np.empty((len(numbers_U), *stores[0].feature_shape(array)), np.float32)
        for s, store in enumerate(stores):
            if (mine := place_U2[:, 0] == s).any():
                out[mine] = store.features(array, place_U2[mine, 1])
        feature_UTW = torch.from_numpy(out if out.ndim == 3 else out[:, None])
        return feature_UTW if grid is None else on_grid(feature_UTW.half(), grid).float()  # the rounding that live features have

    return Images(take(np.arange(1)).shape[2], take)


def _counted(split: VqaSplit, on_progress: OnProgress) -> Iterator[int]:
    for i in range(split.num_images):
        yield i
        if (i + 1) % 100 == 0 or i + 1 == split.num_images:
            on_progress("images read", i + 1, split.num_images, split.name)

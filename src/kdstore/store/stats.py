"""Statistics of a store's float arrays: what a reader wants to know before training, and what normalisation needs.

Blocks of rows are reduced with dask and merged in row order, so that the numbers do not depend on the number of cores. Means and
variances are per channel over all rows, views and tokens that are valid and finite; nothing is normalised in the store itself.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from dask.base import compute
from dask.delayed import delayed

from kdstore.jsonfile import write_json
from kdstore.progress import OnProgress, silent
from kdstore.store.reader import Store, open_store

_BLOCK_VALUES = 1 << 23  # 64 MiB of float64 per block
_Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Moments:
    """Counts, norms, and per-channel mean [W] and summed squared deviation [W] of `vectors` finite vectors."""

    rows: int
    num_nan: int
    num_inf: int
    vectors: int
    norm_min: float
    norm_sum: float
    norm_max: float
    mean_W: _Float64
    squares_W: _Float64


def store_stats(path: str | Path, *, on_progress: OnProgress = silent) -> dict[str, Any]:
    """Compute the statistics of every float array, write them to `stats.json` and return them.

    Per array: `rows` (valid ones), `nan` and `inf` (values in valid rows), `norm` (min, mean, max of the vectors along the channels),
    `mean` and `variance` per channel. Raises what `open_store` and `Store.gather` raise.
    """
    store = open_store(path)
    names = [name for name, spec in store.arrays.items() if spec.dtype.startswith("float")]
    arrays = {}
    for i, name in enumerate(names):
        on_progress("stats", i, len(names), name)
        arrays[name] = array_stats(store, name)
    on_progress("stats", len(names), len(names), "")
    stats = {"store": store.digest, "arrays": arrays}
    write_json(store.path / "stats.json", stats)
    return stats


def array_stats(store: Store, name: str) -> dict[str, Any]:
    """Return the statistics of one float array as `store_stats` describes them."""
    spec = store.arrays[name]
    step = max(spec.chunk[0], _BLOCK_VALUES // (spec.row_bytes // np.dtype(spec.dtype).itemsize) // spec.chunk[0] * spec.chunk[0])
    reduce_block = delayed(functools.partial(_block_moments, store, name))
    blocks = [
        reduce_block(start, min(start + step, spec.shard_rows(shard)[1]), view)
        for shard in range(spec.num_shards)
        for start in range(*spec.shard_rows(shard), step)
        for view in range(spec.views)
    ]
    width = spec.shape[-1]
    nothing = Moments(0, 0, 0, 0, np.inf, 0.0, -np.inf, np.zeros(width), np.zeros(width))
    total = functools.reduce(_merged, compute(*blocks, scheduler="threads"), nothing)
    if not total.vectors:
        return {"rows": total.rows, "nan": total.num_nan, "inf": total.num_inf}
    return {
        "rows": total.rows,
        "nan": total.num_nan,
        "inf": total.num_inf,
        "norm": {"min": total.norm_min, "mean": total.norm_sum / total.vectors, "max": total.norm_max},
        "mean": total.mean_W.tolist(),
        "variance": (total.squares_W / total.vectors).tolist(),
    }


def _block_moments(store: Store, name: str, start: int, stop: int, view: int) -> Moments:
    spec = store.arrays[name]
    valid = store.image_valid if spec.side == "image" else store.text_valid
    rows = np.arange(start, stop)[valid[start:stop]]
    values = store.gather(name, rows, view if spec.has_views else None).astype(np.float64)
    vectors = values.reshape(-1, spec.shape[-1])
    finite = vectors[np.isfinite(vectors).all(axis=1)]
    num_nan, num_inf = int(np.isnan(values).sum()), int(np.isinf(values).sum())
    if not len(finite):
        return Moments(len(rows), num_nan, num_inf, 0, np.inf, 0.0, -np.inf, np.zeros(spec.shape[-1]), np.zeros(spec.shape[-1]))
    norms, mean = np.linalg.norm(finite, axis=1), finite.mean(axis=0)
    squares = np.square(finite - mean).sum(axis=0)
    return Moments(len(rows), num_nan, num_inf, len(finite), float(norms.min()), float(norms.sum()), float(norms.max()), mean, squares)


def _merged(a: Moments, b: Moments) -> Moments:
    """Merge two reductions (Chan, Golub and LeVeque 1983, equation 2.1)."""
    vectors = a.vectors + b.vectors
    share = b.vectors / max(vectors, 1)
    between = b.mean_W - a.mean_W
    return Moments(
        a.rows + b.rows,
        a.num_nan + b.num_nan,
        a.num_inf + b.num_inf,
        vectors,
        min(a.norm_min, b.norm_min),
        a.norm_sum + b.norm_sum,
        max(a.norm_max, b.norm_max),
        a.mean_W + between * share,
        a.squares_W + b.squares_W + np.square(between) * a.vectors * share,
    )

"""Statistics of a store's float arrays: what a reader wants to know before training, and what normalisation needs.

They are taken over the vectors along the channels of all rows, views and tokens that are valid and finite, padding of texts left
out; nothing is normalised in the store itself. The covariance is not kept: at 1,664 channels it takes 22 MB, and its spectrum is
what tells how many dimensions the features use. Whoever fits a projection takes it from `covariance`, in one pass over the sample.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kdstore.errors import DamagedStore, MissingFeature
from kdstore.jsonfile import read_json, write_json
from kdstore.progress import OnProgress, silent
from kdstore.store.blocks import gather_views, in_blocks
from kdstore.store.reader import Store, open_store

MAX_SAMPLES = 1 << 18  # an eigenvalue is then known to some 0.3 % (its relative deviation is sqrt(2 / samples)), in a fraction of the time of a million
SAMPLE_ROWS = 1024  # some 260,000 tokens of a vision transformer
_BATCH = 1024  # sampled vectors per product: large enough for BLAS, 14 MB at 1,664 channels
_Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Moments:
    """Counts, norms, and per-channel mean [W] and summed squared deviation [W] of `vectors` finite vectors; a sample of these [S, W]."""

    rows: int
    num_nan: int
    num_inf: int
    num_limit: int
    vectors: int
    norm_min: float
    norm_sum: float
    norm_max: float
    mean_W: _Float64
    squares_W: _Float64
    sample_SW: npt.NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Covariance:
    """Covariance [W, W] float64 of `samples` vectors (divided by their number), and their mean [W]."""

    samples: int
    mean_W: _Float64
    covariance_WW: _Float64


def store_stats(path: str | Path, *, max_samples: int = MAX_SAMPLES, on_progress: OnProgress = silent) -> dict[str, Any]:
    """Compute the statistics of every array of floats, or of codes that stand for features, write them to `stats.json` and return them.

    Per array: `rows` (valid ones), `vectors` (finite ones in them), values in valid rows that are `nan`, `inf` or `at_limit` (the largest
    finite ones of the dtype, which a clipped overflow leaves; of codes the `codec` is named instead, and all else is of the decoded
    features), `norm` (min, mean, max), `mean` and `variance` per channel, and for embeddings and tokens `samples` and `spectrum`, the
    eigenvalues of the covariance of at most `max_samples` vectors, largest first.
    Raises what `open_store` and `Store.gather` raise, and CannotWrite.
    """
    store = open_store(path)
    names = [name for name, spec in store.arrays.items() if spec.dtype.startswith("float") or name in store.codecs]
    stats = {"store": store.digest, "arrays": {name: array_stats(store, name, max_samples=max_samples, on_progress=on_progress) for name in names}}
    write_json(store.path / "stats.json", stats)
    return stats


def array_stats(store: Store, name: str, *, max_samples: int = MAX_SAMPLES, on_progress: OnProgress = silent) -> dict[str, Any]:
    """Return the statistics of one float array as `store_stats` describes them."""
    spec = store.arrays[name]
    shape = store.feature_shape(name)
    width = shape[-1]
    stride = _stride(store, name, max_samples if name.endswith(("/embedding", "/tokens")) else 0)
    total = Moments(0, 0, 0, 0, 0, np.inf, 0.0, -np.inf, np.zeros(width), np.zeros(width), np.empty((0, width)))
    products = _Products(width)
    done = 0
    for block in in_blocks(functools.partial(_block_moments, store, name, stride), spec, 0, spec.shape[0], shape):
        total = _merged(total, block)
        products.add(block.sample_SW)
        done += block.rows
        on_progress(f"stats of {name}", done, spec.shape[0], "")
    on_progress(f"stats of {name}", spec.shape[0], spec.shape[0], "")
    counts: dict[str, Any] = {"rows": total.rows, "vectors": total.vectors, "nan": total.num_nan, "inf": total.num_inf}
    counts |= {"codec": str(store.codecs[name].chain)} if name in store.codecs else {"at_limit": total.num_limit}
    if not total.vectors:
        return counts
    found: dict[str, Any] = counts | {
        "norm": {"min": total.norm_min, "mean": total.norm_sum / total.vectors, "max": total.norm_max},
        "mean": total.mean_W.tolist(),
        "variance": (total.squares_W / total.vectors).tolist(),
    }
    if stride:
        sampled = products.covariance()
        found |= {"samples": sampled.samples, "spectrum": np.linalg.eigvalsh(sampled.covariance_WW)[::-1].tolist() if sampled.samples else []}
    return found


def covariance(store: Store, name: str, *, max_samples: int = MAX_SAMPLES) -> Covariance:
    """Return the covariance of at most `max_samples` vectors of a float array, the same ones that `array_stats` takes its spectrum from."""
    spec = store.arrays[name]
    shape = store.feature_shape(name)
    products = _Products(shape[-1])
    for block in in_blocks(functools.partial(_block_moments, store, name, _stride(store, name, max_samples)), spec, 0, spec.shape[0], shape):
        products.add(block.sample_SW)
    return products.covariance()


def sampled_covariance(store: Store, name: str, *, max_rows: int = SAMPLE_ROWS) -> Covariance:
    """Return the covariance of the vectors of some valid rows, evenly spread over an array, in seconds for a store of any size."""
    valid = store.image_valid if store.arrays[name].side == "image" else store.text_valid
    rows = np.flatnonzero(valid & store.holds(name))
    rows = rows[:: -(-len(rows) // max_rows) or 1]
    products = _Products(store.feature_shape(name)[-1])
    for start in range(0, len(rows), 16):
        products.add(store.features(name, rows[start : start + 16]).reshape(-1, store.feature_shape(name)[-1]).astype(np.float64))
    return products.covariance()


def read_stats(store: Store, name: str) -> dict[str, Any]:
    """Return what `stats.json` says of an array, beside the store that holds it; raises MissingFeature with the command that writes it."""
    holder, _ = store.located(name, [])
    path, hint = holder.path / "stats.json", f"Measure them once: kdstore store stats {holder.path}"
    stats = read_json(path, DamagedStore) if path.is_file() else {}
    if stats.get("store") != holder.digest:
        raise MissingFeature(f"{holder.path} has no statistics of its own, which this loss needs.", hint)
    found = stats["arrays"].get(name, {})
    if "mean" not in found:
        raise MissingFeature(f"{path} has no mean of {name}: it has no valid row.", hint)
    return dict(found)


class _Products:
    """Sums of outer products of vectors about the mean of the first ones, taken in batches of a fixed size."""

    def __init__(self, width: int) -> None:
        self._batch_SW = np.empty((_BATCH, width))
        self._filled = self._samples = 0
        self._origin_W = np.zeros(width)
        self._sum_W = np.zeros(width)
        self._products_WW = np.zeros((width, width))

    def add(self, sample_SW: npt.NDArray[np.floating[Any]]) -> None:
        while len(sample_SW):
            taken = min(len(sample_SW), _BATCH - self._filled)
            self._batch_SW[self._filled : self._filled + taken] = sample_SW[:taken]
            self._filled += taken
            sample_SW = sample_SW[taken:]
            if self._filled == _BATCH:
                self._flush()

    def covariance(self) -> Covariance:
        if self._filled:
            self._flush()
        samples = max(self._samples, 1)
        mean_W = self._sum_W / samples
        return Covariance(self._samples, self._origin_W + mean_W, self._products_WW / samples - np.outer(mean_W, mean_W))

    def _flush(self) -> None:
        batch_SW = self._batch_SW[: self._filled]
        if not self._samples:
            self._origin_W = batch_SW.mean(axis=0)  # differences of large sums would lose the digits of a small variance
        batch_SW -= self._origin_W
        self._sum_W += batch_SW.sum(axis=0)
        self._products_WW += batch_SW.T @ batch_SW
        self._samples += self._filled
        self._filled = 0


def _stride(store: Store, name: str, max_samples: int) -> int:
    """Return k so that every k-th vector makes a sample of at most `max_samples`, 0 for none; no factor of the vectors per row, so that all tokens are met."""
    rows, per_row = store.arrays[name].shape[0], _vectors_per_row(store, name)
    if not max_samples or not rows:
        return 0
    stride = -(-rows * per_row // max_samples)
    while math.gcd(stride, per_row) > 1:
        stride += 1
    return stride


def _vectors_per_row(store: Store, name: str) -> int:
    return store.arrays[name].views * math.prod(store.feature_shape(name)[:-1])


def _block_moments(store: Store, name: str, stride: int, start: int, stop: int) -> Moments:
    spec, width = store.arrays[name], store.feature_shape(name)[-1]
    limit = np.finfo(spec.dtype if spec.dtype.startswith("float") else np.float32).max
    valid = (store.image_valid if spec.side == "image" else store.text_valid)[start:stop]
    stored = gather_views(store, name, np.arange(start, stop), decoded=True).reshape(-1, width)
    held = _held(store, name, start, stop, valid)
    place = np.flatnonzero(held)
    values = stored[place].astype(np.float64)
    num_nan, num_inf = int(np.isnan(values).sum()), int(np.isinf(values).sum())
    num_limit = int((np.abs(values) >= float(limit)).sum()) - num_inf
    if num_nan or num_inf:
        finite = np.isfinite(values).all(axis=1)
        values, place = values[finite], place[finite]
    sampled = place[(place + start * _vectors_per_row(store, name)) % stride == 0] if stride else place[:0]
    counts = (int(valid.sum()), num_nan, num_inf, num_limit, len(values))
    if not len(values):
        return Moments(*counts, np.inf, 0.0, -np.inf, np.zeros(width), np.zeros(width), stored[sampled])
    norms, mean_W = np.sqrt(np.einsum("nw,nw->n", values, values)), values.mean(axis=0)
    values -= mean_W
    squares_W = np.einsum("nw,nw->w", values, values)
    return Moments(*counts, float(norms.min()), float(norms.sum()), float(norms.max()), mean_W, squares_W, stored[sampled])


def _held(store: Store, name: str, start: int, stop: int, valid: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Which vectors of rows `start:stop`, in their order, belong to valid rows and are not padding of a text."""
    per_row = _vectors_per_row(store, name)
    held = np.repeat(valid, per_row)
    if name == "text/tokens" and "text/length" in store.arrays:
        lengths = store.gather("text/length", np.arange(start, stop))
        held &= (np.arange(per_row) < lengths[:, None]).reshape(-1)
    return held


def _merged(a: Moments, b: Moments) -> Moments:
    """Merge two reductions (Chan, Golub and LeVeque 1983, equation 2.1), without their samples."""
    vectors = a.vectors + b.vectors
    share = b.vectors / max(vectors, 1)
    between = b.mean_W - a.mean_W
    return Moments(
        a.rows + b.rows,
        a.num_nan + b.num_nan,
        a.num_inf + b.num_inf,
        a.num_limit + b.num_limit,
        vectors,
        min(a.norm_min, b.norm_min),
        a.norm_sum + b.norm_sum,
        max(a.norm_max, b.norm_max),
        a.mean_W + between * share,
        a.squares_W + b.squares_W + np.square(between) * a.vectors * share,
        a.sample_SW,
    )

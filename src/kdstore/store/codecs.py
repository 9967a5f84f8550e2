"""Value codecs: what the numbers of an array mean where they are not the teacher's own.

A chain such as `pool7+pca256+int8` reduces a row step by step and ends in a type that the store holds. What a step learns from a sample is a
few float32 arrays, so docs/format.md is all that a stranger needs to decode: Zarr sees plain int8, uint8 or floats, and faiss is asked only to
fit. Every code depends on its own vector alone: products are taken in float64 over blocks of one size, because BLAS picks
other kernels, and so other last bits, for other sizes.

Suffixes: S vectors of a sample, B vectors or rows, W width, K components, M codes per vector, D = W / M, G cells per side of a grid.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from kdstore.errors import ConfigError, UnknownName

Shape = tuple[int, ...]
Float32 = npt.NDArray[np.float32]
Parameters = Mapping[str, Float32]

CENTROIDS = 256  # per code of one byte
BLOCK = 256  # vectors of one product
INT8_MAX = 127  # -128 is left unused, so that the codes are symmetric
_CLIPS = 0.85 ** np.arange(12)  # tried limits of int8, as shares of the largest deviation
_DECODED_VALUES = 1 << 16  # a block of them stays in a core's cache between two passes
_FITTED_CHANNELS = 64  # at once, for int8: what is tried takes several times their memory
_PART = re.compile(r"([a-z]+)([1-9][0-9]{0,5})")


@dataclass(frozen=True)
class ValueCodec:
    """One kind of step: steps of a chain ascend in `rank`, and only the last has a `dtype`. Its functions take the number in its name first.

    `shape` gives the shape of a row after it (raises ConfigError for rows that it cannot take), `parameters` the shapes of what `fit` returns from
    vectors [S, W], of which it needs `least`; `encode` takes float32 [B, W] (pool: [B, T, W]), `decode` writes float32 [B, W].
    """

    rank: int
    numbered: bool
    dtype: str | None
    shape: Callable[[int, Shape], Shape]
    parameters: Callable[[int, Shape], dict[str, Shape]]
    least: Callable[[int], int]
    fit: Callable[[int, Float32], dict[str, Float32]]
    encode: Callable[[int, Parameters, Float32], npt.NDArray[Any]]
    decode: Callable[[int, Parameters, npt.NDArray[Any], Float32], None]


@dataclass(frozen=True)
class Step:
    """One step of a chain: its kind and the number in its name (0 if it has none)."""

    kind: str
    number: int

    @property
    def codec(self) -> ValueCodec:
        return CODECS[self.kind]

    def __str__(self) -> str:
        return f"{self.kind}{self.number or ''}"


@dataclass(frozen=True)
class Chain:
    """Steps whose last one names the stored type; `str` gives the name that `parse_chain` reads."""

    steps: tuple[Step, ...]

    def __str__(self) -> str:
        return "+".join(map(str, self.steps))

    @property
    def plain(self) -> bool:
        """Whether it only casts: then the array holds the teacher's values and needs no codec."""
        return len(self.steps) == 1 and self.steps[0].kind in ("float16", "float32")

    @property
    def dtype(self) -> str:
        return str(self.steps[-1].codec.dtype)

    def shapes(self, row_shape: Shape) -> list[Shape]:
        """Return the shapes of a row before each step and at the end; raises ConfigError."""
        shapes = [row_shape]
        for step in self.steps:
            try:
                shapes.append(step.codec.shape(step.number, shapes[-1]))
            except ConfigError as e:
                raise ConfigError(f"{self} does not fit rows of shape {list(row_shape)}: {e.message}", e.hint) from e
        return shapes

    def feature_shape(self, row_shape: Shape) -> Shape:
        """Return the shape of a decoded row: pooling is not undone, all else is."""
        return self.shapes(row_shape)[1 if self.steps[0].kind == "pool" else 0]

    def parameters(self, row_shape: Shape) -> dict[str, Shape]:
        """Return the shapes of all parameters by name, such as `pca-mean`."""
        named = [(step, step.codec.parameters(step.number, shape)) for step, shape in zip(self.steps, self.shapes(row_shape), strict=False)]
        return {f"{step.kind}-{name}": shape for step, shapes in named for name, shape in shapes.items()}

    def without_pool(self) -> Chain:
        """Return the chain for tokens that lie in no grid."""
        return Chain(tuple(step for step in self.steps if step.kind != "pool"))

    def pooled(self, rows: Float32) -> Float32:
        """Return the features [B, ...] that the chain stands for: rows after its pooling, if it has one."""
        first = self.steps[0]
        return first.codec.encode(first.number, {}, rows) if first.kind == "pool" else rows


@dataclass(frozen=True, eq=False)
class Codec:
    """A fitted chain for rows of one shape; `record` says what it was fitted on and how far it is off."""

    chain: Chain
    row_shape: Shape
    parameters: Parameters
    record: dict[str, Any]

    @cached_property
    def feature_shape(self) -> Shape:
        return self.chain.feature_shape(self.row_shape)

    @cached_property
    def _steps(self) -> list[tuple[Step, Parameters, Shape]]:
        """The steps on vectors, what they learned, and the shape of a row before each."""
        shapes = self.chain.shapes(self.row_shape)
        return [(step, _of_step(self.parameters, step), shape) for step, shape in zip(self.chain.steps, shapes, strict=False) if step.kind != "pool"]

    def encode(self, rows: Float32) -> npt.NDArray[Any]:
        """Encode finite rows float32 [B, *row_shape]; returns codes [B, ...], where floats beyond the stored type are infinite."""
        features = self.chain.pooled(rows)
        codes = self.encode_vectors(features.reshape(-1, features.shape[-1]))
        return codes.reshape(len(rows), *self.chain.shapes(self.row_shape)[-1])

    def encode_vectors(self, x_BW: Float32) -> npt.NDArray[Any]:
        """Encode finite vectors float32 [B, W], pooled already."""
        codes: npt.NDArray[Any] = x_BW
        for step, parameters, _ in self._steps:
            codes = step.codec.encode(step.number, parameters, codes)
        return codes

    def decode(self, codes: npt.NDArray[Any], out: Float32 | None = None) -> Float32:
        """Decode codes [..., C] to float32 of the features' width, into `out` (C-contiguous) if given."""
        width = self.feature_shape[-1]
        out = np.empty((*codes.shape[:-1], width), np.float32) if out is None else out
        values: npt.NDArray[Any] = codes.reshape(-1, codes.shape[-1])
        for number, (step, parameters, shape) in reversed(list(enumerate(self._steps))):
            target = np.empty((len(values), shape[-1]), np.float32) if number else out.reshape(-1, width)
            step.codec.decode(step.number, parameters, values, target)
            values = target
        return out


def parse_chain(text: str, dtype: str = "float16") -> Chain:
    """Read a chain such as `pca256+int8`, which ends in `dtype` if it names no type; raises UnknownName, ConfigError."""
    steps = tuple(_step(part.strip(), text) for part in text.split("+"))
    if steps[-1].codec.dtype is None:
        steps += (Step(dtype, 0),)
    ranks = [step.codec.rank for step in steps]
    if any(a >= b for a, b in itertools.pairwise(ranks)):
        raise ConfigError(f"'{text}' is no chain of codecs.", "The order is pool, pca, then one of float16, float32, int8, pq; each may be left out.")
    return Chain(steps)


def fit_chain(chain: Chain, row_shape: Shape, sample_SW: Float32) -> Codec:
    """Fit all steps on vectors float32 [S, W], pooled already; raises ConfigError if they are too few. The record is left empty."""
    parameters: dict[str, Float32] = {}
    for step in chain.steps:
        if step.kind == "pool":
            continue
        least = step.codec.least(step.number)
        if len(sample_SW) < least:
            raise ConfigError(f"{step} needs {least} vectors to be fitted, the sample holds {len(sample_SW)}.", "Take more data or another codec.")
        learned = step.codec.fit(step.number, sample_SW)
        parameters |= {f"{step.kind}-{name}": value for name, value in learned.items()}
        if step.codec.dtype is None:
            sample_SW = step.codec.encode(step.number, learned, sample_SW)
    return Codec(chain, row_shape, parameters, {})


def _step(part: str, text: str) -> Step:
    if part in CODECS and not CODECS[part].numbered:
        return Step(part, 0)
    match = _PART.fullmatch(part)
    if match is None or match[1] not in CODECS or not CODECS[match[1]].numbered:
        raise UnknownName.of("codec", part, list(CODECS), f"In '{text}'; examples: int8, pool7, pca256+int8, pool7+pq64.")
    return Step(match[1], int(match[2]))


def _of_step(parameters: Parameters, step: Step) -> Parameters:
    prefix = f"{step.kind}-"
    return {name.removeprefix(prefix): value for name, value in parameters.items() if name.startswith(prefix)}


def _same(number: int, shape: Shape) -> Shape:
    return shape


def _nothing(*arguments: Any) -> dict[str, Any]:
    return {}


def _none_needed(number: int) -> int:
    return 0


def _blocks(x_BW: Float32) -> Iterator[tuple[slice, npt.NDArray[np.float64]]]:
    """Yield vectors in blocks of one size as float64, the last filled with zeros, and where they belong."""
    block = np.zeros((BLOCK, x_BW.shape[1]))
    for start in range(0, len(x_BW), BLOCK):
        part = slice(start, min(start + BLOCK, len(x_BW)))
        block[: part.stop - start] = x_BW[part]
        yield part, block


def _cast_encode(dtype: str) -> Callable[[int, Parameters, Float32], npt.NDArray[Any]]:
    def encode(number: int, parameters: Parameters, x_BW: Float32) -> npt.NDArray[Any]:
        with np.errstate(over="ignore"):
            return x_BW.astype(dtype)

    return encode


def _cast_decode(number: int, parameters: Parameters, codes_BW: npt.NDArray[Any], out_BW: Float32) -> None:
    out_BW[...] = codes_BW


def _int8_parameters(number: int, shape: Shape) -> dict[str, Shape]:
    return {"mean": shape[-1:], "scale": shape[-1:]}


def _int8_fit(number: int, x_SW: Float32) -> dict[str, Float32]:
    """Choose mean and step per channel, the step by the least squared error among some limits beyond which values are clipped.

    A channel of massive values has a step of its own, and a few massive values in a channel are clipped only where that serves the rest.
    A channel that is constant in the sample takes the median step of its neighbours, so that it can still move.
    """
    if x_SW.shape[1] > _FITTED_CHANNELS:
        parts = [_int8_fit(number, x_SW[:, start : start + _FITTED_CHANNELS]) for start in range(0, x_SW.shape[1], _FITTED_CHANNELS)]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    mean_W = x_SW.mean(0, dtype=np.float64).astype(np.float32)
    deviation_SW = np.abs(x_SW - mean_W)
    limit_W = deviation_SW.max(0)
    scale_W = np.where(limit_W > 0, limit_W / INT8_MAX, np.inf)  # an infinite step: the errors below are 0
    best_W = np.full(len(mean_W), np.inf)
    chosen_W = scale_W
    for clip in _CLIPS:
        tried_W = (clip * scale_W).astype(np.float32)
        codes_SW = np.minimum(np.rint(deviation_SW / tried_W), INT8_MAX)
        error_W = np.square(np.where(np.isinf(tried_W), 0, tried_W) * codes_SW - deviation_SW).sum(0, dtype=np.float64)
        chosen_W = np.where(error_W < best_W, tried_W, chosen_W)
        best_W = np.minimum(best_W, error_W)
    usable = np.isfinite(chosen_W) & (chosen_W >= np.finfo(np.float32).tiny)
    typical = np.median(chosen_W[usable]) if usable.any() else 1.0
    return {"mean": mean_W, "scale": np.where(usable, chosen_W, typical).astype(np.float32)}


def _int8_encode(number: int, parameters: Parameters, x_BW: Float32) -> npt.NDArray[Any]:
    codes_BW = (x_BW - parameters["mean"]) / parameters["scale"]
    return np.clip(np.rint(codes_BW, out=codes_BW), -INT8_MAX, INT8_MAX, out=codes_BW).astype(np.int8)


def _int8_decode(number: int, parameters: Parameters, codes_BW: npt.NDArray[Any], out_BW: Float32) -> None:
    step = max(1, _DECODED_VALUES // out_BW.shape[1])
    for start in range(0, len(out_BW), step):
        part = out_BW[start : start + step]
        np.multiply(codes_BW[start : start + step], parameters["scale"], out=part)
        part += parameters["mean"]


def _pool_shape(number: int, shape: Shape) -> Shape:
    side = math.isqrt(shape[0]) if len(shape) == 2 else 0
    if side == 0 or side * side != shape[0] or number > side:
        raise ConfigError(f"pool{number} needs the tokens of an image in a square grid of {number} x {number} or more.", "Leave pool out for these.")
    return number * number, shape[1]


def _pool_encode(number: int, parameters: Parameters, x_BTW: Float32) -> Float32:
    """Average a square grid adaptively: cell g of G covers places `floor(g S / G)` to `ceil((g + 1) S / G)` of S."""
    batch, tokens, width = x_BTW.shape
    side = math.isqrt(tokens)
    bounds = [(g * side // number, -(-(g + 1) * side // number)) for g in range(number)]
    grid = x_BTW.reshape(batch, side, side, width)
    rows = np.stack([grid[:, a:b].sum(1, dtype=np.float64) / (b - a) for a, b in bounds], 1)
    cells = np.stack([rows[:, :, a:b].sum(2) / (b - a) for a, b in bounds], 2)
    return cells.astype(np.float32).reshape(batch, number * number, width)


def _pca_shape(number: int, shape: Shape) -> Shape:
    if number > shape[-1]:
        raise ConfigError(f"pca{number} keeps more components than the {shape[-1]} channels there are.", f"Take pca{shape[-1]} or fewer.")
    return *shape[:-1], number


def _pca_parameters(number: int, shape: Shape) -> dict[str, Shape]:
    return {"mean": shape[-1:], "basis": (number, shape[-1])}


def _pca_fit(number: int, x_SW: Float32) -> dict[str, Float32]:
    """Find the directions of most variance, largest first; of each, the component of largest size is positive."""
    mean_W = x_SW.mean(0, dtype=np.float64)
    covariance_WW = np.zeros((x_SW.shape[1], x_SW.shape[1]))
    for start in range(0, len(x_SW), 4096):
        centred = x_SW[start : start + 4096] - mean_W
        covariance_WW += centred.T @ centred
    basis_KW = np.linalg.eigh(covariance_WW)[1].T[::-1][:number]
    signs = np.sign(np.take_along_axis(basis_KW, np.abs(basis_KW).argmax(1)[:, None], 1))
    return {"mean": mean_W.astype(np.float32), "basis": np.ascontiguousarray(basis_KW * signs, np.float32)}


def _pca_encode(number: int, parameters: Parameters, x_BW: Float32) -> Float32:
    mean_W, basis_WK = parameters["mean"].astype(np.float64), parameters["basis"].T.astype(np.float64)
    out_BK = np.empty((len(x_BW), number), np.float32)
    for part, block in _blocks(x_BW):
        out_BK[part] = ((block - mean_W) @ basis_WK)[: part.stop - part.start]
    return out_BK


def _pca_decode(number: int, parameters: Parameters, codes_BK: npt.NDArray[Any], out_BW: Float32) -> None:
    np.matmul(codes_BK.astype(np.float32, copy=False), parameters["basis"], out=out_BW)
    out_BW += parameters["mean"]


def _pq_shape(number: int, shape: Shape) -> Shape:
    if number > shape[-1] or shape[-1] % number:
        near = max(n for n in range(1, min(number, shape[-1]) + 1) if shape[-1] % n == 0)
        raise ConfigError(f"pq{number} cannot divide {shape[-1]} channels into {number} parts of one width.", f"Take pq{near}, or pca before it.")
    return *shape[:-1], number


def _pq_parameters(number: int, shape: Shape) -> dict[str, Shape]:
    return {"codebooks": (number, CENTROIDS, shape[-1] // number)}


def _pq_fit(number: int, x_SW: Float32) -> dict[str, Float32]:
    import faiss  # here alone: reading needs none of it

    quantiser = faiss.ProductQuantizer(x_SW.shape[1], number, 8)
    quantiser.cp.min_points_per_centroid = 1  # silences a warning; how good the codes are is measured
    quantiser.train(np.ascontiguousarray(x_SW))
    return {"codebooks": faiss.vector_to_array(quantiser.centroids).reshape(number, CENTROIDS, -1).astype(np.float32)}


def _pq_encode(number: int, parameters: Parameters, x_BW: Float32) -> npt.NDArray[Any]:
    """Take the nearest centroid of each part; of equally near ones the first."""
    codebooks_MCD = parameters["codebooks"].astype(np.float64)
    half_norm_M1C = 0.5 * np.square(codebooks_MCD).sum(2)[:, None]
    codes_BM = np.empty((len(x_BW), number), np.uint8)
    for part, block in _blocks(x_BW):
        parts_MBD = block.reshape(BLOCK, number, -1).transpose(1, 0, 2)
        distance_MBC = half_norm_M1C - parts_MBD @ codebooks_MCD.transpose(0, 2, 1)
        codes_BM[part] = distance_MBC.argmin(2).T[: part.stop - part.start]
    return codes_BM


def _pq_decode(number: int, parameters: Parameters, codes_BM: npt.NDArray[Any], out_BW: Float32) -> None:
    codebooks_MCD = parameters["codebooks"]
    rows_BM = codes_BM + np.arange(number, dtype=np.int64) * CENTROIDS
    codebooks_MCD.reshape(number * CENTROIDS, -1).take(rows_BM, 0, out=out_BW.reshape(len(out_BW), number, -1), mode="clip")


CODECS: dict[str, ValueCodec] = {
    "pool": ValueCodec(0, True, None, _pool_shape, _nothing, _none_needed, _nothing, _pool_encode, _cast_decode),
    "pca": ValueCodec(1, True, None, _pca_shape, _pca_parameters, lambda number: number + 1, _pca_fit, _pca_encode, _pca_decode),
    "float16": ValueCodec(2, False, "float16", _same, _nothing, _none_needed, _nothing, _cast_encode("float16"), _cast_decode),
    "float32": ValueCodec(2, False, "float32", _same, _nothing, _none_needed, _nothing, _cast_encode("float32"), _cast_decode),
    "int8": ValueCodec(2, False, "int8", _same, _int8_parameters, lambda number: 2, _int8_fit, _int8_encode, _int8_decode),
    "pq": ValueCodec(2, True, "uint8", _pq_shape, _pq_parameters, lambda number: CENTROIDS, _pq_fit, _pq_encode, _pq_decode),
}

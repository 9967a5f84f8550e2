"""Fitting value codecs before the first unit is written, and measuring on rows held out what they lose.

The sample is drawn from the plan with a fixed seed, so it does not depend on which units are left. What was fitted lies in the build folder: a
resumed run takes it from there and writes the codes that an uninterrupted one would.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from kdstore.errors import ConfigError, ModelError
from kdstore.extract.config import ExtractConfig
from kdstore.models.encode import encode_image, encode_image_tokens, encode_text, encode_text_and_tokens
from kdstore.models.load import Model
from kdstore.models.memory import Fitting
from kdstore.progress import OnProgress
from kdstore.store import Chain, Codec, Plan, Store, fit_chain, kept_codec, open_store, parse_chain
from kdstore.store.layout import BUILD, MANIFEST

SEED = 0
VECTORS = 32_768  # of one array: 39 per centroid are 9,984, 20 per channel of the widest towers
HELD_OUT = 4  # every fourth place of the sample
_PAIRED = 1024  # images and texts whose logits are compared
Float32 = npt.NDArray[np.float32]
Batch = tuple[npt.NDArray[np.int64], dict[str, Float32], npt.NDArray[np.int64] | None]
"""Places of rows in the sample, of texts among the distinct ones [B], their features by array [B, ...], and the lengths of texts [B]."""


@dataclass
class _Sample:
    """Vectors of one array: those to fit on and those held out."""

    chain: Chain
    per_row: int
    fitted: list[Float32] = field(default_factory=list)
    held: list[Float32] = field(default_factory=list)
    pooled_cosines: list[npt.NDArray[np.float64]] = field(default_factory=list)

    def add(self, places: npt.NDArray[np.int64], rows: Float32, lengths: npt.NDArray[np.int64] | None) -> None:
        """Take at most `per_row` vectors of each row, a choice that depends on its place alone."""
        features = self.chain.pooled(rows).reshape(len(rows), -1, rows.shape[-1])
        for i, place in enumerate(places.tolist()):
            count = features.shape[1] if lengths is None or features.shape[1] == 1 else int(lengths[i])
            chosen = np.random.default_rng([SEED, place]).permutation(count)[: self.per_row]
            held = place % HELD_OUT == HELD_OUT - 1
            (self.held if held else self.fitted).append(features[i, chosen])
            if held and self.chain.steps[0].kind == "pool":
                self.pooled_cosines.append(_pooled_cosine(rows[i], features[i]))


def chains_of(config: ExtractConfig) -> dict[str, Chain]:
    """Return the codec of every array of features that a run writes; texts lie in no grid, so they are not pooled."""
    chains = {f"{side}/embedding": parse_chain(config.encode or config.dtype, config.dtype) for side in config.embedded_sides}
    tokens = parse_chain(config.reduce or config.dtype, config.dtype)
    if config.tokens in ("image", "both"):
        chains["image/tokens"] = tokens
    if config.tokens in ("text", "both"):
        chains["text/tokens"] = tokens.without_pool()
    return chains


def kept_codecs(out: Path, chains: dict[str, Chain], shapes: dict[str, tuple[int, ...]]) -> dict[str, Codec] | None:
    """Return the codecs that `out` already has, complete or in its build folder, or None unless it has all of them."""
    store = open_store(out) if (out / MANIFEST).is_file() else None
    found = {}
    for name, chain in chains.items():
        if chain.plain:
            continue
        codec = kept_codec(out / BUILD, name, chain, shapes[name]) if store is None else _stored(store, name)
        if codec is None:
            return None
        found[name] = codec
    return found


def sampled(
    config: ExtractConfig, plan: Plan, model: Model, fitting: Fitting, decode: Callable[[int], torch.Tensor | None], on_progress: OnProgress
) -> Iterator[Batch]:
    """Run the teacher over a sample of images and texts, as many of each as `codec_sample` or as there are; undecodable images are left out.

    Where `decode` gives several views, tokens are taken of the first and embeddings of the last.
    """
    images = plan.num_images if config.reads_images else 0
    image_rows, text_rows = (np.sort(np.random.default_rng(SEED).choice(n, min(n, config.codec_sample), replace=False)) for n in (images, plan.num_texts))
    total = len(image_rows) + len(text_rows)
    with ThreadPoolExecutor(config.decoders) as pool:
        for start in range(0, len(image_rows), config.batch):
            pixels = list(pool.map(decode, image_rows[start : start + config.batch].tolist()))
            if any(image is not None for image in pixels):
                batch = torch.stack([image for image in pixels if image is not None])
                features, views = image_features(config, model, fitting, batch), batch.shape[1] if batch.ndim == 5 else 1
                features["image/embedding"] = features["image/embedding"][views - 1 :: views]
                yield start + np.flatnonzero([image is not None for image in pixels]), features, None
            on_progress("fit codecs", start + len(pixels), total, "images")
    distinct: dict[str, int] = {}  # equal captions have one place, so that none is both fitted on and held out
    for start in range(0, len(text_rows), config.batch):
        texts = plan.captions.take(text_rows[start : start + config.batch]).to_pylist()
        found = text_features(config, model, fitting, texts)
        yield np.array([distinct.setdefault(text, len(distinct)) for text in texts]), found, found.pop("text/length", None)
        on_progress("fit codecs", len(image_rows) + start + len(texts), total, "texts")


def image_features(config: ExtractConfig, model: Model, fitting: Fitting, pixels: torch.Tensor) -> dict[str, Float32]:
    """Return the arrays of features that a run writes of preprocessed images [B, C, H, W], float32.

    Of several views [B, V, C, H, W] the embeddings are [B * V, D], and the tokens are those of the first.
    """
    image_BVCHW = pixels if pixels.ndim == 5 else pixels[:, None]
    tokens = config.tokens in ("image", "both")
    alone = image_BVCHW[:, 1:] if tokens else image_BVCHW  # whose tokens nobody asks for
    embeddings, found = [], {}
    if tokens:
        plain_BD, tokens_BTW = fitting.run("image", lambda some: encode_image_tokens(model, some, config.token_layer), image_BVCHW[:, 0])
        embeddings.append(plain_BD[:, None])
        found["image/tokens"] = tokens_BTW.cpu().numpy()
    if alone.shape[1]:
        (embedding_BD,) = fitting.run("image", lambda some: (encode_image(model, some),), alone.flatten(0, 1))
        embeddings.append(embedding_BD.unflatten(0, alone.shape[:2]))
    return found | {"image/embedding": torch.cat(embeddings, 1).flatten(0, 1).cpu().numpy()}


def text_features(config: ExtractConfig, model: Model, fitting: Fitting, texts: list[str]) -> dict[str, npt.NDArray[Any]]:
    """Return the arrays of features that a run writes of texts, float32, and with tokens their lengths int64 [B]: all from one forward pass."""
    if config.tokens not in ("text", "both"):
        return {"text/embedding": fitting.run("text", lambda some: (encode_text(model, some),), texts)[0].cpu().numpy()}
    found = fitting.run("text", lambda some: encode_text_and_tokens(model, some, config.token_layer), texts)
    features = dict(zip(("text/embedding", "text/tokens", "text/length"), (value.cpu().numpy() for value in found), strict=True))
    return {name: value for name, value in features.items() if name != "text/embedding" or "text" in config.embedded_sides}


def fit_codecs(
    chains: dict[str, Chain], shapes: dict[str, tuple[int, ...]], batches: Iterable[Batch], rows: int, logit_scale: float, *, refuse: bool = True
) -> dict[str, Codec]:
    """Fit all chains that are not plain on the batches of a sample of at most `rows` rows; each record says how far decoded features are off.

    Raises ConfigError for a sample that is too small, and ModelError for features that are not finite, which are left out if not to `refuse`.
    """
    samples = {name: _Sample(chain, max(1, VECTORS // max(1, rows))) for name, chain in chains.items() if not chain.plain}
    for places, features, lengths in batches:
        for name in features.keys() & samples.keys():
            values = features[name]
            _, kept = encoded(name, values, None, "float32", refuse=refuse)
            samples[name].add(places[kept], values[kept], None if lengths is None else lengths[kept])
    codecs = {name: _fitted(name, shapes[name], sample) for name, sample in samples.items()}
    both = [f"{side}/embedding" for side in ("image", "text")]
    if all(name in codecs for name in both):
        errors = _logit_errors(*((np.concatenate(samples[name].held)[:_PAIRED], codecs[name]) for name in both), logit_scale=logit_scale)
        for name in both:
            codecs[name].record["held_out"].update(errors)
    return codecs


def encoded(name: str, values: Float32, codec: Codec | None, dtype: str, *, refuse: bool = True) -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_]]:
    """Return features [B, ...] as they are stored, and which rows [B] can be: those without NaN, infinity and floats beyond the type.

    Raises ModelError with the counts if any row cannot, unless not to `refuse`; the codes of such a row mean nothing.
    """
    good_B = _all_finite(values)
    numbers = values
    if not good_B.all():
        numbers = values.copy()
        numbers[~good_B] = 0
    with np.errstate(over="ignore"):
        codes = numbers.astype(dtype) if codec is None else codec.encode(numbers)
    good_B &= _all_finite(codes)
    if refuse and not good_B.all():
        found = f"{int(np.isnan(values).sum())} NaN, {int(np.isinf(values).sum())} infinite values and {int((~np.isfinite(codes)).sum())} beyond {dtype}"
        raise ModelError(
            f"{name}: {len(values)} rows hold {found}.",
            "Store them with --set dtype=float32, compute them with --set precision=fp32, or leave such rows out with --set bad_values=invalid.",
        )
    return codes, good_B


def _all_finite(rows: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    finite_B: npt.NDArray[np.bool_] = np.isfinite(rows).reshape(len(rows), -1).all(axis=1)
    return finite_B


def _stored(store: Store, name: str) -> Codec | None:
    return store.codec(name) if name in store.codecs else None


def _fitted(name: str, shape: tuple[int, ...], sample: _Sample) -> Codec:
    if not sample.held or not sample.fitted:
        raise ConfigError(f"There are too few valid rows to fit {sample.chain} for {name}.", "Take more data, or no codec.")
    fitted_SW, held_SW = np.concatenate(sample.fitted), np.concatenate(sample.held)
    codec = fit_chain(sample.chain, shape, fitted_SW)
    codes = codec.encode_vectors(held_SW)
    decoded_SW = codec.decode(codes)
    measured: dict[str, Any] = {"rows": len(sample.held), "vectors": len(held_SW), "cosine": _summary(_cosines(held_SW, decoded_SW))}
    if sample.pooled_cosines:
        measured["token_to_cell_cosine"] = _summary(np.concatenate(sample.pooled_cosines))
    if "pca-basis" in codec.parameters:
        centred_SW = held_SW - codec.parameters["pca-mean"].astype(np.float64)
        kept = np.square(centred_SW @ codec.parameters["pca-basis"].T.astype(np.float64)).sum()
        measured["explained_variance"] = round(float(kept / max(np.square(centred_SW).sum(), 1e-30)), 6)
    if codes.dtype == np.int8:
        measured["at_limit"] = round(float((np.abs(codes) == 127).mean()), 6)
    fit = {"seed": SEED, "rows": len(sample.fitted), "vectors": len(fitted_SW)}
    return replace(codec, record={"fit": fit, "held_out": measured})


def _logit_errors(image: tuple[Float32, Codec], text: tuple[Float32, Codec], *, logit_scale: float) -> dict[str, float]:
    """Compare the logits of images with texts, at the teacher's scale, before and after: errors, and how often the best text or image stays the best."""
    exact, coded = (logit_scale * _unit(left) @ _unit(right).T for left, right in ((image[0], text[0]), (_decoded(*image), _decoded(*text))))
    error = np.abs(coded - exact)
    return {
        "logit_error_mean": round(float(error.mean()), 6),
        "logit_error_max": round(float(error.max()), 6),
        "top1_agreement_image_to_text": round(float((exact.argmax(1) == coded.argmax(1)).mean()), 6),
        "top1_agreement_text_to_image": round(float((exact.argmax(0) == coded.argmax(0)).mean()), 6),
    }


def _decoded(vectors: Float32, codec: Codec) -> Float32:
    return codec.decode(codec.encode_vectors(vectors))


def _unit(x_SW: Float32) -> npt.NDArray[np.float64]:
    x = x_SW.astype(np.float64)
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-30)


def _cosines(a_SW: Float32, b_SW: Float32) -> npt.NDArray[np.float64]:
    return np.einsum("sw,sw->s", _unit(a_SW), _unit(b_SW))


def _pooled_cosine(tokens_TW: Float32, cells_CW: Float32) -> npt.NDArray[np.float64]:
    """Return the cosine of every token with the cell that its place falls into."""
    side, cells = int(len(tokens_TW) ** 0.5 + 0.5), int(len(cells_CW) ** 0.5 + 0.5)
    line = np.arange(side) * cells // side
    return _cosines(tokens_TW, cells_CW[(line[:, None] * cells + line).reshape(-1)])


def _summary(cosines: npt.NDArray[np.float64]) -> dict[str, float]:
    return {"mean": round(float(cosines.mean()), 6), "p01": round(float(np.quantile(cosines, 0.01)), 6), "min": round(float(cosines.min()), 6)}

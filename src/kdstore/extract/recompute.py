"""The proof that a store holds what its teacher says: some rows are computed again from the source and compared.

Hashes show that bytes are those that were written, not that they were right. A wrong checkpoint, tokenizer or preprocessing behind a
store that looks right shows here, because nothing is taken from the store but the row numbers and what it says of its teacher.
"""

from __future__ import annotations

import functools
import hashlib
import re
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from kdstore.data.source import Source, UndecodableImage
from kdstore.data.sources import open_source
from kdstore.errors import JoinError, ModelError
from kdstore.extract.parent import index_of
from kdstore.models.encode import encode_image, encode_image_tokens, encode_text, encode_text_tokens, image_token_form, text_token_form
from kdstore.models.load import Model, load_model
from kdstore.models.towers import TokenForm
from kdstore.progress import OnProgress, silent
from kdstore.store import Store, StoredViews, open_store, stored_views

LEAST_COSINE = 0.9999
BATCH = 32
IMAGE_FEATURES = ("image/embedding", "image/tokens")  # in the order in which encode_image_tokens returns them
TEXT_FEATURES = ("text/embedding", "text/tokens")
_FILE_NAME = re.compile(r".*@[0-9a-f]{8}")  # how models.load names weights that came from a file

Float64 = npt.NDArray[np.float64]
Replay = Callable[[Image.Image, int], Image.Image]
"""From an image and its row to the picture of one of its views."""


@dataclass(frozen=True)
class Compared:
    """One array: how many rows were computed again, the least cosine and its row, and the rows below the limit."""

    rows: int
    worst: float
    worst_row: int
    failed: tuple[int, ...]


@dataclass(frozen=True)
class RecomputeReport:
    """What `recompute` found; `differs` are the parts of the identity that the teacher does not have, as (store's, teacher's).

    `skipped` are features that are stored as codes or reduced without a codec, so that a cosine with the teacher's own says nothing.
    """

    path: Path
    teacher: str
    source: str
    seed: int
    arrays: dict[str, Compared]
    skipped: tuple[str, ...]
    differs: dict[str, tuple[Any, Any]]

    @property
    def ok(self) -> bool:
        return not self.differs and not any(compared.failed for compared in self.arrays.values())


def recompute(
    path: str | Path,
    rows: int,
    *,
    seed: int | None = None,
    teacher: str | None = None,
    pretrained: str | None = None,
    data: str | None = None,
    device: str = "auto",
    on_progress: OnProgress = silent,
) -> RecomputeReport:
    """Run the teacher again on random valid images and texts, `rows` of each, and compare with what is stored, at the stored precision.

    Of an image with several views a random one is drawn again for its embedding; tokens are compared in the plain one.

    Teacher and source are those that the store names, unless given. Raises what opening a store, a source or a model raises, and JoinError if
    the source does not hold the same images and captions.
    """
    store = open_store(path)
    source = open_source(data or store.recorded_source)
    model = _open_teacher(store, teacher, pretrained, device)
    seed = secrets.randbits(32) if seed is None else seed
    rng = np.random.default_rng(seed)
    images, texts = (_some(valid, rows, rng) for valid in (store.image_valid, store.text_valid))
    stored = stored_views(store)
    views, replay = None, None
    if stored is not None:
        views = rng.integers(0, stored.count, len(images))
        replay = functools.partial(_picture, stored, dict(zip(images.tolist(), views.tolist(), strict=True)))
    features = {**_of_images(store, model, source, images, replay, on_progress), **_of_texts(store, model, source, texts, on_progress)}
    compared = {}
    for name, live in features.items():
        chosen, reduced = images if name.startswith("image/") else texts, live.shape[1:] != store.arrays[name].row_shape
        shown = views if name == "image/embedding" else None
        if name in store.codecs:
            compared[name] = _compared(_coded_cosine(store, name, live, chosen, shown), chosen)
        elif not (reduced and name.endswith("/tokens")):
            compared[name] = _compared(_least_cosine(store.gather(name, chosen, shown), live), chosen)
    skipped = tuple(name for name in (*IMAGE_FEATURES, *TEXT_FEATURES) if name in store.arrays and name not in compared)
    return RecomputeReport(store.path, model.identity["teacher"]["name"], source.spec, seed, compared, skipped, _differences(store.identity, model.identity))


def _open_teacher(store: Store, name: str | None, pretrained: str | None, device: str) -> Model:
    identity = _objects(store.identity)
    said, seed = identity.get("teacher", {}), None
    if name is None:
        if "imported" in said:
            raise ModelError(f"{store.path} was imported and does not say which weights its teacher has.", "Name it with --teacher and --pretrained.")
        name, seed = str(said.get("name", "")).removesuffix(" (untrained)"), said.get("untrained_seed")
        if not name or _FILE_NAME.fullmatch(name):
            raise ModelError(f"The teacher {name or 'of ' + str(store.path)} came from a file or folder.", "Name it with --teacher and --pretrained.")
    precision = next((encoding["precision"] for encoding in _objects(identity.get("arrays", {})).values() if "precision" in encoding), "fp32")
    return load_model(name, pretrained, device=device, precision=precision, untrained=seed is not None, seed=seed or 0)


def _objects(value: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Leave out what is no object: an identity may say anything."""
    return {name: part for name, part in value.items() if isinstance(part, dict)}


def _some(valid_N: npt.NDArray[np.bool_], count: int, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    rows = np.flatnonzero(valid_N)
    return np.sort(rng.choice(rows, min(count, len(rows)), replace=False))


def _of_images(
    store: Store, model: Model, source: Source, rows: npt.NDArray[np.int64], replay: Replay | None, on_progress: OnProgress
) -> dict[str, npt.NDArray[Any]]:
    """Encode images, for their embeddings as `replay` draws them of image and row; returns the arrays of floats that the store has too."""
    names = _features(store, IMAGE_FEATURES)
    layer = _token_layer(store, model, "image", image_token_form)
    key, sha256 = (index_of(store, "image", column) for column in ("key", "sha256"))
    places = _places(source, {row: key(row) for row in rows.tolist()})

    def encode(part: Sequence[int]) -> list[torch.Tensor]:
        images = {row: _image(source, places[row], sha256(row)) for row in part}
        found = {}
        if "image/tokens" in names:
            plain_BCHW = torch.stack([model.preprocess(image) for image in images.values()])
            found = dict(zip(IMAGE_FEATURES, encode_image_tokens(model, plain_BCHW, layer), strict=True))
        if replay is not None or not found:
            pictures = [image if replay is None else replay(image, row) for row, image in images.items()]
            found["image/embedding"] = encode_image(model, torch.stack([model.preprocess(picture) for picture in pictures]))
        return [found[name] for name in names]

    return _encoded(names, encode, rows.tolist(), "images", on_progress)


def _picture(stored: StoredViews, views: dict[int, int], image: Image.Image, row: int) -> Image.Image:
    return stored.picture(image, row, views[row])


def _of_texts(store: Store, model: Model, source: Source, rows: npt.NDArray[np.int64], on_progress: OnProgress) -> dict[str, npt.NDArray[Any]]:
    names = _features(store, TEXT_FEATURES)
    layer = _token_layer(store, model, "text", text_token_form)
    key, sha256 = index_of(store, "image", "key"), index_of(store, "text", "sha256")
    image_rows = np.searchsorted(store.offsets, rows, side="right") - 1
    places = _places(source, {row: key(row) for row in image_rows.tolist()})
    captions = {}
    for row, image_row in zip(rows.tolist(), image_rows.tolist(), strict=True):
        found = source.captions(places[image_row])[row - int(store.offsets[image_row]) :][:1]
        if not found or hashlib.sha256(found[0].text.encode()).hexdigest() != sha256(row):
            raise JoinError(f"{source.spec} has another caption in text row {row} of {store.path}.", "Name the source that it was made from with --data.")
        captions[row] = found[0].text

    def encode(part: Sequence[int]) -> list[torch.Tensor]:
        texts = [captions[row] for row in part]
        return [encode_text(model, texts) if name == "text/embedding" else encode_text_tokens(model, texts, layer)[0] for name in names]

    return _encoded(names, encode, rows.tolist(), "texts", on_progress)


def _token_layer(store: Store, model: Model, side: str, form_of: Callable[[Model, str], TokenForm]) -> str:
    """Name the layer that the stored tokens came from; raises ModelError if the model has no such layer."""
    said = _objects(store.identity.get("arrays", {})).get(f"{side}/tokens", {})
    layer = str(said["layer"]) if said.get("final") == "none" and isinstance(said.get("layer"), int) else "last"
    if layer != "last":
        form_of(model, layer)
    return layer


def _features(store: Store, names: tuple[str, ...]) -> list[str]:
    """Those of the arrays that the store has as floats, or as codes that say what they mean."""
    return [name for name in names if name in store.arrays and (name in store.codecs or store.arrays[name].dtype.startswith("float"))]


def _places(source: Source, keys: dict[int, str]) -> dict[int, int]:
    """Find the images of these keys in the source: at the same row, else wherever the key stands; raises JoinError."""
    if all(row < len(source) and source.key(row) == key for row, key in keys.items()):
        return {row: row for row in keys}
    wanted = set(keys.values())
    found = {key: i for i in range(len(source)) if (key := source.key(i)) in wanted}
    if missing := sorted(wanted - found.keys()):
        raise JoinError(f"{source.spec} has no image '{missing[0]}' ({len(missing)} of {len(wanted)} are missing).", "Name the store's source with --data.")
    return {row: found[key] for row, key in keys.items()}


def _image(source: Source, place: int, sha256: str) -> Image.Image:
    try:
        loaded = source.image(place)
    except UndecodableImage as e:
        raise JoinError(f"{source.spec}: the image '{source.key(place)}' cannot be decoded any more ({e.reason}).", "Restore it.") from e
    if loaded.sha256 != sha256:
        raise JoinError(f"{source.spec}: the image '{source.key(place)}' is not the one that was encoded.", "Name the store's source with --data.")
    return loaded.image


def _encoded(
    names: list[str], encode: Callable[[Sequence[int]], list[torch.Tensor]], rows: list[int], stage: str, on_progress: OnProgress
) -> dict[str, npt.NDArray[Any]]:
    parts: dict[str, list[npt.NDArray[Any]]] = {name: [] for name in names}
    for start in range(0, len(rows) if names else 0, BATCH):
        for name, features in zip(names, encode(rows[start : start + BATCH]), strict=True):
            parts[name].append(features.cpu().numpy())
        on_progress(stage, min(start + BATCH, len(rows)), len(rows), "")
    return {name: np.concatenate(found) for name, found in parts.items() if found}


def _coded_cosine(store: Store, name: str, live: npt.NDArray[Any], rows: npt.NDArray[np.int64], views: npt.NDArray[np.int64] | None) -> Float64:
    """Return the cosine of decoded rows [B] with the teacher's, less what the codec itself takes from it.

    A feature between two codes may fall on either side on another device; both decode to about the same cosine with it.
    """
    codec = store.codec(name)
    if live.shape[1:] != codec.row_shape:
        return np.full(len(live), -1.0)
    features = codec.chain.pooled(live)
    again = codec.decode(codec.encode(live))
    again[(features == 0).all(-1)] = 0  # padding of texts
    return np.minimum(1.0, 1.0 + _least_cosine(store.features(name, rows, views), features) - _least_cosine(again, features))


def _compared(cosine: Float64, rows: npt.NDArray[np.int64]) -> Compared:
    worst = int(np.argmin(cosine))
    return Compared(len(rows), float(cosine[worst]), int(rows[worst]), tuple(rows[cosine < LEAST_COSINE].tolist()))


def _least_cosine(stored: npt.NDArray[Any], live: npt.NDArray[Any]) -> Float64:
    """Return the cosine of rows [B, D], or the least of the tokens' of rows [B, T, D]: 1 where both are zero, -1 where NaN or of other shape."""
    if stored.shape != live.shape:
        return np.full(len(stored), -1.0)
    a, b = stored.astype(np.float64), live.astype(np.float64)
    norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    cosine = np.divide((a * b).sum(-1), norms, out=np.where((a == 0).all(-1) & (b == 0).all(-1), 1.0, 0.0), where=norms != 0)
    return np.nan_to_num(cosine, nan=-1.0).reshape(len(a), -1).min(1)


def _differences(stored: dict[str, Any], live: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Tell in which parts that decide features the identities differ; of the teacher, its weights first."""
    parts = [("teacher", "weights_sha256"), ("teacher", "digest"), ("preprocessing", "digest"), ("tokenizer", "digest")]
    found = {(part, field): (_objects(stored).get(part, {}).get(field), live[part][field]) for part, field in parts}
    differs = {f"{part}.{field}": pair for (part, field), pair in found.items() if pair[0] != pair[1]}
    if "teacher.weights_sha256" in differs:
        differs.pop("teacher.digest", None)  # the digest is over the weights too
    return differs

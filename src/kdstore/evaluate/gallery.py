"""Images with captions, and what embeds them: a model that runs over a source, or a store that is read.

From here on a task does not ask which of the two it has, so that any teacher is scored from its store, without its weights.

N images, M texts, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from kdstore.config import config_digest
from kdstore.data.source import Caption, Source, UndecodableImage
from kdstore.data.sources import open_source
from kdstore.errors import EvaluationError, IdentityMismatch
from kdstore.evaluate.results import augmented_notice, model_record, store_record
from kdstore.jsonfile import digest_of
from kdstore.models.encode import encode_image, encode_text, in_batches
from kdstore.models.load import Model, load_model
from kdstore.progress import OnProgress
from kdstore.store import Store, join_sources, open_store
from kdstore.threads import batches_ahead, decoding_threads

Array = npt.NDArray[Any]
_NO_PROTOCOL = ("model", "pretrained", "cache", "train_cache", "data", "train_data", "device", "encode_batch", "out")


@dataclass(frozen=True, eq=False)
class Gallery:
    """N images by key; `embed_images(rows)` gives float32 [n, D] before normalisation, NaN where an image cannot be decoded, `embed_texts(texts)` [m, D]."""

    spec: str
    keys: Sequence[str]
    captions: Sequence[tuple[Caption, ...]]
    embed_images: Callable[[Sequence[int]], Array]
    embed_texts: Callable[[list[str]], Array]
    left_out: dict[str, int]  # images of the store that are none of the N, by reason


@dataclass(frozen=True, eq=False)
class Images:
    """The images of a gallery that a task can use, with their embeddings and the captions that it asked for."""

    keys: list[str]
    image_ND: Array
    captions: list[tuple[str, ...]]
    left_out: dict[str, int]


def open_model(model: str | None, pretrained: str | None, device: str, precision: str, on_progress: OnProgress) -> Model | None:
    """Load the model of a configuration and pass on its notice; None where none is named."""
    if model is None:
        return None
    loaded = load_model(model, pretrained, device=device, precision=precision)
    if loaded.name.notice:
        on_progress("notice", 0, 0, loaded.name.notice)
    return loaded


def subject_record(subject: Model | Store) -> dict[str, Any]:
    """Say what was scored: a model, or the teacher of a store with the store's digest."""
    return model_record(subject) if isinstance(subject, Model) else store_record([subject], "image/embedding", "text/embedding")


def protocol_digest(config: Any) -> str:
    """Digest of the settings that decide a score, whatever is scored and wherever the data comes from, of which results hold a digest beside it."""
    return config_digest(config, leave_out=_NO_PROTOCOL)


def data_record(spec: str, images: Images, texts: Any) -> dict[str, Any]:
    """Say which images were used: `texts`, what was asked of each, counts into the digest with their keys."""
    return {"name": spec, "num_images": len(images.keys), "digest": digest_of([images.keys, texts]), "left_out": images.left_out}


def gallery_of_source(model: Model, source: Source, batch: int, on_progress: OnProgress) -> Gallery:
    """Let a model embed the images of a source and any texts."""
    return Gallery(
        source.spec,
        [source.key(i) for i in range(len(source))],
        [source.captions(i) for i in range(len(source))],
        lambda rows: _encoded_images(model, source, rows, batch, on_progress),
        lambda texts: _encoded_texts(model, texts, batch, on_progress),
        {},
    )


def gallery_of_store(store: Store, on_progress: OnProgress, source: Source | None = None, model: Model | None = None, batch: int = 256) -> Gallery:
    """Read the valid images of a store; with a `source`, those that it holds by key, with its captions, and with a `model`, texts embedded by it.

    Without one, a text is embedded if it is a caption of the store. Raises MissingFeature for a store without embeddings, IdentityMismatch for a model that
    is not the store's teacher, and JoinError.
    """
    store.require("image/embedding")
    if notice := augmented_notice(store, "image/embedding"):
        on_progress("notice", 0, 0, notice)
    if model is not None and model.identity["teacher"]["digest"] != store.identity["teacher"]["digest"]:
        raise IdentityMismatch(
            f"{model.name.name} is not the teacher of {store.path}, which is {store.identity['teacher']['name']}.", "Name the teacher as --model."
        )
    texts, kinds = store.index("text", "caption").to_pylist(), store.index("text", "kind").to_pylist()
    keys = store.index("image", "key").to_pylist()
    rows, left_out = np.flatnonzero(store.image_valid), {"undecodable": int((~store.image_valid).sum())}
    if source is None:
        ranges = [range(store.offsets[row], store.offsets[row + 1]) for row in rows]
        captions = [tuple(Caption(texts[m], kinds[m]) for m in of_row if store.text_valid[m]) for of_row in ranges]
    else:
        source_rows = join_sources(store, source, on_progress=on_progress).source_row_of_store[rows]
        left_out["not in the source"] = int((source_rows < 0).sum())
        rows = rows[source_rows >= 0]
        captions = [source.captions(int(row)) for row in source_rows[source_rows >= 0]]

    def stored_texts(wanted: list[str]) -> Array:
        row_of = {text: m for m, (text, valid) in enumerate(zip(texts, store.text_valid, strict=True)) if valid}
        if unknown := next((text for text in wanted if text not in row_of), None):
            raise EvaluationError(f"{store.path} holds no embedding of the text '{unknown}'.", "Name its teacher as --model, to embed texts.")
        store.require("text/embedding")
        return _checked(store.features("text/embedding", np.array([row_of[text] for text in wanted])), "texts")

    return Gallery(
        store.place,
        [keys[row] for row in rows],
        captions,
        lambda some: _checked(store.features("image/embedding", rows[np.asarray(some, np.int64)]), "images"),
        stored_texts if model is None else lambda wanted: _encoded_texts(model, wanted, batch, on_progress),
        left_out,
    )


def open_gallery(model: Model | None, cache: str | None, data: str | None, batch: int, on_progress: OnProgress) -> tuple[Model | Store, Gallery]:
    """Open what is scored and its images: of the store, with `data` in place of its captions, or of the source that the model runs over."""
    if cache is None:
        assert model is not None  # what check_subject has checked
        return model, gallery_of_source(model, open_source(data or ""), batch, on_progress)
    store = open_store(cache)
    return store, gallery_of_store(store, on_progress, open_source(data) if data is not None else None, model, batch)


def usable_images(gallery: Gallery, wanted: Callable[[Caption], bool], what: str) -> Images:
    """Embed the images that have a caption of the kind `wanted`, in words `what`, and can be decoded; raises EvaluationError if there is none."""
    chosen = [tuple(caption.text for caption in of_image if wanted(caption)) for of_image in gallery.captions]
    rows = [row for row, texts in enumerate(chosen) if texts]
    if not rows:
        raise EvaluationError(f"No image of {gallery.spec} has a {what}.", f"Name data with a {what} per image (docs/sources.md).")
    image_ND = gallery.embed_images(rows)
    there = np.isfinite(image_ND).all(axis=1)
    if not there.any():
        raise EvaluationError(f"No image of {gallery.spec} with a {what} can be decoded.", "Name another source.")
    kept = [rows[place] for place in np.flatnonzero(there)]
    left_out = {**gallery.left_out, f"without a {what}": len(chosen) - len(rows)}
    left_out["undecodable"] = left_out.get("undecodable", 0) + int((~there).sum())
    return Images(
        [gallery.keys[row] for row in kept],
        image_ND if len(kept) == len(rows) else image_ND[there],
        [chosen[row] for row in kept],
        {reason: count for reason, count in left_out.items() if count},
    )


def _encoded_images(model: Model, source: Source, rows: Sequence[int], batch: int, on_progress: OnProgress) -> Array:
    def decode(row: int) -> torch.Tensor | None:
        try:
            return model.preprocess(source.image(row).image)
        except UndecodableImage:
            return None

    image_ND = np.full((len(rows), model.embed_dim), np.nan, np.float32)
    done = 0
    with decoding_threads(model.device.type) as pool:
        for pictures in batches_ahead(pool, decode, rows, batch):
            decoded = {place: picture for place, picture in enumerate(pictures, done) if picture is not None}
            if decoded:
                embedding_BD = encode_image(model, torch.stack(list(decoded.values()))).cpu().numpy()
                image_ND[list(decoded)] = _checked(embedding_BD, "images", model.name.name)
            done += len(pictures)
            on_progress("images", done, len(rows), "")
    return image_ND


def _encoded_texts(model: Model, texts: list[str], batch: int, on_progress: OnProgress) -> Array:
    on_progress("texts", 0, len(texts), "")
    text_MD = in_batches(lambda some: encode_text(model, some), texts, batch).numpy()
    on_progress("texts", len(texts), len(texts), "")
    return _checked(text_MD, "texts", model.name.name)


def _checked(row_RD: Array, what: str, name: str = "The store") -> Array:
    """Return embeddings; raises EvaluationError for values that are not finite, which an image that cannot be decoded does not explain."""
    bad = int((~np.isfinite(row_RD)).any(axis=1).sum())
    if bad:
        raise EvaluationError(f"{name} gives {bad} of {len(row_RD)} {what} an embedding that is not finite.", "Check its weights and its precision.")
    return row_RD

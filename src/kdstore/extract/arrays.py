"""What a run writes: the shapes of its features, the arrays that hold them, and the identity that says what they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kdstore.data.images import DECODING
from kdstore.extract.config import ExtractConfig
from kdstore.extract.fit import chains_of
from kdstore.extract.views import augmentation_of
from kdstore.models.encode import image_token_form, text_token_form
from kdstore.models.load import Model
from kdstore.store import ArraySpec, Codec, Plan, codec_identity, embedding_array, scalar_array, token_array, view_array
from kdstore.store.plan import Side


def feature_shapes(config: ExtractConfig, model: Model) -> dict[str, tuple[int, ...]]:
    """Return the shape of a row of every array of features that a run computes, before any codec."""
    shapes: dict[str, tuple[int, ...]] = {f"{side}/embedding": (model.embed_dim,) for side in config.embedded_sides}
    if config.tokens in ("image", "both"):
        shapes["image/tokens"] = image_token_form(model, config.token_layer).shape
    if config.tokens in ("text", "both"):
        shapes["text/tokens"] = text_token_form(model, config.token_layer).shape
    return shapes


def planned_arrays(config: ExtractConfig, model: Model, plan: Plan) -> list[ArraySpec]:
    """List the arrays that a run writes: embeddings of both sides, tokens as asked, as their codecs leave them; raises ConfigError if one does not fit."""
    chains, arrays = chains_of(config), []
    for name, shape in feature_shapes(config, model).items():
        side: Side = "image" if name.startswith("image/") else "text"
        describe = embedding_array if name.endswith("/embedding") else token_array
        views = 1 + config.views if name == "image/embedding" else 1
        arrays.append(describe(plan, side, *chains[name].shapes(shape)[-1], dtype=chains[name].dtype, views=views, zstd=config.zstd))
    if (augmentation := augmentation_of(config, model)) is not None:
        arrays.append(view_array(plan, 1 + config.views, augmentation.size))
    return [*arrays, scalar_array(plan, "text/length", "int64")] if config.tokens in ("text", "both") else arrays


def store_identity(config: ExtractConfig, model: Model, plan: Plan, codecs: Mapping[str, Codec]) -> dict[str, Any]:
    """Build what the features depend on: teacher, preprocessing, tokenizer, how images are decoded, source, and how each array is encoded."""
    encoding = {"norm": "none", "precision": config.precision, "views": ["plain"]}
    arrays: dict[str, dict[str, Any]] = {f"{side}/embedding": {**encoding, "layer": "output"} for side in config.embedded_sides}
    for side, form_of in (("image", image_token_form), ("text", text_token_form)):
        if config.tokens in (side, "both"):
            arrays[f"{side}/tokens"] = {**encoding, **form_of(model, config.token_layer).encoding}
    if (augmentation := augmentation_of(config, model)) is not None:
        arrays["image/embedding"]["views"] = ["plain", *["augmented"] * config.views]
        arrays["image/view"] = augmentation.identity
    for name, codec in codecs.items():
        arrays[name]["codec"] = codec_identity(codec)
    return {**model.identity, "decoding": DECODING, "source": {"fingerprint": plan.fingerprint}, "arrays": arrays}

"""Encode images and texts: embeddings as the towers return them, before normalisation, and the tokens of a layer.

Everything that leaves here is float32 (half precision is autocast inside). Image tokens are patches without class or register
tokens; convolutional towers give their spatial features, row by row. What a layer is, and where each family's tokens come from: `towers`.

Shape suffixes: B batch, C channels, H W pixels or grid, D embedding, T tokens, L text length, W token width, N rows.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch

from kdstore.models import towers
from kdstore.models.load import DTYPES, Model
from kdstore.models.towers import TokenForm


def encode_image(model: Model, image_BCHW: torch.Tensor) -> torch.Tensor:
    """Embed preprocessed images; returns float32 [B, D] before normalisation."""
    with _inference(model):
        embedding_BD: torch.Tensor = _compiled(model, towers.image_embedding)(model.clip, _on_device(model, image_BCHW))
        return embedding_BD.float()


def encode_image_tokens(model: Model, image_BCHW: torch.Tensor, layer: str = "last") -> tuple[torch.Tensor, torch.Tensor]:
    """Embed preprocessed images and keep the tokens of a layer; returns float32 [B, D] and [B, T, W], from one forward pass.

    Raises ModelError for a tower of an unknown class; that it has the layer is for `image_token_form` to find out.
    """
    with _inference(model):
        embedding_BD, tokens_BTW = _compiled(model, towers.image_tokens)(model.clip, _on_device(model, image_BCHW), towers.block_of(layer))
        return embedding_BD.float(), tokens_BTW.float()


def image_token_form(model: Model, layer: str = "last") -> TokenForm:
    """Tell the shape (tokens, width) of the image tokens of a layer, and what a store's identity says of them; raises ModelError."""
    with _inference(model):
        return towers.image_token_form(model.clip, layer, _noise(model))


def encode_text(model: Model, texts: list[str]) -> torch.Tensor:
    """Embed texts; returns float32 [B, D] before normalisation."""
    with _inference(model):
        embedding_BD: torch.Tensor = _compiled(model, towers.text_embedding)(model.clip, model.tokenizer(texts).to(model.device))
        return embedding_BD.float()


def encode_text_tokens(model: Model, texts: list[str], layer: str = "last") -> tuple[torch.Tensor, torch.Tensor]:
    """Return the text tower's hidden states of a layer float32 [B, L, W] (zero past the end) and the lengths int64 [B]."""
    return encode_text_and_tokens(model, texts, layer)[1:]


def encode_text_and_tokens(model: Model, texts: list[str], layer: str = "last") -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return what `encode_text` and `encode_text_tokens` do, float32 [B, D], float32 [B, L, W] and int64 [B], from one forward pass."""
    ids_BL = model.tokenizer(texts).to(model.device)
    length_B = text_lengths(ids_BL, model.pad_id, ends_padded=model.pad_id == model.end_id)
    with _inference(model):
        embedding_BD, hidden_BLW = _compiled(model, towers.text_tokens)(model.clip, ids_BL, towers.block_of(layer))
    inside_BL = torch.arange(ids_BL.shape[1], device=ids_BL.device) < length_B[:, None]
    return embedding_BD.float(), hidden_BLW.float() * inside_BL[..., None], length_B


def text_token_form(model: Model, layer: str = "last") -> TokenForm:
    """Tell the shape (length, width) of the text tokens of a layer, and what a store's identity says of them; raises ModelError."""
    with _inference(model):
        form = towers.text_token_form(model.clip, layer, model.tokenizer(["a"]).to(model.device))
    return TokenForm(form.shape, {**form.encoding, "pad_id": model.pad_id})


def text_lengths(ids_BL: torch.Tensor, pad_id: int, *, ends_padded: bool = False) -> torch.Tensor:
    """Length of each row of token ids up to its last one that is no padding; int64 [B].

    `ends_padded`: the tokenizer ends a text with the id that it also pads with (SigLIP), so the first of them belongs to the text.
    """
    place = torch.arange(1, ids_BL.shape[1] + 1, device=ids_BL.device)
    length_B = (place * (ids_BL != pad_id)).amax(1)
    return (length_B + 1).clamp(max=ids_BL.shape[1]) if ends_padded else length_B


def in_batches(encode: Callable[[list[str]], torch.Tensor], texts: list[str], batch: int = 256) -> torch.Tensor:
    """Apply a text encoder to any number of texts, each distinct one once; returns CPU float32 [N, D]."""
    distinct = list(dict.fromkeys(texts))
    place = {text: i for i, text in enumerate(distinct)}
    parts = [encode(distinct[i : i + batch]).cpu() for i in range(0, len(distinct), batch)]
    return torch.cat(parts)[[place[t] for t in texts]]


@contextlib.contextmanager
def _inference(model: Model):  # type: ignore[no-untyped-def]
    with torch.inference_mode(), torch.autocast(model.device.type, DTYPES[model.precision], enabled=model.precision != "fp32"):
        yield


def _on_device(model: Model, image_BCHW: torch.Tensor) -> torch.Tensor:
    form = torch.channels_last if model.channels_last else torch.contiguous_format
    return image_BCHW.to(model.device, memory_format=form)


def _noise(model: Model) -> torch.Tensor:
    """Make one image in which no two places are alike, to look at a tower with; always the same."""
    return _on_device(model, torch.rand(1, 3, *model.image_size, generator=torch.Generator().manual_seed(0)))


def _compiled(model: Model, forward: Callable[..., Any]) -> Callable[..., Any]:
    return _compile(forward) if model.compile else forward


@functools.cache
def _compile(forward: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(forward)

"""Encode images and texts: embeddings as the towers return them, before normalisation, and the tokens of the last layer.

Everything that leaves here is float32 (half precision is autocast inside). Image tokens are patches without class or register
tokens; convolutional towers give their spatial features, row by row.

Shape suffixes: B batch, C channels, H W pixels or grid, D embedding, T tokens, L text length, N rows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from open_clip.transformer import VisionTransformer

from kdstore.errors import ModelError
from kdstore.models.load import DTYPES, Model


@contextlib.contextmanager
def _inference(model: Model):  # type: ignore[no-untyped-def]
    with torch.inference_mode(), torch.autocast(model.device.type, DTYPES[model.precision], enabled=model.precision != "fp32"):
        yield


def encode_image(model: Model, image_BCHW: torch.Tensor) -> torch.Tensor:
    """Embed preprocessed images; returns float32 [B, D] before normalisation."""
    with _inference(model):
        return model.clip.encode_image(image_BCHW.to(model.device), normalize=False).float()


def encode_image_tokens(model: Model, image_BCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Embed preprocessed images and keep their tokens; returns float32 [B, D] and [B, T, W], from one forward pass.

    Tokens are the last layer's, after the final norm where the tower has one (not under attentional pooling, whose norm acts later).
    """
    visual = model.clip.visual
    is_vit = isinstance(visual, VisionTransformer)
    normalize = is_vit and visual.attn_pool is None
    with _inference(model):
        out = visual.forward_intermediates(
            image_BCHW.to(model.device),
            indices=1,
            normalize_intermediates=normalize,
            output_fmt="NLC" if is_vit else "NCHW",
        )
    tokens = out["image_intermediates"][-1].float()
    return out["image_features"].float(), tokens if tokens.ndim == 3 else tokens.flatten(2).transpose(1, 2).contiguous()


def token_shape(model: Model) -> tuple[int, int]:
    """Return (tokens, width) of the image tokens, from one blank image."""
    height, width = model.image_size
    tokens = encode_image_tokens(model, torch.zeros(1, 3, height, width))[1]
    return int(tokens.shape[1]), int(tokens.shape[2])


def encode_text(model: Model, texts: list[str]) -> torch.Tensor:
    """Embed texts; returns float32 [B, D] before normalisation."""
    with _inference(model):
        return model.clip.encode_text(model.tokenizer(texts).to(model.device), normalize=False).float()


def encode_text_tokens(model: Model, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the text tower's last hidden states float32 [B, L, W] (zero past the end) and the lengths int64 [B].

    Raises ModelError for text towers that open_clip gives no hidden states of (Hugging Face encoders).
    """
    ids_BL = model.tokenizer(texts).to(model.device)
    length_B = text_lengths(ids_BL)
    with _inference(model):
        try:
            hidden_BLW = model.clip.forward_intermediates(text=ids_BL, text_indices=1, normalize_intermediates=True)["text_intermediates"][-1].float()
        except AttributeError as e:
            raise ModelError(f"The text tower of {model.name.name} gives no hidden states.", "Use its embeddings.") from e
    inside_BL = torch.arange(ids_BL.shape[1], device=ids_BL.device) < length_B[:, None]
    return hidden_BLW * inside_BL[..., None], length_B


def text_lengths(ids_BL: torch.Tensor) -> torch.Tensor:
    """Length of each row of token ids up to its last non-zero one (0 pads in open_clip's tokenizers); int64 [B]."""
    place = torch.arange(1, ids_BL.shape[1] + 1, device=ids_BL.device)
    return (place * (ids_BL != 0)).amax(1)


def in_batches(encode: Callable[[list[str]], torch.Tensor], texts: list[str], batch: int = 256) -> torch.Tensor:
    """Apply a text encoder to any number of texts, each distinct one once; returns CPU float32 [N, D]."""
    distinct = list(dict.fromkeys(texts))
    place = {text: i for i, text in enumerate(distinct)}
    parts = [encode(distinct[i : i + batch]).cpu() for i in range(0, len(distinct), batch)]
    return torch.cat(parts)[[place[t] for t in texts]]

"""What a model costs: its parameters, and the multiply-accumulates of one image and of one text.

Counted and not timed: the model is built of meta tensors, which have shapes and no numbers, so that the largest takes no memory either. A GMAC is 1e9
multiply-accumulates of matrix products, convolutions and attention, half of what torch counts as floating-point operations; papers on small models call the
same number "GMACs" or "FLOPs".
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch.utils.flop_counter import FlopCounterMode

from kdstore.errors import ModelError
from kdstore.models import towers
from kdstore.models.load import parameter_counts, quiet
from kdstore.models.names import architecture_of, resolve


@dataclass(frozen=True)
class Cost:
    """Parameters: all, all but the token embedding, and those of the image tower; GMACs of one sample of the model's own size, `pixels` a side.

    `embed_dim` is the width of an embedding, `tokens` the number and the width of an image's tokens.
    """

    parameters: int
    without_token_embedding: int
    image_parameters: int
    image_gmacs: float
    text_gmacs: float
    pixels: int
    embed_dim: int
    tokens: tuple[int, int]


def cost_of(name: str) -> Cost:
    """Count what a model costs, of whose name the architecture is taken and no weights; raises UnknownName and ModelError as `resolve` does."""
    with torch.device("meta"):
        clip = build_without_weights(name, "meta").eval()
        image_BCHW, tokens_BL = samples_of(clip, 1)
        image_gmacs, text_gmacs = gmacs(clip.encode_image, image_BCHW), gmacs(clip.encode_text, tokens_BL)
        with torch.no_grad():
            embedding_BD, tokens_BTW = towers.image_tokens(clip, image_BCHW, None)
    counts = parameter_counts(clip)
    in_image = sum(p.numel() for p in clip.visual.parameters())
    shapes = embedding_BD.shape[1], (tokens_BTW.shape[1], tokens_BTW.shape[2])
    return Cost(counts["total"], counts["without_token_embedding"], in_image, image_gmacs, text_gmacs, image_BCHW.shape[2], *shapes)


def build_without_weights(name: str, device: str | torch.device) -> Any:
    """Build the architecture of a model with random weights, without its tokenizer: nothing is fetched, unless the name is of the hub.

    Raises UnknownName and ModelError as `resolve` does, and ModelError where the hub does not say what such a model is.
    """
    resolved = resolve(architecture_of(name), untrained=True)
    try:
        with quiet():
            return open_clip.create_model(resolved.open_clip_name, load_weights=False, pretrained_text=False, device=device)
    except Exception as e:
        if not resolved.name.startswith("hf-hub:"):
            raise
        raise ModelError(f"Cannot read the architecture of {resolved.name}: {type(e).__name__}.", "Check the network.") from e


def samples_of(clip: Any, batch: int, device: str | torch.device | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return images [B, 3, H, W] and token ids [B, L] of a model's own size, which mean nothing."""
    size = clip.visual.image_size
    height, width = (size, size) if isinstance(size, int) else size
    return torch.zeros(batch, 3, height, width, device=device), torch.ones(batch, clip.context_length, dtype=torch.long, device=device)


def parameters_of(model_config: dict[str, Any]) -> dict[str, int]:
    """Count the parameters of an open_clip configuration, as a store's identity records it; raises ModelError for one that open_clip does not build."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "open_clip_config.json").write_text(json.dumps({"model_cfg": model_config, "preprocess_cfg": {}}))
        try:
            with quiet(), torch.device("meta"):
                clip = open_clip.create_model(f"local-dir:{folder}", load_weights=False, pretrained_text=False, device="meta")
        except Exception as e:  # whatever a stranger's configuration does to open_clip
            raise ModelError(f"open_clip cannot build the teacher that the store names: {e}", "Its parameters are not known.") from e
    return parameter_counts(clip)


def gmacs(encode: Callable[[torch.Tensor], Any], sample: torch.Tensor) -> float:
    """Count the GMACs of a forward pass, by running it."""
    # With gradients, because torch's fused attention of inference is one operation that its counter does not know.
    with torch.enable_grad(), FlopCounterMode(display=False) as counter:
        encode(sample)
    return float(counter.get_total_flops()) / 2e9

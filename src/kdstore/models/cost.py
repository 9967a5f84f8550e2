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
from kdstore.models.load import parameter_counts, quiet
from kdstore.models.names import resolve


@dataclass(frozen=True)
class Cost:
    """Parameters: all, all but the token embedding, and those of the image tower; GMACs of one sample of the model's own size, `pixels` a side."""

    parameters: int
    without_token_embedding: int
    image_parameters: int
    image_gmacs: float
    text_gmacs: float
    pixels: int


def cost_of(name: str) -> Cost:
    """Count what an architecture costs, named as a student is (without weights); raises UnknownName and ModelError as `resolve` does."""
    resolved = resolve(name, untrained=True)
    with quiet(), torch.device("meta"):
        clip = open_clip.create_model(resolved.open_clip_name, load_weights=False, pretrained_text=False, device="meta").eval()
        pixels = clip.visual.image_size if isinstance(clip.visual.image_size, int) else clip.visual.image_size[0]
        image_BCHW, tokens_BL = torch.empty(1, 3, pixels, pixels), torch.ones(1, clip.context_length, dtype=torch.long)
        image_gmacs, text_gmacs = gmacs(clip.encode_image, image_BCHW), gmacs(clip.encode_text, tokens_BL)
    counts = parameter_counts(clip)
    in_image = sum(p.numel() for p in clip.visual.parameters())
    return Cost(counts["total"], counts["without_token_embedding"], in_image, image_gmacs, text_gmacs, pixels)


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

"""What a model costs: its parameters, and the multiply-accumulates of one image and of one text.

Counted and not timed: the forward passes run on meta tensors, which have shapes and no numbers. A GMAC is 1e9 multiply-accumulates of matrix products,
convolutions and attention, half of what torch counts as floating-point operations; papers on small models call the same number "GMACs" or "FLOPs".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from kdstore.models.load import Model, parameter_counts


@dataclass(frozen=True)
class Cost:
    """Parameters: all, all but the token embedding, and those of the image tower; GMACs of each tower for one sample at the model's own size."""

    parameters: int
    without_token_embedding: int
    image_parameters: int
    image_gmacs: float
    text_gmacs: float


def cost_of(model: Model) -> Cost:
    """Count what a model of any device costs; the model is left as it is."""
    counts = parameter_counts(model.clip)
    return Cost(
        counts["total"],
        counts["without_token_embedding"],
        sum(p.numel() for p in model.clip.visual.parameters()),
        _gmacs(model.clip, {"image": torch.empty(1, 3, *model.image_size, device="meta")}),
        _gmacs(model.clip, {"text": model.tokenizer(["a"]).to("meta")}),
    )


def _gmacs(clip: Any, sample: dict[str, torch.Tensor]) -> float:
    state = {name: tensor.to("meta") for name, tensor in (*clip.named_parameters(), *clip.named_buffers())}
    # With gradients, because torch's fused attention of inference is one operation that its counter does not know.
    with torch.enable_grad(), FlopCounterMode(display=False) as counter:
        functional_call(clip, state, kwargs=sample)
    return float(counter.get_total_flops()) / 2e9

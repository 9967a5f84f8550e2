"""The optimiser of a run: parameter groups, learning rate, and which numbers the device computes in."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

MAX_LOG_SCALE = math.log(100)


def make_optimiser(parameters: Iterable[nn.Parameter], *, lr: float, betas: tuple[float, float], eps: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW over all trained parameters; matrices decay, and gains, biases, scales and single embeddings (fewer than two axes longer than 1) do not."""
    trained = [p for p in parameters if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.squeeze().ndim >= 2], "weight_decay": weight_decay},  # timm's gains per channel are (C, 1, 1)
        {"params": [p for p in trained if p.squeeze().ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)


def learning_rate(step: int, *, steps: int, warmup_steps: int, peak: float) -> float:
    """Linear warm-up that reaches `peak` at its last step, then a cosine that would reach 0 one step after the end."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / (steps - warmup_steps)))


def choose_precision(name: str, device: torch.device) -> str:
    """Resolve `auto` to fp32 on the CPU and to mixed bf16, or where a GPU lacks that fp16; any other name stays."""
    if name != "auto":
        return name
    if device.type != "cuda":
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"

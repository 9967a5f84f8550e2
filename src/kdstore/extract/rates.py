"""How fast a run was, and what held it back."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from kdstore.extract.config import ExtractConfig
from kdstore.extract.units import Tally
from kdstore.models.encode import encode_image, image_token_form, text_token_form
from kdstore.models.load import DTYPES, Model

_PEAK_SECONDS = 0.2


@dataclass(frozen=True)
class Rates:
    """Images per second of each stage had it run alone, in one process (0 without images), and the stage that held the run back, of texts too.

    `reading` is that of all decoding threads together. `share_of_peak`: the image tower's floating point operations per second of the model's time, over those
    of a large matrix product on the same device in the same precision; None where nothing was computed.
    """

    reading: float
    model: float
    writing: float
    bottleneck: str
    tokens_per_second: float
    share_of_peak: float | None


def rates_of(config: ExtractConfig, model: Model, images: Tally, texts: Tally, seconds: float) -> Rates:
    """Work out the rates of a run from what its image and text units took, `seconds` in all."""
    stages = {"reading": images.decoding, "model": images.model, "writing": images.writing}
    rates = {name: round(images.images / taken, 2) if taken else 0.0 for name, taken in stages.items()}
    tokens = 0
    if config.tokens in ("image", "both"):
        tokens += images.images * image_token_form(model, config.token_layer).shape[0]
    if config.tokens in ("text", "both"):
        tokens += texts.texts * text_token_form(model, config.token_layer).shape[0]
    taken = {"reading": images.decoding, "model": images.model + texts.model, "writing": images.writing + texts.writing}
    share = None
    if images.images > images.invalid and images.model:
        share = round(image_flops(model) * (images.images - images.invalid) / images.model / peak_flops(model), 4)
    return Rates(**rates, bottleneck=max(taken, key=lambda name: taken[name]), tokens_per_second=round(tokens / seconds, 1), share_of_peak=share)


def image_flops(model: Model) -> int:
    """Count the floating point operations of one image through the image tower (two per multiplication with addition)."""
    with FlopCounterMode(display=False) as counter:
        encode_image(model, torch.zeros(1, 3, *model.image_size))
    return int(counter.get_total_flops())


def peak_flops(model: Model) -> float:
    """Measure the operations per second of a large matrix product on the model's device, in its precision."""
    device, size = model.device, 8192 if model.device.type == "cuda" else 1024
    a = torch.randn(size, size, device=device, dtype=DTYPES[model.precision])
    done, best, started = 0.0, 0.0, time.perf_counter()
    while done < _PEAK_SECONDS:
        begun = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        done = time.perf_counter() - started
        best = max(best, 2 * size**3 / (time.perf_counter() - begun))
    return best

"""How fast a run was, and what held it back."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from kdstore.extract.config import ExtractConfig
from kdstore.extract.units import Tally
from kdstore.models.cost import gmacs
from kdstore.models.encode import image_token_form, text_token_form
from kdstore.models.load import DTYPES, Model

_PEAK_SECONDS = 0.2


@dataclass(frozen=True)
class Rates:
    """Images per second of each stage had it run alone, in one process (0 without images), and the stage that held the run back, of texts too.

    `reading` is that of all decoding threads together. `share_of_peak`: operations of both towers per second of the model's time, over those of a large
    matrix product on the same device in the same precision; None where nothing was computed, or by workers, whose devices may be others.
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
    share, elsewhere = None, config.workers or config.scheduler  # on devices that this process does not see
    if not elsewhere and images.encoded + texts.encoded:
        share = round(flops_of(model, images.encoded, texts.encoded) / taken["model"] / peak_flops(model), 4)
    return Rates(**rates, bottleneck=max(taken, key=lambda name: taken[name]), tokens_per_second=round(tokens / seconds, 1), share_of_peak=share)


def flops_of(model: Model, pictures: int, texts: int) -> float:
    """Count the floating point operations of so many pictures and texts through their towers (two per multiplication with addition)."""
    clip, count = model.clip, 0.0
    if pictures:
        count += pictures * gmacs(clip.encode_image, torch.zeros(1, 3, *model.image_size, device=model.device))
    if texts:
        count += texts * gmacs(clip.encode_text, model.tokenizer(["a"]).to(model.device))
    return 2e9 * count


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

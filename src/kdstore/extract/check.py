"""A look at the teacher before a long run: one at chance on its own data is the wrong checkpoint, tokenizer or activation."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from kdstore.data.source import Source
from kdstore.extract.units import Extractor
from kdstore.metrics.retrieval import retrieval_recall
from kdstore.models.encode import encode_image, encode_text, in_batches

PAIRS = 64


def check_teacher(extractor: Extractor, source: Source, batch: int) -> dict[str, Any] | None:
    """Measure recall on the first pairs with distinct captions; `warning` is a sentence for the user, or empty. None where there are too few pairs."""
    model, fitting = extractor.model, extractor.fitting
    pictures, texts = [], []
    for i in range(min(4 * PAIRS, len(source))):
        captions = source.captions(i)
        if captions and captions[0].text not in texts:
            pixels, _ = extractor.decode(i)
            if pixels is not None:
                pictures.append(pixels)
                texts.append(captions[0].text)
        if len(pictures) == PAIRS:
            break
    if len(pictures) < 16:
        return None
    parts = [torch.stack(pictures[i : i + batch]) for i in range(0, len(pictures), batch)]
    image_ND = torch.cat([fitting.run("image", lambda some: (encode_image(model, some),), part)[0] for part in parts])
    text_ND = in_batches(lambda part: fitting.run("text", lambda some: (encode_text(model, some),), part)[0], texts, batch)
    found = retrieval_recall(image_ND.cpu().numpy(), text_ND.numpy(), np.arange(len(texts)), ks=(1, 5))
    recall, chance = found["image_retrieval_recall@5"], 100 * 5 / len(texts)
    warning = ""
    if recall < 2.5 * chance:
        warning = (
            f"Sanity check: in {recall:.0f} % of {len(texts)} pairs {model.name.name} has a caption's image in the top 5 (chance is {chance:.0f} %). "
            "Check the weights, or that the captions are of its kind."
        )
    return {"pairs": len(texts), "image_retrieval_recall@5": round(recall, 2), "chance": round(chance, 2), "warning": warning}

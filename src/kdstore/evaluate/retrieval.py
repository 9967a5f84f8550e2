"""Image and text retrieval of a model on the pairs of a source, with the recall that the source's repeated captions allow.

Images that cannot be decoded, and images without a caption, are left out with their captions, and counted.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from kdstore.config import as_dict, config_digest
from kdstore.data.source import Source, UndecodableImage
from kdstore.data.sources import open_source
from kdstore.errors import ConfigError, EvaluationError
from kdstore.evaluate.outcomes import Outcomes, Run
from kdstore.evaluate.results import check_out, made_record, model_record, write_result
from kdstore.metrics.retrieval import KS, recall_ceiling, recall_of_hits, retrieval_hits
from kdstore.models.encode import encode_image, encode_text, in_batches
from kdstore.models.load import Model, load_model
from kdstore.progress import OnProgress, silent


@dataclass(frozen=True, kw_only=True)
class RetrievalConfig:
    """What is evaluated on which pairs."""

    model: str
    pretrained: str | None = None
    data: str = "scenes/retrieval:1000"
    device: str = "auto"
    precision: str = "fp32"
    encode_batch: int = 256
    out: str | None = None  # result file

    def __post_init__(self) -> None:
        if self.encode_batch < 1:
            raise ConfigError(f"'encode_batch' must be at least 1, found {self.encode_batch}.", "Correct encode_batch.")


@dataclass(frozen=True)
class RetrievalResult:
    """Recall and ceiling in percent by key (`image_retrieval_recall@1`, ...), and the whole result as it was written."""

    recall: dict[str, float]
    ceiling: dict[str, float]
    num_images: int
    num_texts: int
    content: dict[str, Any]


def evaluate_retrieval(config: RetrievalConfig, *, on_progress: OnProgress = silent) -> RetrievalResult:
    """Measure recall at 1, 5 and 10 in both directions; writes the result file if one is named."""
    check_out(config.out)
    started = time.perf_counter()
    source = open_source(config.data)
    model = load_model(config.model, config.pretrained, device=config.device, precision=config.precision)
    if model.name.notice:
        on_progress("notice", 0, 0, model.name.notice)
    pairs = _encode_pairs(model, source, config.encode_batch, on_progress)
    on_progress("recall", 0, 1, f"{len(pairs.image_ND)} images, {len(pairs.captions)} texts")
    hits = retrieval_hits(pairs.image_ND, pairs.text_MD, pairs.image_of_text_M, max(KS))
    recall = recall_of_hits(*hits)
    ceiling = recall_ceiling(pairs.captions, pairs.image_of_text_M)
    on_progress("recall", 1, 1, "")
    content = {
        "stage": "evaluate retrieval",
        "model": model_record(model),
        "data": {"source": source.spec, "num_images": len(pairs.image_ND), "num_texts": len(pairs.captions), "left_out": pairs.left_out},
        "config": as_dict(config),
        "config_digest": config_digest(config, leave_out=("model", "pretrained", "device", "encode_batch", "out")),
        "recall_at": list(KS),
        "rows": [{"row": "model", "scores": recall}, {"row": "ceiling", "scores": ceiling}],
        "made": made_record(model.device, time.perf_counter() - started),
    }
    return RetrievalResult(recall, ceiling, len(pairs.image_ND), len(pairs.captions), write_result(config.out, content, _outcomes(pairs, *hits)))


@dataclass(frozen=True, eq=False)
class _Pairs:
    image_ND: np.ndarray
    text_MD: np.ndarray
    image_of_text_M: np.ndarray
    captions: list[str]
    left_out: dict[str, int]


def _outcomes(pairs: _Pairs, image_hit_MK: np.ndarray, text_hit_NK: np.ndarray) -> Outcomes:
    """Turn hits into outcomes: an item is a query's number, its group the number of its image; the model draws nothing, so there is no seed."""
    sides = (("image", image_hit_MK, pairs.image_of_text_M), ("text", text_hit_NK, np.arange(len(pairs.image_ND))))
    kinds = [(f"{side}_retrieval_recall@{k}", np.asarray(hit[:, :k].any(axis=1)), images) for side, hit, images in sides for k in KS]
    return Outcomes(
        item_N=[str(query) for _, hit, _ in kinds for query in range(len(hit))],
        group_N=[str(image) for _, _, images in kinds for image in images],
        kind_N=[kind for kind, hit, _ in kinds for _ in hit],
        runs=(Run("model", None, 100.0 * np.concatenate([hit for _, hit, _ in kinds])),),
    )


def _encode_pairs(model: Model, source: Source, batch: int, on_progress: OnProgress) -> _Pairs:
    left_out = {"without a caption": 0, "undecodable": 0}
    rows: list[int] = []
    images: list[torch.Tensor] = []
    for batch_rows, image_BCHW in _usable_images(model, source, batch, left_out, on_progress):
        rows += batch_rows
        images.append(encode_image(model, image_BCHW).cpu())
    if not rows:
        raise EvaluationError(f"{source.spec} has no image with a caption that can be decoded.", "Name a source of captioned images.")
    texts = [[caption.text for caption in source.captions(row)] for row in rows]
    captions = [text for of_image in texts for text in of_image]
    image_of_text_M = np.repeat(np.arange(len(rows)), [len(of_image) for of_image in texts])
    on_progress("texts", 0, len(captions), "")
    text_MD = in_batches(lambda some: encode_text(model, some), captions, batch)
    on_progress("texts", len(captions), len(captions), "")
    return _Pairs(torch.cat(images).numpy(), text_MD.numpy(), image_of_text_M, captions, {reason: n for reason, n in left_out.items() if n})


def _usable_images(model: Model, source: Source, batch: int, left_out: dict[str, int], on_progress: OnProgress) -> Iterator[tuple[list[int], torch.Tensor]]:
    """Yield batches of (rows, preprocessed images) of the pairs that can be scored; counts the others in `left_out`."""
    rows: list[int] = []
    images: list[torch.Tensor] = []
    for i in range(len(source)):
        if not source.captions(i):
            left_out["without a caption"] += 1
        else:
            try:
                images.append(model.preprocess(source.image(i).image))
                rows.append(i)
            except UndecodableImage:
                left_out["undecodable"] += 1
        if rows and (len(rows) == batch or i + 1 == len(source)):
            yield rows, torch.stack(images)
            rows, images = [], []
            on_progress("images", i + 1, len(source), "")

"""What an extraction would take, from its plan and a short calibration; nothing is written."""

from __future__ import annotations

import math
import shutil
import time
from dataclasses import dataclass

import torch

from kdstore.data.source import Source
from kdstore.extract.config import ExtractConfig
from kdstore.extract.fit import image_features
from kdstore.extract.job import Job, needed_bytes, prepare, present_folder
from kdstore.models.encode import encode_text, encode_text_tokens
from kdstore.progress import OnProgress, silent

CALIBRATION_SECONDS = 10.0  # of each stage, at most one batch longer


@dataclass(frozen=True)
class Estimate:
    """Rows, bytes and files of a store to be written, the free space where it would lie, and the hours that it takes at the rates measured here.

    Rates are per second, of one process, 0 for what need not be done; `hours` are those of all workers or parts at work at once, without the start of each.
    """

    path: str
    teacher: str
    images: int
    texts: int
    arrays: dict[str, str]
    bytes: int
    files: int
    free_bytes: int
    images_read: float
    images_encoded: float
    texts_encoded: float
    bottleneck: str
    processes: int
    hours: float
    notices: tuple[str, ...]


def estimate(config: ExtractConfig, *, source: Source | None = None, on_progress: OnProgress = silent) -> Estimate:
    """Plan an extraction and time a few batches of it; raises what `extract` raises before its first unit, but for DiskFull."""
    notices: list[str] = []
    job = prepare(config, notices.append, on_progress, source=source, fit=False)
    try:
        read, encoded = _image_rates(job, on_progress)
        texts = _text_rate(job, on_progress)
    finally:
        job.extractor.close()
    plan, processes = job.plan, config.workers or (config.part_of or (1, 1))[1]
    stages = {"reading": plan.num_images / read, "model": plan.num_images / encoded + plan.num_texts / texts}
    units = len(plan.units)
    return Estimate(
        path=str(job.out),
        teacher=job.extractor.model.identity["teacher"]["name"],
        images=plan.num_images,
        texts=plan.num_texts,
        arrays={spec.name: f"{list(spec.shape)} {spec.dtype}" for spec in job.arrays},
        bytes=needed_bytes(job.plan, job.arrays),
        files=sum(-(-spec.shape[0] // spec.shard[0]) + 2 for spec in job.arrays)
        + 2 * units
        + 10,  # with index and validity, offsets, groups, manifest, run.json
        free_bytes=shutil.disk_usage(present_folder(job.out)).free,
        images_read=_finite(read),
        images_encoded=_finite(encoded),
        texts_encoded=_finite(texts),
        bottleneck=max(stages, key=lambda name: stages[name]),
        processes=processes,
        hours=max(stages.values()) / processes / 3600,
        notices=tuple(notices),
    )


def _finite(rate: float) -> float:
    return round(rate, 2) if math.isfinite(rate) else 0.0


def _image_rates(job: Job, on_progress: OnProgress) -> tuple[float, float]:
    """Return images per second of decoding in all threads and of the model, over the first batches; infinite where the images need not be read."""
    if not any(spec.side == "image" for spec in job.arrays):
        return float("inf"), float("inf")
    batch, decoding, model, images, valid = job.extractor.images_at_once, 0.0, 0.0, 0, 0
    for start in range(0, job.plan.num_images, batch):
        on_progress("calibrate", images, job.plan.num_images, "images")
        decoded, seconds = job.extractor.decode_all(range(start, min(start + batch, job.plan.num_images)))
        decoding, images = decoding + seconds, images + len(decoded)
        pixels = [picture for picture, _ in decoded if picture is not None]
        if pixels:
            if not valid:
                _timed(job, torch.stack(pixels))  # the first one allocates, compiles and tunes
            model, valid = model + _timed(job, torch.stack(pixels)), valid + len(pixels)
        if max(decoding, model) > CALIBRATION_SECONDS:
            break
    return images / decoding, valid / model if valid else float("inf")


def _timed(job: Job, image_BCHW: torch.Tensor) -> float:
    started = time.perf_counter()
    image_features(job.config, job.extractor.model, job.extractor.fitting, image_BCHW)
    return time.perf_counter() - started


def _text_rate(job: Job, on_progress: OnProgress) -> float:
    names = {spec.name for spec in job.arrays if spec.side == "text"}
    model, fitting, done, seconds = job.extractor.model, job.extractor.fitting, 0, 0.0
    if not names:
        return float("inf")
    for start in range(0, job.plan.num_texts, 4 * job.config.batch):
        on_progress("calibrate", done, job.plan.num_texts, "texts")
        texts = job.plan.texts(start, min(start + 4 * job.config.batch, job.plan.num_texts))
        started = time.perf_counter()
        if "text/embedding" in names:
            fitting.run("text", lambda some: (encode_text(model, some),), list(dict.fromkeys(texts)))[0].cpu()
        if "text/tokens" in names:
            fitting.run("text", lambda some: encode_text_tokens(model, some, job.config.token_layer), texts)[0].cpu()
        seconds, done = seconds + time.perf_counter() - started, done + len(texts)
        if seconds > CALIBRATION_SECONDS:
            break
    return done / seconds

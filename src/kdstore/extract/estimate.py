"""What an extraction would take, from its plan and a short calibration; nothing is written."""

from __future__ import annotations

import functools
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from kdstore.data.source import Source
from kdstore.extract.arrays import feature_shapes
from kdstore.extract.config import ExtractConfig
from kdstore.extract.fit import chains_of, encoded, image_features, text_features
from kdstore.extract.job import Job, needed_bytes, prepare, present_folder
from kdstore.models.load import pick_device
from kdstore.progress import OnProgress, silent
from kdstore.store import fit_chain

CALIBRATION_SECONDS = 10.0  # of each stage, at most one batch longer
NOISE_VECTORS = 2048
_Encode = Callable[[dict[str, npt.NDArray[Any]]], None]


@dataclass(frozen=True)
class Estimate:
    """Rows, bytes and files of a store to be written, the free space where it would lie, and the hours that it takes at the rates measured here.

    Rates are per second, of one process, 0 for what need not be done; `..._written` are those of encoding for the store, in one thread, without the disk.
    `hours` are of the slowest of reading, model and writing, shared by `processes` at work at once, without the start of each.
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
    images_written: float
    texts_encoded: float
    texts_written: float
    bottleneck: str
    processes: int
    hours: float
    notices: tuple[str, ...]


def estimate(config: ExtractConfig, *, source: Source | None = None, on_progress: OnProgress = silent) -> Estimate:
    """Plan an extraction and time a few batches of it; raises what `extract` raises before its first unit, but for DiskFull."""
    notices: list[str] = []
    processes = _at_once(config, notices.append)
    alone = replace(config, workers=0) if processes == 1 else config  # else it decodes in a worker's share of the cores
    job = prepare(alone, notices.append, on_progress, source=source, fit=False)
    plan, encode = job.plan, _encoder(job)
    try:
        read, *of_images = _image_rates(job, encode, on_progress)
        of_texts = _text_rates(job, encode, on_progress)
    finally:
        job.extractor.close()
    model, writing = (plan.num_images / image + plan.num_texts / text for image, text in zip(of_images, of_texts, strict=True))
    stages = {"reading": plan.num_images / read, "model": model, "writing": writing}
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
        images_encoded=_finite(of_images[0]),
        images_written=_finite(of_images[1]),
        texts_encoded=_finite(of_texts[0]),
        texts_written=_finite(of_texts[1]),
        bottleneck=max(stages, key=lambda name: stages[name]),
        processes=processes,
        hours=max(stages.values()) / processes / 3600,
        notices=tuple(notices),
    )


def _at_once(config: ExtractConfig, say: Callable[[str], None]) -> int:
    """Return by how many processes the hours are shared, those with a GPU or a machine of their own; `say` is told where these are not all."""
    if config.scheduler:
        say("The hours are per worker: divide them by how many the scheduler has.")
    if not config.workers:
        return (config.part_of or (1, 1))[1]
    devices = max(1, torch.cuda.device_count()) if pick_device(config.device).type == "cuda" else 1
    if config.workers > devices:
        say(f"{config.workers} workers share {'one device' if devices == 1 else f'{devices} devices'}: the hours are those of {devices} at once.")
    return min(config.workers, devices)


def _finite(rate: float) -> float:
    return round(rate, 2) if math.isfinite(rate) else 0.0


def _encoder(job: Job) -> _Encode:
    """Return what encodes features as a run does. Codecs are fitted on noise: their time does not depend on the numbers, and there is enough of it."""
    shapes, codecs = feature_shapes(job.config, job.extractor.model), {}
    for name, chain in chains_of(job.config).items():
        if not chain.plain:
            codecs[name] = fit_chain(chain, shapes[name], np.random.default_rng(0).standard_normal((NOISE_VECTORS, shapes[name][-1]), np.float32))
    dtypes = {spec.name: spec.dtype for spec in job.arrays}

    def encode(features: dict[str, npt.NDArray[Any]]) -> None:
        for name in features.keys() & shapes.keys():
            encoded(name, features[name], codecs.get(name), dtypes[name], refuse=False)

    return encode


def _image_rates(job: Job, encode: _Encode, on_progress: OnProgress) -> tuple[float, float, float]:
    """Return images per second of decoding in all threads, of the model and of encoding, over the first batches; infinite where the images need not be read."""
    if not any(spec.side == "image" for spec in job.arrays):
        return math.inf, math.inf, math.inf
    batch, reading, images, valid, model, writing = job.extractor.images_at_once, 0.0, 0, 0, 0.0, 0.0
    for start in range(0, job.plan.num_images, batch):
        on_progress("calibrate images", images, job.plan.num_images, "")
        decoded, seconds = job.extractor.decode_all(range(start, min(start + batch, job.plan.num_images)))
        reading, images = reading + seconds, images + len(decoded)
        pixels = [picture for picture, _ in decoded if picture is not None]
        if pixels:
            compute = functools.partial(image_features, job.config, job.extractor.model, job.extractor.fitting, torch.stack(pixels))
            if not valid:
                compute()  # the first one allocates, compiles and tunes
            computed, encoded_in = _timed(compute, encode)
            model, writing, valid = model + computed, writing + encoded_in, valid + len(pixels)
        if max(reading, model, writing) > CALIBRATION_SECONDS:
            break
    return images / reading, valid / model if valid else math.inf, valid / writing if valid else math.inf


def _text_rates(job: Job, encode: _Encode, on_progress: OnProgress) -> tuple[float, float]:
    """Return texts per second of the model and of encoding, over the first batches; infinite where nothing is computed of texts."""
    texts, done, model, writing = job.plan.num_texts, 0, 0.0, 0.0
    if not any(spec.side == "text" for spec in job.arrays):
        return math.inf, math.inf
    for start in range(0, texts, 4 * job.config.batch):
        on_progress("calibrate texts", done, texts, "")
        part = job.plan.texts(start, min(start + 4 * job.config.batch, texts))
        distinct = list(dict.fromkeys(part))
        computed, encoded_in = _timed(functools.partial(text_features, job.config, job.extractor.model, job.extractor.fitting, distinct), encode)
        model, writing, done = model + computed, writing + encoded_in * len(part) / len(distinct), done + len(part)
        if max(model, writing) > CALIBRATION_SECONDS:
            break
    return done / model, done / writing


def _timed(compute: Callable[[], dict[str, npt.NDArray[Any]]], encode: _Encode) -> tuple[float, float]:
    """Return the seconds of computing some features, and of encoding them."""
    started = time.perf_counter()
    features = compute()
    computed = time.perf_counter()
    encode(features)
    return computed - started, time.perf_counter() - computed

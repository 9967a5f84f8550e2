"""How fast this machine is at the work of a study, from seconds of it: towers that encode and that train, heads, images read, and the start of a process.

Weights are random and images are blank: neither takes longer or shorter for it, so nothing has to be fetched. What is too large to be built here in seconds
gets the rate of the next smaller model, and the plan says so.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from kdstore.data.source import Source, UndecodableImage
from kdstore.distill.optimiser import choose_precision
from kdstore.evaluate.features import Images
from kdstore.evaluate.fit import Lessons, build_head, fit_head
from kdstore.evaluate.packing import pack_questions
from kdstore.evaluate.protocol import VqaConfig
from kdstore.models.cost import Cost, build_without_weights, samples_of
from kdstore.models.load import DTYPES, pick_device
from kdstore.progress import OnProgress, silent

SECONDS = 1.0  # of each thing that is timed, at most one batch longer
MOST_PARAMETERS = 500_000_000  # of a model that is built here
BATCH_GMACS = {"cpu": 50.0, "cuda": 10_000.0}  # of the forward passes in a batch that is timed
WORDS = 8  # of a question that is timed
IMPORTS = "import kdstore.distill.train, kdstore.evaluate.vqa"
Clock = Callable[[], float]


@dataclass(frozen=True)
class Rates:
    """GMACs per second by model, of towers that encode and of the forward and backward passes of towers that train; questions per second that a head learns
    from (None: their GMACs count, at the rate of the student); images per second that are read (None: free); seconds of a process's start.

    `source` says where the numbers are from. Reading runs beside the work of a GPU and shares the cores with that of a CPU: `beside`.
    """

    device: str
    source: str
    encode: dict[str, float]
    train: dict[str, float]
    questions: float | None = None
    images_read: float | None = None
    start: float = 0.0
    beside: bool = False
    notes: tuple[str, ...] = field(default=())


def measure_rates(
    encoders: dict[str, Cost],
    students: dict[str, Cost],
    vqa: VqaConfig,
    source: Source | None,
    *,
    device: str = "auto",
    precision: str = "auto",
    batch_size: int = 256,
    on_progress: OnProgress = silent,
) -> Rates:
    """Time the models of a study on this machine, by name with what they cost, and its head on what the first student gives."""
    target = pick_device(device)
    notes: list[str] = []
    total, done = len(encoders) + len(students) + 1, 0

    def timed(names: dict[str, Cost], rate_of: Callable[[str, Cost], float]) -> dict[str, float]:
        nonlocal done
        rates: dict[str, float] = {}
        for name, cost in sorted(names.items(), key=lambda item: item[1].parameters):
            on_progress("calibrate", done, total, name)
            done += 1
            if cost.parameters <= MOST_PARAMETERS:
                rates[name] = last = rate_of(name, cost)
                before = name
            elif rates:
                rates[name] = last
                notes.append(f"{name} is too large to be timed in seconds: it is given the rate of {before}.")
        return rates

    encode = timed(encoders, lambda name, cost: encoding_rate(name, cost, target))
    train = timed(students, lambda name, cost: training_rate(name, cost, target, precision, batch_size))
    on_progress("calibrate", total - 1, total, "head")
    head = _head_rate(vqa, next(iter(students.values())), target)
    read = None if source is None else _reading_rate(source)
    start = _starting_seconds()
    on_progress("calibrate", total, total, "")
    cores = f", {torch.get_num_threads()} threads" if target.type == "cpu" else ""
    where = torch.cuda.get_device_name(target) if target.type == "cuda" else "this machine's CPU"
    return Rates(f"{where}{cores}", "measured here", encode, train, head, read, start, target.type != "cpu", tuple(notes))


def encoding_rate(name: str, cost: Cost, device: torch.device, precision: str = "fp32", *, clock: Clock = time.perf_counter) -> float:
    """Return the GMACs per second of an image tower's forward pass."""
    clip = build_without_weights(name, device).eval()
    image_BCHW, _ = samples_of(clip, batch := _batch(cost.image_gmacs, device), device)

    def forward() -> None:
        with torch.inference_mode(), torch.autocast(device.type, DTYPES[precision], enabled=precision != "fp32"):
            clip.encode_image(image_BCHW)

    return batch * cost.image_gmacs / _seconds_each(forward, device, clock)


def training_rate(name: str, cost: Cost, device: torch.device, precision: str = "auto", most: int = 256, *, clock: Clock = time.perf_counter) -> float:
    """Return the GMACs per second of both towers in steps of the task's loss, three for each of their forward passes."""
    clip = build_without_weights(name, device).train()
    pair = cost.image_gmacs + cost.text_gmacs
    image_BCHW, tokens_BL = samples_of(clip, batch := min(most, _batch(3 * pair, device)), device)
    optimiser = torch.optim.AdamW(clip.parameters(), fused=True)
    dtype, label_B = DTYPES[choose_precision(precision, device)], torch.arange(batch, device=device)

    def step() -> None:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            image_BD, text_BD = clip.encode_image(image_BCHW, normalize=True), clip.encode_text(tokens_BL, normalize=True)
        logits_BB = clip.logit_scale.exp() * image_BD.float() @ text_BD.float().T
        loss = F.cross_entropy(logits_BB, label_B) + F.cross_entropy(logits_BB.T, label_B)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()

    return batch * 3 * pair / _seconds_each(step, device, clock)


def _batch(gmacs: float, device: torch.device) -> int:
    return max(2, min(256, int(BATCH_GMACS["cpu" if device.type == "cpu" else "cuda"] / gmacs)))


def _seconds_each(work: Callable[[], Any], device: torch.device, clock: Clock) -> float:
    """Return the median of the seconds that some work takes, after a first time that allocates and tunes."""
    taken: list[float] = []
    while len(taken) < 2 or sum(taken[1:]) < SECONDS:
        started = clock()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(clock() - started)
    return statistics.median(taken[1:])


def _head_rate(config: VqaConfig, cost: Cost, device: torch.device, answers: int = 100) -> float:
    """Return the questions per second that a head learns from, four to an image, on random features of a model."""
    per_image, (tokens, width) = 4, cost.tokens
    tokens = config.grid**2 if config.grid else tokens

    def lesson(batches: int) -> float:
        images = batches * config.batch_images
        feature_UTW = torch.randn(images, tokens, width)
        rows = pack_questions([range(2, 2 + WORDS)] * (images * per_image), [(i,) for i in range(images) for _ in range(per_image)])
        head = build_head(config, width, answers, num_words=WORDS)
        lessons = Lessons(Images(width, lambda numbers_U: feature_UTW[torch.from_numpy(numbers_U)]), rows, [{0: 1.0}] * (images * per_image))
        started = time.perf_counter()
        fit_head(nn.ModuleDict({"head": head}), lessons, config, 0, device)
        return images * per_image * config.epochs / (time.perf_counter() - started)

    lesson(1)
    return lesson(max(2, 24 // config.epochs))


def _reading_rate(source: Source) -> float:
    """Return the images per second that one thread reads."""
    read, started = 0, time.perf_counter()
    for i in range(len(source)):
        try:
            source.image(i)
        except UndecodableImage:
            continue
        read += 1
        if time.perf_counter() - started > SECONDS:
            break
    return max(1, read) / (time.perf_counter() - started)


def _starting_seconds() -> float:
    """Return how long a process takes before it begins to work: each task has one of its own."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", IMPORTS], check=True)
    return time.perf_counter() - started


def fixed_rates(device: str, source: str, encoders: Iterable[str], teacher: float, students: Iterable[str], student: float) -> Rates:
    """Return the rates that a recipe gives: one for models that encode, one for students."""
    names = list(students)
    return Rates(device, source, dict.fromkeys(encoders, teacher) | dict.fromkeys(names, student), dict.fromkeys(names, student), beside=True)

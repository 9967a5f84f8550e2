"""What a training step costs: from a store, with no teacher, and with a live teacher in open_clip's own training code, in one run.

Ours is `distill` itself, timed step by step, with its reading threads; theirs is open_clip_train's `train_one_epoch` with DistillClipLoss (and ClipLoss
without a teacher) on batches that lie ready in memory, with the same student, optimiser and batch. Weights of all models are random, and so are the features
of the stores, float16 of each teacher's width: neither changes what a step costs, and running the teacher over all images would take hours. Pictures are
noise of 256 x 256 pixels in memory. The ways take turns; a turn drops its first step, a ratio is the median over the repeats of one repeat's medians.

The headline is wall time, which is what a user waits for: reading that hides behind the step costs nothing there. Process time (CPU seconds of all threads) is
beside it, because it does not count what other programs take: believe a wall ratio only where the machine is idle and both agree.

`break_even_epochs`: after how many epochs extraction (one forward pass of the teacher per pair, timed in the same run) and training from the store take less
than training with the live teacher.

    python benchmarks/step.py [--teachers ViT-B-32 ViT-B-16 ViT-L-14] [--student ViT-T-16] [--loss soft-ce] [--batch 16] [--steps 4] [--repeats 3]
        [--store-only] [--json]
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import open_clip
import torch
from open_clip.loss import ClipLoss, DistillClipLoss
from open_clip_train.train import train_one_epoch
from pictures import Pictures

from kdstore.distill.config import DistillConfig
from kdstore.distill.optimiser import choose_precision, make_optimiser
from kdstore.distill.train import distill
from kdstore.models.encode import encode_image, encode_text
from kdstore.models.load import Model, load_model
from kdstore.models.names import resolve
from kdstore.store import Plan, StoreWriter, embedding_array

Clock = tuple[float, float]  # seconds of wall time, and of this process on all cores
CLOCKS = ("wall", "process")
OF_OPEN_CLIP = {"fp32": "fp32", "bf16": "amp_bf16", "fp16": "amp"}


class Enough(Exception):
    """Ends a run of ours that has shown enough steps."""


@dataclass(frozen=True)
class Bench:
    """What all ways share."""

    student: str
    loss: str
    batch: int
    steps: int  # of a turn, the first one of which is dropped
    device: str
    precision: str
    folder: Path
    source: Pictures


def now(device: torch.device | str) -> Clock:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter(), time.process_time()


def step_of(times: list[Clock]) -> Clock:
    """Return the median time between neighbouring moments."""
    steps = [(b[0] - a[0], b[1] - a[1]) for a, b in itertools.pairwise(times)]
    return statistics.median(wall for wall, _ in steps), statistics.median(process for _, process in steps)


def write_store(path: Path, source: Pictures, width: int) -> None:
    """Write a store of random embeddings of the source's pairs."""
    plan = Plan.freeze((source.key(i), source.captions(i)) for i in range(len(source)))
    arrays = [embedding_array(plan, side, width) for side in ("image", "text")]
    identity = {"format": 1, "teacher": {"name": f"random-{width}", "embed_dim": width, "logit_scale": 100.0}, "source": {"fingerprint": plan.fingerprint}}
    with StoreWriter.open(path, plan=plan, arrays=arrays, identity=identity) as writer:
        for unit in writer.pending():
            rows = np.random.default_rng(unit.start).standard_normal((unit.stop - unit.start, width)).astype(np.float16)
            with writer.attempt(unit) as attempt:
                attempt.append(f"{unit.side}/embedding", rows[:, None] if unit.side == "image" else rows)
                if unit.side == "image":
                    found = [source.image(i).sha256 for i in range(unit.start, unit.stop)]
                    attempt.index([{"sha256": sha256, "valid": True, "reason": "", "width": 256, "height": 256} for sha256 in found])
        writer.finalise({"source": source.spec})


def ours(bench: Bench, store: Path | None) -> Clock:
    """Time steps of `distill`, from a store or alone."""
    times: list[Clock] = []  # the end of each step

    def on_progress(stage: str, done: int, total: int, note: str = "") -> None:
        if stage == "distill":
            times.append(now(bench.device))
            if done == bench.steps + 1:
                raise Enough

    config = DistillConfig(
        cache=None if store is None else str(store),
        student=bench.student,
        loss="none" if store is None else bench.loss,
        out=tempfile.mkdtemp(dir=bench.folder),
        samples=1000 * bench.batch,
        batch_size=bench.batch,
        device=bench.device,
        log_every=1,
    )
    try:
        distill(config, source=bench.source, on_progress=on_progress)
    except Enough:
        return step_of(times)
    raise AssertionError("a run of ours ended before its time")


def theirs(bench: Bench, student: Model, batches: list[tuple[torch.Tensor, torch.Tensor]], teacher: Model | None) -> Clock:
    """Time steps of open_clip's training, with a live teacher or alone."""
    times: list[Clock] = []  # the beginning of each step

    def watched() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for i in range(bench.steps + 1):
            times.append(now(bench.device))
            yield batches[i % len(batches)]

    class Loader:
        num_batches, num_samples = bench.steps + 1, (bench.steps + 1) * bench.batch

        def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
            return watched()

    names = {"device": bench.device, "precision": OF_OPEN_CLIP[bench.precision], "distill": teacher is not None, "batch_size": bench.batch}
    fixed = {"accum_freq": 1, "skip_scheduler": True, "grad_clip_norm": 1.0, "horovod": False, "log_every_n_steps": 1}
    alone = {"world_size": 1, "rank": 0, "wandb": False}
    data = {"train": SimpleNamespace(set_epoch=lambda epoch: None, dataloader=Loader())}
    optimiser = make_optimiser(student.clip.parameters(), lr=1e-3, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.1)
    scaler = torch.amp.GradScaler(bench.device) if bench.precision == "fp16" else None
    loss: Callable[..., Any] = ClipLoss() if teacher is None else DistillClipLoss()
    train_one_epoch(student.clip, data, loss, 0, optimiser, scaler, None, teacher and teacher.clip, SimpleNamespace(**names, **fixed, **alone))
    return step_of([*times[1:], now(bench.device)])


def forward(bench: Bench, teacher: Model, batch: torch.Tensor, texts: list[str]) -> Clock:
    """Time what extraction needs for a batch: the median of forward passes of both towers, their results back on the host."""
    times: list[Clock] = []
    for _ in range(bench.steps + 1):
        times.append(now(bench.device))
        encode_image(teacher, batch).cpu()
        encode_text(teacher, texts).cpu()
    return step_of([*times[1:], now(bench.device)])


def with_outputs(model: Model) -> Model:
    """Let a model return a dict, as open_clip's training wants it."""
    model.clip.output_dict = True
    return model


def report(taken: dict[str, list[Clock]], teachers: list[str]) -> dict[str, Any]:
    """Put repeats together: seconds of a step, ratios of one repeat's turns, and the epochs from which a store pays."""

    def ratio(a: str, b: str, clock: int) -> float:
        return statistics.median(x[clock] / y[clock] for x, y in zip(taken[a], taken[b], strict=True))

    found: dict[str, Any] = {}
    for k, clock in enumerate(CLOCKS):
        found[f"seconds_{clock}"] = {way: round(statistics.median(turn[k] for turn in turns), 4) for way, turns in taken.items()}
        found[f"of_no_teacher_{clock}"] = {name: round(ratio(f"store {name}", "no teacher", k), 4) for name in teachers}
        if f"online {teachers[0]}" in taken:
            found[f"online_of_store_{clock}"] = {name: round(ratio(f"online {name}", f"store {name}", k), 3) for name in teachers}
            epochs = {}
            for name in teachers:
                ways = zip(*(taken[f"{way} {name}"] for way in ("forward", "online", "store")), strict=True)
                values = [once[k] / (online[k] - store[k]) if online[k] > store[k] else math.inf for once, online, store in ways]
                epochs[name] = round(statistics.median(values), 3)
            found[f"break_even_epochs_{clock}"] = epochs
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teachers", nargs="+", default=["ViT-B-32", "ViT-B-16", "ViT-L-14"], help="architectures; H-14 and bigG-14 need 4 and 10 GB")
    parser.add_argument("--student", default="ViT-T-16")
    parser.add_argument("--loss", default="soft-ce", help="of ours; soft-ce is open_clip's")
    parser.add_argument("--images", type=int, default=4096, help="rows of the stores")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=4, help="of a turn, after one that is dropped")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--store-only", action="store_true", help="leave out open_clip and the live teachers: only the limit of 1.03")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    source, precision = Pictures(args.images), choose_precision("auto", torch.device(args.device))
    taken: dict[str, list[Clock]] = {}
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(args.student, args.loss, args.batch, args.steps, args.device, precision, Path(folder), source)
        ways: dict[str, Callable[[], Clock]] = {"no teacher": lambda: ours(bench, None)}
        widths = {name: open_clip.get_model_config(resolve(name, untrained=True).open_clip_name)["embed_dim"] for name in args.teachers}
        for name, width in widths.items():
            if not (store := bench.folder / f"random-{width}").exists():
                write_store(store, source, width)
            ways[f"store {name}"] = lambda store=store: ours(bench, store)
        if not args.store_only:
            student = with_outputs(load_model(args.student, untrained=True, device=args.device))
            texts = [source.captions(i)[0].text for i in range(args.batch)]
            pixels = torch.stack([student.preprocess(source.image(i).image) for i in range(args.batch)])
            batches = [(pixels, student.tokenizer(texts))]
            ways["open_clip, no teacher"] = lambda: theirs(bench, student, batches, None)
            for name in args.teachers:
                teacher = with_outputs(load_model(name, untrained=True, device=args.device, precision=precision))
                ways[f"online {name}"] = lambda teacher=teacher: theirs(bench, student, batches, teacher)
                ways[f"forward {name}"] = lambda teacher=teacher: forward(bench, teacher, pixels, texts)
        for repeat in range(args.repeats):
            for way in ways if repeat % 2 else reversed(ways):
                taken.setdefault(way, []).append(ways[way]())
    settings = {name: getattr(args, name) for name in ("student", "loss", "batch", "steps", "repeats", "device")}
    machine = {"precision": precision, "cores": len(os.sched_getaffinity(0)), "threads": torch.get_num_threads()}
    found = {**settings, **machine, **report(taken, args.teachers)}
    print(json.dumps(found) if args.json else "\n".join(f"{name:>26}  {value}" for name, value in found.items()))


if __name__ == "__main__":
    main()

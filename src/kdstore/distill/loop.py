"""The training loop: one step, many steps, and stopping between two of them.

Losses stay on the device until they are logged or saved, so that no step waits for a number. A step whose loss or gradient is not finite changes nothing: the
device itself leaves the update out, and the count of such steps is looked at when numbers are fetched. Random numbers of a step (dropout) follow from the
seed, the step and the place in the batch, so there is no random state to keep, and a run goes on alike with another number of processes.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from kdstore.distill.batches import Batch
from kdstore.distill.config import DistillConfig
from kdstore.distill.distributed import Share
from kdstore.distill.ema import Average
from kdstore.distill.encoded import Encoded, map_rows
from kdstore.distill.gradients import whole_batch_gradients
from kdstore.distill.objective import Objective
from kdstore.distill.optimiser import MAX_LOG_SCALE, learning_rate, make_optimiser
from kdstore.distill.runfolder import LOG, VALIDATION, Log, save_checkpoint
from kdstore.errors import Interrupted, KdstoreError, RunError
from kdstore.models import towers
from kdstore.models.checkpoint import checkpoint_bytes
from kdstore.progress import OnProgress
from kdstore.stopping import held_signals
from kdstore.store.ahead import read_ahead
from kdstore.store.order import DROPOUT, draw

RECENT = 50  # steps that the rate on the progress line is of


@dataclass(eq=False)
class Training:
    """A student in training: everything that a checkpoint holds, and how to take a step with it."""

    config: DistillConfig
    steps: int
    clip: nn.Module
    objective: Objective
    finish: Callable[[Tensor], Tensor]  # kept views -> input of the student
    device: torch.device
    precision: torch.dtype
    share: Share
    step: int = 0
    seconds: float = 0.0
    waited: float = 0.0  # seconds in which the step waited for data
    skipped: int = 0  # steps whose loss or gradient was not finite
    in_a_row: int = 0  # of these, the latest without a good one between
    latest: dict[str, float] = field(default_factory=dict)
    validation: dict[str, float] = field(default_factory=dict)  # the latest scores

    def __post_init__(self) -> None:
        c = self.config
        self.parameters = [p for p in (*self.clip.parameters(), *self.objective.parameters()) if p.requires_grad]
        self.optimiser = make_optimiser(self.parameters, lr=c.lr, betas=(c.beta1, c.beta2), eps=c.eps, weight_decay=c.weight_decay)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == torch.float16)
        self.max_log_scale = max(MAX_LOG_SCALE, self.clip.logit_scale.item())  # type: ignore[operator]  # published SigLIP models begin above it
        self.average = Average(self.clip, c.ema) if c.ema else None
        self.statistics = [buffer for module in self.clip.modules() if isinstance(module, _BatchNorm) for buffer in module.buffers()]
        self.statistics_of = self.share.piece * self.share.world.size if self.statistics else None  # batch norm's; it is synchronised
        self.run_encode = torch.compile(self.encode) if c.compile else self.encode

    def encode(self, batch: Batch) -> Encoded:
        """Run the student's towers on a batch, or a part of one."""
        with torch.autocast(self.device.type, self.precision, enabled=self.precision != torch.float32):
            image_BCHW, tokens_BTW = self.finish(batch.views_BCHW), None
            if "tokens" in self.objective.parts:
                image_BS, tokens_BTW = towers.image_tokens(self.clip, image_BCHW, None)
            else:
                image_BS = towers.image_embedding(self.clip, image_BCHW)
            synthetic_BS = None if batch.synthetic_BL is None else towers.text_embedding(self.clip, batch.synthetic_BL)
            return Encoded(image_BS, towers.text_embedding(self.clip, batch.tokens_BL), synthetic_BS, tokens_BTW)

    def take(self, batch: Batch) -> Tensor:
        """Take one optimisation step with this process's share of a batch; returns `names`, of the whole batch, as one tensor on the device."""
        for group in self.optimiser.param_groups:
            group["lr"] = self.learning_rate
        self.optimiser.zero_grad()
        statistics = [buffer.clone() for buffer in self.statistics]
        scale, bias = self.clip.logit_scale.exp(), getattr(self.clip, "logit_bias", None)  # type: ignore[operator]
        told = map_rows(self.share.whole, batch.told)
        loss, values = whole_batch_gradients(
            [partial(self._encode_piece, batch, i) for i in range(self.share.rounds)],
            lambda encoded: self.objective(encoded, scale, bias, told),
            self.clip,
            self.parameters,
            self.share,
            scaled=self.scaler.scale,
            same_graph=self.config.compile,
        )
        self.scaler.unscale_(self.optimiser)
        norm = nn.utils.clip_grad_norm_(self.parameters, self.config.grad_clip or math.inf)
        broken = ~(loss.isfinite() & norm.isfinite())
        if not self.scaler.is_enabled():
            self.optimiser.found_inf = broken.float()  # type: ignore[attr-defined]  # what tells a fused optimiser to leave everything as it is
        self.scaler.step(self.optimiser)
        self.scaler.update()
        with torch.no_grad():
            for buffer, before in zip(self.statistics, statistics, strict=True):
                buffer.copy_(torch.where(broken, before, buffer))
            self.clip.logit_scale.clamp_(0, self.max_log_scale)  # type: ignore[operator]
        self.step += 1
        if self.average is not None:
            self.average.update(self.clip, self.step, broken)
        return torch.stack([loss, *values.values(), norm, scale.squeeze()]).detach()

    def _encode_piece(self, batch: Batch, i: int) -> Encoded:
        """Encode the i-th piece of this process's share, with the random numbers of its place in the global batch."""
        torch.manual_seed(int(draw(self.config.seed, self.step, DROPOUT, self.share.start(i))[0]))
        return self.run_encode(map_rows(lambda rows: rows.narrow(0, i * self.share.piece, self.share.piece), batch))

    @property
    def names(self) -> tuple[str, ...]:
        """What `take` returns."""
        return ("loss", *self.objective.terms, "grad_norm", "logit_scale")

    @property
    def learning_rate(self) -> float:
        """The learning rate of the next step."""
        return learning_rate(self.step, steps=self.steps, warmup_steps=round(self.config.warmup * self.steps), peak=self.config.lr)

    def count(self, step: int, values: dict[str, float]) -> None:
        """Count a step that was left out; raises RunError if too many in a row were.

        Under gradient scaling a norm may overflow, which lowers the scale and is no sign of a broken run until the scale is below 1.
        """
        bad = {name: value for name, value in values.items() if not math.isfinite(value)}
        self.skipped += bool({"loss", "grad_norm"} & bad.keys())
        overflows = self.scaler.is_enabled() and "loss" not in bad and self.scaler.get_scale() >= 1
        self.in_a_row = self.in_a_row + 1 if {"loss", "grad_norm"} & bad.keys() and not overflows else 0
        if self.in_a_row >= self.config.max_skipped:
            said = ", ".join(f"{name} is {value}" for name, value in bad.items())
            in_a_row = f", in each of {self.in_a_row} steps" if self.in_a_row > 1 else ""
            raise RunError(
                f"Training broke at step {step - self.in_a_row + 1}: {said}{in_a_row}.",
                "Lower lr, raise warmup or set grad_clip; if it is step 1, run kdstore store verify.",
            )

    def checkpoint(self, settings_digest: str) -> bytes:
        """Return everything that decides how the run of these settings goes on."""
        state = {
            "clip": self.clip.state_dict(),
            "objective": self.objective.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "scaler": self.scaler.state_dict(),
            "average": None if self.average is None else self.average.student.state_dict(),
            "clock": {name: getattr(self, name) for name in CLOCK},
            "latest": self.latest,
            "validation": self.validation,
            "statistics_of": self.statistics_of,
            "settings": settings_digest,
        }
        return checkpoint_bytes(state)

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where a checkpoint of this state was taken; raises RunError if batch norm would see another number of pairs at once."""
        if state["statistics_of"] != self.statistics_of:
            raise RunError(
                f"Batch norm saw {state['statistics_of']} pairs at once in this run, and would see {self.statistics_of}.",
                "Give the micro_batch and the number of processes that the run was begun with.",
            )
        self.clip.load_state_dict(state["clip"])
        self.objective.load_state_dict(state["objective"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.scaler.load_state_dict(state["scaler"])
        if self.average is not None:
            self.average.student.load_state_dict(state["average"])
        for name in CLOCK:
            setattr(self, name, state["clock"][name])
        self.latest, self.validation = state["latest"], state["validation"]


CLOCK = ("step", "seconds", "waited", "skipped", "in_a_row")


def train(
    training: Training,
    make: Callable[[int], Batch],
    path: Path,
    settings_digest: str,
    on_progress: OnProgress,
    validate: Callable[[Training], dict[str, float]] | None = None,
    stop: Callable[[], None] | None = None,
) -> None:
    """Take all remaining steps, logging and saving into the run folder; `make` makes this process's share of a batch, and `stop` lets it wait no longer.

    Raises RunError where too many steps in a row are not finite, what `make` and `validate` raise on any process, and for a signal, once saved, Interrupted.
    """
    t, config, world = training, training.config, training.share.world
    pending: list[tuple[int, float, Tensor]] = []
    recent: deque[tuple[float, float]] = deque([(t.seconds, t.waited)], maxlen=RECENT + 1)

    def settle() -> None:
        """Fetch the numbers of the steps since the last time; log those that are due."""
        rows = torch.stack([row for _, _, row in pending]).tolist() if pending else []
        with world.together():
            for (step, rate, _), row in zip(pending, rows, strict=True):
                values = dict(zip(t.names, row, strict=True))
                t.count(step, values)
                if step % config.log_every == 0 or step == t.steps:
                    t.latest = {name: value for name, value in values.items() if math.isfinite(value)}
                    log.write(LOG, {"step": step, "samples": step * config.batch_size, **t.latest, "lr": rate, "skipped": t.skipped})
        pending.clear()

    def save() -> None:
        settle()
        world.check_same(t.parameters, "weights")
        with world.together():
            if world.first:
                save_checkpoint(path, t.checkpoint(settings_digest))

    def coming() -> Batch:
        """Wait for the next batch; raises Interrupted where a signal has come to one of the processes."""
        asked, error, batch = time.perf_counter(), None, None
        try:
            batch = next(batches)
        except KdstoreError as e:
            error = None if isinstance(e, Interrupted) and signal_came() else e
        t.waited += time.perf_counter() - asked
        if signum := world.agree(error, signal_came()):
            save()
            raise Interrupted(f"Stopped at step {t.step} of {t.steps}; {path} holds a checkpoint.", signum=signum)
        assert batch is not None
        return batch.to(t.device)

    with world.together():
        log = Log(path, t.step, writes=world.first)
    batches = read_ahead(make, range(t.step, t.steps), config.threads)
    with closing(log), closing(batches), held_signals(world.size > 1, stop) as signal_came:
        began, seconds = time.perf_counter(), t.seconds
        while t.step < t.steps:
            batch, rate = coming(), t.learning_rate
            pending.append((t.step + 1, rate, t.take(batch)))
            if t.step % config.log_every == 0 or t.step == t.steps:
                settle()
            if validate is not None and (t.step % config.validate_every == 0 or t.step == t.steps):
                t.validation = validate(t)
                with world.together():
                    log.write(VALIDATION, {"step": t.step, **t.validation})
            t.seconds = seconds + time.perf_counter() - began
            recent.append((t.seconds, t.waited))
            on_progress("distill", t.step, t.steps, _note(t, recent))
            if t.step % config.save_every == 0 or t.step == t.steps:
                save()


def _note(t: Training, recent: deque[tuple[float, float]]) -> str:
    """Say how the latest steps went: loss, rate, the share of the time in which they waited for data, and steps that were left out."""
    loss = f"loss {t.latest['loss']:.3f}, " if "loss" in t.latest else ""
    seconds, waited = (b - a for a, b in zip(recent[0], recent[-1], strict=True))
    rate = (len(recent) - 1) * t.config.batch_size / seconds
    return f"{loss}{rate:.0f} samples/s, {waited / seconds:.0%} of the time waiting for data" + (f", {t.skipped} steps skipped" if t.skipped else "")

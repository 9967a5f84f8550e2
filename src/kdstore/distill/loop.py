"""The training loop: one step, many steps, and stopping between two of them.

Losses stay on the device until they are logged or saved, so that no step waits for a number; a loss that is not finite is still named by its own step.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdstore.distill.batches import Batch
from kdstore.distill.config import DistillConfig
from kdstore.distill.encoded import Encoded
from kdstore.distill.objective import Objective
from kdstore.distill.optimiser import MAX_LOG_SCALE, learning_rate, make_optimiser
from kdstore.distill.runfolder import Log, save_checkpoint
from kdstore.errors import Interrupted, RunError
from kdstore.progress import OnProgress
from kdstore.store.ahead import read_ahead


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
    step: int = 0
    seconds: float = 0.0
    waited: float = 0.0  # seconds in which the step waited for data
    latest: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        c = self.config
        self.parameters = [*self.clip.parameters(), *self.objective.parameters()]
        self.optimiser = make_optimiser(self.parameters, lr=c.lr, betas=(c.beta1, c.beta2), eps=c.eps, weight_decay=c.weight_decay)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == torch.float16)

    def encode(self, batch: Batch) -> Encoded:
        """Run the student's towers on a batch, or a part of one."""
        with torch.autocast(self.device.type, self.precision, enabled=self.precision != torch.float32):
            image_BS = self.clip.encode_image(self.finish(batch.views_BCHW), normalize=False)  # type: ignore[operator]
            return Encoded(image_BS, self.clip.encode_text(batch.tokens_BL, normalize=False))  # type: ignore[operator]

    def take(self, batch: Batch) -> Tensor:
        """Take one optimisation step; returns `names` as one tensor on the device."""
        for group in self.optimiser.param_groups:
            group["lr"] = self.learning_rate
        scale, bias = self.clip.logit_scale.exp(), getattr(self.clip, "logit_bias", None)  # type: ignore[operator]
        loss, values = self.objective(self.encode(batch), scale, bias, batch.told)
        self.optimiser.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimiser)
        norm = nn.utils.clip_grad_norm_(self.parameters, self.config.grad_clip or math.inf)
        self.scaler.step(self.optimiser)
        self.scaler.update()
        with torch.no_grad():
            self.clip.logit_scale.clamp_(0, MAX_LOG_SCALE)  # type: ignore[operator]
        self.step += 1
        return torch.stack([loss, *values.values(), norm, scale.squeeze()]).detach()

    @property
    def names(self) -> tuple[str, ...]:
        """What `take` returns."""
        return ("loss", *self.objective.terms, "grad_norm", "logit_scale")

    @property
    def learning_rate(self) -> float:
        """The learning rate of the next step."""
        return learning_rate(self.step, steps=self.steps, warmup_steps=round(self.config.warmup * self.steps), peak=self.config.lr)

    def state(self) -> dict[str, Any]:
        """Everything that decides how the run goes on."""
        cuda = {"cuda": torch.cuda.get_rng_state(self.device)} if self.device.type == "cuda" else {}
        return {
            "clip": self.clip.state_dict(),
            "objective": self.objective.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "scaler": self.scaler.state_dict(),
            "random": {"cpu": torch.get_rng_state(), **cuda},
            "clock": {"step": self.step, "seconds": self.seconds, "waited": self.waited},
            "latest": self.latest,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken."""
        self.clip.load_state_dict(state["clip"])
        self.objective.load_state_dict(state["objective"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.scaler.load_state_dict(state["scaler"])
        torch.set_rng_state(state["random"]["cpu"].cpu())
        if self.device.type == "cuda" and "cuda" in state["random"]:
            torch.cuda.set_rng_state(state["random"]["cuda"].cpu(), self.device)
        self.step, self.seconds, self.waited = (state["clock"][name] for name in ("step", "seconds", "waited"))
        self.latest = state["latest"]


def train(training: Training, make: Callable[[int], Batch], path: Path, settings_digest: str, on_progress: OnProgress) -> None:
    """Take all remaining steps, logging and saving into the run folder; raises RunError for a loss that is not finite and, once saved, Interrupted."""
    t, config = training, training.config
    pending: list[tuple[int, float, Tensor]] = []

    def settle() -> None:
        """Fetch the numbers of the steps since the last time; log those that are due."""
        rows = torch.stack([row for _, _, row in pending]).tolist() if pending else []
        for (step, rate, _), row in zip(pending, rows, strict=True):
            values = dict(zip(t.names, row, strict=True))
            _check_finite(step, values, scaled=t.scaler.is_enabled())
            if step % config.log_every == 0 or step == t.steps:
                t.latest = {name: value for name, value in values.items() if math.isfinite(value)}
                log.write({"step": step, "samples": step * config.batch_size, **t.latest, "lr": rate})
        pending.clear()

    def save() -> None:
        settle()
        save_checkpoint(path, {**t.state(), "settings": settings_digest})

    batches = read_ahead(make, range(t.step, t.steps), config.threads)
    with closing(Log(path, t.step)) as log, closing(batches), held_interrupt() as interrupted:
        began, seconds = time.perf_counter(), t.seconds
        while t.step < t.steps:
            asked = time.perf_counter()
            batch = next(batches).to(t.device)
            t.waited += time.perf_counter() - asked
            rate = t.learning_rate
            values = t.take(batch)
            pending.append((t.step, rate, values))
            if t.step % config.log_every == 0 or t.step == t.steps:
                settle()
            t.seconds = seconds + time.perf_counter() - began
            on_progress("distill", t.step, t.steps, _note(t))
            if interrupted() and t.step < t.steps:
                save()
                raise Interrupted(f"Stopped at step {t.step} of {t.steps}; {path} holds a checkpoint.")
            if t.step % config.save_every == 0 or t.step == t.steps:
                save()


@contextmanager
def held_interrupt() -> Iterator[Callable[[], bool]]:
    """Let the first Ctrl-C wait for the end of a step, and say whether it came; a second one interrupts at once.

    Only the main thread gets signals, and a process that ignores them (nohup) goes on doing so.
    """
    came = threading.Event()
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        yield came.is_set
        return

    def note(signum: int, frame: object) -> None:
        came.set()
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield came.is_set
    finally:
        signal.signal(signal.SIGINT, before)


def _check_finite(step: int, values: dict[str, float], *, scaled: bool) -> None:
    """Under gradient scaling a norm may overflow, which skips the step and lowers the scale; anything else ends the run."""
    bad = {name: value for name, value in values.items() if not math.isfinite(value) and not (scaled and name == "grad_norm")}
    if bad:
        said = ", ".join(f"{name} is {value}" for name, value in bad.items())
        raise RunError(f"Training broke at step {step}: {said}.", "Lower lr, raise warmup or set grad_clip; if it is step 1, run kdstore store verify.")


def _note(t: Training) -> str:
    loss = f"loss {t.latest['loss']:.3f}, " if t.latest else ""
    return f"{loss}{t.step * t.config.batch_size / t.seconds:.0f} samples/s"

"""Train a head, alone or with blocks of the image tower, and answer with it: no look at the evaluated split, the same result for the same seed.

Loss: binary cross-entropy with logits against soft targets, averaged over everything and multiplied by the number of answers, which is the sum
over answers and the mean over questions. Batches are of images, since all questions of an image share its keys and values; small ones, since a head learns
to bind attributes to objects by the number of steps more than by the number of questions.

All that a step depends on is a function of the seed and its number, so that a run that goes on from a checkpoint is the run that never stopped.

Shape suffixes as in `heads`; Q questions, K labels of a question, U different images of a batch.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from kdstore.errors import EvaluationError, Interrupted
from kdstore.evaluate.answers import START
from kdstore.evaluate.features import Images
from kdstore.evaluate.heads import HEADS, HeadShape, QuestionEncoder, TowerQuestions, WordQuestions
from kdstore.evaluate.packing import QuestionRows, packed_batch
from kdstore.evaluate.protocol import VqaConfig
from kdstore.jsonfile import write_bytes
from kdstore.models.checkpoint import checkpoint_bytes, parse_checkpoint
from kdstore.progress import OnProgress, silent
from kdstore.stopping import held_signals

LOOK_EVERY = 20
"""Steps between two looks at the loss: each waits for the device."""

LOWER_RATES = "Lower learning_rate, or tower_rate with --mode."


@dataclass(frozen=True, eq=False)
class Lessons:
    """Packed questions, the images that they are on, and the soft targets of each by label."""

    images: Images
    rows: QuestionRows
    targets: Sequence[dict[int, float]]


@dataclass(frozen=True)
class Kept:
    """Where the checkpoint of a fit lies, and the digest of all that decides the fit."""

    path: Path
    settings: str


def build_head(config: VqaConfig, image_width: int, num_answers: int, *, num_words: int, states: torch.Tensor | None = None, num_images: int = 1) -> nn.Module:
    """Build an untrained head; with `states` [words of all distinct questions, tower width] it reads these instead of learning words."""
    words = WordQuestions(START + 1 + num_words, config.width) if states is None else TowerQuestions(states, config.width)
    encoder = QuestionEncoder(words, config.width, config.attention_heads)
    return HEADS[config.head](HeadShape(image_width, num_images, num_answers, config.width, config.layers, config.attention_heads), encoder)


def fit_head(
    parts: nn.ModuleDict,
    lessons: Lessons,
    config: VqaConfig,
    seed: int,
    device: torch.device,
    *,
    held: Lessons | None = None,
    kept: Kept | None = None,
    on_progress: OnProgress = silent,
    stage: str = "head",
) -> dict[str, Any]:
    """Train the `head` of some parts in place, and of the `tower` that images come from, if it is one of them, what is trainable.

    Returns what a result says of it. With `held` questions the weights of the epoch that answers most of these remain. With `kept` it goes on from the
    checkpoint there, and leaves one every `save_every` steps, and for Ctrl-C or SIGTERM before it raises Interrupted. Raises EvaluationError for a loss
    that is not finite.
    """
    fit = _Fit(parts.to(device), lessons, config, seed, device)
    if kept is not None and kept.path.is_file():
        fit.restore(parse_checkpoint(kept.path.read_bytes(), kept.path, kept.settings, device))

    def save() -> None:
        if kept is not None:
            write_bytes(kept.path, checkpoint_bytes({**fit.state(), "settings": kept.settings}))

    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), held_signals(patient=False) as signal_came:
        while True:
            if signum := signal_came():
                fit.look(stage)
                save()
                where = f"; {kept.path.parent} holds a checkpoint" if kept else ""
                hint = "The same command goes on from there." if kept else "Give --out FILE to keep what is finished."
                raise Interrupted(f"Stopped at step {fit.step} of {fit.num_steps} of {stage}{where}.", hint, signum)
            if fit.step == fit.num_steps or fit.stale == config.patience:
                return fit.finish(stage)
            loss = fit.take()
            if fit.step % LOOK_EVERY == 0 or fit.step == fit.num_steps:
                fit.look(stage)
                on_progress(stage, fit.step, fit.num_steps, f"loss {loss.item():.3f}")
            if held is not None and fit.step % fit.per_epoch == 0:
                fit.choose(held_out_accuracy(parts, held, device))
            if fit.step % config.save_every == 0:
                save()


class _Fit:
    """The state of a fit between two steps."""

    def __init__(self, parts: nn.ModuleDict, lessons: Lessons, config: VqaConfig, seed: int, device: torch.device) -> None:
        self.parts, self.lessons, self.config, self.seed, self.device = parts, lessons, config, seed, device
        self.label_QK, self.score_QK = _padded_targets(lessons.targets)
        self.optimiser = _optimiser(parts, config)
        self.per_epoch = math.ceil(len(lessons.rows) / config.batch_images)
        self.num_steps = config.epochs * self.per_epoch
        self.step = 0
        self.losses: deque[torch.Tensor] = deque(maxlen=max(1, self.num_steps // 10))
        self.best: dict[str, Any] = {}
        self.stale = 0  # epochs since the best one

    def take(self) -> torch.Tensor:
        """Take one step; returns its loss, not yet looked at."""
        c, rows = self.config, self.lessons.rows
        epoch, place = divmod(self.step, self.per_epoch)
        chosen = np.random.default_rng((self.seed, epoch)).permutation(len(rows))[place * c.batch_images :][: c.batch_images]
        for group in self.optimiser.param_groups:
            group["lr"] = c.learning_rate * group["share"] * _schedule(self.step, self.num_steps, c.warmup)
        torch.manual_seed(int(np.random.default_rng((self.seed, self.step, 1)).integers(2**62)))  # of dropout
        self.parts.train()
        logits_QA = _logits(self.parts["head"], self.lessons.images, rows, chosen, self.device)
        target_QA = torch.zeros_like(logits_QA)
        asked = rows.question_RP[chosen]
        asked = asked[asked >= 0]
        target_QA.scatter_add_(1, self.label_QK[asked].to(self.device), self.score_QK[asked].to(self.device))
        loss = F.binary_cross_entropy_with_logits(logits_QA, target_QA) * logits_QA.shape[1]
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_((p for group in self.optimiser.param_groups for p in group["params"]), c.gradient_clip)
        self.optimiser.step()
        self.losses.append(loss.detach())
        self.step += 1
        return loss

    def look(self, stage: str) -> None:
        """Raise EvaluationError if one of the latest losses is not finite: weights are broken from there on."""
        recent = [loss.item() for loss in list(self.losses)[-LOOK_EVERY:]]
        for back, loss in enumerate(reversed(recent)):
            if not math.isfinite(loss):
                raise EvaluationError(f"The loss of {stage} is {loss} at step {self.step - back}.", LOWER_RATES)

    def choose(self, accuracy: float) -> None:
        """Keep the weights if no epoch before answered more of the questions held out."""
        self.stale += 1
        if not self.best or accuracy > self.best["accuracy"]:
            weights = {name: value.detach().clone() for name, value in self.parts.state_dict().items()}
            self.best, self.stale = {"accuracy": accuracy, "epoch": self.step // self.per_epoch, "weights": weights}, 0

    def finish(self, stage: str) -> dict[str, Any]:
        """Put the best weights in place; returns the mean loss of the last tenth of all steps, the steps taken and which epoch was chosen.

        Raises EvaluationError for weights that are not finite: no loss tells of the last step.
        """
        if self.best:
            self.parts.load_state_dict(self.best["weights"])
        if broken := [name for name, value in self.parts.state_dict().items() if not value.isfinite().all()]:
            raise EvaluationError(f"The weights of {stage} are not finite at step {self.step} (first: {broken[0]}).", LOWER_RATES)
        loss = float(torch.stack(list(self.losses)).mean()) if self.losses else None
        chosen = {"epoch": self.best["epoch"], "held_out_accuracy": round(100 * self.best["accuracy"], 2)} if self.best else {}
        return {"loss": loss, "steps": self.step, **chosen}

    def state(self) -> dict[str, Any]:
        return {
            "parts": self.parts.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "step": self.step,
            "stale": self.stale,
            "losses": [loss.item() for loss in self.losses],
            "best": self.best,
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.parts.load_state_dict(state["parts"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.step, self.stale, self.best = state["step"], state["stale"], state["best"]
        self.losses.extend(torch.tensor(loss, device=self.device) for loss in state["losses"])


@torch.no_grad()
def answer_questions(parts: nn.ModuleDict, images: Images, rows: QuestionRows, device: torch.device, *, batch_images: int = 64) -> np.ndarray:
    """Return the number of the most likely answer of each question, int64 [Q]; `parts` holds the head, and the tower that `images` come from."""
    parts.to(device).eval()
    answer_Q = np.empty(int(rows.question_RP.max()) + 1, np.int64)
    for chosen in _consecutive(len(rows), batch_images):
        question_RP = rows.question_RP[chosen]
        answer_Q[question_RP[question_RP >= 0]] = _logits(parts["head"], images, rows, chosen, device).argmax(dim=1).cpu().numpy()
    return answer_Q


def held_out_accuracy(parts: nn.ModuleDict, held: Lessons, device: torch.device) -> float:
    """Return the mean target of the answers given, 0 to 1: the accuracy, but that both sides are normalised."""
    answer_Q = answer_questions(parts, held.images, held.rows, device)
    return sum(target.get(int(answer), 0.0) for answer, target in zip(answer_Q, held.targets, strict=True)) / len(answer_Q)


def _optimiser(parts: nn.ModuleDict, config: VqaConfig) -> torch.optim.AdamW:
    """AdamW; the tower learns at a share of the head's rate. Matrices decay, gains and biases do not."""
    groups = [
        {"params": chosen, "weight_decay": config.weight_decay if decays else 0.0, "share": config.tower_rate if name == "tower" else 1.0}
        for name, part in parts.items()
        for decays in (True, False)
        if (chosen := [p for p in part.parameters() if p.requires_grad and (p.squeeze().ndim > 1) == decays])
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.98), fused=True)


def _logits(head: nn.Module, images: Images, rows: QuestionRows, chosen: np.ndarray, device: torch.device) -> torch.Tensor:
    """Return logits [Q, A] of the questions in the chosen rows, in their order."""
    numbers_U, place = np.unique(rows.image_RI[chosen], return_inverse=True)
    place_RI = torch.from_numpy(place.reshape(len(chosen), -1)).to(device)
    image_RTW = images.take(numbers_U).to(device)[place_RI].flatten(1, 2)
    questions = packed_batch(rows, chosen, device)
    return head(image_RTW, questions)[questions.start_RP >= 0]


def _padded_targets(targets: Sequence[dict[int, float]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return labels int64 and scores float32 [Q, K]; padding is label 0 with score 0."""
    num_labels = max(map(len, targets))
    label_QK = torch.zeros(len(targets), num_labels, dtype=torch.int64)
    score_QK = torch.zeros(len(targets), num_labels)
    for q, target in enumerate(targets):
        label_QK[q, : len(target)] = torch.tensor(list(target), dtype=torch.int64)
        score_QK[q, : len(target)] = torch.tensor(list(target.values()))
    return label_QK, score_QK


def _schedule(step: int, num_steps: int, warmup: float) -> float:
    """Rise linearly over the warm-up, times half a cosine to zero."""
    return min(1.0, (step + 1) / (warmup * num_steps + 1)) * 0.5 * (1 + math.cos(math.pi * step / num_steps))


def _consecutive(total: int, size: int) -> Iterator[np.ndarray]:
    for start in range(0, total, size):
        yield np.arange(start, min(total, start + size))

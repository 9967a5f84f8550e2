"""A step and what it is cut into, steps that are left out, the average of the weights, and signals."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from kdstore import cli
from kdstore.data.scenes import Scenes
from kdstore.distill.config import DistillConfig
from kdstore.distill.distributed import Share, World
from kdstore.distill.ema import Average
from kdstore.distill.encoded import Encoded
from kdstore.distill.gradients import kept_statistics, whole_batch_gradients
from kdstore.distill.losses import LOSSES, needs_of, parse_loss, parts_of
from kdstore.distill.train import distill
from kdstore.errors import ConfigError, Interrupted, RunError
from kdstore.jsonfile import read_json
from kdstore.models.load import load_model

STEPS = 6


@pytest.fixture
def config(student: str, store: Path, tmp_path: Path) -> DistillConfig:
    """Six steps of eight pairs."""
    return DistillConfig(cache=str(store), student=student, out=str(tmp_path / "run"), samples=STEPS * 8, batch_size=8, lr=2e-3, log_every=1, device="cpu")


def numbers(path: Path | str) -> list[list[float]]:
    """All that a run logged, but for its steps."""
    return [[value for name, value in json.loads(line).items() if name != "step"] for line in (Path(path) / "log.jsonl").read_text().splitlines()]


def checkpoint(path: Path | str) -> dict[str, Any]:
    return torch.load(Path(path) / "checkpoint.pt", weights_only=True)  # type: ignore[no-any-return]


# Pieces of a batch


@pytest.mark.parametrize("loss", [name for name in LOSSES if "masked patches" not in parts_of(parse_loss(name))])
def test_a_batch_in_pieces_is_trained_on_as_the_whole_batch(
    loss: str, config: DistillConfig, gridded: str, sigmoid_store: Path, other: Path, tmp_path: Path
) -> None:
    """But for losses that mask patches at random: pieces draw other masks than the whole (see test_processes.py)."""
    needs = needs_of(parse_loss(loss))
    store = str(sigmoid_store) if "logit_bias" in needs else str(other.with_name("tokens")) if "image/tokens" in needs else config.cache
    config = dataclasses.replace(config, loss=loss, student=gridded, samples=2 * 8, cache=store)
    distill(config)
    distill(dataclasses.replace(config, micro_batch=2, grad_checkpointing=True, out=str(tmp_path / "pieces")))
    np.testing.assert_allclose(numbers(tmp_path / "pieces"), numbers(tmp_path / "run"), rtol=2e-4, atol=5e-6)


class Noisy(nn.Module):
    """Two towers with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = (nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Dropout(0.4), nn.Linear(8, 3)) for _ in range(2))
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.double()

    def encode(self, seed: int, x: Tensor) -> Encoded:
        torch.manual_seed(seed)
        return Encoded(self.image(x), self.text(x))

    def contrast(self, encoded: Encoded) -> tuple[Tensor, dict[str, Tensor]]:
        loss = nn.functional.cross_entropy(self.scale * encoded.image_BS @ encoded.text_BS.T, torch.arange(len(encoded.image_BS)))
        return loss, {"contrast": loss}


@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 99))
def test_pieces_give_the_gradient_of_the_whole_batch_with_the_dropout_that_each_of_them_drew(pieces: int, piece: int, seed: int) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        towers, x = Noisy(), torch.randn(pieces * piece, 5, dtype=torch.float64)
        encoders = [partial(towers.encode, i, part) for i, part in enumerate(x.split(piece))]
        encoded = [encode() for encode in encoders]
        towers.contrast(Encoded(torch.cat([e.image_BS for e in encoded]), torch.cat([e.text_BS for e in encoded])))[0].backward()
        expected = [p.grad for p in towers.parameters()]
        towers.zero_grad()
        share = Share.of(pieces * piece, World(), piece)
        loss, values = whole_batch_gradients(encoders, towers.contrast, towers, list(towers.parameters()), share)
    assert torch.equal(loss, values["contrast"])
    torch.testing.assert_close([p.grad for p in towers.parameters()], expected)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_statistics_of_batch_norm_move_once_per_piece(checkpointing: bool) -> None:
    norm = nn.BatchNorm1d(5, momentum=0.5).double()
    x = torch.arange(40, dtype=torch.float64).view(8, 5).requires_grad_()

    def encode(part: Tensor) -> Encoded:
        rows = torch.utils.checkpoint.checkpoint(norm, part, use_reentrant=False) if checkpointing else norm(part)
        return Encoded(rows, rows)

    share = Share.of(8, World(), 4)
    encoders = [partial(encode, part) for part in x.split(4)]
    whole_batch_gradients(encoders, lambda e: ((e.image_BS**3).sum(), {}), norm, list(norm.parameters()), share)
    first, second = (part.detach().mean(0) for part in x.split(4))
    torch.testing.assert_close(norm.running_mean, 0.25 * first + 0.5 * second)
    assert norm.num_batches_tracked == 2
    assert norm.track_running_stats
    with kept_statistics(norm):
        norm(x)
    assert norm.num_batches_tracked == 2


@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3))
def test_every_pair_of_a_batch_is_of_one_process_and_pieces_do_not_depend_on_their_number(piece: int, rounds: int, size: int) -> None:
    batch = piece * rounds * size
    shares = [Share.of(batch, World(rank, size), piece) for rank in range(size)]
    assert sorted(place for share in shares for place in share.places.tolist()) == list(range(batch))
    starts = {share.start(i) for share in shares for i in range(share.rounds)}
    assert starts == set(range(0, batch, piece))
    for share in shares:
        assert share.mine(torch.arange(batch)).tolist() == share.places.tolist()
        assert [share.places[i * piece] for i in range(share.rounds)] == [share.start(i) for i in range(share.rounds)]


@pytest.mark.parametrize(("world", "micro_batch"), [(3, None), (2, 3), (1, 5), (16, None)])
def test_a_batch_that_cannot_be_dealt_out_evenly_is_refused(world: int, micro_batch: int | None) -> None:
    with pytest.raises(ConfigError, match="8 pairs cannot be dealt to"):
        Share.of(8, World(0, world), micro_batch)


# Steps that are left out


class Breaking:
    """A teacher whose features are not finite in chosen batches."""

    name, logit_scale, logit_bias = "breaking", 14.0, None

    def __init__(self, broken: set[int]) -> None:
        self.broken, self.batches = broken, 0

    def shape(self, array: str) -> tuple[int, ...]:
        return (64,)

    def image(self, array: str, rows: np.ndarray, views: np.ndarray) -> np.ndarray:
        self.batches += 1
        return np.full((len(rows), 64), np.nan if self.batches in self.broken else 1.0, np.float32)

    def text(self, array: str, rows: np.ndarray) -> np.ndarray:
        return np.ones((len(rows), 64), np.float32)


@pytest.mark.parametrize("log_every", [1, 5])
def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(log_every: int, config: DistillConfig, source: Scenes, tmp_path: Path) -> None:
    config = dataclasses.replace(config, cache=None, threads=1, log_every=log_every, loss="clip + crd", lr=0.05, warmup=0.0)
    result = distill(dataclasses.replace(config, ema=0.5), source=source, targets=Breaking({1, 3, 4}))
    assert result.skipped == 3
    assert all(math.isfinite(value) for value in result.losses.values())
    state = checkpoint(tmp_path / "run")
    assert all(tensor.isfinite().all() for part in ("clip", "average") for tensor in state[part].values())
    assert {int(moments["step"]) for moments in state["optimiser"]["state"].values()} == {STEPS - 3}


def test_steps_that_are_not_finite_end_the_run_when_they_repeat(config: DistillConfig, source: Scenes) -> None:
    config = dataclasses.replace(config, cache=None, threads=1, log_every=5, loss="clip + crd", max_skipped=2)
    with pytest.raises(RunError, match="broke at step 4: loss is nan, crd is nan, grad_norm is nan, in each of 2 steps"):
        distill(config, source=source, targets=Breaking({2, 4, 5}))
    assert not (Path(config.out or "") / "checkpoint.pt").exists()


def test_fp16_ends_a_run_whose_gradients_are_never_finite(config: DistillConfig) -> None:
    config = dataclasses.replace(
        config, loss="clip + 1e30*fd", projector="always", precision="fp16", samples=40 * config.batch_size, max_skipped=3, log_every=1
    )
    with pytest.raises(RunError, match=r"grad_norm is (nan|inf), in each of 3 steps"):
        distill(config)


def test_a_student_with_batch_norm_goes_on_only_with_as_many_pairs_at_once(config: DistillConfig, tmp_path: Path) -> None:
    config = dataclasses.replace(config, student="scenes-T", save_every=1)

    def stop(stage: str, done: int, total: int, note: str) -> None:
        if stage == "distill" and done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        distill(config, on_progress=stop)
    with pytest.raises(RunError, match=f"Batch norm saw {config.batch_size} pairs at once in this run, and would see 2"):
        distill(dataclasses.replace(config, resume=True, micro_batch=2))


# The average of the weights


def test_the_average_is_that_of_the_weights_after_each_step() -> None:
    student = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        student.weight.zero_()
        average = Average(student, 0.5)
        expected = torch.zeros(1, 2)
        for step in range(1, 30):
            student.weight.copy_(torch.tensor([[step, -(step**2)]]))
            average.update(student, step, torch.tensor(False))
            decay = min(0.5, (1 + step) / (10 + step))
            expected = decay * expected + (1 - decay) * student.weight
        student.weight.fill_(7)
        average.update(student, 30, torch.tensor(True))
    torch.testing.assert_close(average.student.weight.detach(), expected)


def test_the_average_is_kept_resumed_and_exported_as_a_student_of_its_own(config: DistillConfig, tmp_path: Path) -> None:
    config = dataclasses.replace(config, ema=0.9)
    distill(dataclasses.replace(config, out=str(tmp_path / "whole")))
    with pytest.raises(Interrupted):
        distill(config, on_progress=send(signal.SIGINT, at=2))
    distill(dataclasses.replace(config, resume=True))
    weights, average = (load_model(str(tmp_path / "run" / folder), device="cpu").clip.state_dict() for folder in ("", "ema"))
    kept = checkpoint(tmp_path / "run")["average"]
    assert all(torch.equal(average[name], kept[name]) for name in average)
    assert not all(torch.equal(average[name], weights[name]) for name in average)
    file = "ema/open_clip_model.safetensors"
    assert (tmp_path / "run" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    assert read_json(tmp_path / "run" / "run.json")["ema"] == {"decay": 0.9, "student": "ema"}


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"micro_batch": 4, "grad_checkpointing": True}])
def test_a_compiled_student_trains_as_one_that_is_not(changes: dict[str, Any], config: DistillConfig, gridded: str, tmp_path: Path) -> None:
    config = dataclasses.replace(config, loss="clip-kd", student=gridded, **changes)
    distill(config)
    distill(dataclasses.replace(config, compile=True, out=str(tmp_path / "compiled")))
    np.testing.assert_allclose(numbers(tmp_path / "compiled"), numbers(tmp_path / "run"), rtol=2e-3, atol=1e-4)


# Signals


def send(signum: int, at: int) -> Callable[..., None]:
    """Send this process a signal while a step is reported."""

    def on_progress(stage: str, done: int, total: int, note: str = "") -> None:
        if stage == "distill" and done == at:
            os.kill(os.getpid(), signum)

    return on_progress


def test_sigterm_ends_a_run_with_a_checkpoint_even_if_it_comes_twice(config: DistillConfig, tmp_path: Path) -> None:
    def twice(stage: str, done: int, total: int, note: str = "") -> None:
        for _ in range(2):
            send(signal.SIGTERM, at=3)(stage, done, total, note)

    with pytest.raises(Interrupted, match="Stopped at step 3 of 6") as stopped:
        distill(config, on_progress=twice)
    assert stopped.value.signum == signal.SIGTERM
    assert checkpoint(tmp_path / "run")["clock"]["step"] == 3
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_exit_code_says_which_signal_ended_the_run(
    signum: int, code: int, config: DistillConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted() -> None:
        distill(config, on_progress=send(signum, at=2))

    monkeypatch.setattr(cli, "_run", interrupted)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == code
    assert capsys.readouterr().err.startswith("interrupted: Stopped at step 2 of 6;")


def test_the_progress_line_says_rate_and_waiting(config: DistillConfig) -> None:
    notes: list[str] = []
    distill(config, on_progress=lambda stage, done, total, note: notes.append(note) if stage == "distill" else None)
    assert "samples/s" in notes[-1]
    assert "% of the time waiting for data" in notes[-1]

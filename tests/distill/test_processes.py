"""Runs of several processes, started by torchrun and compared with runs of one: the student draws random numbers (patch dropout)."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kdstore.data.scenes import Scenes
from kdstore.distill.config import DistillConfig
from kdstore.distill.losses import LOSSES, needs_of, parse_loss
from kdstore.distill.train import distill

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture
def config(student: str, store: Path, tmp_path: Path) -> DistillConfig:
    """Two steps of eight pairs in pieces of four: two on one process, one on each of two."""
    return DistillConfig(
        cache=str(store), student=student, out=str(tmp_path / "one"), samples=16, batch_size=8, micro_batch=4, lr=2e-3, log_every=1, threads=1, device="cpu"
    )


def numbers(path: Path) -> list[list[float]]:
    return [list(json.loads(line).values()) for line in (path / "log.jsonl").read_text().splitlines()]


def weights(path: Path) -> dict[str, torch.Tensor]:
    """All that a run trained: the student, and what is its loss's."""
    state = torch.load(path / "checkpoint.pt", weights_only=True)
    return {**state["clip"], **state["objective"]}


def test_two_processes_do_what_one_does_for_every_loss_and_what_ends_one_ends_both(
    config: DistillConfig, source: Scenes, sigmoid_store: Path, other: Path, part: Path, gridded: str, tmp_path: Path
) -> None:
    """That both hold the same bits, projectors too, is checked by every run when it saves; a check of weights that differ must raise."""
    of_sigmoid, of_tokens = {"cache": str(sigmoid_store)}, {"cache": str(other.with_name("tokens")), "student": gridded}
    alike: dict[str, dict[str, Any]] = {loss: {"loss": loss, "projector": "always"} for loss in LOSSES}
    for loss, changes in alike.items():
        needs = needs_of(parse_loss(loss))
        changes |= of_sigmoid if "logit_bias" in needs else of_tokens if "image/tokens" in needs else {}
    alike["several"] = {"cache": (str(config.cache), str(part)), "loss": "clip-kd-free"}  # of which the second lacks images
    alike["matched"] = {**alike["several"], "loss": "clip + crd", "teacher_temperature": "entropy:1.0"}
    alike["pieces"] = {"micro_batch": 2, "ema": 0.9, "grad_checkpointing": True}
    ends: dict[str, dict[str, Any]] = {name: {"cache": None, "loss": "clip", "data": source.spec, "samples": 64} for name in ("undecodable", "sigterm")}
    ends["uneven"] = {"batch_size": 9, "samples": 18, "micro_batch": None}
    settings = {name: {**dataclasses.asdict(config), **changes, "out": str(tmp_path / "two" / name)} for name, changes in {**alike, **ends}.items()}
    (tmp_path / "configs.json").write_text(json.dumps(settings))
    subprocess.run([*TORCHRUN, str(Path(__file__).parent / "processes.py"), str(tmp_path)], check=True, timeout=200, env=ENVIRONMENT)

    first, second = (json.loads((tmp_path / f"ended{rank}.json").read_text()) for rank in range(2))
    assert first == second
    assert {first[name] for name in alike} == {"finished"}
    assert re.fullmatch(r"SourceError: Image scenes-1/train/\d+ cannot be decoded: cut short\.", first["undecodable"])
    assert re.match(r"Interrupted: Stopped at step [1-7] of 8; .* holds a checkpoint\.", first["sigterm"])
    assert first["uneven"] == "ConfigError: A batch of 9 pairs cannot be dealt to 2 processes."
    assert first["drift"] == "The processes of this run hold different projectors."
    for name, changes in alike.items():
        distill(dataclasses.replace(config, **changes, out=str(tmp_path / "one" / name)))
        np.testing.assert_allclose(numbers(tmp_path / "two" / name), numbers(tmp_path / "one" / name), rtol=1e-5, err_msg=name)
        torch.testing.assert_close(weights(tmp_path / "two" / name), weights(tmp_path / "one" / name), rtol=1e-5, atol=1e-6)


def test_a_run_killed_at_random_goes_on_alike_with_another_number_of_processes(config: DistillConfig, tmp_path: Path) -> None:
    config = dataclasses.replace(config, samples=90 * 8, save_every=4)
    stop = random.randrange(5, 20)

    def killed(stage: str, done: int, total: int, note: str = "") -> None:
        if done == stop:
            raise MemoryError

    with pytest.raises(MemoryError):
        distill(config, on_progress=killed)
    settings = [f"--set={name}={json.dumps(value)}" for name, value in dataclasses.asdict(config).items() if value is not None]
    log = tmp_path / "one" / "log.jsonl"
    with subprocess.Popen([*TORCHRUN, "-m", "kdstore", "distill", *settings, "--resume"], env=ENVIRONMENT, stderr=subprocess.PIPE, text=True) as two:
        until = stop + random.randrange(15, 40)
        while two.poll() is None and len(log.read_text().splitlines()) < until:
            time.sleep(0.01)
        workers = Path(f"/proc/{two.pid}/task/{two.pid}/children").read_text().split()
        os.kill(int(random.choice(workers)), signal.SIGKILL)
        _, said = two.communicate(timeout=60)
    assert two.returncode != 0
    assert said.count("error: Another process of this run has ended") <= 1
    reached = torch.load(tmp_path / "one" / "checkpoint.pt", weights_only=True)["clock"]["step"]
    assert stop < reached < 90, "the two took steps of their own, and were ended before the last"
    distill(dataclasses.replace(config, resume=True))
    distill(dataclasses.replace(config, out=str(tmp_path / "whole")))
    np.testing.assert_allclose(numbers(tmp_path / "one"), numbers(tmp_path / "whole"), rtol=1e-4)

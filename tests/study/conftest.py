"""A tiny study that was run whole, in real processes: two teachers, one of which joined later, one student, all controls; two seconds of training in all."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from kdstore.study.config import StudyConfig, parse_study
from kdstore.study.grid import Plan, plan_study
from kdstore.study.run import StudyResult, run_study

PROBES = {"probes": "scenes/retrieval:24?swapped=color", "probe_samples": 16}
TINY: dict[str, dict[str, Any]] = {
    "study": {"name": "tiny", "data": "scenes/train:64", "losses": ["clip-kd-free"], "samples": [64], "seeds": [0], "own_samples": 96} | PROBES,
    "teachers": {"S": "scenes-S"},
    "students": {"T": "scenes-T"},
    "extract": {"unit_rows": 64, "device": "cpu"},
    "distill": {"batch_size": 32, "device": "cpu", "log_every": 1, "save_every": 1},
    "retrieval": {"data": "scenes/retrieval:40", "device": "cpu"},
    "vqa": {"train_images": 20, "eval_images": 20, "epochs": 1, "device": "cpu"},
}


@dataclass(frozen=True)
class Tiny:
    """A finished study: its folder, recipe and plan, and what its two runs did: with the first teacher, and with both."""

    path: Path
    config: StudyConfig
    plan: Plan
    runs: tuple[StudyResult, StudyResult]


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Give every task one thread: results are compared to the last bit, and on busy cores two threads have once given others."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture(scope="session")
def tiny_study(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """The study that is run once for all tests; they read it, and change copies (`copy_study`)."""
    path = tmp_path_factory.mktemp("tiny") / "study"
    config = parse_study({**TINY, "teachers": {"S": "scenes-S", "L": "scenes-L"}})
    runs = (run_study(parse_study(TINY), path), run_study(config, path))
    return Tiny(path, config, plan_study(config), runs)


@pytest.fixture
def copy_study(tiny_study: Tiny, tmp_path: Path) -> Callable[..., Path]:
    """Copy the finished study without what some tasks left; returns the folder."""

    def copy(*without: str) -> Path:
        out = tmp_path / f"copy{len(list(tmp_path.iterdir()))}"
        shutil.copytree(tiny_study.path, out)
        for digest in without:
            for path in out.glob(f"*/{tiny_study.plan.tasks[digest].name}*"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        return out

    return copy

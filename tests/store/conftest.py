"""A small store with every kind of array, written by the real writer: 45 images (one undecodable) and 60 captions in units of 16."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kdstore.data.source import Caption
from kdstore.store import ArraySpec, Plan, StoreWriter, Unit, embedding_array, scalar_array, token_array

UNDECODABLE = 20


@dataclass(frozen=True)
class Sample:
    """Rows of a source, what a teacher made of them, and the ways of writing that down."""

    rows: list[tuple[str, tuple[Caption, ...]]]
    plan: Plan
    specs: list[ArraySpec]
    arrays: dict[str, np.ndarray]
    identity: dict[str, Any]

    undecodable: int = UNDECODABLE

    @staticmethod
    def index_row(row: int) -> dict[str, Any]:
        if row == UNDECODABLE:
            return {"sha256": "", "valid": False, "reason": "the file is empty", "width": 0, "height": 0}
        return {"sha256": f"{row:064x}", "valid": True, "reason": "", "width": 8 + row, "height": 9}

    def of_images(self, rows: int) -> Sample:
        """The first images and their embeddings alone: few files."""
        first = self.rows[:rows]
        plan = Plan.freeze(first, unit_rows=16)
        return Sample(first, plan, [embedding_array(plan, "image", 6, views=2)], self.arrays, self.identity)

    def open(self, path: Path, **changes: Any) -> StoreWriter:
        return StoreWriter.open(path, **{"plan": self.plan, "arrays": self.specs, "identity": self.identity, **changes})

    def write_unit(self, writer: StoreWriter, unit: Unit, step: int = 5) -> None:
        with writer.attempt(unit) as attempt:
            for start in range(unit.start, unit.stop, step):
                rows = slice(start, min(start + step, unit.stop))
                for spec in self.specs:
                    if spec.side == unit.side:
                        attempt.append(spec.name, self.arrays[spec.name][rows])
                if unit.side == "image":
                    attempt.index([self.index_row(i) for i in range(rows.start, rows.stop)])

    def write(self, path: Path, step: int = 5) -> str:
        with self.open(path) as writer:
            for unit in writer.pending():
                self.write_unit(writer, unit, step)
            return writer.finalise({"host": os.uname().nodename, "pid": os.getpid()})


@pytest.fixture(scope="session", autouse=True)
def _fast_disk() -> Iterator[None]:
    """Leave out fsync: it guards against a loss of power, which no test here causes, and takes most of the time of small stores."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda fd: None)
        yield


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """A folder in memory where there is one: these tests make thousands of small files."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def sample() -> Sample:
    rng = np.random.default_rng(0)
    rows = [
        (f"bild-{i}-\N{LATIN SMALL LETTER U WITH DIAERESIS}", tuple(Caption(f"caption {i} {j}", "human" if j else "synthetic") for j in range(i % 4)))
        for i in range(45)
    ]
    plan = Plan.freeze(rows, unit_rows=16)
    specs = [
        embedding_array(plan, "image", 6, views=2),
        dataclasses.replace(token_array(plan, "image", 3, 5, dtype="float32"), shard=(4, 1, 3, 5)),
        embedding_array(plan, "text", 6, zstd=True),
        scalar_array(plan, "text/length", "uint16"),
    ]
    arrays = {
        spec.name: rng.normal(size=spec.shape).astype(spec.dtype) if "length" not in spec.name else rng.integers(0, 77, spec.shape).astype("u2")
        for spec in specs
    }
    for name in ("image/embedding", "image/tokens"):
        arrays[name][UNDECODABLE] = np.nan
    return Sample(rows, plan, specs, arrays, {"format": 1, "teacher": {"name": "scenes-S", "embed_dim": 6, "logit_scale": 100.0}})


@pytest.fixture(scope="session")
def pristine(sample: Sample, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete store that no test may change."""
    path = tmp_path_factory.mktemp("pristine") / "store"
    sample.write(path)
    return path


@pytest.fixture
def copied(pristine: Path, tmp_path: Path) -> Path:
    """A complete store to damage."""
    return Path(shutil.copytree(pristine, tmp_path / "copied"))


@pytest.fixture
def in_child() -> Callable[[Callable[[], None]], int]:
    """Run a function in a forked process; returns its exit status (negative for a signal, 99 for an exception)."""

    def run(work: Callable[[], None]) -> int:
        pid = os.fork()
        if pid == 0:
            status = 99
            try:
                work()
                status = 0
            finally:
                os._exit(status)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    return run


@pytest.fixture
def die_at_rename() -> Callable[[int], None]:
    """Make this process kill itself with signal 9 just before its nth rename (call it in a child only)."""

    def arm(n: int) -> None:
        replace, left = os.replace, [n]

        def counted(*names: Any, **options: Any) -> None:
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            replace(*names, **options)

        os.replace = counted  # type: ignore[assignment]

    return arm

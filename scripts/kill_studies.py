"""Kill a real study with signal 9 at many moments, run it again, and compare all results; then run two at once. Exit code 1 if anything differs.

    python scripts/kill_studies.py --kills 20 --pairs 3 [--recipe recipes/study-smoke.toml]

Every run is `kdstore study run` in a process forked from this one, which has imported everything and computed nothing; its tasks are forked from it in
turn. A kill takes the run and the processes of its tasks, or the run alone, whose tasks then end by themselves while the next run is already there.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

os.environ["OMP_NUM_THREADS"] = "1"  # the last bits of a result depend on the number of threads
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import forked
import torch

from kdstore.distill import train as _first  # noqa: F401  imported before the first fork, as all that tasks do
from kdstore.evaluate import retrieval as _second  # noqa: F401
from kdstore.evaluate import vqa as _third  # noqa: F401
from kdstore.extract import run as _fourth  # noqa: F401
from kdstore.study import run as study_run

TINY = """
study = {name = "tiny", data = "scenes/train:64", losses = ["clip-kd-free"], samples = [64], seeds = [0], own_samples = 96}
teachers = {S = "scenes-S"}
students = {T = "scenes-T"}
extract = {unit_rows = 16}
distill = {batch_size = 32, save_every = 1, log_every = 1}
retrieval = {data = "scenes/retrieval:40"}
vqa = {train_images = 20, eval_images = 20, epochs = 1, save_every = 2}
cost = {device = "any", source = "given, so that nothing is timed", teacher_gmacs_per_second = 1.0, student_gmacs_per_second = 1.0}
"""


class Task:
    """A task's process, forked from a run that has imported everything; what a study asks of a multiprocessing.Process."""

    def __init__(self, target: Callable[..., None], args: tuple[object, ...]) -> None:
        self.target, self.args, self.pid = target, args, 0
        self._exitcode: int | None = None

    def start(self) -> None:
        self.pid = os.fork()
        if self.pid == 0:
            status = 99
            try:
                self.target(*self.args)
            except SystemExit as e:
                status = int(e.code or 0)
            finally:
                sys.stdout.flush()
                os._exit(status)

    @property
    def exitcode(self) -> int | None:
        if self._exitcode is None and (ended := os.waitpid(self.pid, os.WNOHANG))[0]:
            self._exitcode = os.waitstatus_to_exitcode(ended[1])
        return self._exitcode

    def terminate(self) -> None:
        os.kill(self.pid, signal.SIGTERM)


def results(study: Path) -> dict[str, object]:
    """Read every result but for what tells of time and machine, and the bytes of what lies beside it."""
    found: dict[str, object] = {path.name: path.read_bytes() for path in (study / "results").glob("*.parquet")}
    for path in (study / "results").glob("*.json"):
        found[path.name] = {key: value for key, value in json.loads(path.read_text()).items() if key not in ("made", "digest")}
    return found


def holders(study: Path) -> list[int]:
    """List the processes that do a task."""
    found = []
    for lock in study.glob("locks/*/lock.json"):
        with contextlib.suppress(OSError, ValueError):
            found.append(json.loads(lock.read_text())["pid"])
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", type=Path, help="of the study; default: a tiny one")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--pairs", type=int, default=3, help="how often two runs into one folder are started at once")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    study_run.FORKS = SimpleNamespace(Process=Task)  # type: ignore[assignment]
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(prefix="kill-studies-"))
    log, recipe = folder / "log.txt", asked.recipe or folder / "recipe.toml"
    if not asked.recipe:
        recipe.write_text(TINY)

    def start(name: str) -> int:
        return forked.start(["study", "run", str(recipe), "--out", str(folder / name), "--workers", str(asked.workers)], log)

    def differs(name: str) -> bool:
        return results(folder / name) != expected

    began = time.monotonic()
    if forked.finish(start("whole")) != 0:
        sys.exit(log.read_text())
    seconds, expected, rng = time.monotonic() - began, results(folder / "whole"), random.Random(asked.seed)
    both = in_time = 0
    for number in range(asked.kills):
        pid = start(name := f"kill{number}")
        time.sleep(seconds * (number + rng.random()) / asked.kills)
        tasks_too = bool(rng.getrandbits(1))
        os.kill(pid, signal.SIGKILL)
        for task in holders(folder / name) if tasks_too else ():
            with contextlib.suppress(ProcessLookupError):
                os.kill(task, signal.SIGKILL)
        killed = forked.finish(pid) == -signal.SIGKILL
        done = len(list((folder / name / "results").glob("*.json")))
        again = forked.finish(start(name))
        if again != 0 or differs(name):
            sys.exit(f"Run again after kill {number}, it ended with {again} and its results differ; see {folder / name} and {log}.")
        both, in_time = both + tasks_too, in_time + killed
        print(f"{number + 1:4}  killed: {killed}, its tasks too: {tasks_too}, files of results by then: {done}, run again: the same", flush=True)
        shutil.rmtree(folder / name)
    for number in range(asked.pairs):
        ended = [forked.finish(pid) for pid in [start(f"pair{number}") for _ in range(2)]]
        tries = [path.read_text().count("---") for path in (folder / f"pair{number}" / "logs").iterdir()]
        if ended != [0, 0] or differs(f"pair{number}") or set(tries) != {1}:
            sys.exit(f"Two at once ended with {ended}; see {folder / f'pair{number}'} and {log}.")
        shutil.rmtree(folder / f"pair{number}")
    shutil.rmtree(folder)
    report = {"tasks": sum(name.endswith(".json") for name in expected), "seconds_of_a_run": round(seconds, 1), "kills": in_time, "with_tasks": both}
    print(json.dumps({**report, "same_results": asked.kills, "pairs_at_once": asked.pairs, "each_task_once": asked.pairs}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())

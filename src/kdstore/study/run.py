"""Runs what a plan lacks: each task in a process of its own, here or on the workers of any dask cluster that share the folder.

Who does a task holds its lock, and the lock is the process's own: this scheduler may die, a second one may run on the same folder or on another host, and no
task is done twice. A task that fails is reported and the rest goes on; what needs it is skipped; the next run tries again.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Protocol

from kdstore.errors import ConfigError, Interrupted, RunError
from kdstore.progress import OnProgress, silent
from kdstore.stopping import held_signals
from kdstore.store.lock import LOCK
from kdstore.study.config import StudyConfig
from kdstore.study.folder import LOCKS, begin_study, lock_folder, log_path, note_failure, read_done, write_job
from kdstore.study.grid import Plan, Task, plan_study
from kdstore.study.work import BUSY, FOUND, HEADER, begin, without_unread
from kdstore.threads import available_cores

POLL_SECONDS = 0.2
BUSY_SECONDS = 30.0  # until a task that another process does is tried again though its lock is still there: its holder may be dead
CONNECT_SECONDS = 30
LAST_BYTES = 1 << 14


@dataclass(frozen=True)
class Failure:
    """A task that failed: why, in the last line of its log, and where that is."""

    task: str
    label: str
    reason: str
    log: str


@dataclass(frozen=True)
class StudyResult:
    """How far a study is: of `total` tasks, `ran` by this run, `done` in all, those that failed, and the labels of those that wait for these."""

    path: str
    total: int
    done: int
    ran: int
    failed: tuple[Failure, ...]
    skipped: tuple[str, ...]

    @property
    def complete(self) -> bool:
        return self.done == self.total


def finished(plan: Plan, out: str | Path) -> set[str]:
    """Return the digests of the tasks of a plan that are done."""
    return {digest for digest, task in plan.tasks.items() if read_done(out, task) is not None}


def plan_record(plan: Plan, done: set[str]) -> dict[str, Any]:
    """Say what a plan holds: tasks per kind, and how many of them are done already."""
    kinds = dict.fromkeys(task.kind for task in plan.tasks.values())
    return {
        "tasks": len(plan.tasks),
        "done": len(done),
        "kinds": {kind: {"all": len(of := plan.of_kind(kind)), "done": sum(task.digest in done for task in of)} for kind in kinds},
        "arms": len(plan.arms),
    }


def check_names(config: StudyConfig) -> None:
    """Raise UnknownName and ConfigError for a model, loss or data set that nobody knows, paths outside of [folders], and tokens that a loss would not find."""
    from kdstore.distill.config import DistillConfig
    from kdstore.distill.losses import parse_loss, parts_of
    from kdstore.distill.teachers import check_loss
    from kdstore.evaluate.datasets import check_vqa_name
    from kdstore.models.names import resolve

    grid = config.grid
    sources = [grid.data, grid.probes, grid.sweep_data, config.stages["retrieval"].get("data")]
    for name in [*config.teachers.values(), *config.students.values(), *filter(None, sources)]:
        if name not in config.folders and os.sep in name and Path(name.removeprefix("local-dir:")).exists():
            raise ConfigError(f"{name} is a path of this machine, and the study is to mean the same everywhere.", f'Name it: [folders] NAME = "{name}".')
    for name in config.teachers.values():
        if name not in config.folders:
            resolve(name)
    for name in (*config.students.values(), config.random_architecture):
        if name not in config.folders:
            resolve(name, untrained=True)
    for name in grid.vqa:
        check_vqa_name(name)
    for loss in grid.losses:
        check_loss(DistillConfig(**{**without_unread({**config.stages["distill"], "loss": loss}), "samples": min(grid.samples)}))
        if "tokens" in parts_of(parse_loss(loss)) and config.stages["extract"].get("tokens", "none") not in ("image", "both"):
            raise ConfigError(f"The loss '{loss}' reads image tokens, and teachers would be extracted without.", 'Write [extract] tokens = "image".')


def run_study(config: StudyConfig, out: str | Path, *, workers: int = 1, scheduler: str | None = None, on_progress: OnProgress = silent) -> StudyResult:
    """Do all tasks of a recipe that are not done, `workers` at once here, or on a dask cluster; raises Interrupted for Ctrl-C or SIGTERM once they stopped."""
    folder = Path(out).absolute()
    plan = plan_study(config)
    begin_study(folder, config)
    with _crew(workers, scheduler) as crew, held_signals(patient=False) as signal_came:
        shift = _Shift(config, plan, folder, crew, on_progress)
        try:
            while shift.left and not signal_came():
                shift.step()
                time.sleep(POLL_SECONDS)
        finally:
            shift.stop()
        if signum := signal_came():
            raise Interrupted(f"Stopped; {len(shift.done)} of {len(plan.tasks)} tasks are done.", "The same command goes on from there.", signum)
    return shift.result()


class Crew(Protocol):
    """Who runs processes: threads of this one that wait for theirs, or a dask cluster."""

    def room(self) -> int:
        """Return how many tasks may run at once now."""
        ...

    def submit(self, job: str, log: str, stop: str) -> Future[int]:
        """Begin a process; its exit code comes in the future."""
        ...


@dataclass
class _Shift:
    """One run over a plan: what is done, running, failed, skipped, and for others to do."""

    config: StudyConfig
    plan: Plan
    out: Path
    crew: Crew
    on_progress: OnProgress
    done: set[str] = field(default_factory=set)
    ran: set[str] = field(default_factory=set)
    failed: dict[str, Failure] = field(default_factory=dict)
    skipped: dict[str, Task] = field(default_factory=dict)
    running: dict[str, Future[int]] = field(default_factory=dict)
    elsewhere: dict[str, float] = field(default_factory=dict)  # digest -> when it is tried again at the latest
    patient: bool = False  # about workers, which was said

    def __post_init__(self) -> None:
        self.done = finished(self.plan, self.out)
        self._stop = self.out / LOCKS / f"stop-{uuid.uuid4().hex}"
        self._tell()

    @property
    def waiting(self) -> Iterator[Task]:
        """Those that are to be done, in their order."""
        over = self.done | self.failed.keys() | self.skipped.keys() | self.running.keys()
        return (task for digest, task in self.plan.tasks.items() if digest not in over)

    @property
    def left(self) -> bool:
        return bool(self.running) or next(self.waiting, None) is not None

    def step(self) -> None:
        """Take what has ended, and begin what there is room for."""
        for digest in [digest for digest, future in self.running.items() if future.done()]:
            self._end(self.plan.tasks[digest], self.running.pop(digest))
        room = self.crew.room() - len(self.running)
        if room <= 0 and not self.running and not self.patient:
            self.patient = True
            self.on_progress("notice", 0, 0, "waiting for workers: the cluster has none")
        for task in list(self.waiting):
            if any(need in self.failed or need in self.skipped for need in task.needs):
                self.skipped[task.digest] = task
            elif room > 0 and self.done.issuperset(task.needs) and self._free(task):
                room -= self._begin(task)

    def stop(self) -> None:
        """Ask all processes to stop, and wait for them: they leave what they have for the next run."""
        if self.running:
            self.on_progress("notice", 0, 0, f"stopping {len(self.running)} tasks; a second Ctrl-C leaves them to stop alone")
            self._stop.touch()
            try:
                while not all(future.done() for future in self.running.values()):
                    time.sleep(POLL_SECONDS)
            finally:
                self._stop.unlink()

    def result(self) -> StudyResult:
        labels = tuple(f"{task.kind}: {task.label}" for task in self.skipped.values())
        return StudyResult(str(self.out), len(self.plan.tasks), len(self.done), len(self.ran), tuple(self.failed.values()), labels)

    def _free(self, task: Task) -> bool:
        """Tell whether nobody else does a task, as far as can be seen without asking."""
        until = self.elsewhere.get(task.digest, 0.0)
        return time.monotonic() >= until or not (lock_folder(self.out, task) / LOCK).exists()

    def _begin(self, task: Task) -> int:
        """Begin a task unless another run has done it by now; returns how many processes that took."""
        if read_done(self.out, task) is not None:
            self.done.add(task.digest)
            self._tell()
            return 0
        job = write_job(self.out, self.config, task, [self.plan.tasks[digest] for digest in task.needs])
        self.running[task.digest] = self.crew.submit(str(job), str(log_path(self.out, task)), str(self._stop))
        self._tell()
        return 1

    def _end(self, task: Task, future: Future[int]) -> None:
        error = future.exception()
        code = None if error else future.result()
        if code == BUSY:
            self.elsewhere[task.digest] = time.monotonic() + BUSY_SECONDS
        elif code in (0, FOUND) and read_done(self.out, task) is not None:
            self.done.add(task.digest)
            self.ran |= {task.digest} if code == 0 else set()
        else:
            log = log_path(self.out, task)
            reason = f"{type(error).__name__}: {error}" if error else why(code or 0, log)
            self.failed[task.digest] = Failure(task.name, f"{task.kind}: {task.label}", reason, str(log))
            note_failure(self.out, task, reason)
            self.on_progress("warning", 0, 0, f"failed: {task.kind}: {task.label}: {reason} ({log})")
        self._tell()

    def _tell(self) -> None:
        said = [self.plan.tasks[digest].label for digest in self.running]
        note = f"running {said[0]}{f' and {len(said) - 1} more' if len(said) > 1 else ''}" if said else ""
        if self.failed:
            note += f"{'; ' if note else ''}{len(self.failed)} failed"
        self.on_progress("tasks", len(self.done), len(self.plan.tasks), note)


def why(code: int, log: Path) -> str:
    """Say in one line why a process ended: the signal, or the last line that it wrote."""
    if code < 0:
        killed = signal.Signals(-code).name
        return f"killed by {killed}{', perhaps for its memory' if killed == 'SIGKILL' else ''}"
    said = log.read_bytes()[-LAST_BYTES:].decode(errors="replace") if log.exists() else ""
    lines = [line.strip() for line in said.splitlines() if line.strip() and not line.startswith(HEADER)]
    return lines[-1] if lines else f"it ended with {code} and said nothing"


def run_here(job: str, log: str, stop: str, environment: dict[str, str]) -> int:
    """Run a task in a process that is forked from one which has imported everything and computed nothing: imports take longer than a small task."""
    child = FORKS.Process(target=begin, args=(job, log, environment))
    child.start()
    return _wait(child, lambda: child.exitcode, stop)


def run_remotely(job: str, log: str, stop: str) -> int:
    """Run a task's process; called by a worker of dask."""
    with open(log, "ab") as sink:
        command = [sys.executable, "-u", "-m", "kdstore.study.work", job]
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=sink, stderr=sink, start_new_session=True)
    return _wait(child, child.poll, stop)


def _wait(child: Any, exit_code: Callable[[], int | None], stop: str) -> int:
    """Wait for a process to end, and have it stop when there is a file at `stop`; returns its exit code."""
    asked = False
    while (code := exit_code()) is None:
        if not asked and os.path.exists(stop):
            child.terminate()
            asked = True
        time.sleep(POLL_SECONDS / 4)
    return code


FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload([f"kdstore.{name}" for name in ("study.work", "extract.run", "distill.train", "evaluate.vqa", "evaluate.retrieval")])


@contextmanager
def _crew(workers: int, scheduler: str | None) -> Iterator[Crew]:
    if scheduler is None:
        with ThreadPoolExecutor(workers) as pool:
            yield _Here(workers, pool)
    else:
        from distributed import Client

        try:
            client = Client(scheduler, timeout=CONNECT_SECONDS)
        except (OSError, ValueError, TypeError) as e:
            raise ConfigError(f"Cannot reach the dask scheduler at {scheduler} ({e}).", "Name it as tcp://HOST:PORT, as dask says at its start.") from e
        with client:
            yield _Cluster(client)


@dataclass
class _Here:
    """Processes of this machine, one per worker, each with its share of the cores and, of several GPUs, one."""

    workers: int
    pool: ThreadPoolExecutor

    def __post_init__(self) -> None:
        threads = os.environ.get("OMP_NUM_THREADS", str(max(1, available_cores() // self.workers)))
        gpus = visible_gpus() if self.workers > 1 else []
        self._places: SimpleQueue[dict[str, str]] = SimpleQueue()
        for number in range(self.workers):
            self._places.put({"OMP_NUM_THREADS": threads} | ({"CUDA_VISIBLE_DEVICES": gpus[number % len(gpus)]} if gpus else {}))

    def room(self) -> int:
        return self.workers

    def submit(self, job: str, log: str, stop: str) -> Future[int]:
        return self.pool.submit(self._run, job, log, stop)

    def _run(self, job: str, log: str, stop: str) -> int:
        place = self._places.get()
        try:
            return run_here(job, log, stop, place)
        finally:
            self._places.put(place)


def visible_gpus() -> list[str]:
    """Return the GPUs that processes may use, without starting CUDA in this one."""
    if (said := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [gpu for gpu in said.split(",") if gpu]
    return [path.name.removeprefix("nvidia") for path in sorted(Path("/dev").glob("nvidia[0-9]*"))]


@dataclass
class _Cluster:
    """The workers of a dask cluster, one process for each of their threads: a worker for a GPU has one thread."""

    client: Any

    def __post_init__(self) -> None:
        self._knock = self.client.submit(os.getpid, pure=False)  # an adaptive cluster starts no worker before it has a task

    def room(self) -> int:
        if self.client.status != "running":
            raise RunError("The dask scheduler is lost; what its workers have begun goes on.", "Start it again; the same command goes on.")
        return sum(self.client.nthreads().values())

    def submit(self, job: str, log: str, stop: str) -> Future[int]:
        future: Future[int] = self.client.submit(run_remotely, job, log, stop, pure=False)
        return future

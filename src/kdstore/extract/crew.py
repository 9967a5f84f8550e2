"""Who gets which unit of a run on a dask cluster.

The coordinator keeps the queue and tells dask for each unit which workers may have it: left alone, dask would try a unit again where it failed, and feed the
worker that is the first to fail.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import importlib.metadata
import time
from asyncio import CancelledError
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import Any

from distributed import Client, Future, KilledWorker
from distributed.comm import get_address_host

from kdstore.errors import ConfigError
from kdstore.extract.config import ExtractConfig
from kdstore.extract.units import Tally
from kdstore.progress import OnProgress
from kdstore.store import Unit

TRIES = 3
IN_A_ROW = 3  # units that a worker fails, while others succeed, until it gets no more
PER_WORKER = 2  # the unit that it works on, and the next
PATIENCE_SECONDS, REMINDER_SECONDS = 5.0, 60.0  # without workers, until that is said, and said again
PACKAGES = ("kdstore", "torch", "dask")


@dataclass(frozen=True)
class Outcome:
    """What became of a unit on a worker: staged in a folder, or why not; `sizes` and `notices` tell of memory that ran out there."""

    worker: str
    why: str = ""
    folder: str = ""
    record: dict[str, Any] = field(default_factory=dict)
    done: Tally = field(default_factory=Tally)
    sizes: dict[str, int] = field(default_factory=dict)
    notices: tuple[str, ...] = ()
    tries: int = 1


class Queue:
    """The units of a run: those that wait, those given to dask, and those that failed; none goes where it failed, if it can go elsewhere."""

    def __init__(self, client: Client, units: Sequence[Unit]) -> None:
        self.tried: defaultdict[str, list[str]] = defaultdict(list)  # workers on which a unit failed
        self.failed: dict[str, str] = {}
        self._client = client
        self._waiting = deque(units)
        self._given: dict[str, tuple[Future, Unit, set[str]]] = {}
        self._ended: SimpleQueue[Future] = SimpleQueue()

    @property
    def left(self) -> int:
        return len(self._waiting) + len(self._given)

    def hand_out(self, crew: Crew, task: Callable[..., Outcome], config: ExtractConfig, threads: int | None) -> None:
        """Give dask as many units as keep the workers busy; no more, so that where the next ones go depends on how these end."""
        while self._waiting and len(self._given) < PER_WORKER * len(crew.able):
            unit = self._waiting.popleft()
            chosen = crew.away_from(self.tried[unit.name])
            future = self._client.submit(task, config, unit.name, threads, workers=sorted(chosen), pure=False)
            self._given[future.key] = future, unit, chosen
            future.add_done_callback(self._ended.put)

    def take_back(self, crew: Crew) -> None:
        """Let units wait again whose workers have all gone: dask would keep them for these."""
        for key in [key for key, (_, _, chosen) in self._given.items() if not chosen & crew.there]:
            future, unit, _ = self._given.pop(key)
            future.release()
            self._waiting.appendleft(unit)

    def outcomes(self, seconds: float) -> Iterator[tuple[Unit, Outcome]]:
        """Wait a while for a unit to end, and yield all that have; those that dask has cancelled wait again: the scheduler is lost, or was told to restart."""
        with contextlib.suppress(Empty):
            future = self._ended.get(timeout=seconds)
            while True:
                if future.key in self._given:
                    _, unit, _ = self._given.pop(future.key)
                    outcome = _outcome(future)
                    future.release()
                    if outcome is None:
                        self._waiting.appendleft(unit)
                    else:
                        yield unit, outcome
                future = self._ended.get_nowait()

    def try_again(self, unit: Unit, outcome: Outcome) -> None:
        """Let a unit that failed wait for another worker, or note that it has failed for good."""
        self.tried[unit.name] += [outcome.worker] * outcome.tries
        if len(self.tried[unit.name]) < TRIES:
            self._waiting.append(unit)  # last, so that what is wrong may pass
        else:
            self.failed[unit.name] = outcome.why


class Crew:
    """The workers of a cluster: who is there, and who is able to work: has our versions, and does not fail what others can do."""

    def __init__(self, client: Client, address: str, say: Callable[[str], None], on_progress: OnProgress) -> None:
        self.address = address
        self.there: set[str] = set()
        self.able: set[str] = set()
        self._client, self._say, self._on_progress = client, say, on_progress
        self._unlike: dict[str, str] = {}  # what each worker has in other versions, or nothing
        self._failed: dict[str, int] = {}  # units in a row, of those that have ended any
        self._dismissed: set[str] = set()
        self._speak_at = time.monotonic() + PATIENCE_SECONDS

    def look(self) -> None:
        """Find out who is there and able, and say if nobody is; raises OSError if the scheduler is lost, ConfigError if all that came have other versions."""
        if self._client.status != "running":
            raise ConnectionError
        self.there = set(self._client.nthreads())
        self._compare_versions(self.there - self._unlike.keys())
        alike = {worker for worker in self.there if self._unlike.get(worker) == ""}
        if self.there and "" not in self._unlike.values() and self.there <= self._unlike.keys():
            worker, unlike = next(iter(self._unlike.items()))
            raise ConfigError(f"No worker of {self.address} has the versions of this command: {worker} has {unlike}.", "Install the same on all machines.")
        others_succeed = any(self._failed.get(worker) == 0 for worker in alike)
        sick = {worker for worker in alike if self._failed.get(worker, 0) >= IN_A_ROW} if others_succeed else set()
        for worker in sorted(sick - self._dismissed):
            self._say(f"The worker {worker} gets no more units: it failed {IN_A_ROW} in a row, and others do not. Its log says why.")
        self._dismissed |= sick
        self.able = alike - sick
        now = time.monotonic()
        if self.able:
            self._speak_at = now + PATIENCE_SECONDS
        elif now >= self._speak_at:
            self._on_progress("notice", 0, 0, f"Waiting for workers of the dask scheduler at {self.address}: it has none that can work.")
            self._speak_at = now + REMINDER_SECONDS

    def away_from(self, workers: Sequence[str]) -> set[str]:
        """Choose the able workers on other hosts than these workers', or on these hosts but others, or else all."""
        known = {worker for worker in workers if worker}
        hosts = {get_address_host(worker) for worker in known}
        return {worker for worker in self.able if get_address_host(worker) not in hosts} or self.able - known or self.able

    def succeeded(self, worker: str) -> None:
        self._failed[worker] = 0

    def failed(self, worker: str, *, again: bool) -> None:
        """Count a failure, unless the unit failed elsewhere too, which tells nothing of this worker."""
        if not again:
            self._failed[worker] = self._failed.get(worker, 0) + 1

    def _compare_versions(self, workers: set[str]) -> None:
        """Note what new workers have in other versions, before they get a unit."""
        if not workers:
            return
        ask = importlib.metadata.version  # of the standard library, so that a worker without any of the packages can say so
        found = {name: self._client.run(ask, name, workers=sorted(workers), on_error="return") for name in PACKAGES}
        for worker in workers:
            said = {name: by_worker.get(worker) for name, by_worker in found.items()}
            if any(version is None or isinstance(version, OSError) for version in said.values()):
                continue  # it has gone again
            pairs = [(name, _release(said[name]), _release(_installed(name))) for name in PACKAGES]
            unlike = [f"{name} {there} (here {here})" for name, there, here in pairs if there != here]
            self._unlike[worker] = " and ".join(unlike)
            if unlike:
                self._on_progress("warning", 0, 0, f"The worker {worker} gets no units: it has {self._unlike[worker]}.")


def _outcome(future: Future) -> Outcome | None:
    """Return what a task says, or dask of one that could not: workers died of it, or cannot even load it; None if dask knows no more of it."""
    try:
        error = future.exception() if future.status == "error" else None
        if error is None:
            outcome: Outcome = future.result()
            return outcome
    except (OSError, CancelledError, concurrent.futures.CancelledError):
        return None
    if isinstance(error, KilledWorker):
        return Outcome("", "the workers died that had it", tries=TRIES)
    return Outcome("", f"{type(error).__name__}: {error}")


def _installed(name: str) -> str | Exception:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError as e:
        return e


def _release(version: Any) -> str:
    """Return a version without its build: a coordinator may have torch for CPUs and the workers one for GPUs."""
    return version.partition("+")[0] if isinstance(version, str) else "not installed"

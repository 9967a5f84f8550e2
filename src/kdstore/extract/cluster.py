"""Units computed by the workers of a dask cluster, on this machine or many, that share the folder of the store.

A task stages one unit and returns its record; only this process commits, so a worker that dies, a task that runs twice, or one that ends after its coordinator
did, changes nothing. A worker opens source and teacher once, and works only if it comes to the very identity that the store was begun with.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import resource_tracker
from pathlib import Path

import dask
import torch
from distributed import Client, LocalCluster, get_worker

from kdstore.errors import ConfigError, ExtractError
from kdstore.extract.config import ExtractConfig
from kdstore.extract.crew import Crew, Outcome, Queue
from kdstore.extract.job import Job, prepare
from kdstore.extract.units import Tally
from kdstore.models.names import resolve
from kdstore.progress import OnProgress
from kdstore.store import Begun, StoreWriter, Unit, open_attempt, read_begun
from kdstore.threads import available_cores

LOCAL = "127.0.0.1"
CONNECT_SECONDS = 30
LOOK_SECONDS = 1.0  # between looks at who is there

_opened: dict[tuple[str, ExtractConfig], tuple[Begun, Job, list[str]]] = {}  # of a worker's process
_one_unit = threading.Lock()  # at a time, in however many threads dask runs tasks


def extract_on_cluster(
    job: Job, writer: StoreWriter, units: Sequence[Unit], on_unit: Callable[[Unit, Tally], None], say: Callable[[str], None], on_progress: OnProgress
) -> dict[str, str]:
    """Have units computed by workers and commit each as it comes; returns why the units failed that could not be computed in three tries.

    Batches that did not fit on the workers are noted in the job's extractor. Raises ConfigError if the scheduler cannot be reached or has the wrong workers,
    ExtractError if it is lost, and what `on_unit` and `StoreWriter.commit` raise.
    """
    config, sizes, said = config_for_workers(job), job.extractor.fitting.sizes, set[str]()
    with _client(job.config) as client:
        crew, queue = Crew(client, job.config.scheduler or LOCAL, say, on_progress), Queue(client, units)
        _knock = client.submit(os.getpid, pure=False)  # an adaptive cluster starts no worker before it has a task
        while queue.left:
            try:
                crew.look()
                queue.take_back(crew)
                queue.hand_out(crew, stage_remotely, config, threads_of_a_worker(job.config.workers))
            except OSError as e:
                total = len(writer.plan.units)
                raise ExtractError(
                    f"The dask scheduler at {crew.address} is lost; {total - len(writer.pending())} of {total} units are recorded.",
                    "Start it and its workers again; the same command does the units that are missing.",
                ) from e
            for unit, outcome in queue.outcomes(LOOK_SECONDS):
                sizes |= {kind: min(size, sizes.get(kind, size)) for kind, size in outcome.sizes.items()}
                for notice in [f"On a worker: {notice}" for notice in outcome.notices]:
                    if notice not in said:
                        say(notice)
                    said.add(notice)
                if outcome.why:
                    crew.failed(outcome.worker, again=bool(queue.tried[unit.name]))
                    queue.try_again(unit, outcome)
                else:
                    crew.succeeded(outcome.worker)
                    on_unit(unit, outcome.done)  # before the record: what it refuses is computed again
                    writer.commit(Path(outcome.folder), outcome.record)
    return queue.failed


def stage_remotely(config: ExtractConfig, name: str, threads: int | None) -> Outcome:
    """Stage a unit in a worker's process; tells what became of it, whatever went wrong."""
    worker = str(get_worker().address)
    with _one_unit:
        try:
            begun, job, notices = _open(config, threads)
            unit = next(unit for unit in begun.plan.units if unit.name == name)
            with open_attempt(job.out, begun.plan, begun.arrays, unit) as attempt:
                done = job.extractor.write(attempt, unit, lambda done: None)
                told, notices[:] = tuple(notices), []
                return Outcome(worker, "", str(attempt.folder), attempt.close(), done, dict(job.extractor.fitting.sizes), told)
        except Exception as e:
            logging.getLogger(__name__).exception("%s", name)  # the traceback stays here: not every exception can be sent
            return Outcome(worker, f"{type(e).__name__}: {e}")


def threads_of_a_worker(workers: int) -> int | None:
    """Return how many threads the model gets in each of some processes of this machine, of the cores that we may use; None without any."""
    return max(1, available_cores() // workers) if workers else None


def config_for_workers(job: Job) -> ExtractConfig:
    """Return the settings of a process that works alone, in whatever folder it was started."""
    config, teacher, pretrained = job.config, job.config.teacher, job.config.pretrained
    name = resolve(teacher, pretrained, untrained=config.untrained_seed is not None)
    if name.pretrained and os.path.isfile(name.pretrained):
        teacher, pretrained = teacher.partition(":")[0], os.path.abspath(name.pretrained)
    if teacher.endswith(".json"):
        teacher = os.path.abspath(teacher)
    elif name.open_clip_name.startswith("local-dir:") and not name.label:
        teacher = f"local-dir:{os.path.abspath(name.open_clip_name.removeprefix('local-dir:'))}"
    parent, keys = (path and os.path.abspath(path) for path in (config.parent, config.keys))
    config = dataclasses.replace(config, teacher=teacher, pretrained=pretrained, parent=parent, keys=keys, data=job.source.spec)
    return dataclasses.replace(config, out=str(job.out.absolute()), workers=0, scheduler=None)


def _open(config: ExtractConfig, threads: int | None) -> tuple[Begun, Job, list[str]]:
    """Open source and teacher, once in a process; the list is of notices that nobody has read."""
    key = str(config.out), config
    if key not in _opened:
        if threads is not None:
            torch.set_num_threads(threads)
        worker = get_worker().name
        if config.device == "auto" and torch.cuda.device_count() > 1 and isinstance(worker, int):  # of a local cluster; others show a worker one device
            config = dataclasses.replace(config, device=f"cuda:{worker % torch.cuda.device_count()}")
        begun, notices = read_begun(str(config.out)), list[str]()
        _opened.clear()  # of a store before this one
        job = prepare(config, notices.append, begun=begun)
        notices.clear()  # the coordinator has said the same
        _opened[key] = begun, job, notices
    return _opened[key]


@contextmanager
def _client(config: ExtractConfig) -> Iterator[Client]:
    """Connect to the scheduler that was named, or start workers here."""
    if config.scheduler:
        for name in ("distributed", "distributed.client"):
            logging.getLogger(name).setLevel(logging.CRITICAL)  # what goes wrong is told once, by us
        try:
            client = Client(config.scheduler, timeout=CONNECT_SECONDS)
        except (OSError, ValueError, TypeError) as e:  # the last without what TLS needs
            raise ConfigError(f"Cannot reach the dask scheduler at {config.scheduler} ({e}).", "Name it as tcp://HOST:PORT, as dask says at its start.") from e
        with client:
            yield client
        return
    logging.getLogger("distributed").setLevel(logging.ERROR)
    with dask.config.set({"distributed.comm.retry.count": 3, "distributed.worker.memory.terminate": False}):
        with _deaf_to_ctrl_c():
            cluster = LocalCluster(  # a worker runs what anybody sends who reaches it, so nobody on another machine does
                host=LOCAL,
                n_workers=config.workers,
                threads_per_worker=1,
                dashboard_address=f"{LOCAL}:0",  # None is port 8787, and a warning where another run has it
                silence_logs=logging.CRITICAL,  # a heartbeat that the end of the run cuts off is no fault
                memory_limit=0,
            )
        with cluster, Client(cluster) as client:
            yield client


@contextmanager
def _deaf_to_ctrl_c() -> Iterator[None]:
    """Let the processes of a cluster that is made in this block, and those that replace them, not see the Ctrl-C that a terminal sends to all: we end them.

    A mask of signals passes to the threads that are made under it, and from them to their processes; ours sees the signal after the block.
    """
    resource_tracker.ensure_running()  # else the thread of the first worker starts it, and takes the mask off
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)

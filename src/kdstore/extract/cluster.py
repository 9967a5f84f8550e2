"""Units computed by the workers of a dask cluster, on this machine or many, that share the folder of the store.

A task stages one unit and returns its record; only this process commits, so a worker that dies, a task that runs twice, or one that ends after its coordinator
did, changes nothing. A worker opens source and teacher once, and works only if it comes to the very identity that the store was begun with.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import dask
import torch
from distributed import Client, LocalCluster, as_completed, get_worker

from kdstore.errors import ConfigError, ExtractError
from kdstore.extract.config import ExtractConfig
from kdstore.extract.job import Job, prepare
from kdstore.extract.units import Tally
from kdstore.store import Begun, StoreWriter, Unit, open_attempt, read_begun

TRIES = 3
CONNECT_SECONDS = 30

_opened: dict[tuple[str, ExtractConfig], tuple[Begun, Job]] = {}  # of a worker's process


def extract_on_cluster(job: Job, writer: StoreWriter, units: Sequence[Unit], on_unit: Callable[[Unit, Tally], None]) -> dict[str, str]:
    """Have units computed by workers and commit each as it comes; returns why the units failed that three workers could not compute.

    Raises ConfigError if the scheduler cannot be reached, and what `on_unit` and `StoreWriter.commit` raise.
    """
    config = dataclasses.replace(job.config, workers=0, scheduler=None, data=job.source.spec, out=str(job.out.absolute()))
    threads = max(1, (os.cpu_count() or 1) // job.config.workers) if job.config.workers else None
    failed = {}
    with _client(job.config) as client:
        tasks = {client.submit(stage_remotely, config, unit.name, threads, retries=TRIES - 1, pure=False): unit for unit in units}
        for future in as_completed(tasks):
            unit = tasks.pop(future)
            if future.status == "finished":
                folder, record, done = future.result()
                writer.commit(Path(folder), record)
                on_unit(unit, done)
            else:
                failed[unit.name] = str(future.exception()).rstrip(".")
            future.release()
    return failed


def stage_remotely(config: ExtractConfig, name: str, threads: int | None) -> tuple[str, dict[str, Any], Tally]:
    """Stage a unit in a worker's process; returns the attempt's folder, its record, and what was done. Raises ExtractError for whatever went wrong."""
    try:
        begun, job = _open(config, threads)
        unit = next(unit for unit in begun.plan.units if unit.name == name)
        with open_attempt(job.out, begun.plan, begun.arrays, unit) as attempt:
            done = job.extractor.write(attempt, unit, lambda done: None)
            return str(attempt.folder), attempt.close(), done
    except Exception as e:
        logging.getLogger("distributed.worker").exception("%s", name)  # the traceback stays here: not every exception can be sent
        raise ExtractError(f"{type(e).__name__}: {e}") from None


def _open(config: ExtractConfig, threads: int | None) -> tuple[Begun, Job]:
    """Open source and teacher, once in a process."""
    key = str(config.out), config
    if key not in _opened:
        if threads is not None:
            torch.set_num_threads(threads)
        worker = get_worker().name
        if config.device == "auto" and torch.cuda.device_count() > 1 and isinstance(worker, int):  # of a local cluster; others show a worker one device
            config = dataclasses.replace(config, device=f"cuda:{worker % torch.cuda.device_count()}")
        begun = read_begun(str(config.out))
        _opened.clear()  # of a store before this one
        _opened[key] = begun, prepare(config, lambda notice: None, begun=begun)
    return _opened[key]


@contextmanager
def _client(config: ExtractConfig) -> Iterator[Client]:
    """Connect to the scheduler that was named, or start workers here."""
    if config.scheduler:
        try:
            client = Client(config.scheduler, timeout=CONNECT_SECONDS)
        except (OSError, ValueError) as e:
            raise ConfigError(f"Cannot reach the dask scheduler at {config.scheduler} ({e}).", "Name it as tcp://HOST:PORT, as dask says at its start.") from e
        with client:
            yield client
        return
    logging.getLogger("distributed").setLevel(logging.ERROR)
    with dask.config.set({"distributed.comm.retry.count": 3, "distributed.worker.memory.terminate": False}):
        with _deaf_to_ctrl_c():
            cluster = LocalCluster(n_workers=config.workers, threads_per_worker=1, dashboard_address=None, silence_logs=logging.ERROR, memory_limit=0)
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

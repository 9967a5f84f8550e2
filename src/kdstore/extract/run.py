"""The extraction: plan, look at the teacher, have units of images and texts written, seal.

A unit is all or nothing, so an interrupted run is resumed by running it again: units that are recorded are skipped. Units are computed in this process, by the
workers of a dask cluster, or by the parts of a job array; it makes no difference to what is in them.
"""

from __future__ import annotations

import contextlib
import datetime
import platform
import time
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import open_clip
import torch

from kdstore import __version__
from kdstore.data.mapped import repeats
from kdstore.data.source import Source
from kdstore.errors import CannotWrite, ExtractError, IdentityMismatch, StoreLocked, StoreNotFound
from kdstore.extract.check import check_teacher
from kdstore.extract.config import ExtractConfig
from kdstore.extract.job import Job, prepare, store_path
from kdstore.extract.rates import Rates, rates_of
from kdstore.extract.units import BAD_VALUES, Guard, Tally
from kdstore.progress import OnProgress, silent
from kdstore.store import (
    Attempt,
    Begun,
    Plan,
    Store,
    StoreWriter,
    Unit,
    leave_account,
    open_store,
    read_begun,
    record_staged,
    stage_unit,
    staged_units,
)
from kdstore.store.layout import BUILD, MANIFEST
from kdstore.store.plan import SIDES

LOCK_SECONDS = 600  # so long a part waits for another one that begins the store


@dataclass(frozen=True)
class ExtractResult:
    """A finished extraction, or part of one: where, which bytes, how much, how fast; `notices` are for the user to read.

    `digest` is None for a part, whose units wait for `kdstore store finalise`. Undecodable images are those of the whole store, or of the part; what was
    written is this run's, and `rates` are None where it had nothing to do.
    """

    path: str
    digest: str | None
    teacher: str
    images: int
    texts: int
    invalid_images: int
    written_images: int
    written_texts: int
    bytes: int
    seconds: float
    images_per_second: float
    rates: Rates | None
    notices: tuple[str, ...]


class _Run:
    """One process's share of a job: which units, what was done so far, and how that is told."""

    def __init__(self, job: Job, notices: list[str], on_progress: OnProgress) -> None:
        self.job = job
        self.notices = notices
        self.on_progress = on_progress
        self.started = time.perf_counter()
        self.done = {"image": Tally(), "text": Tally()}
        self._guards: dict[str, Guard] = {}
        self.begin([])

    def begin(self, units: list[Unit], writer: StoreWriter | None = None) -> None:
        """Say what is to be done; what the writer has recorded before counts where it is decided whether too much is not valid."""
        self._totals: dict[str, int] = {side: sum(len(unit) for unit in units if unit.side == side) for side in SIDES}
        for side in SIDES:
            seen, invalid = writer.recorded(side) if writer and units else (0, 0)
            self._guards[side] = Guard(side, self.job.config.max_invalid, seen + self._totals[side], seen, invalid)

    def write(self, attempt: Attempt, unit: Unit) -> None:
        """Have a unit written in this process."""
        self.job.extractor.write(attempt, unit, lambda done: self.add(unit, done))

    def add(self, unit: Unit, done: Tally) -> None:
        """Count what was done of a unit, and show it; raises SourceError when too many images or texts are not valid."""
        total = self.done[unit.side] = self.done[unit.side] + done
        self._guards[unit.side].add(done)
        if total.texts:
            self.on_progress("texts", total.texts, self._totals["text"], "")
        elif total.images:  # none where the parent has all that is stored of them
            rate = total.images / (time.perf_counter() - self.started)
            note = f"{rate:.0f} images/s" + (f", {self.invalid} invalid" if self.invalid else "")
            self.on_progress("images", total.images, self._totals["image"], note)

    @property
    def invalid(self) -> int:
        return self._guards["image"].invalid

    def say(self, notice: str, stage: str = "notice") -> None:
        self.notices.append(notice)
        self.on_progress(stage, 0, 0, notice)

    def account(self) -> tuple[dict[str, Any], Rates | None]:
        """Tell what run.json keeps beside the manifest."""
        job, (images, texts), seconds = self.job, self.done.values(), time.perf_counter() - self.started
        rates = rates_of(job.config, job.extractor.model, images, texts, seconds) if images.images or texts.texts else None
        process = {"seconds": round(seconds, 3), "images": images.images, "texts": texts.texts, "rates": None if rates is None else asdict(rates)}
        account = {
            "source": job.source.spec,
            "images": job.plan.num_images,
            "texts": job.plan.num_texts,
            "invalid_images": self.invalid,
            "last_process": process,
            "codecs": {name: {"codec": str(codec.chain), **codec.record} for name, codec in job.codecs.items()},
            "batch": job.config.batch,
            "batch_after_out_of_memory": job.extractor.fitting.sizes,
            "workers": job.config.workers,
            "compile": job.config.compile,
            "channels_last": job.config.channels_last,
            "device": str(job.extractor.model.device),
            "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "versions": {"kdstore": __version__, "torch": torch.__version__, "open_clip": open_clip.__version__, "python": platform.python_version()},
        }
        return account, rates

    def result(self, digest: str | None, size: int, rates: Rates | None, invalid_images: int) -> ExtractResult:
        images, seconds = self.done["image"].images, time.perf_counter() - self.started
        return ExtractResult(
            path=str(self.job.out),
            digest=digest,
            teacher=self.job.extractor.model.identity["teacher"]["name"],
            images=self.job.plan.num_images,
            texts=self.job.plan.num_texts,
            invalid_images=invalid_images,
            written_images=images,
            written_texts=self.done["text"].texts,
            bytes=size,
            seconds=round(seconds, 3),
            images_per_second=round(images / seconds, 2),
            rates=rates,
            notices=tuple(self.notices),
        )


def extract(config: ExtractConfig, *, source: Source | None = None, on_progress: OnProgress = silent) -> ExtractResult:
    """Run a teacher over a source into a store, resuming what an earlier run recorded.

    Raises ModelError, SourceError, JoinError, IdentityMismatch, StoreLocked, DiskFull, and ExtractError when units failed on a cluster; the store stays as the
    last recorded unit left it.
    """
    notices: list[str] = []

    def say(notice: str) -> None:
        notices.append(notice)
        on_progress("notice", 0, 0, notice)

    job = prepare(config, say, on_progress, source=source, begun=_begun(config) if config.part_of else None)
    run = _Run(job, notices, on_progress)
    try:
        return _extract_part(run, *config.part_of) if config.part_of else _extract_all(run)
    finally:
        job.extractor.close()


def _extract_all(run: _Run) -> ExtractResult:
    job = run.job
    with job.open_writer(run.on_progress) as writer:
        record_staged(writer, run.on_progress)
        pending = list(writer.pending())
        if writer.complete:
            run.say(f"{job.out} is complete already.")
        check = check_teacher(job.extractor, job.source, job.config.batch) if pending and job.worth_a_check else None
        if check is not None and check["warning"]:
            run.say(check["warning"], "warning")
        run.begin(pending, writer)
        if pending and (job.config.workers or job.config.scheduler):
            _on_cluster(run, writer, pending)
        else:
            for unit in pending:
                with writer.attempt(unit) as attempt:
                    run.write(attempt, unit)
        account, rates = run.account()
        digest = writer.finalise({**account, "recall_check": check, "resumed": len(pending) < len(job.plan.units)})
    store = open_store(job.out)
    images, texts = (int((~valid).sum()) for valid in (store.image_valid, store.text_valid))
    if images:
        run.say(f"{images} of {job.plan.num_images} images are not valid; the store's index says why.", "warning")
    if texts:
        run.say(f"{texts} texts are not valid: {BAD_VALUES}.", "warning")
    if repeated := _repeated_content(store, job.plan):
        run.say(f"{repeated} of {job.plan.num_images} images have the content of another under another key.")
    return run.result(digest, store.num_bytes, rates, images)


def _on_cluster(run: _Run, writer: StoreWriter, pending: list[Unit]) -> None:
    from kdstore.extract.cluster import extract_on_cluster  # dask's scheduler takes a second to import

    job = run.job
    if job.config.workers:  # share the cores of this machine; workers elsewhere count their own
        job = replace(job, config=replace(job.config, threads=job.config.decoders))
    failed = extract_on_cluster(job, writer, pending, run.add, run.say, run.on_progress)
    if failed:
        last, why = list(failed.items())[-1]
        raise ExtractError(
            f"{len(failed)} of {len(pending)} units failed three times (the last: {last}, {why}).",
            "The others are recorded; the same command does those that are missing.",
        )


def _begun(config: ExtractConfig) -> Begun | None:
    """Return what another part has begun: its plan is taken, and the source not enumerated again."""
    with contextlib.suppress(StoreNotFound):
        return read_begun(store_path(config))
    return None


def _extract_part(run: _Run, number: int, count: int) -> ExtractResult:
    """Stage every `count`-th unit that is neither recorded nor staged, beginning with the `number`-th (from 1); ends early if the store is sealed meanwhile."""
    job = run.job
    with _wait_for_writer(job, run.on_progress) as writer:
        open_units = {unit.name for unit in writer.pending()} - staged_units(job.out).keys()
    mine = [unit for unit in job.plan.units[number - 1 :: count] if unit.name in open_units]
    run.begin(mine)
    sealed = writer.complete
    for unit in mine:
        try:
            with stage_unit(writer, unit) as attempt:
                run.write(attempt, unit)
        except CannotWrite:
            if not (job.out / MANIFEST).is_file():
                raise
            sealed = True
            break
    account, rates = run.account()
    if sealed:
        store = open_store(job.out)
        run.say(f"{job.out} is complete; nothing is left to do for part {number} of {count}.")
        return run.result(store.digest, store.num_bytes, rates, run.invalid)
    leave_account(job.out, f"part-{number:05d}-of-{count:05d}", account)
    run.say(f"Part {number} of {count} has ended. When all have: kdstore store finalise {job.out}")
    return run.result(None, 0, rates, run.invalid)


def _wait_for_writer(job: Job, on_progress: OnProgress) -> StoreWriter:
    """Open the store's writer for a moment, after others that are about the same; raises StoreLocked if one of them keeps it.

    Raises IdentityMismatch for other settings, and where another part has fitted other codecs at the same time.
    """
    for second in range(LOCK_SECONDS):
        try:
            return job.open_writer(on_progress)
        except StoreLocked:
            on_progress("wait for another part", second, LOCK_SECONDS, "")
            time.sleep(1)
        except IdentityMismatch as e:
            if job.codecs and (job.out / BUILD).is_dir():
                hint = "If another part has fitted its codecs just now, run this one again: it takes those. Otherwise give it the settings of the others."
                raise IdentityMismatch(e.message, hint) from e
            raise
    return job.open_writer(on_progress)


def _repeated_content(store: Store, plan: Plan) -> int:
    """Count the images whose encoded bytes are those of another, by 64 bits of their hashes."""
    columns = (store.index("image", "sha256", slice(unit.number, unit.number + 1)) for unit in plan.units if unit.side == "image")
    hashes = (np.array([int(text[:16], 16) for text in column.to_pylist() if text], np.uint64).view(np.int64) for column in columns)
    return len(repeats(hashes, plan.num_images, store.path))

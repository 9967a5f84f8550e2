"""Does one task in a process of its own: `python -m kdstore.study.work DIR/tasks/NAME.json`, which is also how to repeat it by hand.

A process for each, so that a crash, an out-of-memory kill or a bug costs one cell. It works in DIR with paths relative to it, takes the task's lock before it
imports anything slow, and writes the result last. Killed at any moment and begun again, it leaves the same result: extractions, runs and VQA heads go on.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdstore.config import make_config
from kdstore.errors import ConfigError, Interrupted, KdstoreError, RunError, StoreLocked
from kdstore.jsonfile import read_json, write_json
from kdstore.process import keep_freed_memory
from kdstore.progress import OnProgress
from kdstore.store import open_store, store_stats, take_lock
from kdstore.study.config import PROTOCOL
from kdstore.study.folder import RESULT_STAGE, RUNS, STORES, lock_folder, read_done, result_path
from kdstore.study.grid import Task, task_of

BUSY, FOUND = 75, 76  # exit codes: another process does this task now, or has done it
HEADER = "---"  # begins what a process writes to the log
CURVE_POINTS = 200
SPEAK_SECONDS = 30.0


@dataclass(frozen=True)
class Job:
    """A task with the results that it needs, the settings of this machine for its stage, and where the names of the recipe lie here."""

    task: Task
    needs: tuple[Any, ...]  # result files
    machine: dict[str, Any]
    folders: dict[str, str]

    def place(self, name: str | None) -> str | None:
        return None if name is None else self.folders.get(name, name)

    def needed(self, kind: str) -> list[dict[str, Any]]:
        """Return the contents of the needed results of a kind."""
        return [found["content"] for found in self.needs if found["task"]["kind"] == kind]

    @property
    def model(self) -> str:
        """The model that is extracted or scored: the run that it needs, or the one that it names."""
        runs = self.needed("distill")
        named: str | None = self.task.settings.get("teacher") or self.task.settings.get("model")
        return runs[0]["run"] if runs else str(self.place(named))


@dataclass(frozen=True)
class Done:
    """What a task found: its content, what must be equal wherever it is run, and what may differ between two runs of it."""

    content: dict[str, Any]
    alike: dict[str, Any]
    made: dict[str, Any]


def main(arguments: Sequence[str]) -> int:
    """Do the task of a job file unless it is done; returns the exit code."""
    signal.signal(signal.SIGTERM, _interrupt)
    keep_freed_memory()
    path = Path(arguments[0]).absolute()
    os.chdir(path.parents[1])
    try:
        return _do(path)
    except StoreLocked as e:
        print(e)
        return BUSY
    except Interrupted as e:
        print(f"interrupted: {e}")
        return 128 + e.signum
    except KeyboardInterrupt:
        print("interrupted")
        return 128 + signal.SIGTERM
    except KdstoreError as e:
        print(f"error: {e}")
        return 1


def begin(job: str, log: str, environment: dict[str, str]) -> None:
    """Do the same in a process that was forked for it, which is to have a session and a log of its own."""
    import torch

    os.setsid()
    with open(log, "ab") as sink:
        for stream in (1, 2):
            os.dup2(sink.fileno(), stream)
    os.environ.update(environment)
    torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))  # OpenMP has read its variable by now
    sys.exit(main([job]))


def _do(path: Path) -> int:
    job = _read_job(path)
    lock = take_lock(lock_folder("", job.task))
    try:
        if read_done("", job.task) is not None:
            return FOUND
        print(f"{HEADER} {datetime.datetime.now().astimezone().isoformat(timespec='seconds')} {job.task.kind}: {job.task.label}", flush=True)
        started = time.perf_counter()
        done = DOES[job.task.kind](job, _speaker())
        made = {"seconds": round(time.perf_counter() - started, 1), **done.made}
        content = {"task": job.task.record, "task_digest": job.task.digest, "alike": {"protocol": PROTOCOL, **done.alike}, "content": done.content}
        write_json(result_path("", job.task), {"stage": RESULT_STAGE, **content, "made": made})
    finally:
        lock.release()
    return 0


def _read_job(path: Path) -> Job:
    """Read a job and the results that its task needs; raises ConfigError for another version's, RunError for a result that is not there."""
    found = read_json(path, RunError)
    if found["protocol"] != PROTOCOL:
        raise ConfigError(f"{path.name} is of protocol {found['protocol']}, and this kdstore has {PROTOCOL}.", "Install the same version everywhere.")
    task, *others = (task_of(record) for record in (found["task"], *found["needs"]))
    needed = tuple(read_done("", other) for other in others)
    for other, result in zip(others, needed, strict=True):
        if result is None:
            raise RunError(f"{task.label} needs {result_path('', other)}, which is not there.", "Run the study again.")
    return Job(task, needed, found["machine"], found["folders"])


def _extract(job: Job, on_progress: OnProgress) -> Done:
    from kdstore.extract.config import ExtractConfig
    from kdstore.extract.run import extract

    out = f"{STORES}/{job.task.name}"
    given = {"teacher": job.model, "data": job.place(job.task.settings["data"]), "out": out}
    result = extract(make_config(ExtractConfig, job.task.settings, job.machine, given), on_progress=on_progress)
    if job.task.settings.get("tokens", "none") != "none":
        store_stats(out, on_progress=on_progress)  # by which losses of tokens bring every teacher to one scale
    store = open_store(out)
    alike = {"source": store.identity["source"]["fingerprint"]}
    if not job.needs:  # a run's weights have other last bits on other hardware
        alike |= {name: store.identity[name]["digest"] for name in ("teacher", "preprocessing", "tokenizer")}
    content = {"store": out, "identity": store.identity, "digest": store.digest, "rows": store.num_images, "bytes": store.num_bytes}
    run = read_json(Path(out) / "run.json", RunError)
    return Done(content, alike, {"images_per_second": round(result.images_per_second, 1), "device": run["device"], "versions": run["versions"]})


def _distill(job: Job, on_progress: OnProgress) -> Done:
    from kdstore.distill.config import DistillConfig
    from kdstore.distill.train import distill

    settings, out = dict(job.task.settings), f"{RUNS}/{job.task.name}"
    chosen, tried = choose(settings.pop("choices", []), job.needed("retrieval"))
    stores = job.needed("extract")
    given = {"cache": stores[0]["store"] if stores else None, "student": job.place(settings["student"]), "data": job.place(settings["data"])}
    wanted = make_config(DistillConfig, without_unread({**settings, **chosen}), job.machine, {**given, "out": out, "resume": True})
    result = distill(wanted, on_progress=on_progress)
    run = read_json(Path(out) / "run.json", RunError)
    with open(Path(out) / "open_clip_model.safetensors", "rb") as file:
        digest = f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"
    content = {
        "run": out,
        "digest": digest,  # of the weights: run.json tells the time
        "samples": result.samples,
        "parameters": run["student"]["parameters"],
        "curve": _curve(Path(out)),
        "skipped": result.skipped,
        "loss": run["loss"],
        "chosen": chosen,
        "tried": tried,
    }
    alike = {name: value for name, value in run["settings"].items() if name != "stores"}
    times = {"seconds": round(result.seconds, 1), "samples_per_second": round(result.samples_per_second, 1)}
    return Done(content, alike, {**times, "device": run["machine"]["device"], "versions": run["versions"]})


def without_unread(settings: dict[str, Any]) -> dict[str, Any]:
    """Leave out what no term of the loss reads: [distill] is one for all losses of a study, and distillation refuses what would do nothing."""
    from kdstore.distill.losses import needs_of, parse_loss, parts_of

    loss = parse_loss(settings["loss"])
    unread = ([] if "logit_scale" in needs_of(loss) else ["teacher_temperature"]) + ([] if "tokens" in parts_of(loss) else ["token_standard"])
    return {name: value for name, value in settings.items() if name not in unread}


def choose(choices: list[dict[str, Any]], judged: list[dict[str, Any]]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the best of a sweep's choices, the first of equals, and all with their scores: recall@1 averaged over both directions, in percent."""
    recalls = [[found["rows"][0]["scores"][f"{side}_retrieval_recall@1"] for side in ("image", "text")] for found in judged]
    tried = [{"settings": choice, "score": sum(both) / 2} for choice, both in zip(choices, recalls, strict=True)]
    return max(tried, key=lambda one: one["score"])["settings"] if tried else {}, tried


def _curve(run: Path) -> list[dict[str, float]]:
    """Return at most CURVE_POINTS of a run's log: the contrast of images and captions where the loss has it, which runs of other losses share."""
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    kept = rows[:: max(1, -(-len(rows) // CURVE_POINTS))]
    return [{"samples": row["samples"], "loss": round(row.get("clip", row["loss"]), 4)} for row in kept]


def _retrieval(job: Job, on_progress: OnProgress) -> Done:
    from kdstore.evaluate.protocol import RETRIEVAL_DATA, RetrievalConfig
    from kdstore.evaluate.retrieval import evaluate_retrieval

    data = job.place(job.task.settings.get("data", RETRIEVAL_DATA))
    given = {"model": job.model, "data": data, "out": str(result_path("", job.task))}
    return _evaluated(job, evaluate_retrieval(make_config(RetrievalConfig, job.task.settings, job.machine, given), on_progress=on_progress).content)


def _vqa(job: Job, on_progress: OnProgress) -> Done:
    from kdstore.evaluate.protocol import VqaConfig
    from kdstore.evaluate.vqa import evaluate_vqa

    given = {"model": job.model, "folder": job.folders.get(job.task.settings["dataset"]), "out": str(result_path("", job.task))}
    return _evaluated(job, evaluate_vqa(make_config(VqaConfig, job.task.settings, job.machine, given), on_progress=on_progress).content)


def _diagnose_teacher(job: Job, on_progress: OnProgress) -> Done:
    from kdstore.study.diagnostics import diagnose_teacher

    return Done(diagnose_teacher(job.needed("extract")[0]["store"], **job.task.settings), {}, {})


def _diagnose_pair(job: Job, on_progress: OnProgress) -> Done:
    from kdstore.study.diagnostics import diagnose_pair

    first, second = (found["store"] for found in job.needed("extract"))
    return Done(diagnose_pair(first, second, **job.task.settings), {}, {})


def _diagnose_student(job: Job, on_progress: OnProgress) -> Done:
    from kdstore.data.sources import open_source
    from kdstore.study.diagnostics import diagnose_student

    run, *stores = job.needs
    probes, seen = ((found["content"]["store"], open_source(str(job.place(found["task"]["settings"]["data"])))) for found in stores)
    return Done(diagnose_student(run["content"]["run"], probes, seen, **job.task.settings), {}, {})


def _evaluated(job: Job, found: dict[str, Any]) -> Done:
    """Take the times out of an evaluation's result; the file that the stage wrote is replaced by the task's, and the outcomes beside it stay its own."""
    content = {name: value for name, value in found.items() if name not in ("made", "digest")}
    model = content["model"] = {**content["model"], "run": None}  # its digest tells the time
    alike: dict[str, Any] = {name: found[name] for name in ("config_digest", "metric") if name in found}
    alike |= {name: part["digest"] for name, part in found["data"].items() if isinstance(part, dict) and "digest" in part}
    if not job.needs:
        alike["model"] = model["identity"]["teacher"]["digest"]
    return Done(content, alike, found["made"])


def _speaker() -> OnProgress:
    """Tell the log what a stage reports: notices, and how far it is now and then."""
    told = time.monotonic()

    def on_progress(stage: str, done: int, total: int, note: str = "") -> None:
        nonlocal told
        if stage in ("warning", "notice"):
            print(f"{stage}: {note}", flush=True)
        elif time.monotonic() - told >= SPEAK_SECONDS:
            told = time.monotonic()
            print(f"{stage}: {done}/{total}{', ' if note else ''}{note}", flush=True)

    return on_progress


def _interrupt(signum: int, frame: object) -> None:
    raise KeyboardInterrupt


DOES: dict[str, Callable[[Job, OnProgress], Done]] = {
    "extract": _extract,
    "distill": _distill,
    "retrieval": _retrieval,
    "vqa": _vqa,
    "diagnose-teacher": _diagnose_teacher,
    "diagnose-pair": _diagnose_pair,
    "diagnose-student": _diagnose_student,
}

if __name__ == "__main__":
    with suppress(BrokenPipeError):
        sys.exit(main(sys.argv[1:]))

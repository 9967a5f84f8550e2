"""A study on the disk: where each task's files lie, and when it is done.

    study.json           the recipe as normalised, its digest, and the controls with what is expected of them (and was, where that was changed)
    store/NAME/          features of a teacher            runs/NAME/       a student
    results/NAME.json    written last and atomically      results/NAME...  what the stage keeps beside it
    tasks/NAME.json      what a process was told to do    logs/NAME.txt    what it said
    locks/NAME/          who does it just now             failed/NAME.json  why its last try failed

A task is done iff its result file is there, proves itself, and is of this very task under this protocol. No run deletes what another one made.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kdstore.errors import RunError
from kdstore.jsonfile import digest_of, disk_errors, make_folders, read_json, write_json
from kdstore.study.config import PROTOCOL, StudyConfig, parse_study
from kdstore.study.controls import controls_record
from kdstore.study.grid import Task

STUDY = "study.json"
RESULTS, STORES, RUNS, LOGS, LOCKS, TASKS, FAILED = FOLDERS = "results", "store", "runs", "logs", "locks", "tasks", "failed"
RESULT_STAGE = "study task"


def begin_study(out: Path, config: StudyConfig) -> None:
    """Make the folders and write study.json, over that of an earlier recipe; raises CannotWrite, DiskFull."""
    with disk_errors(out):
        for name in FOLDERS:
            make_folders(out / name)
        write_study(out, config, _kept(out, config))


def _kept(out: Path, config: StudyConfig) -> dict[str, Any]:
    """Return what study.json keeps of the one before: where a merged study's stores lie, and margins and controls that stood when there were results."""
    try:
        before = read_json(out / STUDY, RunError)
    except (OSError, RunError):
        return {}
    if before.get("stage") != "study":
        return {}
    kept, earlier, was = {name: before[name] for name in ("merged", "elsewhere") if name in before}, list(before.get("earlier", [])), _expected(before)
    if was not in (*earlier, _expected({"recipe": config.recipe, "controls": controls_record()})) and any((out / RESULTS).glob("*.json")):
        earlier.append(was)
    return kept | ({"earlier": earlier} if earlier else {})


def _expected(study: dict[str, Any]) -> dict[str, Any]:
    """Return what a study.json says beforehand: the margin, and the digest of its controls with their tolerances."""
    return {"margin": study["recipe"]["study"]["margin"], "controls": digest_of(study["controls"])}


def changed_expectations(out: str | Path, config: StudyConfig) -> list[str]:
    """Say how margin and controls differ from those that stood when there were results already."""
    study = read_json(Path(out) / STUDY, RunError)
    now, before = _expected({"recipe": config.recipe, "controls": controls_record()}), [*study.get("earlier", []), _expected(study)]
    margins = sorted({one["margin"] for one in before} - {now["margin"]})
    said = [f"The margin is {now['margin']:g} and was {' and '.join(f'{one:g}' for one in margins)} when there were results already."] if margins else []
    if any(one["controls"] != now["controls"] for one in before):
        said.append("Controls are judged by other expectations than those that stood when there were results already.")
    return said


def write_study(out: Path, config: StudyConfig, more: dict[str, Any] | None = None) -> None:
    said = {"recipe": config.recipe, "study_digest": config.digest, "protocol": PROTOCOL, "controls": controls_record()}
    write_json(out / STUDY, {"stage": "study", **said, "folders": config.folders, "machine": config.machine, **(more or {})})


def load_study(out: str | Path) -> StudyConfig:
    """Read the recipe of a study; raises RunError where there is none, or it is not as it was written."""
    path = Path(out) / STUDY
    if not path.is_file():
        raise RunError(f"There is no study at {out}.", "Begin one with kdstore study run RECIPE --out DIR.")
    study = read_json(path, RunError)
    if study.get("stage") != "study":
        raise RunError(f"{path} is not the {STUDY} of a study.", "Give the folder that kdstore study run was told.")
    machine: dict[str, dict[str, Any]] = study["machine"]
    tables = {**study["recipe"], "folders": study["folders"]}
    return parse_study(tables | {stage: {**tables[stage], **settings} for stage, settings in machine.items()})


def result_path(out: str | Path, task: Task) -> Path:
    """Where a task's result is, or will be."""
    return Path(out) / RESULTS / f"{task.name}.json"


def log_path(out: str | Path, task: Task) -> Path:
    """Where all tries of a task say what they do."""
    return Path(out) / LOGS / f"{task.name}.txt"


def lock_folder(out: str | Path, task: Task) -> Path:
    """Return the folder of a task's lock, which it makes."""
    folder = Path(out) / LOCKS / task.name
    make_folders(folder)
    return folder


def write_job(out: Path, config: StudyConfig, task: Task, needs: Sequence[Task]) -> Path:
    """Write what the process of a task is to do."""
    path = out / TASKS / f"{task.name}.json"
    here = {"machine": config.machine.get(task.kind, {}), "folders": config.folders}
    job = {"stage": "study job", "task": task.record, "needs": [one.record for one in needs], "protocol": PROTOCOL, **here}
    write_json(path, job)
    return path


def note_failure(out: Path, task: Task, reason: str) -> None:
    """Leave why a task failed where the report finds it."""
    said = {"task": task.name, "task_digest": task.digest, "label": f"{task.kind}: {task.label}", "reason": reason, "log": f"{LOGS}/{task.name}.txt"}
    write_json(out / FAILED / f"{task.name}.json", {"stage": "study failure", **said})


def read_failure(out: str | Path, task: Task) -> dict[str, Any] | None:
    """Return why the last try of a task failed; None if it did not, or is done by now."""
    path = Path(out) / FAILED / f"{task.name}.json"
    return read_json(path, RunError) if path.is_file() and read_done(out, task) is None else None


def read_done(out: str | Path, task: Task) -> dict[str, Any] | None:
    """Return a task's result file; None if it is not done."""
    path = result_path(out, task)
    try:
        found = read_json(path, RunError)
    except (OSError, RunError):
        return None
    same = found.get("stage") == RESULT_STAGE and found.get("task_digest") == task.digest
    return found if same and found.get("alike", {}).get("protocol") == PROTOCOL else None

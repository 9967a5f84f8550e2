"""A study on the disk: where each task's files lie, and when it is done.

    study.json           the recipe as normalised, its digest, and the controls with what is expected of them
    store/NAME/          features of a teacher            runs/NAME/       a student
    results/NAME.json    written last and atomically      results/NAME...  what the stage keeps beside it
    tasks/NAME.json      what a process was told to do    logs/NAME.txt    what it said
    locks/NAME/          who does it just now

A task is done iff its result file is there, proves itself, and is of this very task under this protocol. Nothing here is ever deleted.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kdstore.errors import RunError
from kdstore.jsonfile import make_folders, read_json, write_json
from kdstore.study.config import PROTOCOL, StudyConfig, parse_study
from kdstore.study.controls import controls_record
from kdstore.study.grid import Task

STUDY = "study.json"
RESULTS, STORES, RUNS, LOGS, LOCKS, TASKS = "results", "store", "runs", "logs", "locks", "tasks"
RESULT_STAGE = "study task"


def begin_study(out: Path, config: StudyConfig) -> None:
    """Make the folders and write study.json, that of an earlier recipe too."""
    for name in (RESULTS, STORES, RUNS, LOGS, LOCKS, TASKS):
        make_folders(out / name)
    write_study(out, config)


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
    return Path(out) / LOGS / f"{task.name}.txt"


def read_done(out: str | Path, task: Task) -> dict[str, Any] | None:
    """Return a task's result file; None if it is not done."""
    path = result_path(out, task)
    try:
        found = read_json(path, RunError)
    except (OSError, RunError):
        return None
    same = found.get("stage") == RESULT_STAGE and found.get("task_digest") == task.digest
    return found if same and found.get("alike", {}).get("protocol") == PROTOCOL else None

"""Joins studies that several labs have run, by the digests of their tasks: teachers here, seeds there, one report.

Only results travel, with the outcomes behind them; stores and runs stay where they are and are named. Labs may differ in teachers, students, losses, lengths,
seeds, VQA sets and the controls that they left out, in nothing else; and what two of them have both run must have been run alike. Then the first one's counts.
What only one of them has run must be of the same pairs, questions, metric and precision as the others' (`alike`).
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdstore.errors import ConfigError, RunError
from kdstore.evaluate.outcomes import outcomes_path
from kdstore.jsonfile import differing_fields, disk_errors, make_folders, read_json
from kdstore.study.alike import unlike
from kdstore.study.config import PROTOCOL, StudyConfig, parse_study
from kdstore.study.folder import RESULTS, STUDY, load_study, read_done, result_path, write_study
from kdstore.study.grid import Task, plan_study

MANY = ("losses", "samples", "seeds", "vqa")  # of [study]: in the merged one, all that any of them has
OWN = ("name", "random_architecture", "without_controls", *MANY)  # of [study]: in which labs may differ


@dataclass(frozen=True)
class MergeResult:
    """A merged study: its folder, how many results each lab gave to it, how many two labs had both, and how many tasks nobody has run."""

    path: str
    results: dict[str, int]
    in_both: int
    missing: int


def merge_studies(folders: Sequence[str | Path], out: str | Path) -> MergeResult:
    """Join finished results of studies in a new folder; raises RunError and ConfigError for what was not run alike, before anything is written."""
    out = Path(out)
    if (out / STUDY).exists():
        raise ConfigError(f"There is a study at {out} already.", "Give --out a new folder.")
    configs = {str(folder): load_study(folder) for folder in folders}
    earlier: list[dict[str, Any]] = []
    for folder in configs:
        study = read_json(Path(folder) / STUDY, RunError)
        earlier += [one for one in study.get("earlier", []) if one not in earlier]
        if (protocol := study["protocol"]) != PROTOCOL:
            raise ConfigError(f"{folder} was run by protocol {protocol}, and this kdstore has {PROTOCOL}.", "Run it again with this version.")
    merged = _joined(configs)
    first: dict[str, tuple[str, Path, dict[str, Any]]] = {}  # by digest: whose, its file, what must be equal
    counts, in_both, elsewhere = dict.fromkeys(configs, 0), 0, {}
    every: list[tuple[str, Task, dict[str, Any]]] = []
    for folder, config in configs.items():
        for digest, task in plan_study(config).tasks.items():
            found = read_done(folder, task)
            if found is None:
                continue
            every.append((folder, task, found))
            if digest in first:
                other, _, alike = first[digest]
                if differ := differing_fields(alike, found["alike"], (other, folder)):
                    raise RunError(f"{task.kind}: {task.label} was not run alike: {differ}.", "Run it again in one of them, with the other's data and weights.")
                in_both += 1
                continue
            first[digest] = (folder, result_path(folder, task), found["alike"])
            counts[folder] += 1
            if made := found["content"].get("store") or found["content"].get("run"):
                elsewhere[task.name] = str((Path(folder) / made).absolute())
    if said := unlike(every):
        raise RunError(said[0], "Run it again in one of them, with the other's data and settings of the machine.")
    with disk_errors(out):
        make_folders(out / RESULTS)
        for _, path, _ in first.values():
            for file in (path, outcomes_path(path)):
                if file.exists():
                    shutil.copyfile(file, out / RESULTS / file.name)
        from_labs = {"merged": {folder: config.digest for folder, config in configs.items()}, "elsewhere": elsewhere}
        write_study(out, merged, from_labs | ({"earlier": earlier} if earlier else {}))
    missing = sum(digest not in first for digest in plan_study(merged).tasks)
    return MergeResult(str(out), counts, in_both, missing)


def _joined(configs: dict[str, StudyConfig]) -> StudyConfig:
    """Return the recipe that has all that any of some recipes has; raises ConfigError where they differ in what must be equal."""
    (here, first), *others = configs.items()
    tables = first.recipe
    for there, config in others:
        recipe = config.recipe
        if differ := differing_fields(_common(tables), _common(recipe), (here, there)):
            raise ConfigError(f"The studies were not run alike: {differ}.", "Only teachers, students, losses, samples, seeds and VQA sets may differ.")
        study = {name: list(dict.fromkeys([*tables["study"][name], *recipe["study"][name]])) for name in MANY}
        left_out = [name for name in tables["study"]["without_controls"] if name in recipe["study"]["without_controls"]]
        models = {table: _labelled(table, tables[table], recipe[table], there) for table in ("teachers", "students")}
        tables = {**tables, "study": {**tables["study"], **study, "without_controls": left_out}, **models}
    return parse_study(tables)


def _common(recipe: dict[str, Any]) -> dict[str, Any]:
    """Return what must be equal in all labs."""
    study = {name: value for name, value in recipe["study"].items() if name not in OWN}
    return {**{name: table for name, table in recipe.items() if name not in ("teachers", "students")}, "study": study}


def _labelled(table: str, models: dict[str, str], more: dict[str, str], there: str) -> dict[str, str]:
    """Add models that are new under their labels; raises ConfigError for a label that means another model."""
    for label, model in more.items():
        if models.get(label, model) != model:
            raise ConfigError(f"'{label}' in [{table}] is {model} in {there}, and {models[label]} before.", "Rename one of them.")
    return models | {label: model for label, model in more.items() if model not in models.values()}

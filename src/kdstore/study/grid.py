"""From a recipe to its plan: every task of the study, each addressed by what decides its result, and the arms that their results make up.

A task's digest is of its kind, its settings and the digests of the tasks that it needs; no weights, data or GPU are looked at, so that the plan of any study is
made anywhere. What two arms share (a teacher's extraction, the students that have no teacher) is one task. Seeds come one after the other, so that half a
study has a table too.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any
from urllib.parse import parse_qsl

from kdstore.jsonfile import digest_of
from kdstore.study.config import StudyConfig

NO_TEACHER, RANDOM, OWN_SIZE = "no teacher", "random", "own size"  # where other arms have a teacher's label
ROWS = {"untrained student": "untrained", "question-only": "question-only", "vocabulary oracle": "vocabulary-oracle"}  # control -> row of a VQA result
OF_TEACHER = ("teacher_temperature", "token_standard", "sigmoid_teacher")  # settings that say nothing where there is no teacher
NAMED = ("student", "teacher", "model", "dataset", "loss", "samples", "seed", "seeds")


@dataclass(frozen=True)
class Task:
    """One unit of work; `settings` decide its result and hold nothing of a machine, `needs` are digests of tasks whose results it reads, in its kind's order.

    Settings are those of the stage of its name but for paths. `distill` needs the store (if any), then the trials that chose among its `choices` (if any);
    `extract`, `retrieval` and `vqa` of a student need its run.
    """

    kind: str
    label: str  # for people; in no digest
    settings: dict[str, Any]
    needs: tuple[str, ...] = ()

    @cached_property
    def digest(self) -> str:
        return digest_of({"kind": self.kind, "settings": self.settings, "needs": list(self.needs)})

    @cached_property
    def name(self) -> str:
        """Name its files: `<place>-<8 hex>`."""
        said = [str(value) for key in NAMED for value in ([self.settings[key]] if key in self.settings else [])]
        place = re.sub(r"[^A-Za-z0-9._+]+", "-", "-".join([self.kind, *said]))[:80].strip("-.")
        return f"{place}-{self.digest.removeprefix('sha256:')[:8]}"

    @property
    def record(self) -> dict[str, Any]:
        return {"kind": self.kind, "label": self.label, "settings": self.settings, "needs": list(self.needs)}


def task_of(record: dict[str, Any]) -> Task:
    """Return the task of a record."""
    return Task(record["kind"], record["label"], record["settings"], tuple(record["needs"]))


Cell = dict[str, str]
"""Role -> digest of the task that plays it: `extract`, `distill`, `retrieval`, `vqa/<data set>`, `diagnose-teacher`, `diagnose-student`."""


@dataclass(frozen=True)
class Arm:
    """One row of the report: a model kind over seeds. `control` names an entry of CONTROLS; `row` is the row of its VQA results."""

    kind: str  # student, teacher or control
    control: str | None
    teacher: str | None  # a label, or NO_TEACHER, RANDOM, OWN_SIZE
    student: str | None
    loss: str | None
    samples: int | None
    cells: dict[int, Cell]  # by seed
    row: str = "model"

    @property
    def id(self) -> str:
        if self.kind == "teacher":
            return f"teacher|{self.teacher}"
        said = (self.control, self.student, self.loss, self.samples) if self.control else (self.student, self.teacher, self.loss, self.samples)
        return "|".join([self.kind, *(str(value) for value in said if value is not None)])


@dataclass(frozen=True)
class Plan:
    """All tasks of a study by digest, each after those that it needs; its arms; and what teachers' labels stand for: their extractions, and their pairs."""

    tasks: dict[str, Task]
    arms: tuple[Arm, ...]
    stores: dict[str, str]
    pairs: dict[tuple[str, str], str]  # labels of two teachers -> how far they agree

    def of_kind(self, kind: str) -> list[Task]:
        return [task for task in self.tasks.values() if task.kind == kind]


def plan_study(config: StudyConfig) -> Plan:
    """Return the plan of a recipe: the same for the same recipe, on every machine."""
    builder = _Builder(config)
    arms: dict[str, Arm] = {}
    for seed in config.grid.seeds:
        for arm in builder.arms(seed):
            arms.setdefault(arm.id, arm).cells.update(arm.cells)
    return Plan(builder.tasks, tuple(arms.values()), builder.stores, builder.pairs())


@dataclass
class _Builder:
    """Adds tasks; a task that is there already is found again by its digest."""

    config: StudyConfig
    tasks: dict[str, Task] = field(default_factory=dict)
    stores: dict[str, str] = field(default_factory=dict)
    probes: dict[str, str] = field(default_factory=dict)  # label -> the teacher's extraction over the probes

    def arms(self, seed: int) -> Iterator[Arm]:
        """Yield the arms with one seed's cells."""
        config, grid = self.config, self.config.grid
        without = set(grid.without_controls)
        for label, model in config.teachers.items():
            self.stores[label] = self.extract(label, {"teacher": model})
            vqa = grid.vqa if "teacher itself" not in without else ()
            cell = {"extract": self.stores[label], **self.scored(label, {"model": model}, (), seed, vqa), **self.diagnosed(label, model)}
            yield Arm("teacher", None, label, None, None, None, {seed: cell})
        first = next(iter(config.teachers))
        if "random teacher" not in without:
            self.stores[RANDOM] = self.extract(RANDOM, {"teacher": config.random_architecture, "untrained_seed": grid.random_seed})
        for student in config.students:
            yield from self.controls_of(student, seed)
            taught: list[tuple[str | None, str, str]] = [(None, label, self.stores[label]) for label in config.teachers]
            if "random teacher" not in without:
                taught.append(("random teacher", RANDOM, self.stores[RANDOM]))
            if "born-again" not in without:
                taught.append(("born-again", OWN_SIZE, self.stores[f"{OWN_SIZE} ({student})"]))
            if "permuted targets" not in without:
                taught.append(("permuted targets", first, self.stores[first]))
            for samples, loss, (control, label, store) in itertools.product(grid.samples, grid.losses, taught):
                permuted = {"permute_targets": seed} if control == "permuted targets" else {}
                cell = self.student(student, f"{control or label}", store, loss, samples, seed, permuted)
                if label in self.probes and not control and seed == grid.seeds[0]:  # one student of each arm
                    needs = (cell["distill"], self.probes[label], store)
                    cell["diagnose-student"] = self.add("diagnose-student", self.tasks[cell["distill"]].label, self.measured(), needs)
                yield Arm("control" if control else "student", control, label, student, loss, samples, {seed: cell})

    def controls_of(self, student: str, seed: int) -> Iterator[Arm]:
        """Yield what is measured without any teacher: the student alone, rows of its VQA results, and the teacher of the student's own size."""
        grid = self.config.grid
        without = set(grid.without_controls)
        rows = [control for control in ROWS if control not in without] if seed == grid.seeds[0] else []
        for samples in grid.samples:
            with_rows = rows and samples == grid.samples[0]
            if "no teacher" not in without or with_rows:
                cell = self.student(student, NO_TEACHER, None, "none", samples, seed, controls=bool(with_rows))
                yield Arm("control", "no teacher", NO_TEACHER, student, None, samples, {seed: cell})
                for control in rows if with_rows else ():
                    scored = {role: digest for role, digest in cell.items() if role.startswith("vqa/")}
                    yield Arm("control", control, None, student, None, None, {seed: scored}, ROWS[control])
        if "born-again" not in without:
            own = f"{OWN_SIZE} ({student})"
            run = self.distill(student, own, None, "none", grid.own_samples or 4 * max(grid.samples), grid.own_seed)
            self.stores[own] = self.extract(own, {}, (run,))
            cell = {"distill": run, "extract": self.stores[own], **self.scored(own, {}, (run,), seed, grid.vqa)}
            yield Arm("control", "born-again", OWN_SIZE, student, None, None, {seed: cell})

    def student(
        self, student: str, taught_by: str, store: str | None, loss: str, samples: int, seed: int, more: dict[str, Any] | None = None, *, controls: bool = False
    ) -> Cell:
        """Add one student with its scores; with `controls`, its VQA results have the rows of ROWS too."""
        run = self.distill(student, taught_by, store, loss, samples, seed, more)
        return {"distill": run, **self.scored(self.tasks[run].label, {}, (run,), seed, self.config.grid.vqa, controls=controls)}

    def distill(
        self, student: str, taught_by: str, store: str | None, loss: str, samples: int, seed: int, more: dict[str, Any] | None = None, *, trial: bool = False
    ) -> str:
        """Add a run and, where the recipe sweeps, the trials that choose its settings."""
        config, grid = self.config, self.config.grid
        settings = {name: value for name, value in config.stages["distill"].items() if store or name not in OF_TEACHER}
        settings |= {"student": config.students[student], "loss": loss, "data": grid.data, "samples": samples, "seed": seed, "projector": "always"}
        shown = store or (self.stores[next(iter(config.teachers))] if config.stages["extract"].get("views") else None)  # alone, it sees the same views
        needs = (shown,) if shown else ()
        label = f"{student} from {taught_by}, {loss}, {samples} samples, seed {seed}"
        if not config.sweep or trial:
            return self.add("distill", f"trial of {label}: {more}" if trial else label, {**settings, **(more or {})}, needs)
        choices = [dict(zip(config.sweep, values, strict=True)) for values in itertools.product(*config.sweep.values())]
        budget, judges = grid.sweep_samples or samples, {"data": grid.sweep_data}
        permuted = {"permute_targets": grid.sweep_seed} if more else {}
        trials = [self.distill(student, taught_by, store, loss, budget, grid.sweep_seed, {**permuted, **choice}, trial=True) for choice in choices]
        scored = tuple(self.retrieval(self.tasks[run].label, judges, (run,)) for run in trials)
        return self.add("distill", label, {**settings, **(more or {}), "choices": choices}, needs + scored)

    def extract(self, label: str, model: dict[str, Any], needs: tuple[str, ...] = ()) -> str:
        return self.add("extract", label, {**self.config.stages["extract"], "data": self.config.grid.data, **model}, needs)

    def scored(self, label: str, model: dict[str, Any], needs: tuple[str, ...], seed: int, vqa: tuple[str, ...], *, controls: bool = False) -> Cell:
        """Add the retrieval of a model, which draws nothing, and its VQA under one seed."""
        retrieval = self.retrieval(label, model, needs)
        return {"retrieval": retrieval, **{f"vqa/{name}": self.vqa(label, model, needs, seed, name, controls=controls) for name in vqa}}

    def retrieval(self, label: str, more: dict[str, Any], needs: tuple[str, ...]) -> str:
        return self.add("retrieval", label, {**self.config.stages["retrieval"], **more}, needs)

    def vqa(self, label: str, model: dict[str, Any], needs: tuple[str, ...], seed: int, name: str, *, controls: bool) -> str:
        settings = {**self.config.stages["vqa"], **self.config.vqa_of.get(name, {}), "dataset": name, "seeds": [seed], "controls": controls}
        return self.add("vqa", f"{label}, head's seed {seed}", {**settings, **model}, needs)

    def diagnosed(self, label: str, model: str) -> Cell:
        """Add the diagnostics of a teacher, where the recipe names probes: embeddings of these alone, whatever else its store for the students has."""
        if self.config.grid.probes is None:
            return {}
        kept = {name: value for name, value in self.config.stages["extract"].items() if name in ("precision", "dtype", "unit_rows")}
        self.probes[label] = self.add("extract", f"{label}, probes", {**kept, "data": self.config.grid.probes, "teacher": model}, ())
        return {"diagnose-teacher": self.add("diagnose-teacher", label, self.measured(), (self.probes[label],))}

    def pairs(self) -> dict[tuple[str, str], str]:
        """Add how far each two teachers agree on the probes."""
        settings = {"samples": self.config.grid.probe_samples}
        both = itertools.combinations(self.probes, 2)
        return {(a, b): self.add("diagnose-pair", f"{a} and {b}", settings, (self.probes[a], self.probes[b])) for a, b in both}

    def measured(self) -> dict[str, Any]:
        """Say what diagnostics are measured on: how many images, and which classes of words are swapped."""
        swapped = dict(parse_qsl((self.config.grid.probes or "").partition("?")[2])).get("swapped", "")
        return {"samples": self.config.grid.probe_samples, "words": [word for word in swapped.split(",") if word]}

    def add(self, kind: str, label: str, settings: dict[str, Any], needs: tuple[str, ...]) -> str:
        task = Task(kind, label, settings, needs)
        self.tasks.setdefault(task.digest, task)
        return task.digest

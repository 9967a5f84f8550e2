"""From the finished results of a study's folder to the one record that its report is made of: half a study gives half a record, and nothing is invented.

Only results that prove themselves and belong to the recipe's plan count; a task that failed or is missing leaves a gap. The record holds numbers and sentences;
how they look is decided elsewhere. Commands are those of a task by hand, to be given in the study's folder.

T teachers, S seeds.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from kdstore.config import parse_set
from kdstore.study.alike import unlike
from kdstore.study.config import StudyConfig
from kdstore.study.diagnostics import EXPLAINED
from kdstore.study.folder import RESULTS, RUNS, STORES, TASKS, changed_expectations, load_study, read_failure, result_path
from kdstore.study.grid import OF_TEACHER, Arm, Plan, Task, plan_study
from kdstore.study.judged import judge_controls
from kdstore.study.prediction import predict
from kdstore.study.scores import Results, Score, common_seeds, standard_error, summary, table
from kdstore.study.threats import threats
from kdstore.study.verdict import Cell, Headline, Verdict, gain, headline, judge
from kdstore.study.work import without_unread

STRENGTH = "retrieval/t2i@1"
"""The score of the teachers that orders them in the headline; their own VQA orders them in verdicts beside it."""

AGAINST = ("no teacher", "born-again", "random teacher", "permuted targets")
COMMANDS = {"extract": "kdstore extract", "distill": "kdstore distill", "retrieval": "kdstore evaluate retrieval", "vqa": "kdstore evaluate vqa"}
FLAGS = ("model", "teacher", "cache", "data", "student", "loss", "dataset", "out")  # that the commands have for settings of these names
PLACED = ("model", "teacher", "student", "data")  # what the recipe names, and may lie in a folder of this machine

Scores = Mapping[str, Mapping[str, Score]]


def collect(folder: str | Path) -> dict[str, Any]:
    """Return what is known of a study so far; raises RunError where there is none."""
    config = load_study(folder)
    plan = plan_study(config)
    results = Results(Path(folder), config, plan)
    scores = {arm.id: results.scores(arm) for arm in plan.arms}
    said = {arm.id: {name: summary(score, drawn=_drawn(arm, name)) for name, score in scores[arm.id].items()} for arm in plan.arms}
    failures = [failure for digest, task in plan.tasks.items() if digest not in results.done and (failure := read_failure(folder, task)) is not None]
    verdicts, diagnostics = _verdicts(config, plan, scores, said), _diagnostics(plan, results)
    content = {
        "stage": "study report",
        "name": config.grid.name,
        "recipe": config.recipe,
        "study_digest": config.digest,
        "made": _made(results),
        "finished": {"done": len(results.done), "failed": len(failures), "missing": len(plan.tasks) - len(results.done) - len(failures)},
        "changed": changed_expectations(folder, config),
        "unlike": unlike((f"{task.label} ({task.name})", task, results.done[digest]) for digest, task in plan.tasks.items() if digest in results.done),
        "failures": [{name: failure[name] for name in ("task", "label", "reason", "log")} for failure in failures],
        "headline": asdict(_headline(config, plan, verdicts)),
        "arms": [
            _arm(arm, results, said[arm.id]) for arm in plan.arms if any(digest in results.done for cell in arm.cells.values() for digest in cell.values())
        ],
        "verdicts": [cell | _plain(verdict) for cell, verdict in verdicts],
        "gains": list(_gains(plan, scores)),
        "controls": judge_controls(plan, scores, _chance(plan, results), config.grid.without_controls, config.grid.margin),
        "curves": list(_curves(plan, results)),
        "diagnostics": diagnostics,
        "prediction": _prediction(config, plan, diagnostics["teachers"], scores, said),
    }
    return content | {"threats": threats(content, config.grid.margin)}


def _drawn(arm: Arm, score: str) -> bool:
    """Tell whether seeds decide a score: neither the retrieval of a model that no seed of the study trained, nor what the vocabulary allows."""
    return arm.control != "vocabulary oracle" and not (score.startswith("retrieval/") and arm.samples is None)


def _arm(arm: Arm, results: Results, said: dict[str, Any]) -> dict[str, Any]:
    runs = [result for digest in _digests(arm, "distill") if (result := results.done.get(digest)) is not None]
    return {
        "id": arm.id,
        "kind": arm.kind,
        "teacher": arm.teacher,
        "student": arm.student,
        "loss": arm.loss,
        "samples": arm.samples,
        "seeds": sorted(seed for seed, cell in arm.cells.items() if any(digest in results.done for digest in cell.values())),
        "parameters": _parameters(arm, results),
        "scores": said,
        "cost": _cost(arm, results, runs),
        "files": list(_files(arm, results)),
    }


def _digests(arm: Arm, role: str) -> list[str]:
    """Return the tasks that play a role in an arm, each once, those of `vqa` for all data sets."""
    return list(dict.fromkeys(digest for cell in arm.cells.values() for name, digest in cell.items() if name == role or name.startswith(f"{role}/")))


def _parameters(arm: Arm, results: Results) -> dict[str, int] | None:
    """Return the parameters of what was scored, as whatever was done first says."""
    if arm.row not in ("model", "untrained"):
        return None
    for role in ("distill", "retrieval", "vqa"):
        for digest in _digests(arm, role):
            if (content := results.content(digest)) is not None:
                counts: dict[str, int] = content["parameters"] if role == "distill" else content["model"]["parameters"]
                return counts
    return None


def _cost(arm: Arm, results: Results, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the samples that one student saw, the mean of its seconds, and its share of the seconds in which its teacher was extracted, once for all."""
    if arm.kind == "teacher":
        extracted = [results.done[digest]["made"]["seconds"] for digest in _digests(arm, "extract") if digest in results.done]
        return {"samples": None, "seconds": extracted[0] if extracted else None, "teacher_seconds": None}
    if not runs:
        return {"samples": None, "seconds": None, "teacher_seconds": None}
    store = next((digest for digest in runs[0]["task"]["needs"] if results.plan.tasks[digest].kind == "extract"), None)
    share = None
    if arm.loss is not None and store in results.done:
        users = [task for task in results.plan.of_kind("distill") if store in task.needs and task.settings["loss"] != "none"]
        share = results.done[store]["made"]["seconds"] / len(users)
    return {"samples": runs[0]["content"]["samples"], "seconds": float(np.mean([run["made"]["seconds"] for run in runs])), "teacher_seconds": share}


def _files(arm: Arm, results: Results) -> Iterator[dict[str, str]]:
    """Yield the result files behind an arm: of its own tasks, of what they read of teachers, and of how a teacher agrees with the others."""
    tasks = results.plan.tasks
    own = [digest for role in ("extract", "distill", "retrieval", "vqa", "diagnose-teacher", "diagnose-student") for digest in _digests(arm, role)]
    if arm.kind == "teacher":
        own += [digest for pair, digest in results.plan.pairs.items() if arm.teacher in pair]
    read = [need for digest in own for need in tasks[digest].needs if tasks[need].kind == "extract"]
    for digest in dict.fromkeys([*read, *own]):
        if digest in results.done:
            path = result_path("", tasks[digest])
            yield {"path": str(path), "digest": results.done[digest]["digest"], "command": command(tasks[digest], results)}


def command(task: Task, results: Results) -> str:
    """Return the command that does a task by hand in the study's folder: one of kdstore into files of its own, or for diagnostics the task itself again."""
    if task.kind not in COMMANDS:
        return f"mv {RESULTS}/{task.name}.json before.json && python -m kdstore.study.work {TASKS}/{task.name}.json"
    settings = {name: results.place(value) if name in PLACED else value for name, value in task.settings.items() if name != "choices"}
    if settings.keys() & set(OF_TEACHER):
        settings = without_unread(settings)
    needed = [content for digest in task.needs if (content := results.content(digest)) is not None]
    run, store = (next((content[name] for content in needed if name in content), None) for name in ("run", "store"))
    if task.kind == "distill":
        settings |= {} if store is None else {"cache": store}
        settings |= results.done[task.digest]["content"]["chosen"]
    elif run is not None:
        settings["teacher" if task.kind == "extract" else "model"] = run
    if task.kind == "vqa" and (where := results.place(settings["dataset"])) != settings["dataset"]:
        settings["folder"] = where
    settings["out"] = {"extract": f"{STORES}/again", "distill": f"{RUNS}/again"}.get(task.kind, "again.json")
    return " ".join([COMMANDS[task.kind], *(_option(name, value) for name, value in settings.items())])


def _option(name: str, value: Any) -> str:
    if name in FLAGS:
        return f"--{name} {shlex.quote(value)}"
    text = value if isinstance(value, str) and parse_set([f"{name}={value}"])[name] == value else json.dumps(value, ensure_ascii=False)
    return f"--set {shlex.quote(f'{name}={text}')}"


def _cells(config: StudyConfig, plan: Plan) -> Iterator[tuple[dict[str, Any], list[Arm]]]:
    """Yield what a verdict is about: a student, loss, schedule and data set, with the arms of the teachers."""
    for student in config.students:
        for loss in config.grid.losses:
            for samples in config.grid.samples:
                arms = [arm for arm in plan.arms if arm.kind == "student" and (arm.student, arm.loss, arm.samples) == (student, loss, samples)]
                for vqa in config.grid.vqa:
                    yield {"student": student, "loss": loss, "samples": samples, "vqa": vqa}, arms


def _verdicts(config: StudyConfig, plan: Plan, scores: Scores, said: Mapping[str, Any]) -> list[tuple[dict[str, Any], Verdict]]:
    """Return a verdict of each cell and strength, over the teachers that have both, under the seeds that all of them have."""
    verdicts = []
    for cell, arms in _cells(config, plan):
        score = f"vqa/{cell['vqa']}/overall"
        for strength in (STRENGTH, score):
            there = [arm for arm in arms if score in scores[arm.id] and strength in said[f"teacher|{arm.teacher}"]]
            seeds = common_seeds([scores[arm.id][score] for arm in there])
            if not seeds:
                continue
            score_TS, images = table([scores[arm.id][score] for arm in there], seeds)
            own = [said[f"teacher|{arm.teacher}"][strength] for arm in there]
            strength_T, error_T = np.array([one["mean"] for one in own], np.float64), np.array([standard_error(one) for one in own])
            verdict = judge(Cell([str(arm.teacher) for arm in there], strength_T, error_T, score_TS, images), config.grid.margin)
            verdicts.append(({**cell, "strength": strength}, verdict))
    return verdicts


def _headline(config: StudyConfig, plan: Plan, verdicts: Sequence[tuple[dict[str, Any], Verdict]]) -> Headline:
    """Return the verdict over all cells of the plan, unfinished where a teacher or a seed of theirs is missing."""
    found = {_label(cell): verdict for cell, verdict in verdicts if cell["strength"] == STRENGTH}
    every = [len(config.grid.seeds)] * len(config.teachers)
    whole = {label for label, verdict in found.items() if [len(point.by_seed) for point in verdict.points] == every}
    return headline(found, [label for cell, _ in _cells(config, plan) if (label := _label(cell)) not in whole])


def _label(cell: Mapping[str, Any]) -> str:
    return f"{cell['student']}, {cell['loss']}, {cell['samples']} samples, {cell['vqa']}"


def _plain(verdict: Verdict) -> dict[str, Any]:
    return {name: value for name, value in asdict(verdict).items() if name != "p_inverted"}


def _gains(plan: Plan, scores: Scores) -> Iterator[dict[str, Any]]:
    """Yield how far each student of a teacher is above what the controls explain, and the controls' students above no teacher."""
    controls = [arm for arm in plan.arms if arm.control in AGAINST and arm.samples is not None]
    for arm in plan.arms:
        if arm.samples is None or arm.control == "no teacher":
            continue
        for other in controls:
            alike = other.student == arm.student and other.samples == arm.samples and other.loss in (None, arm.loss)
            if not alike or (arm.kind == "control" and other.control != "no teacher"):
                continue
            for name, score in scores[arm.id].items():
                if name == STRENGTH or name.endswith("/overall"):
                    seeds = common_seeds([score, against]) if (against := scores[other.id].get(name)) else []
                    if against and seeds:
                        score_TS, images = table([score, against], seeds)
                        found = gain(score_TS[0], score_TS[1], images)
                        yield {"arm": arm.id, "against": other.id, "score": name, **asdict(found)}


def _chance(plan: Plan, results: Results) -> dict[str, dict[str, float]]:
    """Return what the best constant answer scores, by data set and kind of question, from any of its results."""
    chance: dict[str, dict[str, float]] = {}
    for task in plan.of_kind("vqa"):
        if (content := results.content(task.digest)) is not None:
            chance.setdefault(task.settings["dataset"], content.get("chance") or {})
    return chance


def _curves(plan: Plan, results: Results) -> Iterator[dict[str, Any]]:
    for arm in plan.arms:
        for seed, cell in arm.cells.items():
            content = results.content(cell.get("distill"))
            if content is not None and arm.samples is not None:
                yield {"arm": arm.id, "seed": seed, "points": content["curve"]}


def _diagnostics(plan: Plan, results: Results) -> dict[str, Any]:
    teachers: dict[str, dict[str, float]] = {}
    students: dict[str, dict[str, float]] = {}
    spectra: dict[str, list[float]] = {}
    for arm in plan.arms:
        for role, found in (("diagnose-teacher", teachers), ("diagnose-student", students)):
            content = next((content for digest in _digests(arm, role) if (content := results.content(digest)) is not None), None)
            if content is not None:
                found[str(arm.teacher) if arm.kind == "teacher" else arm.id] = content["measures"]
                if "spectrum" in content:
                    spectra[str(arm.teacher)] = content["spectrum"]
    agreement = _agreement(plan, results, list(teachers))
    named = dict.fromkeys(name for measures in (*teachers.values(), *students.values()) for name in measures)
    explained = {name: _explained(name) for name in (*named, *agreement)}
    return {"teachers": teachers, "spectra": spectra, "students": students, "agreement": agreement, "explained": explained}


def _agreement(plan: Plan, results: Results, names: list[str]) -> dict[str, Any]:
    """Return a matrix of each measure of two teachers, once every two of `names` are measured."""
    pairs = {pair: content["measures"] for pair, digest in plan.pairs.items() if (content := results.content(digest)) is not None}
    if len(names) < 2 or len(pairs) < len(names) * (len(names) - 1) // 2:
        return {}
    measures = {}
    for name in next(iter(pairs.values())):
        matrix = [[1.0 if a == b else pairs.get((a, b), pairs.get((b, a), {})).get(name) for b in names] for a in names]
        measures[name] = {"names": names, "matrix": matrix}
    return measures


def _explained(measure: str) -> str:
    where, _, name = measure.rpartition("/")
    rows = {
        "probes": "Of the student with its teacher, on images that were not trained on: ",
        "seen": "Of the student with its teacher, on images trained on: ",
    }
    said = EXPLAINED.get(name, name)
    return f"{rows[where]}{said[0].lower()}{said[1:]}" if where in rows else said


def _prediction(config: StudyConfig, plan: Plan, measures: Mapping[str, Mapping[str, float]], scores: Scores, said: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return which of the `measures` of teachers tells how their students do: their mean over all cells that every teacher has, against its recall."""
    teachers = [label for label in config.teachers if label in measures and STRENGTH in said[f"teacher|{label}"]]
    means: dict[str, list[float]] = {label: [] for label in teachers}
    for cell, arms in _cells(config, plan):
        score = f"vqa/{cell['vqa']}/overall"
        of_teacher = {arm.teacher: scores[arm.id][score] for arm in arms if score in scores[arm.id]}
        seeds = common_seeds([of_teacher[label] for label in teachers]) if set(teachers) <= of_teacher.keys() else []
        for label in teachers if seeds else ():
            means[label].append(float(np.mean([of_teacher[label][seed].value for seed in seeds])))
    if len(teachers) < 3 or not all(means.values()):
        return []
    own = [{**measures[label], **_own_vqa(config, said[f"teacher|{label}"])} for label in teachers]
    shared = [name for name in own[0] if all(name in of_teacher for of_teacher in own) and len({of_teacher[name] for of_teacher in own}) > 1]
    by_measure = {name: np.array([of_teacher[name] for of_teacher in own], np.float64) for name in shared}
    score_T, strength_T = (np.array(values, np.float64) for values in ([np.mean(means[t]) for t in teachers], _strengths(said, teachers)))
    return [asdict(found) for found in predict(by_measure, score_T, strength_T)]


def _own_vqa(config: StudyConfig, said: Mapping[str, Any]) -> dict[str, float]:
    names = [f"vqa/{name}/overall" for name in config.grid.vqa]
    return {f"its own {name}": said[name]["mean"] for name in names if name in said}


def _strengths(said: Mapping[str, Any], teachers: Sequence[str]) -> list[float]:
    return [said[f"teacher|{label}"][STRENGTH]["mean"] for label in teachers]


def _made(results: Results) -> dict[str, Any]:
    """Say in what time and by what all that is there was made."""
    made = [result["made"] for result in results.done.values()]
    devices = sorted({str(one["device"]) for one in made if "device" in one})
    seconds = sum(float(one["seconds"]) for one in made)
    found: dict[str, set[str]] = {}
    for name, version in (item for one in made for item in one.get("versions", {}).items()):
        found.setdefault(name, set()).add(version)
    versions = {name: " and ".join(sorted(of)) for name, of in sorted(found.items())}
    return {"seconds": round(seconds, 1), "device": ", ".join(devices), "versions": versions}

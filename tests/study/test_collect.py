"""A study's results become one record: of a grid whose truth is known, written by hand, and of the tiny study that was really run."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from kdstore.cli.study import study_app
from kdstore.config import make_config, parse_set
from kdstore.distill.config import DistillConfig
from kdstore.evaluate.outcomes import Outcomes, Run, write_outcomes
from kdstore.evaluate.protocol import RetrievalConfig, VqaConfig
from kdstore.extract.config import ExtractConfig
from kdstore.jsonfile import write_json
from kdstore.study.collect import STRENGTH, collect
from kdstore.study.config import PROTOCOL, StudyConfig, parse_study
from kdstore.study.controls import CONTROLS
from kdstore.study.folder import RESULT_STAGE, begin_study, note_failure, result_path
from kdstore.study.grid import Arm, Plan, Task, plan_study
from kdstore.study.report import _warnings
from kdstore.study.scores import standard_error

TEACHERS = ("S", "M", "L", "XL", "XXL")
KINDS = ("count", "exist")
TABLES: dict[str, dict[str, Any]] = {
    "study": {"name": "known", "data": "scenes/train:128", "losses": ["crd", "clip-kd-free"], "samples": [64], "seeds": [0, 1, 2]}
    | {"probes": "scenes/test:50?swapped=color", "probe_samples": 40},
    "teachers": {label: f"ViT-B-32:{label}" for label in TEACHERS},
    "students": {"T": "scenes-T"},
    "distill": {"batch_size": 32, "teacher_temperature": 20.0},
}
TAUGHT = {"random teacher": 40.0, "born-again": 41.0, "permuted targets": 40.5}
ROW = {"untrained": 30.0, "question-only": 20.0, "vocabulary-oracle": 99.0}


def vqa_of(arm: Arm) -> float:
    """What an arm's students score: 2 points more for each teacher, of 40 without one."""
    if arm.kind == "teacher":
        return 60.0 + TEACHERS.index(str(arm.teacher))
    return 42.0 + 2 * TEACHERS.index(str(arm.teacher)) if arm.kind == "student" else TAUGHT.get(str(arm.control), 40.0)


def write_known(out: Path, config: StudyConfig, *, of: Callable[[Arm], float] = vqa_of) -> Plan:
    """Write every result of a study without computing one; scores differ by seed alike in all arms, and a little by arm."""
    begin_study(out, config)
    plan = plan_study(config)
    owner = {digest: (arm, seed) for arm in reversed(plan.arms) for seed, cell in arm.cells.items() for digest in cell.values()}
    for task in plan.tasks.values():
        arm, seed = owner.get(task.digest, (None, 0))
        value = 0.0 if arm is None else of(arm) + 0.3 * seed + 0.02 * ((7 * seed + len(arm.id)) % 5)
        write_result(out, task, content_of(out, task, arm, value))
    return plan


def write_result(out: Path, task: Task, content: dict[str, Any]) -> None:
    made = {"seconds": 30.0, "device": "cpu", "versions": {"torch": "2"}}
    record = {"stage": RESULT_STAGE, "task": task.record, "task_digest": task.digest, "alike": {"protocol": PROTOCOL}}
    write_json(result_path(out, task), {**record, "content": content, "made": made})


def content_of(out: Path, task: Task, arm: Arm | None, value: float) -> dict[str, Any]:
    count = {"total": 200, "without_token_embedding": 100}
    if task.kind == "extract":
        return {"store": f"store/{task.name}", "rows": 128}
    if task.kind == "distill":
        return {"run": f"runs/{task.name}", "samples": 64, "parameters": count, "curve": [{"samples": 64, "loss": 1.0}], "chosen": {}}
    if task.kind == "retrieval":
        strength = 20.0 + 10 * TEACHERS.index(str(arm.teacher)) if arm is not None and arm.kind == "teacher" else value / 4
        scores = {f"{side}_retrieval_recall@1": {"mean": strength, "interval": [strength - 1, strength + 1]} for side in ("image", "text")}
        return {"model": {"parameters": count}, "summary": [{"row": "model", "seeds": [], "scores": scores}]}
    if task.kind == "vqa":
        rows = {"model": value} | (ROW if task.settings["controls"] else {})
        runs = tuple(Run(row, task.settings["seeds"][0], np.full(16, score)) for row, score in rows.items())
        images = [f"image {i // 2}" for i in range(16)]
        outcomes = Outcomes([str(i) for i in range(16)], images, [KINDS[i % 2] for i in range(16)], runs)
        summary = [
            {"row": row, "scores": {name: {"mean": score, "interval": [score - 2, score + 2]} for name in ("overall", *KINDS)}} for row, score in rows.items()
        ]
        chance = {"overall": 15.0, **dict.fromkeys(KINDS, 20.5)}
        return {"model": {"parameters": count}, "summary": summary, "chance": chance, "outcomes": write_outcomes(result_path(out, task), outcomes)}
    order = 0 if arm is None else TEACHERS.index(str(arm.teacher))
    measures = {"swapped_color": 50.0 + order, "image_hubness": [0.3, 0.1, 0.4, 0.1, 0.5][order]} if task.kind != "diagnose-pair" else {"image_cka": 0.4}
    return {"measures": measures} | ({"spectrum": [0.7, 0.3]} if task.kind == "diagnose-teacher" else {})


@pytest.fixture(scope="module", autouse=True)
def _fast_disk() -> Iterator[None]:
    """Leave out fsync: it guards against a loss of power, which no test here causes, and takes most of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda fd: None)
        yield


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Plan, dict[str, Any]]:
    """A finished study in which every teacher's students are 2 points above those of the next weaker, and what is collected of it."""
    out = tmp_path_factory.mktemp("known")
    plan = write_known(out, parse_study(TABLES))
    return out, plan, collect(out)


def test_a_grid_that_rises_is_monotone_and_every_control_holds(known: tuple[Path, Plan, dict[str, Any]]) -> None:
    _, plan, content = known
    assert content["headline"]["verdict"] == "monotone"
    assert content["finished"] == {"done": len(plan.tasks), "failed": 0, "missing": 0}
    assert {control["name"]: control["verdict"] for control in content["controls"]} == dict.fromkeys(CONTROLS, "holds")
    assert {arm["id"] for arm in content["arms"]} == {arm.id for arm in plan.arms}
    cells = {(verdict["loss"], verdict["strength"]): verdict for verdict in content["verdicts"]}
    assert len(cells) == 2 * 2
    for verdict in cells.values():
        assert [point["teacher"] for point in verdict["points"]] == list(TEACHERS)
        assert verdict["spearman"]["rho"] == pytest.approx(1)
        assert "these test images" not in verdict["scope"]


def test_gains_are_paired_by_seed_and_scores_are_means_over_seeds(known: tuple[Path, Plan, dict[str, Any]]) -> None:
    _, _, content = known
    arms = {arm["id"]: arm for arm in content["arms"]}
    student, alone = arms["student|T|L|crd|64"], arms["control|no teacher|T|64"]
    score = student["scores"]["vqa/scenes/overall"]
    assert score["mean"] == pytest.approx(np.mean(score["by_seed"]))
    assert score["low"] < score["mean"] < score["high"]
    gain = next(g for g in content["gains"] if (g["arm"], g["against"], g["score"]) == (student["id"], alone["id"], "vqa/scenes/overall"))
    assert gain["by_seed"] == pytest.approx(np.subtract(score["by_seed"], alone["scores"]["vqa/scenes/overall"]["by_seed"]))
    assert gain["low"] < 6 < gain["high"]
    assert arms["teacher|L"]["scores"]["retrieval/t2i@1"] == {"mean": 40.0, "low": 39.0, "high": 41.0, "by_seed": [40.0]}
    assert student["cost"] == {"samples": 64, "seconds": 30.0, "teacher_seconds": 30.0 / (2 * 3)}


def test_diagnostics_stand_beside_the_arms_and_a_measure_in_the_students_order_is_found(known: tuple[Path, Plan, dict[str, Any]]) -> None:
    diagnostics, prediction = known[2]["diagnostics"], {found["measure"]: found for found in known[2]["prediction"]}
    assert list(diagnostics["teachers"]) == list(diagnostics["spectra"]) == list(TEACHERS)
    assert set(diagnostics["students"]) == {f"student|T|{teacher}|{loss}|64" for teacher in TEACHERS for loss in ("crd", "clip-kd-free")}
    assert diagnostics["agreement"]["image_cka"]["matrix"] == [[1.0 if a == b else 0.4 for b in TEACHERS] for a in TEACHERS]
    assert set(diagnostics["explained"]) == {"swapped_color", "image_hubness", "image_cka"}
    assert prediction["swapped_color"]["rho"] == pytest.approx(1)
    assert prediction["image_hubness"]["rho"] < 1
    assert {"strength", "its own vqa/scenes/overall"} < set(prediction)


CONFIGS = {"kdstore extract": ExtractConfig, "kdstore distill": DistillConfig, "kdstore evaluate retrieval": RetrievalConfig, "kdstore evaluate vqa": VqaConfig}


def test_every_command_gives_the_stage_the_settings_of_its_task_and_diagnostics_have_one(known: tuple[Path, Plan, dict[str, Any]]) -> None:
    out, plan, content = known
    tasks = {f"results/{task.name}.json": task for task in plan.tasks.values()}
    assert {file["path"] for arm in content["arms"] for file in arm["files"]} == set(tasks), "nothing in a report is without its file"
    for arm in content["arms"]:
        for file in arm["files"]:
            assert json.loads((out / file["path"]).read_text())["digest"] == file["digest"]
            if (task := tasks[file["path"]]).kind.startswith("diagnose"):
                assert file["command"] == f"mv {file['path']} before.json && python -m kdstore.study.work tasks/{task.name}.json"
                continue
            name = next(name for name in CONFIGS if file["command"].startswith(f"{name} --"))
            words = shlex.split(file["command"].removeprefix(name))
            given = [(option.removeprefix("--"), value) for option, value in zip(words[::2], words[1::2], strict=True)]
            settings = parse_set([value for option, value in given if option == "set"]) | {option: value for option, value in given if option != "set"}
            config = make_config(CONFIGS[name], settings)
            for setting, value in tasks[file["path"]].settings.items():
                if setting != "teacher_temperature" or config.loss == "crd":  # what no term of a loss reads is left out
                    assert getattr(config, setting) == (tuple(value) if isinstance(value, list) else value)


def test_a_control_that_misbehaves_is_told_in_the_controls_and_first_of_the_threats(tmp_path: Path) -> None:
    write_known(tmp_path, parse_study(TABLES), of=lambda arm: 43.0 if arm.control == "permuted targets" else vqa_of(arm))
    content = collect(tmp_path)
    verdicts = {control["name"]: control for control in content["controls"]}
    assert {name for name, control in verdicts.items() if control["verdict"] == "fails"} == {"permuted targets"}
    assert "3.0 points above no teacher in vqa/scenes/overall" in verdicts["permuted targets"]["why"]
    assert content["threats"][0]["title"] == "Controls misbehave"


def test_a_margin_that_is_changed_once_there_are_results_is_told_above_the_verdict(tmp_path: Path) -> None:
    config, wider = parse_study(TABLES), parse_study({**TABLES, "study": TABLES["study"] | {"margin": 3.0}})
    begin_study(tmp_path, wider)
    write_known(tmp_path, config)  # before there is a result, it is free
    assert collect(tmp_path)["changed"] == []
    for _ in range(2):
        begin_study(tmp_path, wider)
        content = collect(tmp_path)
        (said,) = content["changed"]
        assert said == "The margin is 3 and was 1 when there were results already."
        assert content["threats"][0]["title"] == "Expectations were changed"
        assert ("threats", "What was expected was changed.", said) in _warnings(content)


def test_results_of_two_versions_are_told_with_both_and_of_two_heads_above_the_verdict(tmp_path: Path) -> None:
    plan = write_known(tmp_path, parse_study(TABLES))
    for task in plan.of_kind("vqa"):
        path = result_path(tmp_path, task)
        found = json.loads(path.read_text())
        write_json(path, {**found, "alike": {**found["alike"], "config_digest": "second" if task.settings["seeds"] == [2] else "first"}})
    write_json(path, {**json.loads(path.read_text()), "made": {"seconds": 1.0, "device": "cuda", "versions": {"torch": "3", "kdstore": "0.0.9"}}})
    content = collect(tmp_path)
    assert content["made"]["versions"] == {"kdstore": "0.0.9", "torch": "2 and 3"}  # of those that made it, not of the one that reports
    (said,) = content["unlike"]
    assert said.startswith("vqa of scenes was not run alike: config_digest: ")
    assert content["threats"][0]["title"] == "Results were not made alike"
    assert ("threats", "Results are compared that were not made alike.", said) in _warnings(content)


def test_of_half_a_study_only_what_is_there_is_told_and_it_is_not_called_monotone(tmp_path: Path) -> None:
    tables = {**TABLES, "study": TABLES["study"] | {"without_controls": ["random teacher"]}}
    plan = write_known(tmp_path, parse_study(tables))
    gone = [task for task in plan.tasks.values() if task.settings.get("seed") == 2 or task.settings.get("seeds") == [2] or "XXL" in task.label]
    for task in gone:
        result_path(tmp_path, task).unlink()
    damaged = next(task for task in plan.of_kind("vqa") if task.settings["controls"])
    result_path(tmp_path, damaged).write_text("{}")
    note_failure(tmp_path, gone[0], "DiskFull: no space left.")
    content = collect(tmp_path)
    assert content["finished"] == {"done": len(plan.tasks) - len(gone) - 1, "failed": 1, "missing": len(gone)}
    assert [failure["reason"] for failure in content["failures"]] == ["DiskFull: no space left."]
    assert not [arm for arm in content["arms"] if arm["teacher"] == "XXL"]
    assert {len(point["by_seed"]) for verdict in content["verdicts"] for point in verdict["points"]} == {2}
    assert {len(verdict["points"]) for verdict in content["verdicts"]} == {4}
    assert {verdict["verdict"] for verdict in content["verdicts"] if verdict["strength"] == STRENGTH} == {"monotone"}
    assert content["headline"]["verdict"] == "not decidable"  # the teacher that is missing may be the one that is inverted
    assert "2 planned cells not finished" in content["headline"]["sentence"]
    controls = {control["name"]: (control["verdict"], control["why"]) for control in content["controls"]}
    assert controls["random teacher"] == ("not run", "The recipe leaves it out.")
    assert controls["question-only"] == ("not run", "It is not finished.")
    assert {"Controls are missing", "The study is not whole"} <= {threat["title"] for threat in content["threats"]}


def test_threats_are_told_where_they_apply_alone(known: tuple[Path, Plan, dict[str, Any]], tmp_path: Path) -> None:
    few = {**TABLES, "teachers": {label: TABLES["teachers"][label] for label in ("S", "M")}, "study": TABLES["study"] | {"seeds": [0], "samples": [64, 128]}}
    write_known(tmp_path, parse_study({**few, "study": {name: value for name, value in few["study"].items() if name != "probes"}}))
    whole, two = ({threat["title"] for threat in content["threats"]} for content in (known[2], collect(tmp_path)))
    assert {"Few teachers", "Few seeds", "No diagnostics"} <= two - whole
    assert {"One schedule length", "Many measures, few teachers"} <= whole - two
    assert {"A synthetic world", "One student", "No sweep", "A student as large as its teacher"} <= whole & two
    assert not {"Saturated teachers", "Teachers closer than their noise", "Controls misbehave", "Nothing was taught"} & whole


def test_one_seed_has_no_interval_but_what_no_seed_decides_has_that_of_the_images(tmp_path: Path) -> None:
    write_known(tmp_path, parse_study({**TABLES, "study": TABLES["study"] | {"seeds": [0]}}))
    content = collect(tmp_path)
    ends = {arm["id"]: {name: score["low"] for name, score in arm["scores"].items()} for arm in content["arms"]}
    assert {ends[f"{kind}"]["vqa/scenes/overall"] for kind in ("student|T|S|crd|64", "teacher|S", "control|question-only|T")} == {None}
    assert ends["student|T|S|crd|64"]["retrieval/t2i@1"] is None
    assert None not in (ends["teacher|S"]["retrieval/t2i@1"], ends["control|vocabulary oracle|T"]["vqa/scenes/overall"])
    assert standard_error(content["arms"][0]["scores"]["vqa/scenes/overall"]) == 100  # teachers are not ordered by what one seed of a head says


def test_a_study_that_was_really_run_is_told_and_its_page_is_written(tiny_study: Any, copy_study: Callable[..., Path]) -> None:
    out = copy_study()
    done = CliRunner().invoke(study_app, ["report", str(out), "--json"], catch_exceptions=False)
    content = json.loads(done.stdout)
    assert done.exit_code == 0
    assert content["finished"] == {"done": len(tiny_study.plan.tasks), "failed": 0, "missing": 0}
    assert all(arm["scores"] for arm in content["arms"])
    assert {control["verdict"] for control in content["controls"]} <= {"holds", "fails"}
    assert set(content["diagnostics"]["teachers"]) == {"S", "L"}
    assert content["headline"]["sentence"] in (out / "report" / "index.html").read_text()

"""A recipe becomes a plan: what is shared is one task, what decides a result is in its digest, and what does not is not."""

import subprocess
import sys
from pathlib import Path

import pytest

from kdstore.errors import ConfigError, UnknownName
from kdstore.study.config import parse_study, read_study
from kdstore.study.controls import CONTROLS
from kdstore.study.grid import plan_study
from kdstore.study.run import finished

TABLES = {
    "study": {"name": "tiny", "data": "scenes/train:128", "losses": ["clip-kd-free", "crd"], "samples": [128, 256], "seeds": [0, 1]},
    "teachers": {"S": "scenes-S", "L": "scenes-L"},
    "students": {"T": "scenes-T"},
    "distill": {"batch_size": 64},
}


def planned(**tables):
    return plan_study(parse_study({**TABLES, **{name: TABLES.get(name, {}) | table for name, table in tables.items()}}))


def of_kind(plan, kind):
    return [task for task in plan.tasks.values() if task.kind == kind]


def test_one_extraction_serves_all_students_of_a_teacher():
    plan = planned()
    assert len(of_kind(plan, "extract")) == 4  # two teachers, the random one, the student's own size
    taught = [task for task in of_kind(plan, "distill") if plan.stores["S"] in task.needs]
    assert len(taught) == 2 * 2 * 2 * 2  # losses, lengths, seeds, permuted or not
    assert len(of_kind(plan, "distill")) == 5 * 8 + 2 * 2 + 1  # taught by five, alone, the teacher of the student's own size


def test_every_task_comes_after_those_that_it_needs_and_all_controls_are_there():
    plan = planned()
    seen = set()
    for digest, task in plan.tasks.items():
        assert set(task.needs) <= seen
        seen.add(digest)
    assert {arm.control for arm in plan.arms if arm.control} | {"teacher itself"} == set(CONTROLS)
    assert len({arm.id for arm in plan.arms} | {(arm.id, arm.loss) for arm in plan.arms}) == 2 * len(plan.arms)
    assert {digest for arm in plan.arms for cell in arm.cells.values() for digest in cell.values()} == plan.tasks.keys() - {plan.stores["random"]}


def test_another_teacher_adds_its_own_tasks_alone():
    few, more = planned(), planned(teachers={"S again": "scenes-S:other"})
    added = more.tasks.keys() - few.tasks.keys()
    assert few.tasks.keys() <= more.tasks.keys()
    assert len(added) == 1 + 1 + 2 + 8 * 3  # its store, retrieval, VQA under two seeds; eight students, each scored twice


def test_labels_machines_and_spelled_out_defaults_are_in_no_digest():
    plain = planned()
    renamed = planned(distill={"threads": 7, "device": "cuda", "lr": 1e-3}, folders={"scenes": "/data"})
    labelled = plan_study(parse_study({**TABLES, "teachers": {"small": "scenes-S", "large": "scenes-L"}}))
    assert plain.tasks.keys() == renamed.tasks.keys() == labelled.tasks.keys()
    assert plain.tasks.keys() != planned(distill={"lr": 2e-3}).tasks.keys()


def test_a_normalised_recipe_is_read_as_itself():
    config = parse_study({**TABLES, "vqa": {"epochs": 2, "scenes": {"width": 32}}, "sweep": {"lr": [1e-3, 2e-3]}, "study": SWEPT})
    assert parse_study(config.recipe) == config


SWEPT = {**TABLES["study"], "sweep_samples": 64, "sweep_data": "scenes/val:50"}


def test_a_sweep_gives_every_arm_the_same_trials():
    plan = planned(study=SWEPT, sweep={"lr": [1e-3, 2e-3, 4e-3]})
    students = [task for task in of_kind(plan, "distill") if "choices" in task.settings]
    for task in students:
        judged = [plan.tasks[digest] for digest in task.needs if plan.tasks[digest].kind == "retrieval"]
        trials = [plan.tasks[one.needs[0]] for one in judged]
        assert [trial.settings["lr"] for trial in trials] == [choice["lr"] for choice in task.settings["choices"]] == [1e-3, 2e-3, 4e-3]
        assert {(trial.settings["samples"], trial.settings["seed"], trial.settings["loss"]) for trial in trials} == {(64, 3_000, task.settings["loss"])}
        assert {one.settings["data"] for one in judged} == {"scenes/val:50"}
        assert {trial.needs for trial in trials} == {tuple(digest for digest in task.needs if plan.tasks[digest].kind == "extract")}


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"distill": {"loss": "crd"}}, "for the study to decide"),
        ({"distill": {"lrr": 1}}, "lr"),
        ({"distill": {"init": "inherit"}}, "does not begin as the others"),
        ({"study": {**SWEPT, "sweep_data": "scenes/retrieval:200"}, "sweep": {"lr": [1e-3]}}, "trained on or reported"),
        ({"study": {**SWEPT, "data": "scenes:64", "sweep_data": "scenes/train:50"}, "sweep": {"lr": [1e-3]}}, "trained on or reported"),
        ({"study": SWEPT, "sweep": {"lr": []}}, "no value of lr"),
        ({"study": {**TABLES["study"], "own_seed": 1}}, "student's seed"),
        ({"study": {**TABLES["study"], "probes": "scenes/train:50?swapped=color"}}, "trained on"),
        ({"study": {**TABLES["study"], "without_controls": ["random"]}}, "random teacher"),
        ({"teachers": {"a|b": "scenes-S"}}, "'|'"),
        ({"teachers": {}}, "at least one"),
        ({"vqa": {"gqa": {"epochs": 1}}}, "gqa"),
    ],
)
def test_what_would_be_unfair_or_unclear_is_refused_in_one_line(changed, said):
    with pytest.raises((ConfigError, UnknownName), match=said.replace("|", r"\|")):
        parse_study({**TABLES, **changed})


def test_a_recipe_is_read_from_a_file_with_settings_of_the_command_line(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text('[study]\nname = "x"\ndata = "scenes"\nlosses = ["crd"]\nsamples = [64]\n[teachers]\n"S, 40k" = "scenes-S"\n[students]\nT = "scenes-T"\n')
    config = read_study(path, ["study.seeds=[5]", "distill.lr=0.002", "folders.gqa=/data/gqa"])
    assert (config.grid.seeds, config.stages["distill"], config.place("gqa")) == ((5,), {"lr": 0.002}, "/data/gqa")
    with pytest.raises(ConfigError, match=r"study.seeds"):
        read_study(path, ["seeds=[5]"])


def test_diagnostics_are_of_every_teacher_every_two_and_one_student_of_each_arm():
    probes = "scenes/retrieval:50?swapped=color,count"
    plain, plan = planned(), planned(study={**TABLES["study"], "probes": probes, "probe_samples": 40})
    assert plain.tasks.keys() < plan.tasks.keys()
    assert {kind: len(of_kind(plan, f"diagnose-{kind}")) for kind in ("teacher", "pair", "student")} == {"teacher": 2, "pair": 1, "student": 2 * 2 * 2}
    assert len([task for task in of_kind(plan, "extract") if task.settings["data"] == probes]) == 2
    assert {str(task.settings["words"]) for task in of_kind(plan, "diagnose-student")} == {"['color', 'count']"}
    assert set(plan.pairs) == {("S", "L")}


def test_planning_needs_no_torch():
    code = "import sys, kdstore.study.grid, kdstore.study.folder; sys.exit('torch' in sys.modules or 'open_clip' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_study_in_the_docs_is_the_recipe_and_whole():
    """Its digests are those of the recipe of now, so that whoever adds a teacher or a seed to it computes only what is new."""
    study = Path(__file__).parents[2] / "docs" / "study-scenes" / "study"
    plan = plan_study(read_study(study.parents[2] / "recipes" / "study-scenes.toml"))
    assert finished(plan, study) == set(plan.tasks)

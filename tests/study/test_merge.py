"""Results of several labs become one study if they were run alike, and nothing if they were not; told from files, without any model."""

import shutil

import pytest

from kdstore.errors import CannotWrite, ConfigError, RunError
from kdstore.jsonfile import read_json, write_json
from kdstore.study.config import PROTOCOL, parse_study
from kdstore.study.folder import RESULT_STAGE, STUDY, begin_study, load_study, read_done, result_path
from kdstore.study.grid import plan_study
from kdstore.study.merge import merge_studies
from kdstore.study.report import write_report

TABLES = {
    "study": {"name": "tiny", "data": "scenes/train:128", "losses": ["crd"], "samples": [128], "seeds": [0, 1]},
    "teachers": {"S": "scenes-S", "L": "scenes-L"},
    "students": {"T": "scenes-T"},
}


def finished(out, **changed):
    """A study of which every task has a result, though a made-up one."""
    config = parse_study({**TABLES, **{table: {**TABLES.get(table, {}), **values} if table == "study" else values for table, values in changed.items()}})
    begin_study(out, config)
    for task in plan_study(config).tasks.values():
        said = {"alike": {"protocol": PROTOCOL, "weights": "w"}, "content": {"store": f"store/{task.name}"} if task.kind == "extract" else {}}
        write_json(result_path(out, task), {"stage": RESULT_STAGE, "task": task.record, "task_digest": task.digest, **said, "made": {}})
        result_path(out, task).with_suffix(".outcomes.parquet").write_bytes(b"x")
    return config


def change(out, task, **alike):
    path = result_path(out, task)
    found = read_json(path)
    write_json(path, {**found, "alike": {**found["alike"], **alike}})


def test_seeds_of_one_lab_and_teachers_of_another_make_one_study(tmp_path):
    one, other, out = tmp_path / "one", tmp_path / "other", tmp_path / "merged"
    finished(one, study={"seeds": [0]})
    config = finished(other, study={"seeds": [1]}, teachers={"L": "scenes-L"}, distill={"threads": 1})
    result = merge_studies([one, other], out)
    merged = load_study(out)
    assert (merged.teachers, merged.grid.seeds) == (TABLES["teachers"], (0, 1))
    plan = plan_study(merged)
    done = {digest for digest, task in plan.tasks.items() if read_done(out, task)}
    assert done >= set(plan_study(parse_study({**TABLES, "study": {**TABLES["study"], "seeds": [0]}})).tasks)
    assert result.missing == len(plan.tasks) - len(done) > 0  # S with seed 1, and controls of S
    assert result.in_both == 2 + 3  # store and retrieval of L; run, store and retrieval of the teacher of the student's own size
    assert sum(result.results.values()) == len(list((out / "results").glob("*.json"))) == len(list((out / "results").glob("*.parquet")))
    named = read_json(out / STUDY)["elsewhere"]
    assert named[plan.tasks[plan.stores["L"]].name].startswith(str(one))
    begin_study(out, merged)  # a run that goes on with it
    assert read_json(out / STUDY)["elsewhere"] == named
    assert config.machine == {"extract": {}, "distill": {"threads": 1}, "retrieval": {}, "vqa": {}}


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"distill": {"lr": 0.002}}, "distill.lr: .*one nothing, .*other 0.002"),
        ({"study": {"margin": 2.0}}, "study.margin: .*one 1.0, .*other 2.0"),
        ({"vqa": {"scenes": {"epochs": 9}}}, "vqa.scenes.epochs"),
        ({"teachers": {"S": "scenes-L"}}, "'S' in .teachers. is scenes-L in .*other, and scenes-S before"),
    ],
)
def test_other_settings_are_refused_in_a_line_that_names_both(tmp_path, changed, said):
    finished(tmp_path / "one")
    finished(tmp_path / "other", **changed)
    with pytest.raises(ConfigError, match=said):
        merge_studies([tmp_path / "one", tmp_path / "other"], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_one_task_with_other_weights_is_refused_in_a_line_that_names_both(tmp_path):
    config = finished(tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "other")
    plan = plan_study(config)
    change(tmp_path / "other", plan.tasks[plan.stores["L"]], weights="v")
    with pytest.raises(RunError, match=r'extract: L was not run alike: weights: .*one "w", .*other "v"'):
        merge_studies([tmp_path / "one", tmp_path / "other"], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    ("kind", "alike"), [("extract", "source"), ("distill", "source"), ("distill", "precision"), ("retrieval", "evaluated"), ("vqa", "config_digest")]
)
def test_labs_that_share_no_task_are_refused_where_pairs_precision_or_questions_differ(tmp_path, kind, alike):
    for lab, label, seed in (("one", "S", 0), ("other", "L", 1)):
        config = finished(tmp_path / lab, teachers={label: TABLES["teachers"][label]}, study={"seeds": [seed], "without_controls": ["born-again"]})
        for task in plan_study(config).of_kind(kind):
            change(tmp_path / lab, task, **{alike: lab})
    with pytest.raises(RunError, match=f'{kind}.* was not run alike: {alike}: .*one "one", .*other "other"'):
        merge_studies([tmp_path / "one", tmp_path / "other"], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_another_protocol_and_a_folder_that_is_taken_are_refused(tmp_path):
    finished(tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "other")
    with pytest.raises(ConfigError, match="already"):
        merge_studies([tmp_path / "one"], tmp_path / "other")
    write_json(tmp_path / "other" / STUDY, {**read_json(tmp_path / "other" / STUDY), "protocol": PROTOCOL + 1})
    with pytest.raises(ConfigError, match=f"other was run by protocol {PROTOCOL + 1}"):
        merge_studies([tmp_path / "one", tmp_path / "other"], tmp_path / "merged")
    with pytest.raises(RunError, match="no study at"):
        merge_studies([tmp_path / "one", tmp_path / "nothing"], tmp_path / "merged")


def test_a_folder_that_cannot_be_made_is_told_in_one_line_by_run_and_report(tmp_path):
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(CannotWrite, match="taken"):
        begin_study(tmp_path / "taken" / "study", parse_study(TABLES))
    with pytest.raises(CannotWrite, match="taken"):
        write_report(tmp_path / "taken" / "report", {"name": "begun"})

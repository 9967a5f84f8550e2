"""A study in real processes: nothing is done twice, whatever fails is told and the rest goes on, and stopping at any moment changes no result."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from distributed import LocalCluster

from kdstore import cli
from kdstore.errors import ConfigError, Interrupted
from kdstore.jsonfile import digest_of, read_json, write_json
from kdstore.study.config import parse_study
from kdstore.study.folder import LOCKS, load_study, log_path, read_done, read_failure, result_path
from kdstore.study.run import check_names, run_study


def results(out):
    """Every result file but for what tells of time and machine."""
    found = {path.name: json.loads(path.read_text()) for path in sorted((out / "results").glob("*.json"))}
    return {name: {key: value for key, value in one.items() if key not in ("made", "digest")} for name, one in found.items()}


def cell(tiny, arm_id):
    """What an arm's only cell is made of, but for its diagnosis."""
    (arm,) = (arm for arm in tiny.plan.arms if arm.id == arm_id)
    return {role: digest for role, digest in arm.cells[0].items() if not role.startswith("diagnose")}


@pytest.fixture
def taught(tiny_study):
    """The digests of one student's tasks: it is distilled, then scored twice."""
    return cell(tiny_study, "student|T|L|clip-kd-free|64")


def when(condition, then):
    """Do something in another thread as soon as a condition holds."""

    def watch():
        deadline = time.monotonic() + 100
        while not condition() and time.monotonic() < deadline:
            time.sleep(0.01)
        then()

    threading.Thread(target=watch).start()


def holder(out, task):
    """The process that does a task, if any."""
    try:
        return json.loads((out / LOCKS / task.name / "lock.json").read_text())["pid"]
    except (OSError, ValueError):
        return None


def test_all_cells_are_done_and_another_teacher_adds_its_own_alone(tiny_study):
    first, second = tiny_study.runs
    assert first.complete
    assert first.ran == first.total
    assert second.complete
    assert second.ran == second.total - first.total == 3 + 3 + 4  # its store and scores; its student, scored twice; diagnosed: it, the two, the student


def test_nothing_is_run_again_and_a_changed_recipe_deletes_nothing(tiny_study, copy_study):
    out = copy_study()
    before = {path: path.stat().st_mtime_ns for path in (out / "results").iterdir()}
    again = run_study(tiny_study.config, out)
    assert (again.ran, again.done) == (0, again.total)
    tables = {**tiny_study.config.recipe, "teachers": {"only S": "scenes-S"}}
    assert run_study(parse_study(tables), out).ran == 0
    assert load_study(out).teachers == {"only S": "scenes-S"}
    assert before == {path: path.stat().st_mtime_ns for path in (out / "results").iterdir()}


def test_a_result_says_what_it_is_of_and_is_believed_only_if_it_proves_it(tiny_study, copy_study, taught):
    out, task = copy_study(), tiny_study.plan.tasks[taught["distill"]]
    found = read_done(out, task)
    assert found["task_digest"] == task.digest == digest_of({name: found["task"][name] for name in ("kind", "settings", "needs")})
    content = found["content"]
    assert (out / content["run"] / "open_clip_model.safetensors").is_file()
    assert [point["samples"] for point in content["curve"]] == [32, 64]
    assert not any(str(out.parent) in text for text in (json.dumps(one) for one in results(out).values()))  # the folder may be moved
    path = result_path(out, task)
    write_json(path, {**found, "task_digest": tiny_study.plan.stores["S"]})
    assert read_done(out, task) is None
    path.write_text(path.read_text().replace('"samples": 64', '"samples": 65'))
    assert read_done(out, task) is None


def test_what_fails_is_told_with_its_log_the_rest_goes_on_and_the_next_run_tries_again(tiny_study, copy_study, taught):
    teacher = cell(tiny_study, "teacher|S")
    out = copy_study(*taught.values(), teacher["retrieval"])
    task = tiny_study.plan.tasks[taught["distill"]]
    (out / "runs" / task.name).mkdir()
    (out / "runs" / task.name / "notes.txt").write_text("not a run")
    result = run_study(tiny_study.config, out)
    assert not result.complete
    assert result.ran == 1  # the teacher's retrieval
    (failure,) = result.failed
    assert "neither empty nor a run" in failure.reason
    assert failure.log == str(log_path(out, task))
    assert read_failure(out, task)["reason"] == failure.reason
    assert len(result.skipped) == 2
    (out / "runs" / task.name / "notes.txt").unlink()
    assert run_study(tiny_study.config, out).complete
    assert read_failure(out, task) is None
    assert results(out) == results(tiny_study.path)


def test_killed_or_interrupted_it_goes_on_to_the_same_results(tiny_study, copy_study, taught):
    out, task = copy_study(*taught.values()), tiny_study.plan.tasks[taught["distill"]]
    begun = out / "runs" / task.name / "checkpoint.pt"
    when(begun.exists, lambda: os.kill(holder(out, task), signal.SIGKILL))
    result = run_study(tiny_study.config, out)
    assert "SIGKILL" in result.failed[0].reason
    killed = holder(out, task)  # whose lock is still there
    when(lambda: holder(out, task) not in (None, killed), lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(Interrupted):
        run_study(tiny_study.config, out)
    assert holder(out, task) is None  # it has stopped, too
    assert run_study(tiny_study.config, out).complete
    assert results(out) == results(tiny_study.path)


def test_two_runs_at_once_share_the_work(tiny_study, copy_study, taught):
    out = copy_study(*taught.values())
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: run_study(tiny_study.config, out), range(2))
    assert first.complete
    assert second.complete
    assert first.ran + second.ran == len(taught)
    for digest in taught.values():
        assert log_path(out, tiny_study.plan.tasks[digest]).read_text().count("---") == 1
    assert results(out) == results(tiny_study.path)


def test_workers_of_a_dask_cluster_do_the_same(tiny_study, copy_study, taught):
    out = copy_study(taught["retrieval"])
    with LocalCluster(n_workers=1, threads_per_worker=1, processes=True, dashboard_address="127.0.0.1:0") as cluster:
        result = run_study(tiny_study.config, out, scheduler=cluster.scheduler_address)
    assert result.complete
    assert result.ran == 1
    assert results(out) == results(tiny_study.path)


def test_the_command_shows_the_plan_and_its_exit_code_says_whether_all_is_done(tiny_study, copy_study, taught, tmp_path, monkeypatch, capsys):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        "\n".join(f"[{table}]\n" + "\n".join(f"{key} = {json.dumps(value)}" for key, value in values.items()) for table, values in toml_of(tiny_study).items())
    )
    out = copy_study()

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["kdstore", "study", "run", str(recipe), *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code, capsys.readouterr().out

    elsewhere = ("device='a'", "source='b'", "teacher_gmacs_per_second=1", "student_gmacs_per_second=1")
    rates = [part for setting in elsewhere for part in ("--set", f"cost.{setting}")]
    code, said = run("--out", str(tmp_path / "nothing"), "--dry-run", "--set", "study.seeds=[0,1]", *rates)
    assert code in (0, None)
    assert not (tmp_path / "nothing").exists()
    assert "runs that read it" in said
    code, said = run("--out", str(out), "--json")
    assert code in (0, None)
    assert json.loads(said)["ran"] == 0
    task = tiny_study.plan.tasks[taught["retrieval"]]
    result_path(out, task).unlink()
    (out / "locks" / task.name / "lock.json").mkdir()  # nobody can take it
    assert run("--out", str(out), *rates)[0] == 1


def toml_of(tiny):
    return {name: table for name, table in {**tiny.config.recipe, "folders": {}}.items() if table} | {
        "study": {name: value for name, value in tiny.config.recipe["study"].items() if value is not None},
        "extract": tiny.config.recipe["extract"] | tiny.config.machine["extract"],
    }


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"study": {"losses": ["clip-kdd"]}}, "clip-kd"),
        ({"study": {"vqa": ["scene"]}}, "scenes"),
        ({"students": {"T": "scenes-X"}}, "scenes-T"),
        ({"study": {"losses": ["clip-kd"]}, "distill": {"batch_size": 1}}, "batch_size"),
        ({"study": {"losses": ["clip + theia"]}}, 'tokens = "image"'),
    ],
)
def test_a_wrong_name_is_told_before_anything_runs(tiny_study, changed, said):
    recipe = tiny_study.config.recipe
    tables = {**recipe, **{table: {**recipe[table], **more} if table != "students" else more for table, more in changed.items()}}
    with pytest.raises(ConfigError, match=said):
        check_names(parse_study(tables))


def test_a_path_of_this_machine_is_named_in_folders(tiny_study, tmp_path):
    recipe = tiny_study.config.recipe
    with pytest.raises(ConfigError, match="folders"):
        check_names(parse_study({**recipe, "teachers": {"mine": str(tmp_path)}}))
    check_names(parse_study({**recipe, "teachers": {"mine": "ours"}, "folders": {"ours": str(tmp_path)}}))


def test_a_job_of_another_version_is_refused(tiny_study, copy_study, taught):
    out, task = copy_study(taught["retrieval"]), tiny_study.plan.tasks[taught["retrieval"]]
    job = read_json(tiny_study.path / "tasks" / f"{task.name}.json")
    write_json(out / "tasks" / f"{task.name}.json", {**job, "protocol": 0})
    done = subprocess.run([sys.executable, "-m", "kdstore.study.work", str(out / "tasks" / f"{task.name}.json")], capture_output=True, text=True)
    assert done.returncode == 1
    assert "same version" in done.stdout

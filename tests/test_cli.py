"""The command line as a user meets it: real processes, wrong input, exit codes, JSON."""

import inspect
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
import torch

from kdstore import cli
from kdstore.cli import evaluate, main
from kdstore.cli.options import STAGES
from kdstore.cli.screen import bars
from kdstore.extract.config import ExtractConfig
from kdstore.extract.run import extract
from kdstore.models.load import load_model

STARTER = "from kdstore.__main__ import main; main()"


@pytest.fixture
def here(capsys, monkeypatch, tmp_path):
    """The same entry point in this process and an empty folder: a process of its own for every wrong word would cost minutes of imports."""

    def run(*args):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["kdstore", *map(str, args)])
        code = 0
        try:
            main()
        except SystemExit as e:
            code = e.code or 0
        out, err = capsys.readouterr()
        return subprocess.CompletedProcess(args, code, out, err)

    return run


def kdstore(*args, cwd=None):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
    return subprocess.run([sys.executable, "-W", "ignore", "-c", STARTER, *map(str, args)], capture_output=True, text=True, cwd=cwd, env=environment)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp("cli") / "store"
    extract(ExtractConfig(teacher="scenes-T", untrained_seed=0, data="scenes/val:64", out=str(path), device="cpu"))
    return path


def test_help_imports_no_stage():
    """What makes --help slow is imports; a clock in a test would only measure the machine."""
    invoke = "assert CliRunner().invoke(app, ['--help']).exit_code == 0"
    code = f"import sys\nfrom typer.testing import CliRunner\nfrom kdstore.cli import app\n{invoke}\nprint(*sys.modules)"
    loaded = set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())
    assert not loaded & {"torch", "open_clip", "zarr", "numpy", "datasets", "numba", "dask", "faiss", "pyarrow", "matplotlib", "scipy"}


COMMANDS = [
    "extract",
    "distill",
    *(f"evaluate {task}" for task in ("vqa", "zeroshot", "retrieval", "probe", "agreement", "compare", "table")),
    "store verify",
    "list losses",
    "demo",
]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command, here):
    done = here(*command.split(), "--help")
    assert done.returncode == 0
    assert "Usage" in done.stdout


WRONG = {
    "no such option": (["extract", "--teachr", "scenes-S"], "kdstore extract --help"),
    "no such command": (["list", "teacher"], "kdstore list --help"),
    "no command": (["store"], "kdstore store --help"),
    "no teacher": (["extract", "--recipe", "units.toml"], "--teacher is needed"),
    "negative views": (["extract", "--teacher", "scenes-T", "--views", "-1"], "views must not be negative"),
    "no list of keys": (
        ["extract", "--teacher", "scenes-T", "--parent", "STORE", "--tokens", "image", "--keys", "none", "--out", "new"],
        "keys in none: No such file",
    ),
    "a place that is taken": (["extract", "--teacher", "scenes-T", "--data", "nowhere", "--out", "unfinished/.."], "neither empty nor a store"),
    "a place below a file": (["extract", "--teacher", "scenes-T", "--data", "nowhere", "--out", "rows.csv/s"], "Not a directory"),
    "a table that is empty": (["extract", "--teacher", "scenes-T", "--set", "untrained_seed=0", "--data", "empty.csv"], "Empty CSV file. Check"),
    "report over a folder": (["store", "join", "STORE", "scenes/val:64", "--out", "unfinished"], "there already"),
    "a lock where no store is": (["store", "unlock", "."], "There is no store"),
    "unknown teacher": (["extract", "--teacher", "ViT-bigG-15"], "ViT-bigG-14"),
    "unknown tag": (["extract", "--teacher", "ViT-B-32:laion2b_s34b"], "laion2b_s34b_b79k"),
    "other activation": (["extract", "--teacher", "ViT-H-14:dfn5b"], "ViT-H-14-quickgelu:dfn5b"),
    "no caption column": (["extract", "--teacher", "scenes-T", "--set", "untrained_seed=0", "--data", "rows.csv"], "found path, title"),
    "no such data": (["extract", "--teacher", "scenes-T", "--set", "untrained_seed=0", "--data", "nowhere"], "nowhere"),
    "unknown setting": (["extract", "--teacher", "scenes-T", "--set", "untraned_seed=0"], "untrained_seed"),
    "a setting like no other": (["evaluate", "vqa", "--set", "foo=1"], "All: kdstore list settings vqa."),
    "settings of no stage": (["list", "settings", "extrakt"], "Did you mean extract"),
    "wrong type": (["distill", "--data", "scenes:64", "--set", "lr=fast"], "lr"),
    "unknown table in a recipe": (["distill", "--recipe", "table.toml"], "distill"),
    "unknown key in a recipe": (["distill", "--recipe", "key.toml"], "batch_size"),
    "recipe that is no TOML": (["distill", "--recipe", "rows.csv"], "rows.csv"),
    "card without a licence": (["store", "card", "STORE", "--licence", "mit"], "--teacher-licence, --source-licence, --citation"),
    "signed by nobody": (["store", "verify", "STORE", "--signed-by", "rows.csv"], "has no manifest.json.sig"),
    "no key to sign with": (["store", "sign", "STORE", "--key", "nowhere"], "no key at nowhere"),
    "nothing to withdraw": (["store", "withdraw", "STORE", "--keys", "rows.csv", "--out", "new"], "none of the 2 images"),
    "import of what it is not": (["store", "import", ".", "--format", "datacompdr", "--out", "new"], "There is no .tar"),
    "no such store": (["distill", "--cache", "nowhere"], "nowhere"),
    "nothing to pull": (["store", "pull", "nowhere", "copy"], "There is no store at nowhere"),
    "a pull into a bucket": (["store", "pull", "STORE", "s3://lab/store"], "kdstore store push"),
    "a push to a web server": (["store", "push", "STORE", "https://lab.org/store"], "read only"),
    "store without manifest": (["distill", "--cache", "unfinished"], "manifest"),
    "unknown loss": (["distill", "--cache", "STORE", "--loss", "clip-dk"], "clip-kd"),
    "teacher's loss without a store": (["distill", "--data", "scenes:64", "--loss", "clip-kd"], "--cache"),
    "unknown student": (["distill", "--cache", "STORE", "--batch-size", "16", "--student", "ViT-T-61"], "ViT-T-16"),
    "other data": (["distill", "--cache", "STORE", "--data", "scenes/test:8"], "key"),
    "store of another identity": (
        ["extract", "--teacher", "scenes-T", "--set", "untrained_seed=1", "--data", "scenes/val:64", "--out", "STORE"],
        "other features",
    ),
    "unknown model": (["evaluate", "retrieval", "--model", "nothing"], "nothing"),
    "nothing to score": (["evaluate", "retrieval"], "--model or --cache is needed"),
    "no labels": (["evaluate", "zeroshot", "--model", "scenes-T"], "--data is needed: images with labels"),
    "no such templates": (["evaluate", "zeroshot", "--cache", "STORE", "--templates", "imagenett"], "Did you mean imagenet"),
    "labels that are not there": (["evaluate", "zeroshot", "--cache", "STORE"], "has a label"),
    "agreement of one": (["evaluate", "agreement", "--cache", "STORE"], "found 0 of --model and 1 of --cache"),
    "too few to agree on": (["evaluate", "agreement", "--cache", "STORE", "--cache", "STORE"], "and 2000 were asked for"),
    "probe without labels": (["evaluate", "probe", "--train-cache", "STORE", "--cache", "STORE"], "has a label"),
    "unknown data set": (["evaluate", "vqa", "--model", "scenes-T", "--dataset", "vqa3"], "vqav2"),
    "nothing to compare": (["evaluate", "compare", "a.json", "b.json"], "No result file a.json"),
    "another file in a table": (["evaluate", "table", "table.toml"], "is not JSON as kdstore writes it"),
    "missing VQA folder": (["evaluate", "vqa", "--model", "scenes-S", "--dataset", "easy-vqa", "--data-dir", "nowhere"], "nowhere"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_one_line_with_a_hint_and_leaves_nothing(case, store, tmp_path, here):
    args, said = WRONG[case]
    (tmp_path / "rows.csv").write_text("path,title\na.png,x\n")
    (tmp_path / "empty.csv").touch()
    (tmp_path / "table.toml").write_text("[distil]\nloss = 'clip'\n")
    (tmp_path / "units.toml").write_text("[extract]\nunit_rows = 64\n")
    (tmp_path / "key.toml").write_text("[distill]\nbatchsize = 3\n")
    (tmp_path / "unfinished" / "_build").mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    done = here(*[str(store) if a == "STORE" else a for a in args])
    lines = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert done.returncode == 1, done.stderr
    assert len(lines) == 1
    assert said in lines[0]
    assert "Traceback" not in done.stderr
    assert not done.stdout
    assert sorted(tmp_path.rglob("*")) == before


def test_a_real_process_exits_with_one_line_and_one(tmp_path):
    done = kdstore("distill", "--cache", "nowhere", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert len(done.stderr.splitlines()) == 1, done.stderr


def test_ctrl_c_is_one_line_and_130_and_the_same_command_goes_on(tmp_path, here):
    args = ["extract", "--teacher", "scenes-T", "--set", "untrained_seed=0", "--set", "batch=8", "--data", "scenes/val:400", "--unit-rows", "32"]
    args += ["--out", str(tmp_path / "store"), "--device", "cpu"]
    code = f"import signal; signal.signal(signal.SIGINT, signal.default_int_handler); {STARTER}"  # a test run in the background inherits 'ignore'
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-W", "ignore", "-c", code, *args], stderr=subprocess.PIPE, text=True, env=environment)
    deadline = time.monotonic() + 200
    while not list(tmp_path.rglob("image-*.json")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    said = process.communicate()[1]
    assert process.returncode == 130, said
    assert "Traceback" not in said
    assert len([line for line in said.splitlines() if line.startswith("interrupted:")]) == 1
    done = here(*args, "--json")
    assert 0 < json.loads(done.stdout)["written_images"] < 400


def test_ctrl_c_during_imports_is_one_line_and_130():
    finder = "class Finder:\n    def find_spec(name, *_):\n        if name == 'typer': os.kill(os.getpid(), signal.SIGINT)\n"
    code = f"import os, signal, sys\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n{finder}sys.meta_path.insert(0, Finder)\n{STARTER}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "interrupted: Stopped.\n")


def test_results_are_json_on_stdout_and_progress_goes_to_stderr(store, here):
    done = here("store", "info", store, "--json")
    assert json.loads(done.stdout)["images"] == 64
    again = here("extract", "--teacher", "scenes-T", "--set", "untrained_seed=0", "--data", "scenes/val:64", "--out", store, "--json")
    assert json.loads(again.stdout)["written_images"] == 0
    assert "is complete already" in again.stderr
    assert "scenes-T" in again.stderr


def test_verify_exits_with_one_and_names_file_and_rows(store, tmp_path, here):
    copy = tmp_path / "copy"
    shutil.copytree(store, copy)
    assert here("store", "verify", copy).returncode == 0
    shard = next(p for p in (copy / "image" / "embedding").rglob("*") if p.is_file() and p.name != "zarr.json")
    content = bytearray(shard.read_bytes())
    content[100] ^= 1
    shard.write_bytes(content)
    done = here("store", "verify", copy)
    assert done.returncode == 1
    assert str(shard.relative_to(copy)) in done.stderr
    assert "rows 0 to 15" in done.stderr


def test_the_default_path_of_a_store_is_the_short_name_of_its_teacher(tmp_path, here):
    model = load_model("ViT-B-32", untrained=True, device="cpu")
    torch.save(model.clip.state_dict(), tmp_path / "b32.pt")
    done = here("extract", "--teacher", "ViT-B-32", "--pretrained", "b32.pt", "--data", "scenes/val:8", "--json")
    assert json.loads(done.stdout)["path"] == "store/B-32", done.stderr
    assert (tmp_path / "store" / "B-32" / "manifest.json").is_file()


def test_lists_name_what_can_be_named(here):
    assert "clip-kd" in here("list", "losses").stdout
    assert "ViT-T-16" in here("list", "students").stdout
    assert "ViT-bigG-14: laion2b_s39b_b160k (default)" in here("list", "teachers").stdout
    assert {"scenes", "easy-vqa"} <= set(json.loads(here("list", "vqa", "--json").stdout)["datasets"])
    for stage in STAGES:
        assert "device" in json.loads(here("list", "settings", stage, "--json").stdout) or stage in ("score", "study")
    assert "eval_split  str = 'test'" in here("list", "settings", "vqa").stdout


def test_every_option_is_none_unless_given():
    """A default exists once, in the stage's dataclass."""
    scores = (evaluate.evaluate_vqa, evaluate.evaluate_zeroshot, evaluate.evaluate_retrieval, evaluate.evaluate_probe, evaluate.evaluate_agreement)
    for command in (cli.extract, cli.distill, *scores, cli.demo):
        for parameter in inspect.signature(command).parameters.values():
            assert parameter.default in (None, inspect.Parameter.empty) or parameter.name == "as_json", (command, parameter)


def test_the_package_declares_its_entry_point():
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"kdstore": "kdstore.__main__:main"}
    assert {"torch", "open_clip_torch", "faiss-cpu", "zarr", "numcodecs", "dask", "typer", "datasets"} <= {d.split(">=")[0] for d in project["dependencies"]}


def test_without_a_terminal_a_running_stage_has_its_lines_and_each_its_end(capsys):
    with bars(every=0) as report:
        for done in (0, 250, 1000, 1000):
            report("images", done, 1000, "2 invalid")
        report("warning", 0, 0, "one [bad] word of scenes:100:")
        report("bytes", 2000, 4000)
        seen = capsys.readouterr().err.splitlines()
        report("images", 0, 10)
    assert [line.split(",")[0] for line in seen] == [
        "images: 0/1000",
        "images: 250/1000",
        "images: 1000/1000",
        "warning: one [bad] word of scenes:100:",
        "bytes: 2.0 kB/4.0 kB",
    ]
    assert seen[1].split(", ")[1].endswith("/s")
    assert seen[1].endswith(" left, 2 invalid")
    assert capsys.readouterr().err == "images: 0/10\n"
    with bars(every=1e9) as report:
        for done in range(5):
            report("images", done, 10)
    assert [line.split(",")[0] for line in capsys.readouterr().err.splitlines()] == ["images: 0/10", "images: 4/10"]  # the last of what was cut short

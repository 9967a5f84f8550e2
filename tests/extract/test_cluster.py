"""One store from many processes: whoever computes a unit, and whoever dies, the store is the one that a single process writes."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
from PIL import Image

from kdstore.errors import ConfigError, IncompleteStore, SourceError, StoreNotFound
from kdstore.extract.cluster import config_for_workers
from kdstore.extract.config import ExtractConfig
from kdstore.extract.job import prepare
from kdstore.extract.run import extract
from kdstore.jsonfile import read_json
from kdstore.models.names import CONFIGS, demo_teachers
from kdstore.store import finalise_store, open_store, store_progress, verify_store

SETTINGS = [
    *("--teacher", "scenes-T", "--set", "untrained_seed=0", "--data", "scenes/val:160", "--tokens", "image", "--views", "1"),
    *("--unit-rows", "16", "--device", "cpu", "--json"),
]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "PYTHONPATH": str(Path(__file__).parents[2] / "src")}


def config(out, **changes):
    settings = {"teacher": "scenes-T", "untrained_seed": 0, "data": "scenes/val:160", "tokens": "image", "views": 1, "unit_rows": 16, "device": "cpu"}
    return ExtractConfig(**{**settings, "out": str(out), **changes})


@pytest.fixture(scope="module")
def digest(tmp_path_factory):
    return extract(config(tmp_path_factory.mktemp("whole") / "s")).digest


def run(*command, folder, **environment):
    """Run the command line; returns its result and what it says to the user."""
    done = subprocess.run([sys.executable, "-m", "kdstore", *command], env=ENVIRONMENT | environment, cwd=folder, capture_output=True, text=True, timeout=150)
    return json.loads(done.stdout or "{}"), done.stderr


def wait_for(done, process, seconds=150):
    deadline = time.monotonic() + seconds
    while not done():
        assert process.poll() is None, "it ended too soon"
        assert time.monotonic() < deadline
        time.sleep(0.02)


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


class Cluster:
    """A dask cluster of processes: a scheduler, and workers that are started in a folder of their own, where no relative path leads anywhere."""

    def __init__(self, folder, stack):
        self.address, self._stack, self._folder = f"tcp://127.0.0.1:{free_port()}", stack, folder
        (folder / "elsewhere").mkdir()
        host, port = self.address.removeprefix("tcp://").split(":")
        self.scheduler = self.run("distributed.cli.dask_scheduler", "--host", host, "--port", port, "--no-dashboard")

    def worker(self, **environment):
        command = ("distributed.cli.dask_worker", self.address, "--no-nanny", "--no-dashboard")
        return self.run(*command, folder=self._folder / "elsewhere", **environment)

    def run(self, *command, folder=None, stderr=subprocess.DEVNULL, **environment):
        command = [sys.executable, "-m", *command]
        process = subprocess.Popen(command, env=ENVIRONMENT | environment, cwd=folder or self._folder, stdout=subprocess.DEVNULL, stderr=stderr)
        self._stack.callback(process.wait)
        self._stack.callback(process.kill)
        return process


@pytest.fixture
def cluster(tmp_path):
    with ExitStack() as stack:
        yield Cluster(tmp_path, stack)


def test_a_store_is_the_same_after_a_worker_and_the_coordinator_were_killed(tmp_path, digest, cluster):
    out, workers = tmp_path / "s", [cluster.worker() for _ in range(3)]
    command = ("extract", *SETTINGS, "--scheduler", cluster.address, "--out", "s")

    def recorded():
        return len(list((out / "_build" / "units").glob("*.json")))

    coordinator = cluster.run("kdstore", *command)
    wait_for(lambda: recorded() >= 2, coordinator)
    workers[0].send_signal(signal.SIGKILL)
    wait_for(lambda: recorded() >= 8, coordinator)
    coordinator.send_signal(signal.SIGKILL)
    coordinator.wait()
    assert not (out / "manifest.json").exists()
    found, _ = run(*command, folder=tmp_path)
    assert (cluster.scheduler.poll(), workers[1].poll()) == (None, None)
    assert found["digest"] == digest
    assert found["written_images"] < 160
    assert verify_store(out).ok
    assert not (out / "_build").exists()


def test_processes_of_this_machine_write_the_store_of_one_process(tmp_path, digest):
    with socket.socket() as other:
        with suppress(OSError):  # taken already is as good
            other.bind(("127.0.0.1", 8787))
            other.listen()
        found, said = run("extract", *SETTINGS, "--workers", "2", "--out", "s", folder=tmp_path, PYTHONWARNINGS="default")
    assert "8787" not in said  # of a dashboard that nobody asked for
    assert (found["digest"], found["written_images"], found["written_texts"]) == (digest, 160, open_store(tmp_path / "s").num_texts)
    assert found["rates"]["bottleneck"] in ("reading", "model", "writing")


def test_ctrl_c_to_all_processes_of_a_run_is_one_line_and_leaves_none(tmp_path):
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from kdstore.__main__ import main; main()"
    command = [sys.executable, "-c", code, "extract", *SETTINGS, "--data", "scenes/val:2000", "--workers", "2", "--out", "s"]
    with subprocess.Popen(command, env=ENVIRONMENT, cwd=tmp_path, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        wait_for(lambda: list((tmp_path / "s/_build").glob("units/image-*.json")), process)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        said = process.communicate()[1]
    assert process.returncode == 130, said
    assert "Traceback" not in said
    assert said.splitlines()[-1].startswith("interrupted:")


def pictures(folder, number):
    for k in range(number):
        Image.new("RGB", (64, 64), (6 * k, 9, 9)).save(folder / f"{k}.png")
    (folder / "rows.csv").write_text("path,caption\n" + "".join(f"{k}.png,number {k}\n" for k in range(number)))


def preload(folder, name, code):
    """Write what a worker loads first, and return the environment that has it do so."""
    (folder / name).write_text("import time, torch\nfrom pathlib import Path\nfrom kdstore.extract import cluster, fit, units\n" + code)
    return {"DASK_DISTRIBUTED__WORKER__PRELOAD": str(folder / name)}


def test_a_unit_that_fails_three_times_is_named_a_sick_worker_left_alone_and_the_rest_kept(tmp_path, cluster):
    pictures(tmp_path, 40)
    shutil.copy(demo_teachers()["scenes-S"] / "open_clip_model.safetensors", tmp_path / "weights.safetensors")
    bug = tmp_path / "bug"
    bug.touch()
    decode = (
        "def decode(self, row, real=units.Extractor.decode, **views):\n"
        f"    if row == 20 and Path({str(bug)!r}).exists(): raise RuntimeError('broken')\n"
        "    return real(self, row, **views)\n"
        "units.Extractor.decode = decode\n"
    )
    memory = (
        "def encode(model, some, real=fit.encode_image):\n"
        "    if len(some) > 4: raise torch.cuda.OutOfMemoryError('as from a small device')\n"
        "    return real(model, some)\n"
        "fit.encode_image = encode\n"
    )
    cluster.worker(**preload(tmp_path, "small.py", decode + memory))
    cluster.worker(**preload(tmp_path, "sick.py", "def fail(*settings): raise RuntimeError('broken')\ncluster._open = fail\n"))
    settings = ("--teacher", "scenes-S", "--pretrained", "weights.safetensors", "--data", "rows.csv", "--unit-rows", "8", "--device", "cpu", "--json")
    command = ("extract", *settings, "--scheduler", cluster.address, "--out", "s")
    _, said = run(*command, folder=tmp_path)
    assert "error: 1 of 10 units failed three times (the last: image-00002, RuntimeError: broken)" in said
    assert said.count("gets no more units: it failed 3 in a row") == 1
    assert "notice: On a worker: Out of memory with 8 images at once; going on with 4." in said
    bug.unlink()
    found, said = run(*command, folder=tmp_path)
    assert (found["images"], found["written_images"]) == (40, 8)
    assert read_json(tmp_path / "s/run.json")["batch_after_out_of_memory"] == {"image": 4}


def test_missing_workers_wrong_versions_and_a_lost_scheduler_are_a_line_each(tmp_path, cluster):
    pictures(tmp_path, 40)
    hang = "def decode(self, row, **views): time.sleep(100)\nunits.Extractor.decode = decode\n"
    (tmp_path / "old/kdstore-0.0.1.dist-info").mkdir(parents=True)
    (tmp_path / "old/kdstore-0.0.1.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: kdstore\nVersion: 0.0.1\n")
    command = ("extract", *SETTINGS, "--data", "rows.csv", "--scheduler", cluster.address, "--out", "s")

    def said():
        return (tmp_path / "said").read_text()

    with open(tmp_path / "said", "w") as stderr:
        coordinator = cluster.run("kdstore", *command, stderr=stderr)
        wait_for(lambda: "Waiting for workers of the dask scheduler" in said(), coordinator)
        worker = cluster.worker(**preload(tmp_path, "hang.py", hang))
        wait_for(lambda: any((tmp_path / "s/_build").glob("attempts/image-*")), coordinator)
        cluster.worker(PYTHONPATH=f"{tmp_path / 'old'}:{ENVIRONMENT['PYTHONPATH']}")
        wait_for(lambda: "gets no units: it has kdstore 0.0.1 (here 0.1.0)" in said(), coordinator)
        for process in (cluster.scheduler, worker):
            process.kill()
        coordinator.wait(timeout=150)
    assert coordinator.returncode == 1
    assert "Traceback" not in said()
    assert said().splitlines()[-1].startswith(f"error: The dask scheduler at {cluster.address} is lost; 0 of 6 units are recorded. Start it")


def test_settings_for_workers_mean_the_same_in_another_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    pictures(tmp_path, 3)
    shutil.copytree(demo_teachers()["scenes-S"], "folder")
    shutil.copy(CONFIGS / "scenes-T.json", "mine.json")
    (tmp_path / "keys.txt").write_text("1.png\n")
    parent = extract(ExtractConfig(teacher="folder", data="rows.csv", out="parent", device="cpu"))
    names = [{"teacher": "folder"}, {"teacher": "local-dir:folder"}, {"teacher": "mine.json", "untrained_seed": 0}, {"teacher": "scenes-S"}]
    names += [{"teacher": "scenes-S", "pretrained": "folder/open_clip_model.safetensors"}, {"teacher": "scenes-S:folder/open_clip_model.safetensors"}]
    for name in [*names, {"teacher": "folder", "parent": parent.path, "keys": "keys.txt", "tokens": "image"}]:
        here = prepare(ExtractConfig(**name, data="rows.csv", out="s", device="cpu", scheduler="tcp://h:1"), print)
        settings = config_for_workers(here)
        monkeypatch.chdir(tmp_path / "elsewhere")
        there = prepare(settings, print)
        monkeypatch.chdir(tmp_path)
        assert there.identity == here.identity
        assert there.out == here.out.absolute()
        for job in (here, there):
            job.extractor.close()


def test_parts_in_any_order_and_interrupted_make_the_store_of_one_process(tmp_path, digest):
    out = tmp_path / "s"

    def stop(stage, done, total, note=""):
        if stage == "images" and done > 16:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        extract(config(out, part="3/3"), on_progress=stop)
    with pytest.raises(IncompleteStore, match="units are not there"):
        finalise_store(out)
    for part in ("2/3", "3/3", "2/3"):
        result = extract(config(out, part=part))
        assert result.digest is None
        assert result.notices[-1].endswith(f"kdstore store finalise {out}")
    assert result.written_images == 0  # it was done
    progress = store_progress(out)
    assert progress.units_staged > 0
    assert progress.writer is None
    extract(config(out, part="1/3"))
    assert finalise_store(out) == digest
    account = read_json(out / "run.json")
    assert (account["images"], account["invalid_images"], len(account["parts"])) == (160, 0, 3)
    assert open_store(out).recorded_source == "scenes/val:160"
    assert extract(config(out, part="1/3")).digest == digest
    assert finalise_store(out) == digest  # complete already
    with pytest.raises(StoreNotFound, match="No store is being written"):
        finalise_store(tmp_path / "nowhere")


def test_what_parts_have_staged_is_taken_by_a_run_that_does_the_rest(tmp_path, digest):
    extract(config(tmp_path / "s", part="2/4"))
    result = extract(config(tmp_path / "s"))
    assert result.digest == digest
    assert 0 < result.written_images < 160


def test_a_staged_unit_that_was_damaged_is_done_again(tmp_path, digest):
    extract(config(tmp_path / "s", part="1/2"))
    staged = sorted((tmp_path / "s/_build/parts").glob("image-*/*"))
    staged[0].write_bytes(staged[0].read_bytes()[:-1])
    extract(config(tmp_path / "s", part="1/2"))
    extract(config(tmp_path / "s", part="2/2"))
    assert finalise_store(tmp_path / "s") == digest


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"part": "0/3"}, "I from 1 to N"),
        ({"part": "4/3"}, "I from 1 to N"),
        ({"part": "one"}, "I from 1 to N"),
        ({"part": "1/2", "workers": 2}, "three ways"),
        ({"workers": -1}, "must not be negative"),
        ({"scheduler": "tcp://127.0.0.1:1", "workers": 1}, "three ways"),
    ],
)
def test_wrong_ways_of_sharing_the_work_are_refused(changes, said):
    with pytest.raises(ConfigError, match=said):
        config("s", **changes)


def test_too_many_undecodable_images_end_a_part_too(tmp_path):
    (tmp_path / "rows.csv").write_text("path,caption\n" + "".join(f"{k}.png,c {k}\n" for k in range(40)))
    with pytest.raises(SourceError, match="images are not valid"):
        extract(config(tmp_path / "s", data=str(tmp_path / "rows.csv"), part="1/1"))

"""One store from many processes: whoever computes a unit, and whoever dies, the store is the one that a single process writes."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
from PIL import Image

from kdstore.errors import ConfigError, IncompleteStore, SourceError, StoreNotFound
from kdstore.extract.config import ExtractConfig
from kdstore.extract.run import extract
from kdstore.jsonfile import read_json
from kdstore.store import finalise_store, open_store, store_progress, verify_store

SETTINGS = [
    *("--teacher", "scenes-T", "--set", "untrained_seed=0", "--data", "scenes/val:160", "--tokens", "image"),
    *("--unit-rows", "16", "--device", "cpu", "--json"),
]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "PYTHONPATH": str(Path(__file__).parents[2] / "src")}


def config(out, **changes):
    settings = {"teacher": "scenes-T", "untrained_seed": 0, "data": "scenes/val:160", "tokens": "image", "unit_rows": 16, "device": "cpu"}
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


def test_a_store_is_the_same_after_a_worker_and_the_coordinator_were_killed(tmp_path, digest):
    address, out = f"tcp://127.0.0.1:{free_port()}", tmp_path / "s"
    host, port = address.removeprefix("tcp://").split(":")
    with ExitStack() as stack:

        def running(*command):
            process = subprocess.Popen([sys.executable, "-m", *command], env=ENVIRONMENT, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            stack.callback(process.wait)
            stack.callback(process.kill)
            return process

        scheduler = running("distributed.cli.dask_scheduler", "--host", host, "--port", port, "--no-dashboard")
        workers = [running("distributed.cli.dask_worker", address, "--no-nanny", "--nthreads", "1", "--no-dashboard") for _ in range(3)]
        command = ("extract", *SETTINGS, "--scheduler", address, "--out", "s")

        def recorded():
            return len(list((out / "_build" / "units").glob("*.json")))

        coordinator = running("kdstore", *command)
        wait_for(lambda: recorded() >= 2, coordinator)
        workers[0].send_signal(signal.SIGKILL)
        wait_for(lambda: recorded() >= 8, coordinator)
        coordinator.send_signal(signal.SIGKILL)
        coordinator.wait()
        assert not (out / "manifest.json").exists()
        found, _ = run(*command, folder=tmp_path)
        assert (scheduler.poll(), workers[1].poll()) == (None, None)
    assert found["digest"] == digest
    assert found["written_images"] < 160
    assert verify_store(out).ok
    assert not (out / "_build").exists()


def test_processes_of_this_machine_write_the_store_of_one_process(tmp_path, digest):
    found, _ = run("extract", *SETTINGS, "--workers", "2", "--out", "s", folder=tmp_path)
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


def test_a_unit_that_fails_three_times_is_named_and_the_rest_is_kept(tmp_path):
    for k in range(40):
        Image.new("RGB", (64, 64), (6 * k, 9, 9)).save(tmp_path / f"{k}.png")
    (tmp_path / "rows.csv").write_text("path,caption\n" + "".join(f"{k}.png,number {k}\n" for k in range(40)))
    (tmp_path / "broken.py").write_text(  # what a worker loads first: a decoder that fails on one image, as by a bug in a library
        "from kdstore.extract import units\n"
        "def decode(self, row, real=units.Extractor.decode, **views):\n    if row == 20: raise RuntimeError('broken')\n    return real(self, row, **views)\n"
        "units.Extractor.decode = decode\n"
    )
    command = ("extract", *SETTINGS, "--data", "rows.csv", "--workers", "1", "--out", "s")
    _, said = run(*command, folder=tmp_path, DASK_DISTRIBUTED__WORKER__PRELOAD=str(tmp_path / "broken.py"))
    assert "error: 1 of 6 units failed three times (the last: image-00001, RuntimeError: broken)" in said
    found, _ = run(*command, folder=tmp_path)
    assert found["written_images"] == 16


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

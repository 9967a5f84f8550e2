"""Parts of a job array that are stopped, killed and overtaken: what they staged stays, and what they left half-done goes."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kdstore.errors import IdentityMismatch, SourceError
from kdstore.extract.config import ExtractConfig
from kdstore.extract.run import extract
from kdstore.store import StoreWriter, finalise_store, store_progress, verify_store


def config(out, **changes):
    settings = {"teacher": "scenes-T", "untrained_seed": 0, "data": "scenes/val:96", "unit_rows": 16, "device": "cpu"}
    return ExtractConfig(**{**settings, "out": str(out), **changes})


@pytest.fixture(scope="module")
def digest(tmp_path_factory):
    return extract(config(tmp_path_factory.mktemp("whole") / "s")).digest


def test_what_parts_have_staged_survives_a_finalise_that_fails(tmp_path, digest):
    extract(config(tmp_path / "s", part="1/1"))
    staged = store_progress(tmp_path / "s").units_staged
    with pytest.raises(KeyboardInterrupt), StoreWriter.reopen(tmp_path / "s"):
        raise KeyboardInterrupt
    assert store_progress(tmp_path / "s").units_staged == staged > 0
    assert finalise_store(tmp_path / "s") == digest


def test_a_part_that_is_told_to_end_leaves_no_half_unit_and_one_that_was_killed_is_cleared_up(tmp_path, digest):
    parts = tmp_path / "s/_build/parts"
    command = [
        "extract",
        "--teacher",
        "scenes-T",
        "--set",
        "untrained_seed=0",
        "--data",
        "scenes/val:96",
        "--unit-rows",
        "16",
        "--device",
        "cpu",
        "--part",
        "1/1",
    ]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "src")}
    process = subprocess.Popen([sys.executable, "-m", "kdstore", *command, "--out", "s"], cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not list(parts.glob("*.json")):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert said.splitlines()[-1].startswith("interrupted: Stopped")

    def half_done():
        return [folder for folder in parts.glob("*-*-*") if folder.is_dir() and not (parts / f"{'-'.join(folder.name.split('-')[:2])}.json").exists()]

    assert not half_done()
    unit = next(name for name in (f"image-{k:05}" for k in range(6)) if not (parts / f"{name}.json").exists())
    host = "".join(c if c.isascii() and c.isalnum() else "_" for c in socket.gethostname())
    for pid in (process.pid, os.getpid()):
        (parts / f"{unit}-{'0' * 32}-{pid}-{host}").mkdir()
    extract(config(tmp_path / "s", part="1/1"))
    assert [folder.name for folder in parts.iterdir() if "0" * 32 in folder.name] == [f"{unit}-{'0' * 32}-{os.getpid()}-{host}"]  # that process lives
    assert finalise_store(tmp_path / "s") == digest


def test_a_part_that_was_overtaken_ends_and_leaves_the_sealed_store_alone(tmp_path, digest):
    def overtake(stage, done, total, note=""):
        if stage == "images" and not (tmp_path / "s/manifest.json").exists():
            extract(config(tmp_path / "s"))

    result = extract(config(tmp_path / "s", part="1/2"), on_progress=overtake)
    assert result.digest == digest
    assert "is complete" in result.notices[-1]
    assert not (tmp_path / "s/_build").exists()
    assert verify_store(tmp_path / "s").ok


def test_a_part_takes_the_plan_of_the_others_and_refuses_other_data(tmp_path, digest):
    extract(config(tmp_path / "s", part="1/2"))
    for data in ("scenes/val:97", "scenes/train:96"):
        with pytest.raises(IdentityMismatch, match="does not hold the 96 rows"):
            extract(config(tmp_path / "s", part="2/2", data=data))
    extract(config(tmp_path / "s", part="2/2"))
    assert finalise_store(tmp_path / "s") == digest


def test_a_disk_that_fails_ends_the_run_and_is_no_fact_about_an_image(tmp_path):
    for k in range(4):
        Image.fromarray(np.full((64, 64, 3), 50 * k, np.uint8)).save(tmp_path / f"{k}.png")
    (tmp_path / "metadata.csv").write_text("file_name,caption\n" + "".join(f"{k}.png,number {k}\n" for k in range(4)))
    (tmp_path / "2.png").unlink()
    with socket.socket(socket.AF_UNIX) as broken:
        broken.bind(str(tmp_path / "2.png"))  # opening it fails with ENXIO, as a disk may with others
        with pytest.raises(SourceError, match=r"Cannot read .*2\.png: No such device"):
            extract(config(tmp_path / "s", data=str(tmp_path), max_invalid=0.9))
    (tmp_path / "2.png").unlink()
    assert extract(config(tmp_path / "s", data=str(tmp_path), max_invalid=0.9)).invalid_images == 1

"""Distilling from a store where it is: the same losses as from a folder, in every order, and what does not fit into the cache is said before the first step."""

from __future__ import annotations

import functools
import http.server
import json
import os
import signal
import threading
from collections import Counter
from contextlib import contextmanager, suppress
from dataclasses import replace

import numpy as np
import pytest

from kdstore.data.scenes import Scenes
from kdstore.distill.config import DistillConfig
from kdstore.distill.train import distill
from kdstore.errors import ConfigError, Interrupted, RunError
from kdstore.store import Plan, StoreWriter, embedding_array, open_store


@contextmanager
def served(folder, send=None):
    """A web server of a folder, as its address and the files that it was asked for; `send(path)` is called before a body is sent."""
    asked = Counter()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def send_head(self):
            asked[self.path.lstrip("/")] += 1
            return super().send_head()

        def copyfile(self, source, outputfile):
            if send is not None:
                self.wfile.flush()
                send(self.path)
            with suppress(OSError):  # who asked is gone
                super().copyfile(source, outputfile)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()


def losses(run):
    return [json.loads(line)["loss"] for line in (run / "log.jsonl").read_text().splitlines()]


def fetched(asked):
    """How often each shard of embeddings was asked for."""
    return {path: count for path, count in asked.items() if "/embedding/c/" in path}


@pytest.fixture
def settings(student):
    return {"student": student, "loss": "crd", "batch_size": 8, "log_every": 1, "device": "cpu"}


@pytest.fixture
def wide(tmp_path):
    """A store of noise for 128 scenes, in 8 shards of images and some 40 of texts."""
    source = Scenes("train", 128)
    plan = Plan.freeze(((source.key(i), source.captions(i)) for i in range(len(source))), unit_rows=16)
    arrays = [embedding_array(plan, side, 64) for side in ("image", "text")]
    teacher = {"name": "noise", "embed_dim": 64, "logit_scale": 10.0, "logit_bias": None}
    rng = np.random.default_rng(0)
    with StoreWriter.open(tmp_path / "wide", plan=plan, arrays=arrays, identity={"teacher": teacher}) as writer:
        for unit in writer.pending():
            with writer.attempt(unit) as attempt:
                shape = (len(unit), 1, 64) if unit.side == "image" else (len(unit), 64)
                attempt.append(f"{unit.side}/embedding", rng.normal(size=shape).astype(np.float16))
                if unit.side == "image":
                    attempt.index([{"sha256": "", "valid": True, "reason": "", "width": 1, "height": 1}] * len(unit))
        writer.finalise({"source": source.spec})
    return tmp_path / "wide"


@pytest.mark.parametrize("shuffle", ["auto", "windows:32"])
def test_a_run_from_an_address_has_the_losses_of_one_from_the_folder(store, settings, tmp_path, shuffle):
    settings |= {"epochs": 3, "shuffle": shuffle}
    distill(DistillConfig(cache=str(store), out=str(tmp_path / "local"), **settings))
    with served(store.parent) as (url, asked):
        distill(DistillConfig(cache=f"{url}/{store.name}?key=secret", cache_folder=str(tmp_path / "cache"), out=str(tmp_path / "remote"), **settings))
    assert losses(tmp_path / "remote") == losses(tmp_path / "local")
    assert len(losses(tmp_path / "local")) == 15
    assert set(fetched(asked).values()) == {1}
    said = (tmp_path / "remote/run.json").read_text()
    assert "secret" not in said
    assert json.loads(said)["order"] == ("full" if shuffle == "auto" else {"block": 16, "window": 32})


def test_a_store_larger_than_the_cache_is_read_in_windows_which_are_the_runs_own(wide, settings, tmp_path):
    settings |= {"epochs": 1, "cache_folder": str(tmp_path / "cache")}
    size = sum(entry["size"] for path, entry in open_store(wide).manifest["files"].items() if "/embedding/c/" in path)
    with served(wide.parent) as (url, asked):
        run = DistillConfig(cache=f"{url}/{wide.name}", cache_gib=size * 0.8 / 2**30, out=str(tmp_path / "run"), **settings)
        distill(run)
        assert json.loads((tmp_path / "run/run.json").read_text())["order"] == {"block": 16, "window": 16}
        assert sum(fetched(asked).values()) <= 2 * len(fetched(asked))  # a full shuffle reads all of them with every batch
        with pytest.raises(ConfigError, match=r'A full shuffle of all pairs reads .* GiB at once .* Raise cache_gib to .*, set shuffle="windows:\d+", or pull'):
            distill(replace(run, shuffle="full", out=str(tmp_path / "full")))
        with pytest.raises(ConfigError, match=r"A batch of 8 needs .* GiB: raise cache_gib"):
            distill(replace(run, cache_gib=size / 6 / 2**30, out=str(tmp_path / "small")))
        with pytest.raises(RunError, match="shuffle is 'windows:16' there and 'windows:48' here"):
            distill(replace(run, shuffle="windows:48"))


def test_ctrl_c_ends_the_wait_for_shards_and_the_run_goes_on_from_there(wide, settings, tmp_path):
    settings |= {"epochs": 1, "cache_folder": str(tmp_path / "cache")}
    stopped, once, waited_out = threading.Event(), threading.Semaphore(), []

    def stall(path):
        if "/embedding/c/" in path and not stopped.is_set():
            if once.acquire(blocking=False):
                os.kill(os.getpid(), signal.SIGINT)
            waited_out.append(not stopped.wait(30))

    with served(wide.parent, stall) as (url, asked):
        run = DistillConfig(cache=f"{url}/{wide.name}", out=str(tmp_path / "run"), **settings)
        with pytest.raises(Interrupted, match=r"Stopped at step 0 of 16; .* holds a checkpoint"):
            distill(run)
        assert len(fetched(asked)) < 48  # while none comes: those under way go on as soon as one does
        stopped.set()
        distill(replace(run, resume=True))
    assert not any(waited_out)
    distill(DistillConfig(cache=str(wide), out=str(tmp_path / "local"), **settings))
    assert losses(tmp_path / "run") == losses(tmp_path / "local")

"""Distilling from a store where it is: the same losses as from a folder, in every order, and what does not fit into the cache is said before the first step."""

from __future__ import annotations

import functools
import http.server
import json
import threading
from collections import Counter
from contextlib import contextmanager

import numpy as np
import pytest

from kdstore.distill.config import DistillConfig
from kdstore.distill.train import distill
from kdstore.errors import ConfigError, RunError
from kdstore.store import open_store


@contextmanager
def served(folder):
    """A web server of a folder, as its address and the files that it was asked for."""
    asked = Counter()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def send_head(self):
            asked[self.path.lstrip("/")] += 1
            return super().send_head()

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()


def losses(run):
    return [json.loads(line)["loss"] for line in (run / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("shuffle", ["auto", "windows:32"])
def test_a_run_from_an_address_has_the_losses_of_one_from_the_folder_and_fetches_only_what_it_needs(store, student, tmp_path, shuffle):
    settings = {"student": student, "loss": "crd", "epochs": 3, "batch_size": 8, "log_every": 1, "device": "cpu", "shuffle": shuffle, "threads": 1}
    distill(DistillConfig(cache=str(store), out=str(tmp_path / "local"), **settings))
    with served(store.parent) as (url, asked):
        distill(DistillConfig(cache=f"{url}/{store.name}?key=secret", cache_folder=str(tmp_path / "cache"), out=str(tmp_path / "remote"), **settings))
    assert losses(tmp_path / "remote") == losses(tmp_path / "local")
    assert len(losses(tmp_path / "local")) == 15
    said = (tmp_path / "remote/run.json").read_text()
    assert "secret" not in said
    assert json.loads(said)["pairs"]["order"] == ("full" if shuffle == "auto" else {"block": 16, "window": 32})

"""Pulls that are killed, and that fail at every step in turn: what came stays, a reader sees a whole store or none, and the next pull goes on."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import time

import numpy as np
import pytest

from kdstore.errors import IncompleteStore, KdstoreError, StoreLocked, StoreNotFound
from kdstore.store import Plan, StoreWriter, embedding_array, open_store, verify_store
from kdstore.store.layout import BESIDE, MANIFEST
from kdstore.store.lock import take_lock
from kdstore.store.share import pull_store


def is_whole_or_none(path, digest):
    """Tell whether there is a whole store; raises if there is a half one."""
    try:
        store = open_store(path)
    except (IncompleteStore, StoreNotFound):
        return False
    assert store.digest == digest
    assert verify_store(path).ok
    return True


def write_noise(path):
    """Write a store of eight shards of 256 KiB."""
    plan = Plan.freeze([(str(i), ()) for i in range(2048)], unit_rows=256)
    spec = embedding_array(plan, "image", 512)
    values = np.random.default_rng(0).normal(size=spec.shape).astype(spec.dtype)
    with StoreWriter.open(path, plan=plan, arrays=[spec], identity={}) as writer:
        for unit in writer.pending():
            with writer.attempt(unit) as attempt:
                attempt.append(spec.name, values[unit.start : unit.stop])
                attempt.index([{"sha256": "", "valid": True, "reason": "", "width": 1, "height": 1}] * len(unit))
        writer.finalise({})
    return path


def test_a_pull_that_is_killed_five_times_receives_each_byte_once(web, tmp_path, patience):
    target = tmp_path / "pulled"
    store = open_store(write_noise(tmp_path / "large"))
    web.root, web.pause = store.path, 0.001
    listed = store.manifest["files"]

    def sent():
        return sum(size for path, size in web.sent.items() if path in listed)

    for kill in range(1, 6):
        pid = os.fork()
        if pid == 0:
            try:
                pull_store(web.url, target, patience=patience, parallel=4)
            finally:
                os._exit(0)
        while sent() < store.num_bytes * kill / 6 and os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            time.sleep(0.0002)
        os.kill(pid, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
        time.sleep(0.02)  # the server ends what it was sending
        assert not is_whole_or_none(target, store.digest)
    web.pause = 0
    pull_store(web.url, target, patience=patience)
    assert is_whole_or_none(target, store.digest)
    piece = max(entry["size"] for entry in listed.values()) / 8
    assert sent() <= store.num_bytes + 5 * 4 * 4 * piece  # one pull, and what was in flight at each kill


@pytest.mark.parametrize("back", [False, True])
def test_a_failure_at_every_step_leaves_the_old_store_or_none_or_the_new_one_and_goes_on_or_back(sample, tmp_path, monkeypatch, back):
    few = sample.of_images(10)
    few.write(tmp_path / "few")
    source = str(tmp_path / "few")
    digest = open_store(source).digest
    old = sample.of_images(3)
    old.write(tmp_path / "old")
    step, failed = 0, True
    real = {name: getattr(os, name) for name in ("replace", "unlink")}
    while failed:
        target, left, step = tmp_path / f"target-{step}", step, step + 1
        old.write(target)
        digests = {digest, open_store(target).digest}

        def counted(name, *args, **options):
            nonlocal left
            left -= 1
            if left == -1:
                raise OSError(errno.EIO, "the disk fails", "file")
            return real[name](*args, **options)

        with monkeypatch.context() as patch:
            for name in real:
                patch.setattr(os, name, lambda *args, name=name, **options: counted(name, *args, **options))
            with contextlib.suppress(KdstoreError):
                pull_store(source, target, force=True, parallel=1)
            failed = left < 0
        try:
            assert open_store(target).digest in digests
            assert verify_store(target).ok
        except (IncompleteStore, StoreNotFound):
            pass
        again = str(tmp_path / "old") if back else source
        pulled = pull_store(again, target, force=True)
        assert pulled.whole
        assert is_whole_or_none(target, open_store(again).digest)
        assert not (target / "_build").exists()
    assert step > 25


def test_two_pulls_into_one_folder_do_not_fight(web, pristine, tmp_path, patience):
    (tmp_path / "pulled/_build").mkdir(parents=True)
    lock = take_lock(tmp_path / "pulled/_build")
    with pytest.raises(StoreLocked):
        pull_store(web.url, tmp_path / "pulled", patience=patience)
    assert {path for path, *_ in web.asked} <= {MANIFEST, *BESIDE}
    lock.release()
    assert pull_store(web.url, tmp_path / "pulled", patience=patience).whole

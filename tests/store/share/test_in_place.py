"""Stores that are used where they are: each file comes once for all processes of a machine, whole or not at all, and the cache keeps its bound."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import pickle
import signal
import threading
import time
import traceback
from collections import Counter

import numpy as np
import pytest

from kdstore.errors import ConfigError, DamagedStore, DiskFull, IdentityMismatch, KdstoreError, TransferError
from kdstore.jsonfile import write_json
from kdstore.store import Cache, open_store, verify_store
from kdstore.store.manifest import FileEntry, let_go
from kdstore.store.reader import Store
from kdstore.store.share import Patience
from kdstore.store.share.remote import remote_manifest

from .test_kills import write_noise

ROWS = np.random.default_rng(1).permutation(2048)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return write_noise(tmp_path_factory.mktemp("written") / "noise")


@pytest.fixture
def noise(web, written):
    """A store of eight shards of 256 KiB, which the web server has."""
    web.root = written
    return open_store(written)


def cache_of(tmp_path, size=2**30):
    return Cache(tmp_path / "cache", size)


def held(cache):
    """The bytes that lie in a cache."""
    return sum(file.stat().st_size for file in (cache.folder / "files").rglob("*") if file.is_file())


def shards_asked(web):
    return Counter(path for path, _, _ in web.asked if path.startswith("image/embedding/c/"))


def in_processes(count, work):
    """Fork processes that do `work(number)` and return their exit codes."""
    pids = []
    for number in range(count):
        if (pid := os.fork()) == 0:
            code = 1
            try:
                work(number)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        pids.append(pid)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


@pytest.mark.parametrize("bound", [2**30, 3 * 2**18])
def test_eight_processes_read_right_rows_and_fetch_each_file_once_if_all_fit(web, noise, tmp_path, bound):
    patience = Patience(backoff=0.01)  # the server is no faster than these processes leave it
    for number in range(8):  # three of them are refused at first, and none comes twice for it
        web.faults[f"image/embedding/c/{number}/0/0"] = ["503"] * (number % 3 == 0)
    expected = noise.gather("image/embedding", ROWS)

    def read(number):
        store = Store(remote_manifest(web.url, cache_of(tmp_path, bound), patience))
        order = np.random.default_rng(number).permutation(len(ROWS))
        for part in np.split(order, 8):
            np.testing.assert_array_equal(store.gather("image/embedding", ROWS[part]), expected[part])

    count = 8 if bound == 2**30 else 3
    assert in_processes(count, read) == [0] * count
    assert held(cache_of(tmp_path)) <= bound
    if bound == 2**30:
        assert shards_asked(web) == {f"image/embedding/c/{number}/0/0": 1 + (number % 3 == 0) for number in range(8)}
        assert {count for path, count in Counter(path for path, _, _ in web.asked if path in noise.manifest["files"]).items() if "/c/" not in path} == {1}
    else:
        assert sum(shards_asked(web).values()) > 8  # what did not fit came again


def test_a_process_that_is_killed_while_it_downloads_leaves_what_the_next_one_goes_on_with_at_once(web, noise, tmp_path, patience):
    path = "image/embedding/c/0/0/0"
    Store(remote_manifest(web.url, cache_of(tmp_path), patience)).gather("image/embedding", [300])  # all but this shard
    web.pause = 0.1
    pid = os.fork()
    if pid == 0:
        Store(remote_manifest(web.url, cache_of(tmp_path), patience)).gather("image/embedding", [0])
        os._exit(1)
    while web.sent[path] < noise.manifest["files"][path]["size"] / 2:
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    web.pause = 0
    store = Store(remote_manifest(web.url, cache_of(tmp_path), patience))
    np.testing.assert_array_equal(store.gather("image/embedding", [0, 7]), noise.gather("image/embedding", [0, 7]))
    ranges = [asked for name, asked, _ in web.asked if name == path]
    assert ranges[0] is None
    assert int(ranges[1].removeprefix("bytes=").rstrip("-")) >= noise.manifest["files"][path]["size"] // 4
    assert not list((tmp_path / "cache").rglob("*~"))


def test_who_opens_a_file_in_transit_just_before_it_is_removed_does_not_fetch_it_beside_another(tmp_path, monkeypatch):
    cache, entry = cache_of(tmp_path), FileEntry(5, hashlib.sha256(b"bytes").hexdigest(), None)
    partial = cache.path(entry).with_name(cache.path(entry).name + "~")
    flock, removed = fcntl.flock, []

    def late(fd, operation):
        if operation == fcntl.LOCK_EX | fcntl.LOCK_NB and not removed:
            removed.append(partial.unlink())  # by another, which no byte came to
        flock(fd, operation)

    def fetch(path):
        fd = os.open(partial, os.O_RDWR)
        with pytest.raises(BlockingIOError):
            flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.write(fd, b"bytes")
        os.close(fd)
        os.replace(partial, path)

    monkeypatch.setattr(fcntl, "flock", late)
    let_go(cache.lease(entry, fetch, lambda seconds: None))
    assert removed
    assert cache.path(entry).read_bytes() == b"bytes"


def test_a_shard_that_is_listed_larger_than_its_rows_is_not_fetched(web, noise, tmp_path):
    web.root = tmp_path / "hostile"
    web.root.mkdir()
    for size, said in ((10 << 30, "lists 10737418240 bytes for image/embedding/c/3/0/0, which its shape does not fill"), (10**400, "not a file entry")):
        content = json.loads((noise.path / "manifest.json").read_text())
        content["files"]["image/embedding/c/3/0/0"]["size"] = size
        write_json(web.root / "manifest.json", content)
        with pytest.raises(DamagedStore, match=said):
            open_store(web.url, cache_of(tmp_path))
    assert {path for path, _, _ in web.asked} == {"manifest.json"}
    assert not held(cache_of(tmp_path))


def test_what_did_not_come_with_a_pinned_manifest_is_asked_for_again(web, noise, tmp_path):
    web.faults["run.json"] = ["403"]
    for there in (False, True, True):
        assert (open_store(f"{web.url}#{noise.digest}", cache_of(tmp_path)).path / "run.json").is_file() == there
    assert Counter(path for path, _, _ in web.asked)["manifest.json"] == 2


def test_a_file_that_is_being_read_is_not_evicted_and_the_one_of_the_oldest_use_is(web, noise, tmp_path, patience):
    cache = cache_of(tmp_path, 3 * 2**18)  # two shards and what is small
    manifest = remote_manifest(web.url, cache, patience)
    store = Store(manifest)
    paths = [manifest.where(f"image/embedding/c/{number}/0/0") for number in range(8)]
    store.gather("image/embedding", [0])
    lease = manifest.descriptor("image/embedding/c/0/0/0")
    store.gather("image/embedding", [256])
    store.gather("image/embedding", [512])
    assert [path.exists() for path in paths[:3]] == [True, False, True]
    let_go(lease)
    store.gather("image/embedding", [512])
    store.gather("image/embedding", [768])
    assert [path.exists() for path in paths[:4]] == [False, False, True, True]
    with pytest.raises(ConfigError, match=r"A file of .* does not fit into the cache .* Raise cache_gib"):
        Store(remote_manifest(web.url, Cache(tmp_path / "small", 2**17), patience)).gather("image/embedding", [0])


def test_a_file_that_does_not_come_right_comes_at_the_next_try_or_is_named(web, noise, tmp_path, patience):
    store = Store(remote_manifest(web.url, cache_of(tmp_path), patience))
    paths = [f"image/embedding/c/{number}/0/0" for number in range(8)]
    faults = dict(zip(paths, ["404", "html", "wrong", "hang", "short", "reset", "norange-short", "503"], strict=True))
    web.faults.update({path: [fault] for path, fault in faults.items()})
    web.forever = True
    for number, path in enumerate(paths[:4]):
        with pytest.raises(TransferError, match=rf"A file of {web.url} did not come: {path} .*\."):
            store.gather("image/embedding", [256 * number])
        assert not store._manifest.where(path).exists()
    web.faults[paths[0]], web.forever = [], False
    np.testing.assert_array_equal(store.gather("image/embedding", ROWS), noise.gather("image/embedding", ROWS))
    assert not any(web.faults[path] for path in paths)


def test_an_address_may_pin_the_digest_and_then_what_is_in_the_cache_needs_no_server(web, noise, tmp_path, monkeypatch):
    cache = cache_of(tmp_path)
    with pytest.raises(IdentityMismatch, match=f"has the store {noise.digest}, expected sha256:0000"):
        open_store(f"{web.url}#sha256:{'0' * 64}", cache)
    with pytest.raises(ConfigError, match=rf"What follows {web.url}# is no digest"):
        open_store(f"{web.url}#sha256:12", cache)
    store = open_store(f"{web.url}#{noise.digest}", cache)
    expected = store.gather("image/embedding", ROWS[:300])
    asked = len(web.asked)
    again = pickle.loads(pickle.dumps(open_store(f"{web.url}#{noise.digest}", cache)))
    np.testing.assert_array_equal(again.gather("image/embedding", ROWS[:300]), expected)
    assert len(web.asked) == asked
    assert store.summary()["path"] == web.url


def test_announced_shards_come_while_nobody_waits(web, noise, tmp_path):
    from kdstore.store.ahead import will_need

    store = open_store(web.url, cache_of(tmp_path))
    will_need(store, "image/embedding", np.arange(2048))
    end = time.monotonic() + 10
    while sum(shards_asked(web).values()) < 8 or any(thread.name == "kdstore-coming" for thread in threading.enumerate()):
        assert time.monotonic() < end
        time.sleep(0.01)
    np.testing.assert_array_equal(store.gather("image/embedding", ROWS), noise.gather("image/embedding", ROWS))
    assert set(shards_asked(web).values()) == {1}


def test_a_damaged_file_of_the_cache_is_said_where_it_lies_and_a_cut_one_comes_again(web, noise, tmp_path):
    cache = cache_of(tmp_path)
    file = open_store(web.url, cache)._manifest.where("image/embedding/c/0/0/0")
    open_store(web.url, cache).gather("image/embedding", [0])
    os.truncate(file, 1000)
    assert np.isfinite(open_store(web.url, cache).gather("image/embedding", [0])).all()
    content = bytearray(file.read_bytes())
    content[0] ^= 1
    file.write_bytes(content)
    with pytest.raises(DamagedStore, match=rf"{file}.* Remove this file of the cache"):
        open_store(web.url, cache).gather("image/embedding", [0])


def test_a_full_disk_is_said(web, noise, tmp_path, monkeypatch):
    store = open_store(web.url, cache_of(tmp_path))
    write = os.write

    def full(fd, content):
        if len(content) > 2**16:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(fd, content)

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(DiskFull, match=r"No space left to write .*cache"):
        store.gather("image/embedding", [0])
    monkeypatch.undo()
    assert np.isfinite(store.gather("image/embedding", [0])).all()
    with pytest.raises(DiskFull, match=r"needs .* bytes more, and its disk has"):
        cache_of(tmp_path).require_room(2**60)


def test_who_has_no_home_may_still_name_a_cache(monkeypatch):
    for name in ("HOME", "XDG_CACHE_HOME", "KDSTORE_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 2**31 - 9)
    assert str(Cache.default("/somewhere").folder) == "/somewhere"
    assert Cache.default().folder.name == "kdstore"


def test_commands_that_need_a_folder_say_so_of_an_address(tmp_path):
    with pytest.raises(KdstoreError, match=r"A store at https:// cannot be used in place by this command. Pull it"):
        verify_store("https://host/store")

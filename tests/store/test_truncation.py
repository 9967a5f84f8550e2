"""A file cut while it is read is an error that names it: no signal, and no row of zeros. Real files, real processes."""

from __future__ import annotations

import faulthandler
import itertools
import mmap
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch.utils.data import DataLoader, Dataset

from kdstore.errors import DamagedStore
from kdstore.store import Plan, Store, StoreWriter, embedding_array, mapping, open_store
from kdstore.store import gather as gathering
from kdstore.store.mapping import CAN_MAP

ROWS, WIDTH = 256, 512
VALUES = np.random.default_rng(0).integers(1, 1 << 14, (ROWS, 1, WIDTH)).astype(np.uint16).view(np.float16)  # no zeros, no NaN
NAME, SHARD = "image/embedding", "image/embedding/c/1/0/0"  # shards of 128 rows, 33 pages each
IN_SHARD = np.arange(128, 256)
SIZE = 128 * WIDTH * 2 + 8 * (4 + 16) + 4

InChild = Callable[[Callable[[], None]], int]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whole") / "store"
    plan = Plan.freeze([(str(i), ()) for i in range(ROWS)], unit_rows=128)
    with StoreWriter.open(path, plan=plan, arrays=[embedding_array(plan, "image", WIDTH)], identity={}) as writer:
        for unit in writer.pending():
            with writer.attempt(unit) as attempt:
                attempt.append(NAME, VALUES[unit.start : unit.stop])
                attempt.index([{"sha256": "", "valid": True, "reason": "", "width": 1, "height": 1}] * len(unit))
        writer.finalise({})
    return path


@pytest.fixture
def path(whole: Path, tmp_path: Path) -> Path:
    copied = Path(shutil.copytree(whole, tmp_path / "store"))
    assert (copied / SHARD).stat().st_size == SIZE
    return copied


def cut_and_grown(path: Path, size: int) -> None:
    os.truncate(path, size)
    os.truncate(path, SIZE)


@pytest.mark.parametrize("size", [0, 1, 4096, 70_001, SIZE - 200, SIZE - 4])
@pytest.mark.parametrize("cut", [os.truncate, cut_and_grown], ids=["cut", "cut and grown"])
@pytest.mark.parametrize("mapped", [True, False], ids=["mapped", "read"])
def test_a_shard_cut_between_two_gathers_is_an_error_for_its_rows_and_for_no_others(
    path: Path, in_child: InChild, cut: Callable[[Path, int], None], size: int, mapped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gathering, "CAN_MAP", mapped and gathering.CAN_MAP)

    def read() -> None:
        store = open_store(path)
        assert np.array_equal(store.gather(NAME, np.arange(ROWS)), VALUES[:, 0])
        cut(path / SHARD, size)
        for rows in (IN_SHARD, IN_SHARD[::-1], [0, 130], IN_SHARD):
            with pytest.raises(DamagedStore, match=SHARD + r".*rows \d+ to"):
                store.gather(NAME, rows)
        assert np.array_equal(store.gather(NAME, np.arange(128)), VALUES[:128, 0])

    assert in_child(read) == 0


def test_a_shard_cut_after_it_was_mapped_and_before_its_first_touch_is_an_error(path: Path, in_child: InChild) -> None:
    def read() -> None:
        store = open_store(path)
        store.gather(NAME, [128])
        os.truncate(path / SHARD, 8192)
        for rows in ([200], [128], IN_SHARD):
            with pytest.raises(DamagedStore, match=SHARD):
                store.gather(NAME, rows)

    assert in_child(read) == 0


def test_shards_cut_by_another_process_in_the_middle_of_gathers_are_errors(whole: Path, path: Path) -> None:
    """Two threads read all rows again and again until one is told; the parent cuts at any moment, twenty times."""
    rounds, content = 20, (whole / SHARD).read_bytes()
    ready, told = os.pipe()
    rng = random.Random(0)

    def read_until_damaged(store_path: Path) -> None:
        store, out = open_store(store_path), np.empty((ROWS, WIDTH), np.float16)
        rows = np.random.default_rng(0).permutation(ROWS)
        store.gather(NAME, rows)
        os.write(told, b"r")
        with pytest.raises(DamagedStore, match=SHARD):
            all(np.array_equal(store.gather(NAME, rows, out=out), VALUES[rows, 0]) for _ in itertools.count())  # ends at a wrong row, too

    child = os.fork()
    if child == 0:
        status = 99
        try:
            with ThreadPoolExecutor(2) as pool:
                for _ in range(rounds):
                    (path / "new").write_bytes(content)
                    os.replace(path / "new", path / SHARD)
                    list(pool.map(read_until_damaged, [path, path]))
            status = 0
        finally:
            os._exit(status)
    os.close(told)
    for _ in range(rounds):
        if len(os.read(ready, 1) + os.read(ready, 1)) < 2:
            break  # the child is dead
        time.sleep(rng.random() * 5e-3)
        os.truncate(path / SHARD, rng.randrange(SIZE - 200))
    os.close(ready)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


class CutAtFour(Dataset[Any]):
    """All rows in every item, and a shard cut before the fifth."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def __getitem__(self, item: int) -> Any:
        if item == 4:
            os.truncate(self.store.path / SHARD, 0)
        return self.store.gather(NAME, np.arange(ROWS))


def test_a_worker_of_a_loader_finds_the_cut(path: Path) -> None:
    """PyTorch's workers have a handler of SIGBUS of their own, put in place after the fork, that ends them."""
    store = open_store(path)
    store.gather(NAME, np.arange(ROWS))
    items = iter(DataLoader(CutAtFour(store), batch_size=None, sampler=range(8), num_workers=1, multiprocessing_context="fork"))
    for _ in range(4):
        assert np.array_equal(next(items).numpy(), VALUES[:, 0])
    with pytest.raises(DamagedStore, match=SHARD):
        next(items)


@pytest.mark.skipif(not CAN_MAP, reason="nothing is mapped here")
def test_a_store_that_is_let_go_leaves_nothing_mapped(path: Path) -> None:
    maps = Path("/proc/self/maps")
    for _ in range(3):
        store = open_store(path)
        store.gather(NAME, np.arange(ROWS))
        assert f"{path / SHARD}" in maps.read_text()
        del store
        assert f"{path}" not in maps.read_text()
    assert not set(map(int, mapping._freed)) & set(np.flatnonzero(mapping._ranges[:, 0]).tolist()), "a free slot names no range"


@pytest.mark.parametrize("sent", [True, False], ids=["sent by a process", "of a mapping of others"])
def test_a_bus_error_that_is_not_ours_ends_the_process_as_before(path: Path, in_child: InChild, sent: bool) -> None:
    def read() -> None:
        with open(os.devnull, "w") as nowhere:
            faulthandler.enable(nowhere)
            open_store(path).gather(NAME, [0])
            if sent:
                os.kill(os.getpid(), signal.SIGBUS)
            with open(path / "other", "w+b") as f:
                f.write(b"x" * 100)
                f.flush()
                memory = mmap.mmap(f.fileno(), 0, prot=mmap.PROT_READ)
                os.truncate(f.fileno(), 0)
                memory[0]

    assert in_child(read) == -signal.SIGBUS

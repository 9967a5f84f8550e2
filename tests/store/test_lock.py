"""The lock: who holds it, whether that one lives, and what becomes of a writer whose lock is gone."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kdstore.errors import StoreLocked
from kdstore.jsonfile import write_json
from kdstore.store import lock, open_store, unlock_store, verify_store
from kdstore.store.lock import Holder, is_alive, read_holder, take_lock

InChild = Callable[[Callable[[], None]], int]
ELSEWHERE = Holder(host="elsewhere", pid=1, machine="another boot", started="1", since="", period=0.02, token="x")


@pytest.fixture(autouse=True)
def _fast_heart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.02)


@pytest.fixture
def build(tmp_path: Path) -> Path:
    (tmp_path / "store/_build").mkdir(parents=True)
    return tmp_path / "store/_build"


def put(build: Path, holder: Holder) -> Path:
    write_json(build / "lock.json", dataclasses.asdict(holder))
    return build / "lock.json"


@pytest.fixture
def beating() -> Iterator[Callable[[Path], None]]:
    """Beat for a holder on another host, until the test ends."""
    stop = threading.Event()
    threads = []

    def beat(path: Path) -> None:
        fd = os.open(path, os.O_RDWR)
        threads.append(threading.Thread(target=lock._beat, args=(fd, stop, 0.02)))
        threads[-1].start()

    yield beat
    stop.set()
    for thread in threads:
        thread.join()


def test_two_writers_are_refused(sample: Any, tmp_path: Path, in_child: InChild) -> None:
    def second() -> None:
        with pytest.raises(StoreLocked, match=f"process {parent}"):
            sample.open(tmp_path / "store")

    parent = os.getpid()
    with sample.open(tmp_path / "store"):
        with pytest.raises(StoreLocked, match="is being written by process"):
            sample.open(tmp_path / "store")
        assert in_child(second) == 0
    sample.open(tmp_path / "store").close()


def test_a_process_of_this_machine_is_known_by_number_and_start(build: Path, in_child: InChild) -> None:
    path = build / "lock.json"
    assert in_child(lambda: os.kill(take_lock(build) and os.getpid(), signal.SIGKILL)) == -signal.SIGKILL
    dead = read_holder(path)
    assert dead is not None
    assert not is_alive(path, dead)
    alive = dataclasses.replace(dead, pid=os.getppid(), started=lock._started(os.getppid()))
    assert is_alive(path, alive)
    assert not is_alive(path, dataclasses.replace(alive, started="7"))  # another process had this number
    assert not is_alive(path, dataclasses.replace(alive, pid=os.getpid()))  # this one, if it has not this lock
    take_lock(build).release()
    assert not path.exists()


def test_a_process_that_was_killed_and_waits_for_its_parent_is_dead(build: Path) -> None:
    pid = os.fork()
    if pid == 0:
        take_lock(build)
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    take_lock(build).release()
    os.waitpid(pid, 0)


def test_the_lock_of_another_host_is_taken_when_its_time_stands_still_and_only_then(build: Path, beating: Callable[[Path], None]) -> None:
    path = put(build, ELSEWHERE)
    os.utime(path, (2**32, 2**32))  # what the time says does not matter
    take_lock(build).release()
    beating(put(build, ELSEWHERE))
    with pytest.raises(StoreLocked, match="process 1 on elsewhere"):
        take_lock(build)


@pytest.mark.parametrize("left", [b"", b'{"host": "elsewhere"', b"\0" * 300])
def test_a_lock_that_its_maker_could_not_write_is_watched_like_any_other(build: Path, left: bytes, beating: Callable[[Path], None]) -> None:
    (build / "lock.json").write_bytes(left)
    take_lock(build).release()
    (build / "lock.json").write_bytes(left)
    beating(build / "lock.json")
    with pytest.raises(StoreLocked, match="an unknown host"):
        take_lock(build)


def test_a_lock_beats_while_it_is_held_and_not_for_its_successor(build: Path) -> None:
    held = take_lock(build)
    path = build / "lock.json"
    assert is_alive(path, dataclasses.replace(ELSEWHERE, period=0.1))
    path.unlink()
    assert not is_alive(put(build, ELSEWHERE), ELSEWHERE)
    held.release()
    assert read_holder(path) == ELSEWHERE


def test_whom_a_take_over_watches_is_said_while_it_waits(build: Path) -> None:
    put(build, ELSEWHERE)
    said: list[tuple[int, int, str]] = []
    take_lock(build, lambda stage, *report: said.append(report)).release()
    assert said[0] == (0, 24, f"does {ELSEWHERE} live?")
    assert said[-1] == (24, 24, f"{ELSEWHERE} is dead")


def test_the_heart_stops_with_the_process(build: Path, in_child: InChild) -> None:
    assert in_child(lambda: take_lock(build) and None) == 0
    assert not is_alive(build / "lock.json", ELSEWHERE)


def test_a_writer_whose_lock_was_taken_commits_nothing_more(sample: Any, pristine: Path, tmp_path: Path) -> None:
    path = tmp_path / "store"
    with pytest.raises(StoreLocked, match="no longer writes"), sample.open(path) as first:  # noqa: PT012
        unit = first.pending()[0]
        with first.attempt(unit) as attempt:
            assert unlock_store(path, force=True).pid == os.getpid()
            for spec in sample.specs:
                if spec.side == unit.side:
                    attempt.append(spec.name, sample.arrays[spec.name][: len(unit)])
            attempt.index([sample.index_row(row) for row in range(len(unit))])
    with sample.open(path) as second:
        assert second.pending() == sample.plan.units
        with pytest.raises(StoreLocked):
            sample.write_unit(first, unit)
        with pytest.raises(StoreLocked), first:  # its end removes nothing of the successor's
            raise StoreLocked("")
        for unit in second.pending():
            sample.write_unit(second, unit)
        with pytest.raises(StoreLocked, match="no longer writes"):
            first.finalise({})
        assert second.finalise({}) == open_store(pristine).digest
    assert verify_store(path).ok


def test_a_stopped_process_whose_lock_was_taken_ends_without_a_trace_in_the_store(sample: Any, pristine: Path, tmp_path: Path) -> None:
    path, pid = tmp_path / "store", os.fork()
    if pid == 0:
        status = 1
        try:
            with sample.open(path) as writer:
                sample.write_unit(writer, writer.pending()[0])
                unit = writer.pending()[0]
                with writer.attempt(unit) as attempt:
                    attempt.append("image/embedding", sample.arrays["image/embedding"][unit.start : unit.stop])
                    os.kill(os.getpid(), signal.SIGSTOP)
                    attempt.append("image/tokens", sample.arrays["image/tokens"][unit.start : unit.stop])
        except StoreLocked:
            status = 7
        finally:
            os._exit(status)
    os.waitpid(pid, os.WUNTRACED)
    with pytest.raises(StoreLocked, match=f"process {pid}"):  # stopped is not dead
        sample.open(path)
    assert unlock_store(path, force=True).pid == pid
    with sample.open(path) as writer:
        assert len(writer.pending()) == len(sample.plan.units) - 1
        os.kill(pid, signal.SIGCONT)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
        for unit in writer.pending():
            sample.write_unit(writer, unit)
        assert writer.finalise({}) == open_store(pristine).digest
    assert verify_store(path).ok
    assert not (path / "_build").exists()


@pytest.mark.parametrize("stale", [False, True])
def test_of_many_processes_that_write_one_store_at_once_each_is_refused_or_ends_in_the_whole(sample: Any, tmp_path: Path, stale: bool) -> None:
    few, path = sample.of_images(20), tmp_path / "store"
    digest = few.write(tmp_path / "alone")
    for _ in range(4):
        if stale:
            (path / "_build").mkdir(parents=True)
            put(path / "_build", ELSEWHERE)
        start = time.monotonic() + 0.1
        children = []
        for _ in range(4):
            pid = os.fork()
            if pid == 0:
                status = 1
                try:
                    time.sleep(max(0.0, start - time.monotonic()))
                    status = 0 if few.write(path) == digest else 2
                except StoreLocked:
                    status = 7
                finally:
                    os._exit(status)
            children.append(pid)
        ended = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
        assert set(ended) <= {0, 7}
        assert few.write(path) == digest
        assert verify_store(path).ok
        assert not (path / "_build").exists()
        shutil.rmtree(path)


def test_unlock_removes_the_lock_of_the_dead_and_that_of_the_living_by_force_alone(sample: Any, tmp_path: Path) -> None:
    path = tmp_path / "store"
    with sample.open(path):
        with pytest.raises(StoreLocked, match="which is alive"):
            unlock_store(path)
        (path / "_build/lock.json").unlink()
        assert unlock_store(path) is None
        put(path / "_build", ELSEWHERE)
        assert unlock_store(path) == ELSEWHERE
        assert unlock_store(path) is None


def test_without_flock_the_lock_works_all_the_same(sample: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(fd: int, operation: int) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(lock.fcntl, "flock", missing)
    (tmp_path / "store/_build").mkdir(parents=True)
    put(tmp_path / "store/_build", ELSEWHERE)
    with pytest.raises(StoreLocked, match="no longer writes"), sample.open(tmp_path / "store") as writer:  # noqa: PT012
        with pytest.raises(StoreLocked, match="is being written by"):
            sample.open(tmp_path / "store")
        unlock_store(tmp_path / "store", force=True)
        sample.write_unit(writer, writer.pending()[0])
    assert sample.write(tmp_path / "store")

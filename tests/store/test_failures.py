"""A store is written while the disk fails, or the process dies, at every single call that changes the disk; what is resumed equals what nothing interrupted."""

from __future__ import annotations

import errno
import io
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from kdstore import jsonfile
from kdstore.errors import CannotWrite, DiskFull, IncompleteStore, StoreNotFound
from kdstore.store import lock, open_store, shard

InChild = Callable[[Callable[[], None]], int]
CALLS = ("mkdir", "unlink", "rmdir", "fsync", "replace", "write")
GROWING = ("mkdir", "create", "write")
FAILING = {"an input/output error": (*CALLS, "create"), "no space left": GROWING, "kill -9": ("unlink", "rmdir", "replace", *GROWING)}


@contextmanager
def counted(fail: Callable[[int, str], None]) -> Iterator[list[str]]:
    """Call `fail(number, call)` before each call that changes the disk, and half-way into those that write a file; yields the calls so far."""
    calls: list[str] = []

    def point(name: str) -> None:
        calls.append(name)
        fail(len(calls) - 1, name)

    def before(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def replaced(*args: Any, **options: Any) -> Any:
            point(name)
            return call(*args, **options)

        return replaced

    def open_descriptor(path: Any, flags: int, *args: Any, **options: Any) -> int:
        if flags & os.O_CREAT:
            point("create")
        return descriptor(path, flags, *args, **options)

    class Halting(io.FileIO):
        def write(self, content: Any) -> int:
            half = bytes(content)[: len(content) // 2]
            super().write(half)
            point("write")
            return len(half) + super().write(bytes(content)[len(half) :])

    def open_file(path: Path | int, mode: str, buffering: int = 8192, **options: Any) -> io.BufferedWriter:
        if isinstance(path, Path):
            point("create")
        return io.BufferedWriter(Halting(path, mode, **options), buffering)

    descriptor = os.open
    with pytest.MonkeyPatch.context() as patch:
        for name in CALLS:
            patch.setattr(os, name, before(name, getattr(os, name)))
        patch.setattr(os, "open", open_descriptor)
        for module in (jsonfile, lock, shard):
            patch.setattr(module, "open", open_file, raising=False)
        yield calls


@pytest.fixture(autouse=True)
def _short_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A lock file without content, of a process that died between making and writing it, is watched for less than half a minute."""
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.01)


def contents(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file() and p.name != "run.json"}


@pytest.mark.parametrize("kind", FAILING)
def test_a_failure_at_any_call_that_changes_the_disk_and_a_resume_end_in_the_same_store(sample: Any, tmp_path: Path, in_child: InChild, kind: str) -> None:
    def fail_at(n: int) -> Callable[[int, str], None]:
        def fail(number: int, name: str) -> None:
            if kind == "kill -9" and number == n:
                os.kill(os.getpid(), signal.SIGKILL)
            if kind == "an input/output error" and number == n:
                raise OSError(errno.EIO, "Input/output error")
            if kind == "no space left" and number >= n and name in GROWING:
                raise OSError(errno.ENOSPC, "No space left on device")

        return fail

    def write_and_fail(n: int) -> None:
        with counted(fail_at(n)):
            try:
                few.write(path)
            except DiskFull:
                assert kind == "no space left"
            except CannotWrite:
                assert kind == "an input/output error"

    few, path = sample.of_images(4), tmp_path / "store"
    digest = few.write(tmp_path / "whole")
    expected = contents(tmp_path / "whole")
    with counted(lambda number, name: None) as calls:
        few.write(path)
    assert {*CALLS, "create"} == set(calls)
    for n in (n for n, name in enumerate(calls) if name in FAILING[kind]):
        shutil.rmtree(path, ignore_errors=True)
        if kind == "kill -9":
            assert in_child(lambda n=n: write_and_fail(n)) == -signal.SIGKILL
        else:
            write_and_fail(n)
        if path.exists() and not (path / "manifest.json").exists():
            with pytest.raises((IncompleteStore, StoreNotFound)):
                open_store(path)
        assert few.write(path) == digest, (n, calls[n])
        assert contents(path) == expected, (n, calls[n])

"""Rights and room: folders of a group, folders that cannot be written, a disk that is full."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kdstore.errors import CannotWrite, DiskFull, IncompleteStore
from kdstore.store import open_store, store_progress, verify_store

InChild = Callable[[Callable[[], None]], int]
NOBODY = 65534
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user and mount a disk")


def modes(path: Path) -> Iterator[tuple[Path, int, int]]:
    for entry in (path, *path.rglob("*")):
        status = entry.stat()
        yield entry, stat.S_IMODE(status.st_mode), status.st_gid


@pytest.mark.parametrize("umask", [0o002, 0o027])
def test_files_and_folders_have_the_rights_that_the_umask_leaves_and_the_group_of_the_folder(
    sample: Any, tmp_path: Path, in_child: InChild, umask: int
) -> None:
    def write() -> None:
        os.umask(umask)
        with sample.open(team / "half") as writer:
            sample.write_unit(writer, writer.pending()[0])
        with sample.open(team / "locked") as writer:
            assert {mode for _, mode, _ in modes(team / "locked")} == {0o2777 & ~umask, 0o666 & ~umask}
        sample.write(team / "store")

    team, group = tmp_path / "team", 12345 if os.geteuid() == 0 else os.getgroups()[-1]
    team.mkdir()
    os.chown(team, -1, group)
    team.chmod(0o2775)
    assert in_child(write) == 0
    for entry, mode, owner in (*modes(team / "store"), *modes(team / "half")):
        assert (mode, owner) == (0o2777 & ~umask if entry.is_dir() else 0o666 & ~umask, group), entry


@as_root
def test_a_colleague_of_the_group_goes_on_with_a_store_that_was_killed(sample: Any, pristine: Path, tmp_path: Path, in_child: InChild) -> None:
    def as_colleague(user: int, work: Callable[[], object]) -> int:
        def child() -> None:
            os.umask(0o002)
            os.setgroups([])
            os.setgid(12345)
            os.setuid(user)
            work()

        return in_child(child)

    def write_one_unit_and_die() -> None:
        writer = sample.open(team / "store")
        sample.write_unit(writer, writer.pending()[0])
        os.kill(os.getpid(), 9)

    team = tmp_path / "team"
    team.mkdir()
    os.chown(team, -1, 12345)
    team.chmod(0o2775)
    tmp_path.chmod(0o755)
    assert as_colleague(1001, write_one_unit_and_die) == -9
    assert as_colleague(1002, lambda: sample.write(team / "store")) == 0
    assert open_store(team / "store").digest == open_store(pristine).digest


@as_root
def test_a_store_that_cannot_be_written_is_read_and_found_complete_and_gets_nothing_inside(
    sample: Any, copied: Path, tmp_path: Path, in_child: InChild
) -> None:
    def read() -> None:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        store = open_store(copied)
        for spec in sample.specs:
            rows = np.arange(spec.shape[0])
            assert store.gather(spec.name, rows, np.zeros_like(rows) if spec.has_views else None).shape[0] == len(rows)
        store.keys()
        assert verify_store(copied).ok
        with sample.open(copied) as writer:  # what is left of its building cannot be removed, and is in nobody's way
            assert writer.complete
        assert store_progress(half).images_recorded == 16
        with pytest.raises(CannotWrite, match="Permission denied"):
            sample.open(half)

    half = tmp_path / "half"
    with sample.open(half) as writer:
        sample.write_unit(writer, writer.pending()[0])
    (copied / "_build").mkdir()
    before = sorted(copied.rglob("*"))
    tmp_path.chmod(0o755)
    for entry, _, _ in [*modes(copied), *modes(half)]:
        entry.chmod(0o555 if entry.is_dir() else 0o444)
    assert in_child(read) == 0
    assert sorted(copied.rglob("*")) == before


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", disk], capture_output=True).returncode:
        pytest.skip("this machine does not let us mount a disk")
    try:
        yield disk
    finally:
        subprocess.run(["umount", disk], check=True)


@as_root
@pytest.mark.parametrize("free", [0, 8, 20, 60, 120, 200])
def test_a_full_disk_is_an_error_that_names_the_path_and_the_store_stays_as_it_was(sample: Any, pristine: Path, small_disk: Path, free: int) -> None:
    with sample.open(small_disk / "store") as writer:
        sample.write_unit(writer, writer.pending()[0])
    before = {p: p.read_bytes() for p in (small_disk / "store").rglob("*") if p.is_file()}
    with open(small_disk / "others", "wb", buffering=0) as others:
        others.write(bytes(shutil.disk_usage(small_disk).free - free * 1024))
    with pytest.raises(DiskFull, match=f"No space left to write {small_disk}/store"):
        sample.write(small_disk / "store")
    assert {p: p.read_bytes() for p in before} == before
    assert not any((small_disk / "store/_build/attempts").iterdir())
    assert store_progress(small_disk / "store").units_recorded >= 1
    with pytest.raises(IncompleteStore):
        open_store(small_disk / "store")
    (small_disk / "others").unlink()
    assert sample.write(small_disk / "store") == open_store(pristine).digest
    assert verify_store(small_disk / "store").ok

"""The lock of a store's one committer: a file that names host and process.

A lock of a dead process of this host is taken over; one of another host never is, because nobody here can see whether it lives.
The short section that reads and replaces the file runs under flock, so that two processes cannot both take over a stale lock.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import uuid
from collections.abc import Iterator
from pathlib import Path

from kdstore.errors import DamagedStore, StoreLocked
from kdstore.jsonfile import read_json, write_json

_PROCESS = uuid.uuid4().hex  # tells this process from a dead one that had the same pid (in containers pids repeat)


def take_lock(path: Path) -> None:
    """Make this process the committer of the folder that holds `path`; raises StoreLocked."""
    with _exclusive(path.parent):
        holder = _read(path)
        if holder and _is_alive(holder):
            raise StoreLocked(
                f"{path.parent.parent} is being written by process {holder['pid']} on {holder['host']}.",
                f"Wait for it; if it is surely dead, remove {path}.",
            )
        write_json(path, {"host": socket.gethostname(), "pid": os.getpid(), "process": _PROCESS})


def release_lock(path: Path) -> None:
    """Remove the lock if this process holds it."""
    with contextlib.suppress(FileNotFoundError), _exclusive(path.parent):
        holder = _read(path)
        if holder and holder["pid"] == os.getpid() and holder["process"] == _PROCESS:
            path.unlink()


def _read(path: Path) -> dict[str, object]:
    try:
        return read_json(path)
    except (FileNotFoundError, DamagedStore):  # write_json is atomic: a damaged lock is nobody's
        return {}


def _is_alive(holder: dict[str, object]) -> bool:
    pid = int(str(holder["pid"]))
    if holder["host"] != socket.gethostname():
        return True
    if pid == os.getpid():
        return holder["process"] == _PROCESS
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


@contextlib.contextmanager
def _exclusive(folder: Path) -> Iterator[None]:
    fd = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)

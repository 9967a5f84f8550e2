"""The lock of a store's one committer: `_build/lock.json` names host and process, and the time on that file beats.

Whether the holder lives is seen without comparing two clocks. A process of this machine (same boot, same process table) is looked up by its number and the
moment of its start. Any other's file is watched for WATCH_BEATS of its periods by our monotonic clock: the time on it must change, whatever it says.

The file is made exclusively, which holds on every file system. Commits and take-overs run under flock on the file itself, so that a holder that was taken for
dead (suspended, cut off from the disk) cannot commit beside its successor: it looks whose the file is and stops. Where flock does not work (some network
disks) that look still stops it, but for the one commit that it may have just begun; a file of that commit which replaces one of the successor's would
no longer match the successor's record, which `verify` and a training read find.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import functools
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from kdstore.errors import DamagedStore, KdstoreError, StoreLocked, StoreNotFound
from kdstore.jsonfile import disk_errors, encode_json, parse_json
from kdstore.progress import OnProgress, silent
from kdstore.store.layout import BUILD, MANIFEST

LOCK = "lock.json"
BEAT_SECONDS = 5.0
WATCH_BEATS = 6
FLOCK_SECONDS = 10.0  # a commit takes some milliseconds
_held: set[str] = set()  # tokens of this process's locks


@dataclass(frozen=True)
class Holder:
    """Who made a lock; `machine` and `started` are empty where the system does not tell, `since` is for people only."""

    host: str
    pid: int
    machine: str
    started: str
    since: str
    period: float  # seconds between two beats
    token: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


class Lock:
    """A lock in the hands of this process; it beats until it is released or the process ends."""

    def __init__(self, path: Path, holder: Holder, fd: int) -> None:
        self._path = path
        self._holder = holder
        self._fd = fd
        self._one_thread = threading.Lock()
        self._released = threading.Event()
        self._heart = threading.Thread(target=_beat, args=(fd, self._released, holder.period), name="kdstore-lock", daemon=True)
        self._heart.start()
        _held.add(holder.token)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Keep the lock from being taken for the time of a commit; raises StoreLocked if this process no longer has it."""
        with self._one_thread:
            if self._released.is_set():
                raise self._lost()
            with _flocked(self._fd, self._path):
                if self._holder.pid != os.getpid() or read_holder(self._path) != self._holder:
                    raise self._lost()
                yield

    def release(self) -> None:
        """Remove the lock if this process still has it; nothing in a forked child."""
        if self._holder.pid != os.getpid() or self._released.is_set():
            return
        with contextlib.suppress(KdstoreError, OSError), self.held():
            self._path.unlink()
        with self._one_thread:
            self._released.set()
            self._heart.join()
            os.close(self._fd)
        _held.discard(self._holder.token)

    def _lost(self) -> StoreLocked:
        found = f"This process no longer writes {_store(self._path)}: its lock was removed or taken."
        return StoreLocked(found, "What it had recorded is kept; 'kdstore store info' tells who writes now.")


def take_lock(build: Path, on_progress: OnProgress = silent) -> Lock:
    """Make this process the committer of the store that `build` belongs to; waits for the beats of a holder that it cannot look up, and says so.

    Raises StoreLocked if the holder lives, FileNotFoundError if `build` is gone, DiskFull, CannotWrite.
    """
    path = build / LOCK
    while True:
        found = read_holder(path)
        if found is None:
            with contextlib.suppress(FileExistsError):
                return _make(path)
        elif not is_alive(path, found, on_progress):
            remove_lock(path, found)
        elif read_holder(path) == found:
            raise StoreLocked(f"{_store(path)} is being written by {found}.", f"Wait for it, or see 'kdstore store info {_store(path)}'.")


def unlock_store(store: str | Path, *, force: bool = False) -> Holder | None:
    """Remove the lock of a dead process, or with `force` of any; returns whose it was, None if there was none.

    Raises StoreLocked if the holder lives, StoreNotFound, CannotWrite.
    """
    path = Path(store) / BUILD / LOCK
    if not (Path(store) / BUILD).is_dir() and not (Path(store) / MANIFEST).is_file():
        raise StoreNotFound(f"There is no store at {store}.", "Check the path.")
    with disk_errors(path):
        found = read_holder(path)
        if found is not None and force:
            path.unlink(missing_ok=True)
        elif found is not None and is_alive(path, found):
            hint = "With --force its lock is removed all the same; it then stops before its next commit."
            raise StoreLocked(f"{store} is being written by {found}, which is alive.", hint)
        elif found is not None:
            remove_lock(path, found)
    return found


def read_holder(path: Path) -> Holder | None:
    """Return whom a lock file names, None if there is no such file; one that does not say (its maker was stopped just then) is nobody's in particular."""
    try:
        fd = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        content = parse_json(os.read(fd, 1 << 16), path)
        return Holder(**{name: content[name] for name in Holder.__dataclass_fields__})
    except (DamagedStore, KeyError):
        return Holder("an unknown host", 0, "", "", "", BEAT_SECONDS, f"inode {os.fstat(fd).st_ino}")
    finally:
        os.close(fd)


def is_alive(path: Path, holder: Holder, on_progress: OnProgress = silent) -> bool:
    """Tell whether the holder of a lock file lives: at once for a process of this machine, after watching its beats otherwise."""
    if holder.machine and holder.machine == _machine():
        if holder.pid == os.getpid():
            return holder.token in _held
        started = _started(holder.pid)
        if started is not None:
            return started == holder.started
    first, steps = _last_change(path), 4 * WATCH_BEATS
    for step in range(steps):  # each look comes after a sleep, so that a watcher that was suspended itself looks again
        on_progress("lock", step, steps, f"does {holder} live?")
        time.sleep(min(holder.period, BEAT_SECONDS * WATCH_BEATS) / 4)
        if _last_change(path) != first:
            return True
    on_progress("lock", steps, steps, f"{holder} is dead")
    return False


def remove_lock(path: Path, found: Holder) -> None:
    """Remove a dead holder's lock unless somebody has done so by now; raises StoreLocked if it is in use, CannotWrite."""
    with contextlib.suppress(FileNotFoundError):
        fd = os.open(path, os.O_RDWR)  # NFS grants an exclusive flock to writers only
        try:
            with _flocked(fd, path):
                if read_holder(path) == found:
                    path.unlink()
        finally:
            os.close(fd)


def _make(path: Path) -> Lock:
    """Make the lock file; raises FileExistsError if there is one."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    holder = Holder(socket.gethostname(), os.getpid(), _machine(), _started(os.getpid()) or "", now, BEAT_SECONDS, uuid.uuid4().hex)
    try:
        with open(fd, "wb", closefd=False) as file:
            file.write(encode_json(asdict(holder))[0])
        os.fsync(fd)  # seen by other hosts
        return Lock(path, holder, fd)
    except BaseException:
        os.close(fd)
        path.unlink()
        raise


def _beat(fd: int, released: threading.Event, period: float) -> None:
    """Set the time on the file until the lock is released: one call without data, through the descriptor, so that a successor's file is never touched."""
    while not released.wait(period):
        with contextlib.suppress(OSError):
            os.utime(fd)


def _last_change(path: Path) -> tuple[int, ...]:
    """Return which file is there and the time on it; opening it makes a network disk ask its server."""
    try:
        fd = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return ()
    try:
        found = os.fstat(fd)
        return found.st_ino, found.st_mtime_ns, found.st_size
    finally:
        os.close(fd)


@functools.cache
def _machine() -> str:
    """Name this boot and this table of processes (containers on one machine have tables of their own, and the same numbers in them)."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _started(pid: int) -> str | None:
    """Return when a process of this machine was started, in ticks since the boot: '' if it has ended, None if that cannot be seen."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None if _may_be_hidden(pid) else ""
    except OSError:
        return None
    return "" if state in (b"Z", b"X") else fields[18].decode()


def _may_be_hidden(pid: int) -> bool:
    """Tell whether a process that /proc does not show is there nevertheless: /proc may hide the processes of other users."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _store(path: Path) -> Path:
    return path.parent.parent


@contextlib.contextmanager
def _flocked(fd: int, path: Path) -> Iterator[None]:
    """Hold flock on an open lock file where the file system has it; raises StoreLocked if another process keeps it."""
    end = time.monotonic() + FLOCK_SECONDS
    locked = False
    while not locked:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            locked = True
        except BlockingIOError as e:
            if time.monotonic() > end:
                raise StoreLocked(
                    f"{_store(path)} is just being committed to by another process.", "Wait for it; if it hangs, 'kdstore store unlock --force'."
                ) from e
            time.sleep(0.01)
        except OSError:
            break
    try:
        yield
    finally:
        if locked:
            fcntl.flock(fd, fcntl.LOCK_UN)

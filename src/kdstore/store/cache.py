"""A bounded folder of files of stores that are elsewhere, shared by all processes of a machine.

A file lies under its sha256 and size, so stores, runs and users of the folder share what is equal, and it has that name only since its bytes were compared
with them. Everything else is flock, which ends with its process, however that ends, and needs no clean-up:

- who reads a file holds it shared, from opening to closing (a lease); who evicts needs it alone, and takes the file whose last lease began first;
- who downloads holds the file in transit alone, so each is downloaded by one process, and by the next one from where a dead one came to;
- who counts bytes and evicts holds the folder. A file in transit counts in full from its first byte, so the bound is kept while it comes.

An evicted file would stay readable for whoever has it open, but would take space that nobody counts: hence leases. Nobody who holds a lease waits for
another file, so a bound that any single file fits into is never a deadlock. The folder should be on a disk of this machine: flock on network disks is slow.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import shutil
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from kdstore.errors import ConfigError, DiskFull
from kdstore.jsonfile import disk_errors
from kdstore.store.layout import IN_TRANSIT
from kdstore.store.manifest import FileEntry, let_go

GIB = 2**30
DEFAULT_GIB = 32.0
WAIT_SECONDS = 0.02  # between two looks at what another process does


@dataclass(frozen=True)
class Cache:
    """A folder and the bytes that it may hold."""

    folder: Path
    max_bytes: int

    @classmethod
    def default(cls, folder: str | None = None, gib: float | None = None) -> Cache:
        """Return the cache of these settings, else of the environment (KDSTORE_CACHE, KDSTORE_CACHE_GIB), else 32 GiB below the user's cache folder."""
        said = os.environ.get("KDSTORE_CACHE_GIB")
        try:
            bound = gib if gib is not None else float(said or DEFAULT_GIB)
            if not 0 < bound < 2**30:
                raise ValueError
        except ValueError as e:
            raise ConfigError(f"KDSTORE_CACHE_GIB is '{said}', which is no size in GiB.", "Set a number above 0, or unset it.") from e
        home = os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "kdstore")
        chosen = os.path.expanduser(folder or os.environ.get("KDSTORE_CACHE") or home)  # unlike Path's, no error for a user without a home
        return cls(Path(chosen).absolute(), int(bound * GIB))

    def path(self, entry: FileEntry) -> Path:
        """Return where a file lies when it is here."""
        return self.folder / "files" / entry.sha256[:2] / f"{entry.sha256}.{entry.size}"

    def lease(self, entry: FileEntry, fetch: Callable[[Path], None], wait: Callable[[float], None]) -> int:
        """Open a file for reading; it stays here until `let_go`.

        One that is not here is brought by `fetch(path)`, which goes on with what lies at `path` + '~'; if another process is at that, or no room can be
        made, `wait(seconds)` is called between two looks. Raises ConfigError for a file larger than the bound, DiskFull, CannotWrite, what the calls raise.
        """
        path = self.path(entry)
        with disk_errors(path):
            while True:
                if (fd := self._leased(path, entry.size)) is not None:
                    return fd
                claim = self._claim(path, entry)
                if claim is None:
                    wait(WAIT_SECONDS * random.uniform(0.5, 1.5))
                    continue
                try:
                    fetch(path)
                finally:
                    _forget_if_empty(path)
                    let_go(claim)

    def require_room(self, needed: int) -> None:
        """Raise DiskFull unless the disk has room for so many bytes of files, those that are here among them."""
        with disk_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            held = sum(size for _, size, _ in self._files())
            free = shutil.disk_usage(self.folder).free
        if needed > held + free:
            hint = "Free space, or choose another cache_folder (KDSTORE_CACHE) or less cache_gib."
            raise DiskFull(f"{self.folder} needs {needed - held} bytes more, and its disk has {free} free.", hint)

    def _leased(self, path: Path, size: int) -> int | None:
        """Open a file that is here and count its use; None if it is not here, or just being evicted."""
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            found = os.fstat(fd)
            if found.st_nlink and stat.S_ISREG(found.st_mode) and found.st_size == size:
                with contextlib.suppress(PermissionError):  # another user's file
                    os.utime(fd)
                return fd
            if found.st_nlink:  # cut by somebody: not what its name says
                path.unlink(missing_ok=True)
        except BlockingIOError:
            pass
        except BaseException:
            let_go(fd)
            raise
        let_go(fd)
        return None

    def _claim(self, path: Path, entry: FileEntry) -> int | None:
        """Become the one who downloads a file, with room made for it; None if another is, or has it just done, or there is no room now."""
        if entry.size > self.max_bytes:
            said = f"A file of {entry.size / GIB:.3g} GiB does not fit into the cache {self.folder} of {self.max_bytes / GIB:.3g} GiB."
            raise ConfigError(said, "Raise cache_gib (KDSTORE_CACHE_GIB).")
        path.parent.mkdir(parents=True, exist_ok=True)
        with self._alone():
            if path.exists():
                return None
            fd = os.open(_in_transit(path), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.fstat(fd).st_nlink and not path.exists() and self._make_room():  # since it was opened, it may have been removed or got its name
                    return fd
                _forget_if_empty(path)
            except BlockingIOError:
                pass
            except BaseException:
                let_go(fd)
                raise
        let_go(fd)
        return None

    def _make_room(self) -> bool:
        """Evict files that nobody reads or downloads, those of the oldest use first, until the bound is kept; tells whether it is. For who holds the folder."""
        files = list(self._files())
        used = sum(size for _, size, _ in files)
        for path, size, _ in sorted(files, key=lambda file: file[2]):
            if used <= self.max_bytes:
                break
            with contextlib.suppress(FileNotFoundError, BlockingIOError):
                fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    os.unlink(path)
                    used -= size
                finally:
                    let_go(fd)
        return used <= self.max_bytes

    def _files(self) -> Iterator[tuple[str, int, int]]:
        """Yield path, size and last use of all files; those in transit with the size that they will have."""
        for parent, _, names in os.walk(self.folder / "files"):
            for name in names:
                path = os.path.join(parent, name)
                with contextlib.suppress(FileNotFoundError, ValueError):
                    yield path, int(name.removesuffix(IN_TRANSIT).partition(".")[2]), os.stat(path).st_mtime_ns

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Hold the folder for the time that counting and evicting takes."""
        fd = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            let_go(fd)


def _in_transit(path: Path) -> Path:
    return path.with_name(path.name + IN_TRANSIT)


def _forget_if_empty(path: Path) -> None:
    """Remove a file in transit of which nothing came, for who holds it alone."""
    with contextlib.suppress(FileNotFoundError):
        if not _in_transit(path).stat().st_size:
            _in_transit(path).unlink()

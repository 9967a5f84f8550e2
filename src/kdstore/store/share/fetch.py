"""Fetching files into a staging folder: hashed as they come, resumed where they broke off, fetched again or elsewhere until their sha256 is right.

A file in transit has a name that no file of a store can have, and gets its own when its hash is right; so what lies in the staging folder under a
file's own name has once been that file.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path

from kdstore.errors import TransferError
from kdstore.jsonfile import disk_errors
from kdstore.progress import OnProgress
from kdstore.store.layout import IN_TRANSIT
from kdstore.store.manifest import FileEntry
from kdstore.store.share.transport import BLOCK_BYTES, Body, Failure, Patience, Place

MAX_WRONG = 3  # whole files of another hash from one place
MAX_FAILED = 16  # files; a place that lacks so many lacks all


@dataclass
class Transfer:
    """Bytes that were received, and when each place may be asked again; shared by the threads of one pull."""

    places: list[Place]
    patience: Patience
    received: int = 0
    stopped: threading.Event = field(default_factory=threading.Event)
    _open: set[Body] = field(default_factory=set)
    _rest_until: dict[str, float] = field(default_factory=dict)
    _one_thread: threading.Lock = field(default_factory=threading.Lock)

    def rest(self, place: Place, seconds: float) -> None:
        """Leave a place alone for some time, all threads."""
        with self._one_thread:
            until = time.monotonic() + min(seconds, self.patience.longest)
            self._rest_until[place.name] = max(until, self._rest_until.get(place.name, 0.0))

    def wait_for(self, place: Place) -> None:
        """Return when a place may be asked; raises Stopped."""
        while (rest := self._rest_until.get(place.name, 0.0) - time.monotonic()) > 0:
            self.pause(rest)
        if place.pace is not None:
            place.pace.wait(self.pause)
        self.pause(0)

    def pause(self, seconds: float) -> None:
        if self.stopped.wait(seconds) if seconds else self.stopped.is_set():
            raise Stopped

    @contextlib.contextmanager
    def reading(self, body: Body) -> Iterator[None]:
        """Let `stop` end the wait for more of a body."""
        with self._one_thread:
            self._open.add(body)
        try:
            yield
        finally:
            with self._one_thread:
                self._open.discard(body)

    def stop(self) -> None:
        """End all transfers now."""
        self.stopped.set()
        with self._one_thread:
            for body in self._open:
                body.shut()

    def count(self, size: int) -> None:
        with self._one_thread:
            self.received += size


class Stopped(Exception):
    """The pull ends; what has come so far is kept."""


def fetch_files(transfer: Transfer, folder: Path, files: Mapping[str, FileEntry], parallel: int, on_progress: OnProgress, before: int = 0) -> None:
    """Fetch files into a folder, largest first; raises TransferError that names those which no place has as they should be.

    `before` bytes of all were there already. What is fetched stays, also when this raises.
    """
    total, done, lock = before + sum(entry.size for entry in files.values()), before, threading.Lock()

    def advance(size: int) -> None:
        nonlocal done
        with lock:
            done += size
            on_progress("bytes", done, total, "")

    order = sorted(files, key=lambda path: -files[path].size)
    pool = ThreadPoolExecutor(parallel, "kdstore-pull")
    failed: dict[str, str] = {}
    try:
        waiting = {pool.submit(fetch_file, transfer, path, files[path], folder / path, advance): path for path in order}
        for future in as_completed(waiting):
            try:
                future.result()
            except Failure as e:
                failed[waiting[future]] = e.reason
                if len(failed) == MAX_FAILED:
                    transfer.stop()
                    break
    except BaseException:
        transfer.stop()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
    if failed:
        named = "; ".join(f"{path} {reason}" for path, reason in sorted(failed.items())[:4])
        more = f"; and {len(failed) - 4} more" if len(failed) > 4 else ""
        hint = "What came is kept. Try again later, or name another --mirror."
        raise TransferError(f"{len(failed)} of {len(files)} files did not come: {named}{more}.", hint)


def fetch_file(transfer: Transfer, path: str, entry: FileEntry, target: Path, advance: Callable[[int], None]) -> None:
    """Fetch one file from the first place that has it as it should be; raises Failure with what each place did, DiskFull, CannotWrite."""
    reasons = []
    with disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with _InTransit(target, entry, advance) as file:
            for place in transfer.places if entry.size else ():
                if file.right:
                    break
                reasons.append(f"{_try_place(transfer, place, path, entry, file)} at {place.name}")
            if not file.finish():
                raise Failure(", ".join(reasons) or "is empty, and its sha256 is not that of an empty file")


def read_small(transfer: Transfer, place: Place, path: str, at_most: int) -> bytes:
    """Return a file whose hash is not known; raises Failure, also if it has more than `at_most` bytes."""
    patience, tries = transfer.patience, 0
    while True:
        transfer.wait_for(place)
        tries += 1
        try:
            return _read_once(transfer, place, path, at_most)
        except Failure as e:
            if not e.again or tries >= patience.tries:
                raise
            transfer.rest(place, e.after or patience.backoff * 2 ** (tries - 1))


def _read_once(transfer: Transfer, place: Place, path: str, at_most: int) -> bytes:
    content, until = bytearray(), time.monotonic() + transfer.patience.window + at_most / 2**20
    with place.open(path) as body, transfer.reading(body):
        for block in body.blocks if (body.size or 0) <= at_most else (b"",):
            transfer.count(len(block))
            content += block
            if time.monotonic() > until:
                raise Failure("comes too slowly")
            if len(content) > at_most:
                break
        if max(len(content), body.size or 0) > at_most:
            raise Failure(f"is larger than {at_most} bytes", again=False)
        if body.size is not None and body.size != len(content):
            raise Failure(f"ends after {len(content)} of {body.size} bytes")
    return bytes(content)


class _InTransit:
    """A file that is being received, with the hash of what has come."""

    def __init__(self, target: Path, entry: FileEntry, advance: Callable[[int], None]) -> None:
        self._target = target
        self._partial = target.with_name(target.name + IN_TRANSIT)
        self._entry = entry
        self._advance = advance
        self._sha256 = hashlib.sha256()
        self.size = 0
        self.tag: str | None = None

    def __enter__(self) -> _InTransit:
        """Go on with what lies there: its hash is computed anew."""
        self._fd = os.open(self._partial, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        while block := os.read(self._fd, BLOCK_BYTES):
            self._sha256.update(block)
            self.size += len(block)
        self._advance(self.size)
        if self.size > self._entry.size or (self.size == self._entry.size and not self.right):
            self.restart()
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self._fd)

    @property
    def right(self) -> bool:
        return self.size == self._entry.size and self._sha256.hexdigest() == self._entry.sha256

    def write(self, block: bytes) -> None:
        left = memoryview(block)
        while left:
            left = left[os.write(self._fd, left) :]
        self._sha256.update(block)
        self.size += len(block)
        self._advance(len(block))

    def restart(self) -> None:
        """Forget what has come."""
        os.ftruncate(self._fd, 0)
        os.lseek(self._fd, 0, os.SEEK_SET)
        self._advance(-self.size)
        self._sha256, self.size, self.tag = hashlib.sha256(), 0, None

    def finish(self) -> bool:
        """Give the file its name if it is right."""
        if self.right:
            os.fsync(self._fd)
            os.replace(self._partial, self._target)
        return self.right


def _try_place(transfer: Transfer, place: Place, path: str, entry: FileEntry, file: _InTransit) -> str:
    """Fetch what is missing of a file from one place; returns '' if it is right then, else what this place did."""
    patience, tries, wrong, furthest = transfer.patience, 0, 0, file.size
    file.tag = None
    while True:
        transfer.wait_for(place)
        try:
            _receive(transfer, place, path, entry, file)
            return ""
        except Failure as e:
            reason, again, after = e.reason, e.again, e.after
        if file.size == entry.size:  # all of it, and not what it should be
            file.restart()
            wrong, furthest = wrong + 1, 0
        tries = 1 if file.size - furthest >= min(BLOCK_BYTES, (entry.size - furthest) / 8) else tries + 1
        furthest = max(furthest, file.size)  # a server that forgets ranges now and then makes no progress for ever
        if not again or tries >= patience.tries or wrong >= MAX_WRONG:
            return reason
        if after:
            transfer.rest(place, after)
        transfer.pause(min(patience.longest, patience.backoff * 2 ** (max(tries, wrong) - 1) * random.uniform(0.5, 1.0)))


def _receive(transfer: Transfer, place: Place, path: str, entry: FileEntry, file: _InTransit) -> None:
    """Ask once for the rest of a file and write what comes; raises Failure unless it is right at the end."""
    patience = transfer.patience
    with place.open(path, file.size, file.tag) as body, transfer.reading(body):
        if body.size is not None and body.size != entry.size:
            raise Failure(f"has {body.size} bytes, expected {entry.size},")
        if body.start != file.size:
            file.restart()
        file.tag = body.tag
        since, by_then = time.monotonic(), file.size
        for block in body.blocks:
            transfer.pause(0)
            transfer.count(len(block))
            file.write(block[: entry.size - file.size])
            if file.size == entry.size:
                break
            if (now := time.monotonic()) - since >= patience.window:
                if file.size - by_then < patience.floor * (now - since):
                    raise Failure(f"comes at less than {patience.floor:.0f} bytes per second")
                since, by_then = now, file.size
    if file.size < entry.size:
        raise Failure(f"ends after {file.size} of {entry.size} bytes")
    if not file.right:
        raise Failure("does not match its sha256")

"""What moving bytes between places has in common: how a file is asked for, how one try fails, how long to wait, and what may be said of a place.

A place never decides whether bytes are right: it hands over what came, and the sha256 of the manifest decides. So an error here is only a reason to try again.
"""

from __future__ import annotations

import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from kdstore.address import redacted

BLOCK_BYTES = 1 << 20
_URL = re.compile(r"[a-z][a-z0-9+.-]*://[^\s'\"<>]+", re.IGNORECASE)


@dataclass(frozen=True)
class Patience:
    """How long to wait for a place, in seconds, and how often to try again."""

    connect: float = 15.0
    silence: float = 60.0
    """Without a byte."""
    window: float = 60.0
    floor: float = 2048.0
    """Bytes per second; less over a window is as good as nothing."""
    tries: int = 5
    """Of a file at one place without any progress."""
    backoff: float = 0.5
    """Doubles with each try."""
    longest: float = 300.0
    """Wait between two tries, whatever the server asks for."""


class Failure(Exception):
    """One try to move a file failed: `reason` in words; `again` tells whether another try may do, `after` how many seconds the place wants to be left alone."""

    def __init__(self, reason: str, *, again: bool = True, after: float = 0.0, missing: bool = False) -> None:
        super().__init__(reason)
        self.reason = without_secrets(reason)
        self.again = again
        self.after = after
        self.missing = missing


@dataclass(frozen=True, eq=False)
class Body:
    """Bytes of a file from `start` on as they come; `size` of the whole file if the place says it, `tag` names this version; `shut` ends a wait for more."""

    start: int
    size: int | None
    tag: str | None
    blocks: Iterator[bytes]
    shut: Callable[[], None] = lambda: None


class Place(Protocol):
    """Where the files of a store can be read."""

    @property
    def name(self) -> str:
        """The place as it may be shown: without credentials."""
        ...

    @property
    def pace(self) -> Pace | None:
        """How many requests it takes."""
        ...

    def open(self, path: str, start: int = 0, tag: str | None = None) -> AbstractContextManager[Body]:
        """Ask for a file from byte `start` on, if it still is the version `tag`; the answer may begin at 0 instead. Raises Failure, also while it is read."""
        ...


@dataclass(frozen=True)
class Stored:
    """A file that a place says it has: bytes, and a hash of them as `algorithm` (sha256, git, md5, s3) and its text; '' where it tells none."""

    size: int
    algorithm: str = ""
    value: str = ""


class Pace:
    """Lets at most `limit` requests begin in any `seconds`: the Hub counts them."""

    def __init__(self, limit: int, seconds: float) -> None:
        self._limit, self._seconds = limit, seconds
        self._begun: deque[float] = deque()
        self._one_thread = threading.Lock()

    def wait(self, pause: Callable[[float], None]) -> None:
        """Return when one more may begin, after pauses that `pause` may end by raising."""
        while (rest := self._begin()) > 0:
            pause(rest)

    def _begin(self) -> float:
        """Count one that begins, unless there are as many as may be; returns how many seconds that stays so."""
        with self._one_thread:
            now = time.monotonic()
            while self._begun and self._begun[0] + self._seconds <= now:
                self._begun.popleft()
            if len(self._begun) >= self._limit:
                return self._begun[0] + self._seconds - now
            self._begun.append(now)
            return 0.0


def number_of(text: str) -> int | None:
    """Read a header's number; None for what is none, such as digits of other scripts or a million of them."""
    return int(text) if text.isascii() and text.isdigit() and len(text) < 19 else None


def without_secrets(text: str) -> str:
    """Redact every URL in a text, which may be a library's."""
    return _URL.sub(lambda found: redacted(found[0]), " ".join(text.split()))[:300]

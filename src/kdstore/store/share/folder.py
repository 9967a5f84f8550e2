"""A folder of this machine, or of a shared disk, to pull from."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from kdstore.errors import KdstoreError
from kdstore.store.share.transport import BLOCK_BYTES, Body, Failure


class Folder:
    """Files below a folder."""

    pace = None

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.name = str(path)

    @contextlib.contextmanager
    def open(self, path: str, start: int = 0, tag: str | None = None) -> Iterator[Body]:
        """Open a regular file; see `Place.open`."""
        try:
            fd = os.open(self.path / path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW)  # never waits for the writer of a FIFO
            with open(fd, "rb", buffering=0) as file:
                found = os.fstat(fd)
                if not stat.S_ISREG(found.st_mode):
                    raise Failure("is no regular file", again=False)
                file.seek(start)
                yield Body(start, found.st_size, None, iter(lambda: file.read(BLOCK_BYTES), b""))
        except KdstoreError:
            raise  # of whoever reads this: a full disk is an OSError too
        except (FileNotFoundError, NotADirectoryError) as e:
            raise Failure("is not there", again=False, missing=True) from e
        except OSError as e:
            if e.errno == errno.ELOOP:  # to what is no part of the store, and nobody else's business
                raise Failure("is a link", again=False) from e
            raise Failure(f"cannot be read ({e.strerror or type(e).__name__})") from e

"""Buckets (`s3://`, `gs://`) through fsspec's file systems, which know each service's credentials, endpoints and signatures.

Objects are read in ranges, so that memory holds a few of them whatever an object's size; an object appears whole or not at all when it was written.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from kdstore.address import redacted
from kdstore.errors import ConfigError, KdstoreError
from kdstore.store.share.transport import Body, Failure, Patience, Stored

RANGE_BYTES = 8 << 20
PART_BYTES = 16 << 20  # of an upload in several parts, of which S3 takes 10,000
_PACKAGES = {"s3": ("s3fs", "s3"), "gs": ("gcsfs", "gcs")}


class Bucket:
    """Objects below a prefix of a bucket."""

    pace = None
    files_at_once = 1
    parallel = 4

    def __init__(self, url: str, patience: Patience) -> None:
        self.name = redacted(url).rstrip("/")
        self._scheme, _, self._root = self.name.partition("://")
        if not self._root:
            raise ConfigError(f"{self.name} names no bucket.", f"Write {self._scheme}://BUCKET/PATH.")
        self._patience = patience

    @functools.cached_property
    def _system(self) -> Any:
        """The file system, made when it is first needed; raises ConfigError without its package."""
        package, extra = _PACKAGES[self._scheme]
        try:
            __import__(package)
        except ImportError as e:
            raise ConfigError(f"{self._scheme}:// needs the package {package}, which is not installed.", f"pip install 'kdstore[{extra}]'") from e
        import fsspec

        if self._scheme == "gs":
            logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # what it logs it raises too, and with whatever was asked for
            return fsspec.filesystem("gs", use_listings_cache=False)
        waits = {"connect_timeout": self._patience.connect, "read_timeout": self._patience.silence, "retries": {"max_attempts": 1}, "max_pool_connections": 32}
        system = fsspec.filesystem("s3", use_listings_cache=False, config_kwargs=waits)
        system.retries = 1  # we try again, and elsewhere
        return system

    @contextlib.contextmanager
    def open(self, path: str, start: int = 0, tag: str | None = None) -> Iterator[Body]:
        """Read an object in ranges; see `Place.open`."""
        with self._failures():
            yield Body(start, None, None, self._ranges(f"{self._root}/{path}", start))

    def _ranges(self, key: str, start: int) -> Iterator[bytes]:
        longest = self._patience.silence + RANGE_BYTES / self._patience.floor
        while block := bytes(self._system.cat_file(key, start=start, end=start + RANGE_BYTES, timeout=longest)):
            yield block
            if len(block) < RANGE_BYTES:
                return
            start += len(block)

    def listing(self) -> dict[str, Stored]:
        """Return what lies below the prefix, with the hashes that the service keeps; raises Failure."""
        with self._failures():
            found = self._system.find(self._root, detail=True)
        return {name.removeprefix(self._root).lstrip("/"): _stored(info) for name, info in found.items()}

    def commit(self, add: Sequence[tuple[str, Path]], remove: Sequence[str] = ()) -> None:
        """Remove objects, then write others; raises Failure."""
        options = {"chunksize": PART_BYTES, "max_concurrency": 4} if self._scheme == "s3" else {}
        with self._failures():
            for path in remove:
                with contextlib.suppress(FileNotFoundError):
                    self._system.rm_file(f"{self._root}/{path}")
            for path, file in add:
                self._system.put_file(str(file), f"{self._root}/{path}", **options)

    @contextlib.contextmanager
    def _failures(self) -> Iterator[None]:
        """Turn the errors of a service into Failure; each of these packages has its own, and what they say may hold what was signed."""
        try:
            yield
        except (Failure, KdstoreError):
            raise
        except FileNotFoundError as e:
            raise Failure("is not there", again=False, missing=True) from e
        except PermissionError as e:
            raise Failure("is refused (no permission)", again=False) from e
        except TimeoutError as e:
            raise Failure("does not come within the time-out") from e
        except Exception as e:
            if type(e).__name__ in ("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "DefaultCredentialsError", "RefreshError"):
                raise Failure(f"is not asked for: no credentials ({type(e).__name__})", again=False) from e
            if isinstance(e, OSError) or type(e).__module__.split(".")[0] in ("botocore", "aiobotocore", "aiohttp", "gcsfs", "google", "fsspec"):
                raise Failure(f"is not answered as it should be ({type(e).__name__})") from e
            raise


def _stored(info: dict[str, Any]) -> Stored:
    """Read what a listing says of an object: S3 has an ETag, which is the MD5 of the parts' MD5s if there were several, Google the MD5 in base64."""
    size, tag, md5 = int(info["size"]), str(info.get("ETag", "")).strip('"'), info.get("md5Hash")
    if md5:
        return Stored(size, "md5", base64.b64decode(md5).hex())
    return Stored(size, "s3" if "-" in tag else "md5", tag) if tag else Stored(size)

"""A store that is used where it is: its files come into a cache of this machine when they are read, or before.

Nothing is believed but the manifest, as in a pull, and the transfers are those of a pull. An address that pins the digest (`#sha256:...`) needs no server for
what the cache has. Connections and threads belong to the process that made them: one that was forked makes its own.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections import deque
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from kdstore.address import redacted, store_name
from kdstore.errors import ConfigError, DamagedStore, Interrupted, KdstoreError, TransferError
from kdstore.jsonfile import disk_errors, make_folders, write_bytes
from kdstore.store.cache import Cache
from kdstore.store.layout import MANIFEST, ArraySpec
from kdstore.store.manifest import FileEntry, Manifest, let_go, read_manifest
from kdstore.store.reader import open_store
from kdstore.store.share.fetch import Stopped, Transfer, fetch_file
from kdstore.store.share.places import open_place
from kdstore.store.share.pull import DIGEST, fetch_beside, mirrors_of, read_card, read_remote_manifest
from kdstore.store.share.transport import Failure, Patience

SLACK_BYTES = 1 << 20  # what headers of codecs may add to small chunks
AT_ONCE = 8  # transfers of files that nobody waits for yet, and as many of those that are waited for together


def remote_manifest(address: str, cache: Cache, patience: Patience | None = None) -> Manifest:
    """Read the manifest of the store at an address, which may end with the digest that it must have (`#sha256:...`).

    Raises ConfigError, StoreNotFound, DamagedStore, IdentityMismatch, TransferError, DiskFull, CannotWrite.
    """
    patience = patience or Patience()
    place, _, digest = address.partition("#")
    if digest and not DIGEST.fullmatch(digest):
        raise ConfigError(f"What follows {redacted(place)}# is no digest.", "Write ADDRESS#sha256: and 64 hex digits, and %23 for a '#' that is part of it.")
    supply = Remote(place, cache, patience)
    root = functools.partial(_root, cache, place)
    if digest and (root(digest) / MANIFEST).is_file():
        with contextlib.suppress(KdstoreError):  # damaged: read again
            kept = read_manifest(root(digest))
            if kept.digest == digest:
                return replace(kept, supply=supply)
    encoded, manifest = read_remote_manifest(supply.mine.transfer, digest or None)
    _check_sizes(manifest, redacted(place))
    folder, missed = root(manifest.digest), list[str]()
    with disk_errors(folder):
        make_folders(folder)
        fetch_beside(supply.mine.transfer, folder, {"run.json": None, "stats.json": None}, lambda kind, done, total, said: missed.append(said))
        if not missed:  # else whoever pins the digest asks for them again
            write_bytes(folder / MANIFEST, encoded)
    return replace(manifest, root=folder, supply=supply)


def _check_sizes(manifest: Manifest, place: str) -> None:
    """Raise DamagedStore for a shard that is listed with more than any codec makes of its rows: it would be fetched, and push out what others use."""
    for name, metadata in manifest.content["arrays"].items():
        spec = ArraySpec.from_metadata(name, metadata)
        for number in range(spec.num_shards):
            entry = manifest.files.get(spec.shard_path(number))
            if entry is not None and entry.size > 2 * spec.plain_shard_bytes(number) + SLACK_BYTES:
                raise DamagedStore(f"{place} lists {entry.size} bytes for {spec.shard_path(number)}, which its shape does not fill.", "Tell its publisher.")


def _root(cache: Cache, place: str, digest: str) -> Path:
    """Return the folder of a manifest: its name is that of the store."""
    return cache.folder / "stores" / digest.removeprefix("sha256:") / store_name(place)


@dataclass
class _Process:
    """What one process has of a store: its connections, and files that it fetches before anyone asks for them."""

    pid: int
    transfer: Transfer
    has_mirrors: bool = False
    waiting: deque[tuple[str, FileEntry]] = field(default_factory=deque)
    coming: set[str] = field(default_factory=set)
    threads: int = 0


class Remote:
    """The files of a store at an address, by way of a cache; see `Supply`."""

    def __init__(self, address: str, cache: Cache, patience: Patience) -> None:
        self._address = address
        self.name = redacted(address)
        self.cache = cache
        self._patience = patience
        self._one_thread = threading.Lock()
        self._process: _Process | None = None

    @property
    def mine(self) -> _Process:
        """What this process has."""
        if self._process is None or self._process.pid != os.getpid():
            self._process = _Process(os.getpid(), Transfer([open_place(self._address, self._patience)], self._patience))
            self._one_thread = threading.Lock()  # a fork may have copied a locked one
        return self._process

    def where(self, entry: FileEntry) -> Path:
        """Return where a file lies once it is here."""
        return self.cache.path(entry)

    def descriptor(self, path: str, entry: FileEntry) -> int:
        """Open a file, fetched first if need be."""
        mine = self.mine
        mine.coming.discard(path)
        try:
            return self.cache.lease(entry, lambda target: self._fetch(mine, path, entry, target), mine.transfer.pause)
        except Stopped as e:
            raise Interrupted(f"Stopped while {path} of {self.name} was on its way; what came is kept.") from e

    def bring(self, files: Mapping[str, FileEntry]) -> None:
        """Fetch files, several at once."""
        missing = [(path, entry) for path, entry in files.items() if not self.where(entry).exists()]
        if len(missing) > 1:
            mine = self.mine
            with ThreadPoolExecutor(AT_ONCE, "kdstore-bring") as pool:
                try:
                    list(pool.map(lambda file: let_go(self.descriptor(*file)), missing))
                except BaseException:
                    self._process = None
                    mine.transfer.stop()
                    raise

    def announce(self, files: Mapping[str, FileEntry]) -> None:
        """Fetch files meanwhile, in threads that end when nothing is left to fetch, or with the process."""
        mine = self.mine
        with self._one_thread:
            new = [(path, entry) for path, entry in files.items() if path not in mine.coming and not self.where(entry).exists()]
            mine.waiting.extend(new)
            mine.coming.update(path for path, _ in new)
            while mine.threads < min(AT_ONCE, len(mine.waiting)):
                mine.threads += 1
                threading.Thread(target=self._fetch_announced, args=(mine,), name="kdstore-coming", daemon=True).start()

    def stop(self) -> None:
        """End all transfers for good: whoever waits for a file gets Interrupted."""
        self.mine.transfer.stop()

    def reopening(self, digest: str) -> tuple[Any, ...]:
        """Return how another process opens this store."""
        return open_store, (f"{self._address}#{digest}", self.cache)

    def _fetch(self, mine: _Process, path: str, entry: FileEntry, target: Path) -> None:
        """Fetch one file, from the mirrors that the card names too if the address itself has it not; raises TransferError."""
        while True:
            try:
                return fetch_file(mine.transfer, path, entry, target, lambda size: None)
            except Failure as e:
                if mine.has_mirrors:
                    hint = "Try again later: what is in the cache is not fetched again."
                    raise TransferError(f"A file of {self.name} did not come: {path} {e.reason}.", hint) from e
            with self._one_thread:
                if not mine.has_mirrors:
                    mine.transfer.places += [open_place(name, self._patience) for name in mirrors_of(read_card(mine.transfer))]
                    mine.has_mirrors = True

    def _fetch_announced(self, mine: _Process) -> None:
        while True:
            with self._one_thread:
                if not mine.waiting:
                    mine.threads -= 1
                    return
                path, entry = mine.waiting.popleft()
            if path in mine.coming:  # else it has been asked for meanwhile
                with contextlib.suppress(KdstoreError):  # said to whoever asks for it
                    let_go(self.descriptor(path, entry))

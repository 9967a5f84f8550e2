"""Pushing a store to a place: data first, manifest last.

Nothing is sent that the place says it has, by size and hash, so an interrupted push goes on. Every file is compared with its sha256 before it is sent. A
push to a folder is a pull from the other side.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from kdstore.address import is_address
from kdstore.errors import ConfigError, DamagedStore, IdentityMismatch, MissingFeature, TransferError
from kdstore.progress import OnProgress, silent
from kdstore.store.layout import BESIDE, MANIFEST
from kdstore.store.manifest import RESTORE, Manifest, read_manifest
from kdstore.store.share.fetch import Transfer
from kdstore.store.share.places import Writable, matches, open_place
from kdstore.store.share.pull import check_old, pull_store, read_remote_manifest
from kdstore.store.share.staging import bytes_of, is_file_of
from kdstore.store.share.transport import Failure, Patience, Stored

File = tuple[str, Path]
T = TypeVar("T")


@dataclass(frozen=True)
class Pushed:
    """What a push sent: files and bytes of the store, and how many of them were sent."""

    path: str
    target: str
    digest: str
    files: int
    bytes: int
    files_sent: int
    sent_bytes: int


def push_store(path: str | Path, target: str, *, force: bool = False, patience: Patience | None = None, on_progress: OnProgress = silent) -> Pushed:
    """Send a store to a place, where it appears when all of it is there; run again to go on.

    A store of another identity is replaced with `force` only, and of a replaced one the files that it lists are removed. Raises ConfigError for a place that
    takes no files, DamagedStore for a file of ours that is not as it was written, MissingFeature for a part, IdentityMismatch, TransferError.
    """
    patience = patience or Patience()
    manifest = read_manifest(Path(path))
    if manifest.part is not None:
        raise MissingFeature(f"{path} is a part of its store.", f"{manifest.pull_hint()}; or push a store of these rows: kdstore store subset.")
    if not is_address(target):
        pulled = pull_store(str(path), target, force=force, patience=patience, on_progress=on_progress)
        new = pulled.files - pulled.kept_files, pulled.bytes - pulled.kept_bytes
        return Pushed(str(path), target, manifest.digest, pulled.files, pulled.bytes, *new)
    place: Any = open_place(target, patience)
    if not hasattr(place, "commit"):
        raise ConfigError(f"{place.name} takes no files: a web server is read only.", "Copy the folder there yourself, manifest.json last.")
    writable: Writable = place
    there = _tried(patience, writable, writable.listing)
    old = _old_manifest(writable, there, patience, force)
    check_old(writable.name, old, manifest, force)
    todo = [name for name, entry in manifest.files.items() if not (name in there and matches(there[name], manifest.root / name, entry.sha256))]
    if old is None and not force:
        _refuse_others(writable, manifest, there, todo)
    gone = sorted(name for name in (old.files if old else ()) if name in there and name not in manifest.files)
    for name in BESIDE:
        if (manifest.root / name).is_symlink():
            on_progress("warning", 0, 0, f"{manifest.root / name} is a link and is not sent.")
    _send(writable, manifest, todo, _removed_first(manifest, old, there, todo, gone), gone, patience, on_progress)
    every, sent = bytes_of(manifest.files, manifest.files), bytes_of(manifest.files, todo)
    return Pushed(str(path), writable.name, manifest.digest, len(manifest.files), every, len(todo), sent)


def _old_manifest(place: Writable, there: dict[str, Stored], patience: Patience, force: bool) -> Manifest | None:
    """Return the manifest that a place has; one that is none is replaced by force."""
    if MANIFEST not in there:
        return None
    try:
        return read_remote_manifest(Transfer([place], patience))[1]
    except DamagedStore as e:
        if force:
            return None
        raise DamagedStore(e.message, "Choose another place, or replace what is there: --force.") from e


def _refuse_others(place: Writable, manifest: Manifest, there: dict[str, Stored], todo: Sequence[str]) -> None:
    """Raise IdentityMismatch if files would be replaced where no earlier push of this store has been: they are of something else."""
    ours = [name for name in manifest.files if name in there and name not in todo and not name.endswith("zarr.json")]
    if not ours and (others := [name for name in todo if name in there]):
        raise IdentityMismatch(f"{place.name} holds other files of these names: {', '.join(others[:3])}.", "Choose another place, or replace them: --force.")


def _removed_first(manifest: Manifest, old: Manifest | None, there: dict[str, Stored], todo: Sequence[str], gone: Sequence[str]) -> list[str]:
    """Return the manifest if files that it lists will change: a reader then finds no store instead of files of two.

    With it goes what kdstore has put beside it and the new store has not: its signature and statistics are of the old one. README.md may be anybody's.
    """
    if MANIFEST not in there or not (old is None or any(name in old.files for name in todo) or gone or old.digest != manifest.digest):
        return []
    stale = [name for name in BESIDE if name != "README.md" and name in there and not _is_ours(manifest.root / name)]
    return [MANIFEST, *(stale if old and old.digest != manifest.digest else ())]


def _is_ours(file: Path) -> bool:
    """Tell whether a file lies in the store's folder: what a link leads to is not sent."""
    return file.is_file() and not file.is_symlink()


def _send(place: Writable, manifest: Manifest, todo: Sequence[str], first: list[str], gone: list[str], patience: Patience, on_progress: OnProgress) -> None:
    """Send files, then what lies beside the manifest, then the manifest, in as few commits as the place allows."""
    total, done, lock = bytes_of(manifest.files, todo), 0, threading.Lock()

    def send(names: Sequence[str], remove: Sequence[str] = (), last: Sequence[File] = ()) -> None:
        nonlocal done
        files = [(name, _checked(manifest, name)) for name in names]
        _tried(patience, place, lambda: place.commit([*files, *last], remove), ", ".join([*names, *(name for name, _ in last)][:3]))
        with lock:
            done += bytes_of(manifest.files, names)
            on_progress("bytes", done, total, "")

    beside = [(name, manifest.root / name) for name in (*BESIDE, MANIFEST) if _is_ours(manifest.root / name)]
    batches = list(_batches(todo, place.files_at_once))
    if place.files_at_once > 1 and len(batches) <= 1:  # one commit changes all at once
        send([name for batch in batches for name in batch], [*gone, *(name for name in first if name != MANIFEST)], beside)
        return
    if first:
        send((), [*first, *gone])  # nobody reads them any more, and who is stopped later knows no more of them
    with ThreadPoolExecutor(place.parallel, "kdstore-push") as pool:
        futures = [pool.submit(send, batch) for batch in batches]
        try:
            for future in futures:
                future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    if place.files_at_once > 1:
        send((), (), beside)
        return
    for file in beside:
        send((), (), [file])


def _batches(names: Sequence[str], size: int) -> Iterator[list[str]]:
    left = iter(names)
    while batch := list(itertools.islice(left, size)):
        yield batch


def _checked(manifest: Manifest, name: str) -> Path:
    """Return where a file of ours lies; raises DamagedStore unless it is as it was written."""
    with manifest.open(name):
        pass  # in the folder, of its size
    if not is_file_of(manifest.root / name, manifest.files[name]):
        raise DamagedStore(f"{manifest.root / name} does not match its sha256{manifest.files[name].said()}.", RESTORE)
    return manifest.root / name


def _tried(patience: Patience, place: Writable, work: Callable[[], T], names: str = "") -> T:
    """Do what a place may refuse for a time, to files of these names; raises TransferError."""
    for tries in itertools.count(1):
        try:
            return work()
        except Failure as e:
            if not e.again or tries >= patience.tries:
                raise TransferError(f"{place.name}{': ' * bool(names)}{names} {e.reason}.", "What was sent is kept there; the same command goes on.") from e
            time.sleep(min(patience.longest, max(e.after, patience.backoff * 2 ** (tries - 1))))
    raise AssertionError

"""Units staged by the parts of a job array, which know nothing of each other: they lie in `_build/parts` until a committer records them.

A part needs the store's lock only to find out what there is to do. What it stages is complete and synced, with its record beside it, so a part that is stopped
and started again goes on after its last unit, and one that runs twice at once does the work twice and nothing else.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kdstore.errors import DamagedStore, IncompleteStore
from kdstore.jsonfile import disk_errors, read_json, write_json
from kdstore.progress import OnProgress, silent
from kdstore.store.attempt import Attempt, open_attempt, remove_dead_attempts, staged_path
from kdstore.store.layout import BUILD, MANIFEST
from kdstore.store.manifest import read_manifest
from kdstore.store.plan import Unit
from kdstore.store.writer import PARTS, StoreWriter

ACCOUNTS = "accounts"


@contextlib.contextmanager
def stage_unit(writer: StoreWriter, unit: Unit) -> Iterator[Attempt]:
    """Stage a unit for `finalise_store`; leaving the block keeps it, an exception discards it. `writer` may have given its lock back.

    What a process of this host left of the unit when it died is removed.
    """
    folder = _parts_folder(writer.path)
    remove_dead_attempts(folder, unit)
    with open_attempt(writer.path, writer.plan, writer.arrays, unit, under=PARTS) as attempt:
        yield attempt
        write_json(folder / f"{unit.name}.json", {"folder": attempt.folder.name, "record": attempt.close()})


def staged_units(path: Path) -> dict[str, tuple[Path, dict[str, Any]]]:
    """Return the folder and the record of every unit that parts have staged whole, by its name."""
    found = {}
    for file in sorted((path / BUILD / PARTS).glob("*.json")):
        with contextlib.suppress(DamagedStore, FileNotFoundError):  # a record that was cut, or files that were recorded already
            said = read_json(file)
            folder, record = file.parent / Path(said["folder"]).name, said["record"]
            if all(staged_path(folder, name).stat().st_size == entry["size"] for name, entry in record["files"].items()):
                found[file.stem] = folder, record
    return found


def record_staged(writer: StoreWriter, on_progress: OnProgress = silent) -> None:
    """Record what parts have staged and is not recorded yet; raises StoreLocked, DiskFull, CannotWrite."""
    pending = {unit.name for unit in writer.pending()}
    staged = {name: found for name, found in staged_units(writer.path).items() if name in pending}
    for done, (name, (folder, record)) in enumerate(staged.items(), 1):
        writer.commit(folder, record)
        (folder.parent / f"{name}.json").unlink(missing_ok=True)
        on_progress("staged units", done, len(staged), "")


def leave_account(path: Path, part: str, account: dict[str, Any]) -> None:
    """Keep what the last run of a part says of itself, for `run.json`; raises DiskFull, CannotWrite."""
    folder = _parts_folder(path) / ACCOUNTS
    with disk_errors(folder):
        folder.mkdir(exist_ok=True)
    write_json(folder / f"{part}.json", account)


def finalise_store(path: str | Path, *, on_progress: OnProgress = silent) -> str:
    """Record all staged units of a store whose parts have ended and seal it; returns its digest, also of one that is complete already.

    Raises IncompleteStore with the units that no part has staged, StoreNotFound, StoreLocked, DiskFull, CannotWrite.
    """
    if (Path(path) / MANIFEST).is_file():
        on_progress("notice", 0, 0, f"{path} is complete already.")
        return read_manifest(Path(path)).digest
    with StoreWriter.reopen(path, on_progress=on_progress) as writer:
        record_staged(writer, on_progress)
        if pending := writer.pending():
            some = ", ".join(unit.name for unit in pending[:5]) + (", ..." if len(pending) > 5 else "")
            raise IncompleteStore(
                f"{path}: {len(pending)} of {len(writer.plan.units)} units are not there ({some}).",
                "Run the parts that did not end again, or the extract command without --part, which does the rest.",
            )
        accounts = [read_json(file) for file in sorted((writer.path / BUILD / PARTS / ACCOUNTS).glob("*.json"))]
        images, invalid = writer.recorded("image")
        run = {"source": accounts[0].get("source") if accounts else None, "images": images, "texts": writer.plan.num_texts}
        return writer.finalise({**run, "invalid_images": invalid, "parts": accounts})


def _parts_folder(path: Path) -> Path:
    """Create the folder of staged units in the build folder, which is gone once the store is sealed."""
    with disk_errors(path):
        (path / BUILD / PARTS).mkdir(exist_ok=True)
    return path / BUILD / PARTS

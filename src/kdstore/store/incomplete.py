"""A store that is being written, seen from outside: how far it is, who writes it, and whether that one lives.

It only reads, and needs no lock: whatever it meets was renamed into place whole. All may be gone a moment later, when the committer seals the store.
"""

from __future__ import annotations

import contextlib
import datetime
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdstore.errors import CannotRead
from kdstore.jsonfile import read_json
from kdstore.store.attempt import ATTEMPTS
from kdstore.store.layout import BUILD, MANIFEST, PULL
from kdstore.store.lock import LOCK, is_alive, read_holder
from kdstore.store.plan import SIDES
from kdstore.store.writer import BUILD_JSON, PARTS, UNITS

_NOTHING = {"images": 0, "texts": 0, "unit_rows": 1}


@dataclass(frozen=True)
class Committer:
    """Who holds the lock; `since` by its own clock, `last_beat` by that of the file system (both UTC)."""

    host: str
    pid: int
    alive: bool
    since: str
    last_beat: str


@dataclass(frozen=True)
class StoreProgress:
    """How far an incomplete store is: units and rows recorded and in all, bytes in place and in attempts; `writer` is None if nobody holds the lock."""

    path: str
    teacher: str | None
    images: int
    images_recorded: int
    texts: int
    texts_recorded: int
    units: int
    units_recorded: int
    bytes_in_place: int
    bytes_staged: int
    units_staged: int  # by parts, for `kdstore store finalise` to record
    last_record: str | None
    writer: Committer | None
    pulled: bool = False  # from elsewhere, not extracted
    complete: bool = False


def store_progress(path: str | Path) -> StoreProgress | None:
    """Describe a store without manifest, None if there is none (any more); all counts are 0 until its plan is written.

    A writer on another host is watched for up to half a minute. Raises DamagedStore, CannotRead.
    """
    path = Path(path)
    build = path / BUILD
    try:
        if (path / MANIFEST).is_file() or not build.is_dir():
            return None
        said: dict[str, Any] = read_json(build / BUILD_JSON) if (build / BUILD_JSON).is_file() else {"plan": _NOTHING, "identity": {}}
        recorded = {record.name: record.stat().st_mtime for record in (build / UNITS).glob("*.json")}
        writer = _committer(build / LOCK)
    except FileNotFoundError:  # sealed while we looked
        return None
    except OSError as e:
        raise CannotRead(f"Cannot read {e.filename}: {e.strerror}.", "Ask its owner for the right to read it.") from e
    plan = said["plan"]
    planned = [
        (side, f"{side}-{number:05d}.json", min(plan["unit_rows"], plan[f"{side}s"] - start))
        for side in SIDES
        for number, start in enumerate(range(0, plan[f"{side}s"], plan["unit_rows"]))
    ]
    done = [(side, rows) for side, name, rows in planned if name in recorded]
    return StoreProgress(
        path=str(path),
        teacher=said["identity"].get("teacher", {}).get("name"),
        images=plan["images"],
        images_recorded=sum(rows for side, rows in done if side == "image"),
        texts=plan["texts"],
        texts_recorded=sum(rows for side, rows in done if side == "text"),
        units=len(planned),
        units_recorded=len(done),
        bytes_in_place=sum(_bytes_in(path / name) for name in (*SIDES, "index")),
        bytes_staged=sum(_bytes_in(build / name) for name in (ATTEMPTS, PARTS, PULL)),
        units_staged=len(list((build / PARTS).glob("*.json"))),
        last_record=_utc(max(recorded.values())) if recorded else None,
        writer=writer,
        pulled=(build / PULL).is_dir(),
    )


def _committer(path: Path) -> Committer | None:
    holder = read_holder(path)
    if holder is not None:
        with contextlib.suppress(FileNotFoundError):  # given back just now
            return Committer(holder.host, holder.pid, is_alive(path, holder), holder.since, _utc(path.stat().st_mtime))
    return None


def _bytes_in(folder: Path) -> int:
    """Sum the sizes of the files below a folder; those that vanish meanwhile count nothing."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                total += os.stat(os.path.join(parent, name)).st_size
    return total


def _utc(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).isoformat(timespec="seconds")

"""Attempts at units: what a process stages in a folder of its own, and hands to whoever may commit it.

An attempt needs no lock and harms nothing: its files count only once the store's committer has renamed them into place and recorded the unit. So any number of
processes on any hosts may work on one store, twice on the same unit too.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import socket
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from kdstore.jsonfile import disk_errors
from kdstore.store.layout import BUILD, ArraySpec, index_path
from kdstore.store.plan import Plan, Unit, parquet_bytes
from kdstore.store.shard import ShardWriter, WrittenFile, write_file

IMAGE_INDEX = pa.schema(
    [
        ("row", pa.int64()),
        ("key", pa.large_string()),
        ("sha256", pa.string()),
        ("valid", pa.uint8()),
        ("reason", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
    ]
)
TEXT_INDEX = pa.schema([("row", pa.int64()), ("image_row", pa.int64()), ("kind", pa.large_string()), ("sha256", pa.string()), ("caption", pa.large_string())])

ATTEMPTS = "attempts"
_HOST = re.sub(r"[^A-Za-z0-9]", "_", socket.gethostname())


class Attempt:
    """One try at a unit: blocks and index rows are appended in row order, in any number of calls."""

    def __init__(self, folder: Path, plan: Plan, unit: Unit, specs: Sequence[ArraySpec]) -> None:
        self.folder = folder
        self._plan = plan
        self._unit = unit
        self._specs = {spec.name: spec for spec in specs}
        self._rows = dict.fromkeys(self._specs, 0)
        self._open: dict[str, tuple[int, ShardWriter]] = {}
        self._files: dict[str, dict[str, Any]] = {}
        self._crcs: dict[str, list[npt.NDArray[np.uint32]]] = {name: [] for name in self._specs}
        self._index: list[dict[str, Any]] = []
        self._nan = {name: np.zeros(len(unit), bool) for name, spec in self._specs.items() if spec.dtype.startswith("float")}

    def append(self, name: str, block: npt.NDArray[np.generic]) -> None:
        """Append rows [rows, V, ...] of an image array or [rows, ...] of a text array, already in the stored dtype; raises DiskFull, CannotWrite."""
        spec = self._specs[name]
        if block.shape[1:] != spec.shape[1:] or block.dtype != np.dtype(spec.dtype):
            raise ValueError(f"{name}: expected rows of shape {spec.shape[1:]} {spec.dtype}, found {block.shape[1:]} {block.dtype}")
        if self._rows[name] + len(block) > len(self._unit):
            raise ValueError(f"{name}: {self._rows[name] + len(block)} rows appended to {self._unit.name}, which has {len(self._unit)}")
        if name in self._nan and len(block):
            self._nan[name][self._rows[name] :][: len(block)] = np.isnan(block.reshape(len(block), -1)[:, 0])
        while len(block):
            number, shard = self._shard(spec)
            taken = shard.append(block)
            self._rows[name] += taken
            block = block[taken:]
            if shard.full:
                written, crcs = shard.close()
                del self._open[name]
                self._note(spec.shard_path(number), written, *spec.shard_rows(number))
                self._crcs[name].append(crcs)

    def index(self, rows: pa.Table | Sequence[dict[str, Any]]) -> None:
        """Append what is known of the next rows.

        Images need `sha256`, `valid`, `reason`, `width`, `height` each; texts only `valid`, and all are valid if this is never called.
        Row numbers, keys and captions are the plan's.
        """
        self._index.extend(rows.to_pylist() if isinstance(rows, pa.Table) else rows)

    def close(self) -> dict[str, Any]:
        """End all files and return the unit's record; raises ValueError if rows are missing, and DiskFull."""
        valid = self._valid()
        self.append(f"{self._unit.side}/valid", valid)
        for name, rows in self._rows.items():
            if rows != len(self._unit):
                raise ValueError(f"{name}: {rows} rows appended to {self._unit.name}, expected {len(self._unit)}")
        for name, nan in self._nan.items():
            if not nan[valid == 0].all():
                raise ValueError(f"{name}: row {self._unit.start + int(np.argmax((valid == 0) & ~nan))} is not valid but not NaN")
        table = image_index(self._plan, self._unit, self._index, valid) if self._unit.side == "image" else text_index(self._plan, self._unit)
        path = index_path(self._unit)
        self._note(path, write_file(staged_path(self.folder, path), parquet_bytes(table)), self._unit.start, self._unit.stop)
        crcs = {name: np.concatenate(parts).tobytes().hex() for name, parts in self._crcs.items()}
        return {"unit": self._unit.name, "valid": int(valid.sum()), "files": self._files, "crcs": crcs}

    def abandon(self) -> None:
        for _, shard in self._open.values():
            shard.abandon()

    def _valid(self) -> npt.NDArray[np.uint8]:
        if self._unit.side == "text" and not self._index:
            return np.ones(len(self._unit), np.uint8)
        return np.array([bool(row["valid"]) for row in self._index], np.uint8)

    def _shard(self, spec: ArraySpec) -> tuple[int, ShardWriter]:
        if spec.name not in self._open:
            number = (self._unit.start + self._rows[spec.name]) // spec.shard[0]
            self._open[spec.name] = number, ShardWriter(staged_path(self.folder, spec.shard_path(number)), spec, number)
        return self._open[spec.name]

    def _note(self, path: str, written: WrittenFile, start: int, stop: int) -> None:
        self._files[path] = {"size": written.size, "sha256": written.sha256, "rows": [start, stop]}


@contextlib.contextmanager
def open_attempt(path: Path, plan: Plan, specs: Sequence[ArraySpec], unit: Unit, under: str = ATTEMPTS) -> Iterator[Attempt]:
    """Stage a unit of the store at `path` in a new folder under `_build/<under>`, which stays unless the block raises; raises DiskFull, CannotWrite."""
    folder = path / BUILD / under / f"{unit.name}-{uuid.uuid4().hex}-{os.getpid()}-{_HOST}"
    with disk_errors(folder):
        folder.mkdir()
    attempt = Attempt(folder, plan, unit, [spec for spec in specs if spec.side == unit.side])
    try:
        yield attempt
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    finally:
        attempt.abandon()


def remove_dead_attempts(under: Path, unit: Unit) -> None:
    """Remove what processes of this host that have ended left of a unit without staging it whole."""
    for folder in under.glob(f"{unit.name}-*-{_HOST}"):
        pid = int(folder.name.removesuffix(f"-{_HOST}").rpartition("-")[2])
        if not Path(f"/proc/{pid}").exists() and not (under / f"{unit.name}.json").exists():
            shutil.rmtree(folder, ignore_errors=True)


def staged_path(folder: Path, name: str) -> Path:
    """Where an attempt keeps the file `name` of the store: in one flat folder, cheap to make and to remove."""
    return folder / name.replace("/", "+")


def image_index(plan: Plan, unit: Unit, rows: list[dict[str, Any]], valid: npt.NDArray[np.uint8]) -> pa.Table:
    columns = {name: [row[name] for row in rows] for name in ("sha256", "reason", "width", "height")}
    numbers = np.arange(unit.start, unit.stop)
    return pa.table({"row": numbers, "key": plan.keys[unit.start : unit.stop], "valid": valid, **columns}, IMAGE_INDEX)


def text_index(plan: Plan, unit: Unit) -> pa.Table:
    numbers = np.arange(unit.start, unit.stop)
    captions = plan.captions[unit.start : unit.stop]
    columns = {
        "row": numbers,
        "image_row": np.searchsorted(plan.offsets, numbers, side="right") - 1,
        "kind": plan.kinds[unit.start : unit.stop],
        "sha256": [hashlib.sha256(text.encode()).hexdigest() for text in captions.to_pylist()],
        "caption": captions,
    }
    return pa.table(columns, TEXT_INDEX)

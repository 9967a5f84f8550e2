"""Opening a store and reading from it first, in a fresh process: seconds and memory against the number of rows.

One unit of narrow rows is written and hard-linked into all the places of a large store, so that 100 M rows need little disk:
what opening costs depends on the manifest, the metadata and the checks, which are all of their real size.
Memory is anonymous memory beyond that of the imports, and the highest that resident memory rose above it.

    python benchmarks/open.py [--rows 10000000 ...] [--width 8] [--json]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from kdstore.jsonfile import read_json, write_json
from kdstore.store import Plan, StoreWriter, embedding_array, open_store

UNIT_ROWS = 16384


def write_unit(folder: Path, width: int) -> None:
    """Write a store of one unit of images."""
    plan = Plan.freeze(((str(i), ()) for i in range(UNIT_ROWS)), unit_rows=UNIT_ROWS)
    with StoreWriter.open(folder, plan=plan, arrays=[embedding_array(plan, "image", width)], identity={}) as writer:
        for unit in writer.pending():
            with writer.attempt(unit) as attempt:
                attempt.append("image/embedding", np.random.default_rng(0).standard_normal((len(unit), 1, width), np.float32).astype(np.float16))
                attempt.index([{"sha256": "", "valid": True, "reason": "", "width": 1, "height": 1}] * len(unit))
        writer.finalise({})


def grow(folder: Path, units: int) -> None:
    """Turn a store of one unit into one of `units` equal ones."""
    content = read_json(folder / "manifest.json")
    files: dict[str, dict[str, Any]] = content["files"]

    def put(name: str, data: bytes) -> None:
        (folder / name).write_bytes(data)
        files[name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}

    def put_numbers(name: str, numbers: Any) -> None:
        np.save(folder / name, numbers)
        with open(folder / name, "rb") as f:
            files[name] = {"size": os.path.getsize(folder / name), "sha256": hashlib.file_digest(f, "sha256").hexdigest()}

    places = {
        "image/embedding/c/0/0/0": "image/embedding/c/{}/0/0",
        "image/valid/c/0": "image/valid/c/{}",
        "index/image/00000.parquet": "index/image/{:05}.parquet",
    }
    for first, place in places.items():
        for unit in range(1, units):
            name = place.format(unit)
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            os.link(folder / first, folder / name)
            files[name] = {**files[first], "rows": [unit * UNIT_ROWS, (unit + 1) * UNIT_ROWS]}
    content["plan"]["images"] = rows = units * UNIT_ROWS
    for name in ("image/embedding", "image/valid"):
        content["arrays"][name]["shape"][0] = rows
        put(f"{name}/zarr.json", json.dumps(content["arrays"][name]).encode())
        put_numbers(f"checks/{name}.npy", np.tile(np.load(folder / f"checks/{name}.npy"), units))
    put_numbers("index/offsets.npy", np.zeros(rows + 1, np.int64))
    content["files"] = dict(sorted(files.items()))
    write_json(folder / "manifest.json", content)


def measure(folder: Path) -> dict[str, Any]:
    """Open the store, gather two batches; to be called in a fresh process."""
    anonymous, resident = _memory("RssAnon"), _memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts here
    start = time.perf_counter()
    store = open_store(folder)
    found: dict[str, Any] = {"rows": store.num_images, "files": len(store.manifest["files"]), "open_s": time.perf_counter() - start}
    found |= {"open_MB": _memory("RssAnon") - anonymous, "open_peak_MB": _memory("VmHWM") - resident}
    rng = np.random.default_rng(0)
    for name in ("first_batch", "second_batch"):
        rows = rng.integers(0, store.num_images, 1024)
        start = time.perf_counter()
        store.gather("image/embedding", rows)
        found[f"{name}_s"] = time.perf_counter() - start
    return {**found, "batches_MB": _memory("RssAnon") - anonymous}


def _memory(field: str) -> float:
    """Return a field of this process's memory in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 10_000_000, 100_000_000], help="rounded up to units of 16,384")
    parser.add_argument("--width", type=int, default=8)
    parser.add_argument("--json", action="store_true", help="print a JSON object per number of rows")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure)))
        return
    for rows in args.rows:
        with tempfile.TemporaryDirectory() as folder:
            store = Path(folder) / "store"
            write_unit(store, args.width)
            grow(store, -(-rows // UNIT_ROWS))
            line = subprocess.run([sys.executable, __file__, "--measure", store], check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
        print(line if args.json else ", ".join(f"{name} {value:.4g}" for name, value in json.loads(line).items()))


if __name__ == "__main__":
    main()

"""Random batches of image embeddings: `Store.gather` against fancy indexing of an np.memmap, side by side in one run.

Each repeat times both ways on the same batch, one after the other, so that whatever else the machine does hits both. The page
cache is warm; the first touch of the store (every chunk's crc32c) and the import with its compilation are timed apart.

    python benchmarks/read.py [--rows 200000] [--width 1280] [--batch 1024] [--repeats 300] [--json]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

started = time.perf_counter()
from kdstore.store import Plan, StoreWriter, embedding_array, open_store  # noqa: E402

IMPORT_SECONDS = time.perf_counter() - started


def write_both(folder: Path, rows: int, width: int) -> float:
    """Write the same float16 rows as a store and as one .npy file; returns the store's write rate in MB/s."""
    plan = Plan.freeze((str(i), ()) for i in range(rows))
    flat = np.lib.format.open_memmap(folder / "flat.npy", "w+", np.float16, (rows, width))
    seconds = 0.0
    with StoreWriter.open(folder / "store", plan=plan, arrays=[embedding_array(plan, "image", width)], identity={}) as writer:
        for unit in writer.pending():
            block = np.random.default_rng(unit.number).standard_normal((len(unit), 1, width), np.float32).astype(np.float16)
            flat[unit.start : unit.stop] = block[:, 0]
            start = time.perf_counter()
            with writer.attempt(unit) as attempt:
                attempt.append("image/embedding", block)
                attempt.index([{"sha256": "", "valid": True, "reason": "", "width": 1, "height": 1}] * len(unit))
            seconds += time.perf_counter() - start
        writer.finalise({})
    flat.flush()
    return rows * width * 2 / seconds / 1e6


def measure(folder: Path, rows: int, width: int, batch: int, repeats: int) -> dict[str, Any]:
    """Return medians in microseconds per batch, and the median of the ratios of each repeat."""
    write_rate = write_both(folder, rows, width)
    store = open_store(folder / "store")
    start = time.perf_counter()
    for begin in range(0, rows, 4096):
        store.gather("image/embedding", np.arange(begin, min(begin + 4096, rows)))
    first_touch = time.perf_counter() - start
    flat = np.load(folder / "flat.npy", mmap_mode="r")
    int(np.asarray(flat).view(np.uint8)[::4096].max())  # map every page, as the first touch has done for the store

    rng = np.random.default_rng(0)
    out = np.empty((batch, width), np.float16)
    ways: dict[str, Callable[[Any], Any]] = {
        "memmap": lambda index: flat[index],
        "store, new array": lambda index: store.gather("image/embedding", index),
        "store, into a buffer": lambda index: store.gather("image/embedding", index, out=out),
    }
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(repeats):
        index = rng.integers(0, rows, batch)
        for way, read in ways.items():
            start = time.perf_counter()
            read(index)
            seconds[way].append(time.perf_counter() - start)
    return {
        "rows": rows,
        "width": width,
        "batch": batch,
        "cores": len(os.sched_getaffinity(0)),
        "load": os.getloadavg()[0],
        "import_s": IMPORT_SECONDS,
        "write_MB_per_s": write_rate,
        "first_touch_GB_per_s": rows * width * 2 / first_touch / 1e9,
        "median_us": {way: statistics.median(times) * 1e6 for way, times in seconds.items()},
        "rate_over_memmap": {
            way: statistics.median(a / b for a, b in zip(seconds["memmap"], times, strict=True)) for way, times in seconds.items() if way != "memmap"
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=300)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder), args.rows, args.width, args.batch, args.repeats)
    if args.json:
        print(json.dumps(found))
        return
    for name, value in found.items():
        print(f"{name}: {', '.join(f'{k} {v:.4g}' for k, v in value.items()) if isinstance(value, dict) else f'{value:.4g}'}")


if __name__ == "__main__":
    main()

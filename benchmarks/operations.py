"""Statistics and recoding of a store far larger than memory: MB/s and the peak of anonymous memory, each in a process of its own.

A store of float16 embeddings of the given size is written; `stats` and `recode` (to zstd) then run in a child whose RssAnon is
sampled every 10 ms: what it has allocated, without the pages of mapped shards, which the kernel takes back at will.
`imports` is what the child has before it opens the store. The rate counts the bytes of the array once.

    python benchmarks/operations.py [--mb 2500] [--width 1280] [--workers 2] [--folder .] [--json]
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import dask
import numpy as np

from kdstore.store import Encoding, Plan, StoreWriter, embedding_array, open_store, recode_store, store_stats, verify_store

LIMIT_MB = 256
BLOCK_ROWS = 4096


def make_store(folder: Path, megabytes: int, width: int) -> None:
    """Write a store of about `megabytes` of embeddings, each 4096 rows the first ones again."""
    rows = megabytes * 1_000_000 // (2 * width)
    plan = Plan.freeze((f"{i:012}", ()) for i in range(rows))
    block = np.random.default_rng(0).standard_normal((BLOCK_ROWS, 1, width), np.float32).astype(np.float16)
    info = {"sha256": "0" * 64, "valid": True, "reason": "", "width": 224, "height": 224}
    with StoreWriter.open(folder, plan=plan, arrays=[embedding_array(plan, "image", width)], identity={}) as writer:
        for unit in writer.pending():
            with writer.attempt(unit) as attempt:
                for start in range(0, len(unit), BLOCK_ROWS):
                    attempt.append("image/embedding", block[: len(unit) - start])
                attempt.index([info] * len(unit))
        writer.finalise({})


def measure(operation: str, folder: Path, workers: int) -> dict[str, Any]:
    """Run one operation; to be called in a fresh process."""
    imports, peak, ended = _anonymous_mb(), 0.0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not ended.wait(0.01):
            peak = max(peak, _anonymous_mb())

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.perf_counter()
    try:
        with dask.config.set(num_workers=workers):
            if operation == "stats":
                store_stats(folder)
            else:
                recode_store(folder, folder.with_name("recoded"), Encoding(codec="zstd"))
    finally:
        ended.set()
        watcher.join()
    seconds = time.perf_counter() - started
    spec = open_store(folder).arrays["image/embedding"]
    megabytes = spec.shape[0] * spec.row_bytes / 1e6
    return {"operation": operation, "MB": megabytes, "seconds": seconds, "MB_per_s": megabytes / seconds, "imports_MB": imports, "peak_MB": peak}


def _anonymous_mb() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mb", type=int, default=2500, help="size of the array in MB")
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--workers", type=int, default=2, help="threads of dask")
    parser.add_argument("--folder", type=Path, help="where the stores are written; default: the folder for temporary files")
    parser.add_argument("--json", action="store_true", help="print a JSON object per operation")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure[0], Path(args.measure[1]), args.workers)))
        return
    folder = Path(tempfile.mkdtemp(dir=args.folder))
    try:
        make_store(folder / "store", args.mb, args.width)
        for operation in ("stats", "recode"):
            command = [sys.executable, __file__, "--measure", operation, str(folder / "store"), "--workers", str(args.workers)]
            line = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
            line["below_limit"] = line["peak_MB"] < LIMIT_MB
            print(json.dumps(line) if args.json else ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in line.items()), flush=True)
        assert verify_store(folder / "recoded").ok
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()

"""Verifying a store beside plain sha256 of the same files on all cores, with a warm page cache, in turns in one run.

The ratio is the median over the repeats of how long hashing takes over how long `verify_store` takes, which does the same and looks at the structure too.
Embeddings in units of the usual 16,384 rows (shards of 42 MB) and tokens in shards of 0.9 GB are measured; a sample of 5 % is timed apart.
Memory is how far the process's own rose while it verified.

    python benchmarks/verify.py [--megabytes 2000] [--repeats 9] [--json]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from kdstore.store import ArraySpec, Plan, StoreWriter, embedding_array, token_array, verify_store

CORES = len(os.sched_getaffinity(0))


def write_store(folder: Path, plan: Plan, spec: ArraySpec) -> Path:
    """Write one array of random bits."""
    rng = np.random.default_rng(0)
    with StoreWriter.open(folder, plan=plan, arrays=[spec], identity={}) as writer:
        for unit in writer.pending():
            with writer.attempt(unit) as attempt:
                for _ in range(len(unit) // 64):
                    attempt.append(spec.name, rng.integers(0, 30000, (64, 1, *spec.row_shape), np.uint16).view(np.float16))
                attempt.index([{"sha256": "", "valid": True, "reason": "", "width": 1, "height": 1}] * len(unit))
        writer.finalise({})
    return folder


def plain_sha256(folder: Path) -> None:
    """Hash every file of a folder on all cores, the largest first."""

    def digest(path: Path) -> str:
        with open(path, "rb") as f:
            return hashlib.file_digest(f, "sha256").hexdigest()

    files = sorted((path for path in folder.rglob("*") if path.is_file()), key=lambda path: -path.stat().st_size)
    with ThreadPoolExecutor(CORES) as pool:
        list(pool.map(digest, files))


def seconds_of(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def anonymous_megabytes() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


def rise_of(work: Callable[[], Any]) -> float:
    """Return how many MB of anonymous memory the process took beyond what it had, at its highest."""
    before, highest, ended = anonymous_megabytes(), 0.0, threading.Event()

    def watch() -> None:
        nonlocal highest
        while not ended.wait(0.005):
            highest = max(highest, anonymous_megabytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        work()
    finally:
        ended.set()
        watcher.join()
    return max(0.0, highest - before)


def measure(folder: Path, repeats: int) -> dict[str, Any]:
    """Verify and hash in turns, each first in every second repeat."""
    ways: dict[str, Callable[[], Any]] = {"verify": lambda: verify_store(folder), "sha256": lambda: plain_sha256(folder)}
    report = verify_store(folder)
    if not report.ok or report.read_bytes != report.num_bytes:
        raise SystemExit("the store is not whole")
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(repeats):
        for name in (sorted, lambda names: sorted(names, reverse=True))[repeat % 2](ways):
            taken[name].append(seconds_of(ways[name]))
    sampled = verify_store(folder, sample="5%", seed=0)
    return {
        "files": report.num_files,
        "MB": report.num_bytes / 1e6,
        "ratio_to_sha256": statistics.median(b / a for a, b in zip(taken["verify"], taken["sha256"], strict=True)),
        "MB_per_s": {name: report.num_bytes / statistics.median(times) / 1e6 for name, times in taken.items()},
        "memory_MB": rise_of(ways["verify"]),
        "sample_5_percent": {"s": seconds_of(lambda: verify_store(folder, sample="5%", seed=0)), "share_read": sampled.read_bytes / sampled.num_bytes},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=2000, help="of each of the two stores")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    found: dict[str, Any] = {"cores": CORES, "load": os.getloadavg()[0]}
    with tempfile.TemporaryDirectory() as name:
        for what, unit_rows, make, row_bytes in (
            ("embeddings", 16384, lambda plan: embedding_array(plan, "image", 1280), 2560),
            ("tokens", 1024, lambda plan: token_array(plan, "image", 256, 1664), 851_968),
        ):
            rows = -(-args.megabytes * 10**6 // row_bytes // 64) * 64
            plan = Plan.freeze(((str(i), ()) for i in range(rows)), unit_rows=unit_rows)
            found[what] = measure(write_store(Path(name) / what, plan, make(plan)), args.repeats)
    if args.json:
        print(json.dumps(found))
        return
    print(f"{found['cores']} cores, load {found['load']:.1f}")
    for what in ("embeddings", "tokens"):
        line, sample = found[what], found[what]["sample_5_percent"]
        print(
            f"{what}: {line['files']} files, {line['MB']:,.0f} MB, verify at {line['ratio_to_sha256']:.2f} of sha256 "
            f"({line['MB_per_s']['verify']:,.0f} and {line['MB_per_s']['sha256']:,.0f} MB/s), {line['memory_MB']:.0f} MB of memory; "
            f"--sample 5% {sample['s']:.2f} s, {100 * sample['share_read']:.1f} % read"
        )


if __name__ == "__main__":
    main()

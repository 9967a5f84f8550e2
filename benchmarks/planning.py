"""Opening a source and freezing its plan, each in a fresh process: seconds and memory against the number of pairs.

Kinds: `tars` (10 shards as img2dataset lays them out, pictures of a few bytes, index kept), `csv`, and the built-in `scenes`; tables and tars are opened twice,
as what is read for the first time is converted and kept. Memory is anonymous memory above that after the imports (pages of mapped files can be dropped and are
not counted): the highest while the source was opened and while the plan was frozen, and what both hold in the end.

    python benchmarks/planning.py [--pairs 10000 1000000] [--kinds tars csv scenes] [--json]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from kdstore.data.sources import open_source
from kdstore.store import Plan

SHARDS = 10


def caption(i: int) -> str:
    return f"a photograph of subject {i} that was taken on a rainy day in town {i % 977}"


def member(name: str, content: bytes) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    return info.tobuf() + content + bytes(-len(content) % tarfile.BLOCKSIZE)


def write_tars(folder: Path, pairs: int) -> str:
    for shard in range(SHARDS):
        with open(folder / f"{shard:05d}.tar", "wb") as f:
            for i in range(shard * pairs // SHARDS, (shard + 1) * pairs // SHARDS):
                f.write(member(f"{i:09d}.jpg", b"no picture") + member(f"{i:09d}.txt", caption(i).encode()))
            f.write(bytes(2 * tarfile.BLOCKSIZE))
    return str(folder)


def write_csv(folder: Path, pairs: int) -> str:
    with open(folder / "pairs.csv", "w") as f:
        f.write("path,caption\n")
        f.writelines(f"{i:09d}.jpg,{caption(i)}\n" for i in range(pairs))
    return str(folder / "pairs.csv")


WRITERS = {"tars": write_tars, "csv": write_csv, "scenes": lambda folder, pairs: f"scenes:{pairs}"}


def anonymous() -> int:
    """Return this process's anonymous memory in bytes."""
    line = next(text for text in Path("/proc/self/status").read_text().splitlines() if text.startswith("RssAnon"))
    return 1024 * int(line.split()[1])


def measure(spec: str) -> dict[str, Any]:
    """Open and plan in this process."""
    start = anonymous()
    peaks, done = [start], threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            peaks[-1] = max(peaks[-1], anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.perf_counter()
    source = open_source(spec)
    opened, peaks = time.perf_counter() - began, [*peaks, anonymous()]
    began = time.perf_counter()
    plan = Plan.freeze((source.key(i), source.captions(i)) for i in range(len(source)))
    planned = time.perf_counter() - began
    done.set()
    watcher.join()
    return {
        "pairs": plan.num_images,
        "open_s": round(opened, 2),
        "plan_s": round(planned, 2),
        "open_peak_mb": round((peaks[0] - start) / 1e6, 1),
        "plan_peak_mb": round((peaks[-1] - start) / 1e6, 1),
        "held_mb": round((anonymous() - start) / 1e6, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, nargs="+", default=[10_000, 1_000_000])
    parser.add_argument("--kinds", nargs="+", choices=WRITERS, default=list(WRITERS))
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure)))
        return
    for kind in args.kinds:
        for pairs in args.pairs:
            with tempfile.TemporaryDirectory() as folder:
                spec = WRITERS[kind](Path(folder), pairs)
                for pass_ in ("first",) if kind == "scenes" else ("first", "again"):
                    output = subprocess.run([sys.executable, __file__, "--measure", spec], check=True, capture_output=True, text=True).stdout
                    found = {"kind": kind, "pass": pass_, **json.loads(output)}
                    print(json.dumps(found) if args.json else "  ".join(f"{name} {value}" for name, value in found.items()), flush=True)


if __name__ == "__main__":
    main()

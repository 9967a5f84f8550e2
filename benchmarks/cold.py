"""Reading with a cold page cache: in order, shuffled within windows, and at random, beside what the disk gives to a plain read of the same files.

Before each way the files' pages are dropped (posix_fadvise), and mincore is asked whether they are gone. Rows are read through `gather_ahead`, first touch
and its crc32c included. Of embeddings a random read fetches a chunk of 16 rows for one of them: how many bytes that makes per byte of rows is said too. For a
store larger than memory give more --rows. The folder must be on the disk in question: that of temporary files may be memory.

    python benchmarks/cold.py --folder DIR [--rows 400000] [--window-mb 256] [--json]
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import mmap
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from read import BLOCK_ROWS, numbered, write_store

from kdstore.store import ArraySpec, Batches, Order, embedding_array, gather_ahead, open_store, token_array


def repeated(rows: int, unit_rows: int, width: int) -> Iterator[npt.NDArray[np.float16]]:
    """Yield blocks of random numbers, all the same: a disk does not mind, and drawing them would take longer than writing."""
    block = np.random.default_rng(0).standard_normal((unit_rows, width), np.float32).astype(np.float16)
    for start in range(0, rows, unit_rows):
        yield block[: rows - start]


def drop(files: list[Path]) -> float:
    """Drop the files' pages from memory; returns the share of them that stayed."""
    resident = pages = 0
    for path in files:
        fd = os.open(path, os.O_RDONLY)
        os.fdatasync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        with mmap.mmap(fd, 0, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE) as mapped:
            states = (ctypes.c_ubyte * -(-len(mapped) // mmap.PAGESIZE))()
            held = ctypes.c_char.from_buffer(mapped)
            ctypes.CDLL(None).mincore(ctypes.c_void_p(ctypes.addressof(held)), ctypes.c_size_t(len(mapped)), states)
            del held
        os.close(fd)
        resident += int((np.frombuffer(states, np.uint8) & 1).sum())
        pages += len(states)
    return resident / pages


def plain_read(files: list[Path]) -> int:
    """Read whole files as dd does, 1 MiB at a time; returns bytes."""
    buffer, total = bytearray(1 << 20), 0
    for path in files:
        with open(path, "rb", buffering=0) as f:
            while read := f.readinto(buffer):
                total += read
    return total


def plain_random(files: list[Path], size: int, count: int) -> int:
    """Read pieces of `size` bytes at random places, one after the other; returns bytes."""
    rng, total = np.random.default_rng(1), 0
    descriptors = [os.open(path, os.O_RDONLY) for path in files]
    for fd in rng.choice(descriptors, count).tolist():
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
        total += len(os.pread(fd, size, int(rng.integers(0, max(os.fstat(fd).st_size - size, 1)))))
    for fd in descriptors:
        os.close(fd)
    return total


def through(store: Path, name: str, requests: Iterable[list[int]], coming: Iterable[list[int]] = ()) -> int:
    """Read batches of rows ahead from a store opened afresh; returns the bytes of the rows."""
    ahead = gather_ahead(open_store(store), ({name: rows} for rows in requests), coming=({name: rows} for rows in coming))
    return sum(arrays[name].nbytes for arrays in ahead)


def measure(store: Path, spec: ArraySpec, batch: int, window: int, random_batches: int, repeats: int) -> dict[str, Any]:
    """Read in all ways, in turn; returns their median rates in MB/s of rows."""
    files = sorted(path for path in (store / spec.name / "c").rglob("*") if path.is_file())
    steps = spec.shape[0] // batch
    in_order = [range(start, start + batch) for start in range(0, steps * batch, batch)]
    windows = Batches(Order.windowed(spec, 0, window), batch, steps)
    random = Batches(Order(spec.shape[0], 0), batch, min(random_batches, steps))
    chunk_bytes = spec.chunk[0] * spec.row_bytes
    ways: dict[str, Callable[[], int]] = {
        "plain read": lambda: plain_read(files),
        "plain reads of a chunk at random": lambda: plain_random(files, chunk_bytes, len(random) * batch),
        "in order": lambda: through(store, spec.name, in_order),
        "windows": lambda: through(store, spec.name, windows),
        "windows, announced": lambda: through(store, spec.name, windows, windows.coming()),
        "random": lambda: through(store, spec.name, random),
        "random, announced": lambda: through(store, spec.name, random, random.coming()),
    }
    rates: dict[str, list[float]] = {name: [] for name in ways}
    stayed = 0.0
    for _ in range(repeats):
        for name, way in ways.items():
            stayed = max(stayed, drop(files))
            start = time.perf_counter()
            rates[name].append(way() / (time.perf_counter() - start) / 1e6)
    return {
        "MB_per_s": {name: statistics.median(values) for name, values in rates.items()},
        "random_bytes_fetched_per_byte": len({row // spec.chunk[0] for rows in random for row in rows}) * spec.chunk[0] / (len(random) * batch),
        "in_memory_before": stayed,
        "GB": sum(path.stat().st_size for path in files) / 1e9,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where to write, on the disk in question")
    parser.add_argument("--rows", type=int, default=400_000, help="embeddings of 1280 float16; a token grid of 256 x 1664 for every 400 of them")
    parser.add_argument("--window-mb", type=int, default=256)
    parser.add_argument("--random-batches", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    found: dict[str, Any] = {"memory_GB": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, "window_MB": args.window_mb}
    for what, rows, batch in (("embeddings", args.rows, 1024), ("tokens", args.rows // 400, 32)):
        with tempfile.TemporaryDirectory(dir=args.folder) as name:
            plan = numbered(rows, BLOCK_ROWS if what == "embeddings" else 64)
            spec = embedding_array(plan, "image", 1280) if what == "embeddings" else token_array(plan, "image", 256, 1664)
            write_store(Path(name) / what, plan, spec, repeated(rows, plan.unit_rows, math.prod(spec.row_shape)))
            found[what] = measure(Path(name) / what, spec, batch, args.window_mb << 20, args.random_batches, args.repeats)
    if args.json:
        print(json.dumps(found))
        return
    for what in ("embeddings", "tokens"):
        rates = found[what]["MB_per_s"]
        print(f"\n{what}, {found[what]['GB']:.2f} GB, {found[what]['in_memory_before']:.1%} in memory at worst; windows of {args.window_mb} MB")
        print("| way | MB/s of rows | of a plain read |\n| --- | ---: | ---: |")
        for way, rate in rates.items():
            print(f"| {way} | {rate:,.0f} | {rate / rates['plain read']:.2f} |")
        print(f"\nat random, {found[what]['random_bytes_fetched_per_byte']:.1f} bytes of chunks per byte of rows")


if __name__ == "__main__":
    main()

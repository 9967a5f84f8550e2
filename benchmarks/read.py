"""Reading random rows with a warm page cache: `Store.gather` beside np.memmap and the readers of others, all in one run.

Every repeat times each way in turn, so that whatever else the machine does hits all; a ratio is the median over the repeats. A batch of every way is
compared with what was written. The first touch of the store (every chunk's crc32c) and the import with its compilation are timed apart. Then token grids
against a copy of as many bytes, and how a gather grows with its rows, in time and in memory beyond the result.

    pip install -e '.[benchmark]'
    python benchmarks/read.py [--rows 200000] [--width 1280] [--batch 1024] [--repeats 300] [--json]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

started = time.perf_counter()
from peers import PEERS, Read  # noqa: E402

from kdstore.store import ArraySpec, Plan, Store, StoreWriter, embedding_array, open_store, token_array  # noqa: E402

IMPORT_SECONDS = time.perf_counter() - started
PEER_EVERY = 50  # repeats of our own for one of a peer: a peer takes up to a thousand times as long, and leaves a cold cache and a sleeping core
BLOCK_ROWS = 4096


def blocks(rows: int, width: int) -> Iterator[npt.NDArray[np.float16]]:
    """Yield the same `rows` x `width` random numbers each time, in blocks."""
    for start in range(0, rows, BLOCK_ROWS):
        yield np.random.default_rng(start).standard_normal((min(BLOCK_ROWS, rows - start), width), np.float32).astype(np.float16)


def write_store(folder: Path, plan: Plan, spec: ArraySpec, rows: Iterator[npt.NDArray[Any]]) -> Store:
    """Write one array whose blocks are the units."""
    with StoreWriter.open(folder, plan=plan, arrays=[spec], identity={}) as writer:
        for unit, block in zip(writer.pending(), rows, strict=True):
            with writer.attempt(unit) as attempt:
                attempt.append(spec.name, block.reshape(len(unit), 1, *spec.row_shape))
                attempt.index([{"sha256": "", "valid": True, "reason": "", "width": 1, "height": 1}] * len(unit))
        writer.finalise({})
    return open_store(folder)


def numbered(rows: int, unit_rows: int = BLOCK_ROWS) -> Plan:
    return Plan.freeze(((str(i), ()) for i in range(rows)), unit_rows=unit_rows)


def seconds_of(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def random_rows(folder: Path, rows: int, width: int, batch: int, repeats: int) -> dict[str, Any]:
    """Measure all ways; returns microseconds per batch, and how many times longer than ours into a buffer each takes."""
    plan = numbered(rows)
    writing = seconds_of(lambda: write_store(folder / "store", plan, embedding_array(plan, "image", width), blocks(rows, width)))
    generating = seconds_of(lambda: [None for _ in blocks(rows, width)])
    store = open_store(folder / "store")
    first_touch = seconds_of(lambda: [store.gather("image/embedding", np.arange(i, min(i + BLOCK_ROWS, rows))) for i in range(0, rows, BLOCK_ROWS)])
    flat = np.lib.format.open_memmap(folder / "flat.npy", "w+", np.float16, (rows, width))
    for i, block in enumerate(blocks(rows, width)):
        flat[i * BLOCK_ROWS :][: len(block)] = block
    flat.flush()
    flat = np.load(folder / "flat.npy", mmap_mode="r")
    int(np.asarray(flat).view(np.uint8)[:, ::4096].max())  # map every page, as the first touch has done for the store

    out, taken = np.empty((batch, width), np.float16), np.empty((batch, width), np.float16)
    ours: dict[str, Read] = {
        "kdstore, into a buffer": lambda index: store.gather("image/embedding", index, out=out),
        "kdstore, new array": lambda index: store.gather("image/embedding", index),
        "np.memmap": lambda index: flat[index],
        "np.memmap, np.take into a buffer": lambda index: np.take(flat, index, axis=0, out=taken, mode="clip"),
    }
    peers, missing = open_peers(folder, rows, width)
    rng = np.random.default_rng(0)
    index = rng.integers(0, rows, batch)
    for name, read in {**ours, **peers}.items():
        if not np.array_equal(read(index), flat[index]):
            raise SystemExit(f"{name} returns other rows")
    taken_s: dict[str, list[float]] = {name: [] for name in (*ours, *peers)}
    ratios: dict[str, list[float]] = {name: [] for name in (*ours, *peers)}
    for repeat in range(repeats):
        ways = list((ours | peers if repeat % PEER_EVERY == 0 else ours).items())
        now = {}
        for name, read in ways[repeat % len(ways) :] + ways[: repeat % len(ways)]:  # all take turns in going first
            index = rng.integers(0, rows, batch)  # to each its own, else the next finds some rows in the processor's cache
            start = time.perf_counter()
            read(index)
            now[name] = time.perf_counter() - start
        for name, seconds in now.items():
            taken_s[name].append(seconds)
            ratios[name].append(seconds / now["kdstore, into a buffer"])
    return {
        "ratio_to_memmap": statistics.median(ratios["np.memmap"]),
        "median_us": {name: statistics.median(times) * 1e6 for name, times in taken_s.items()},
        "times_ours": {name: statistics.median(values) for name, values in ratios.items()},
        "not_installed": missing,
        "first_touch_GB_per_s": rows * width * 2 / first_touch / 1e9,
        "write_MB_per_s": rows * width * 2 / (writing - generating) / 1e6,
    }


def open_peers(folder: Path, rows: int, width: int) -> tuple[dict[str, Read], list[str]]:
    """Write the rows in every peer's format; returns the readers, and the names of peers that are not there."""
    readers, missing = {}, []
    for name, open_peer in PEERS.items():
        (folder / name).mkdir()
        try:
            readers[name] = open_peer(folder / name, lambda: blocks(rows, width), folder / "store")
        except ImportError as e:
            missing.append(f"{name} ({e})")
    return readers, missing


def token_grids(folder: Path, samples: int, batch: int, repeats: int, tokens: int = 256, width: int = 1664) -> dict[str, Any]:
    """Gather batches of token grids, and copy as many bytes of memory; returns microseconds and the median rate over that of the copy."""
    plan = numbered(samples, 64)
    grids = np.random.default_rng(0).standard_normal((samples, tokens * width), np.float32).astype(np.float16)
    store = write_store(folder, plan, token_array(plan, "image", tokens, width), (grids[start : start + 64] for start in range(0, samples, 64)))
    first_touch = seconds_of(lambda: store.gather("image/tokens", np.arange(samples)))
    out, copy = (np.empty((batch, tokens, width), np.float16) for _ in range(2))
    rng = np.random.default_rng(0)
    read, copied = [], []
    for _ in range(repeats):
        index, start = rng.integers(0, samples, batch), int(rng.integers(0, samples - batch + 1))
        read.append(seconds_of(lambda index=index: store.gather("image/tokens", index, out=out)))  # type: ignore[misc]
        copied.append(seconds_of(lambda start=start: np.copyto(copy, grids[start : start + batch].reshape(copy.shape))))  # type: ignore[misc]
    return {
        "batch": batch,
        "median_us": {"kdstore": statistics.median(read) * 1e6, "np.copyto": statistics.median(copied) * 1e6},
        "rate_over_copy": statistics.median(b / a for a, b in zip(read, copied, strict=True)),
        "first_touch_GB_per_s": grids.nbytes / first_touch / 1e9,
    }


def growth(folder: Path, rows: int, width: int = 16) -> dict[int, dict[str, float]]:
    """Gather more and more random rows at once; returns nanoseconds and bytes beyond the result, both per row."""
    plan = numbered(rows)
    store = write_store(folder, plan, embedding_array(plan, "image", width), blocks(rows, width))
    store.gather("image/embedding", np.arange(rows))
    found = {}
    for count in sorted({n for n in (10_000, 100_000, 1_000_000) if n < rows} | {rows}):
        index, out = np.random.default_rng(count).integers(0, rows, count), np.empty((count, width), np.float16)
        nanoseconds = [seconds_of(lambda index=index, out=out: store.gather("image/embedding", index, out=out)) / count * 1e9 for _ in range(5)]  # type: ignore[misc]
        tracemalloc.start()
        store.gather("image/embedding", index, out=out)
        found[count] = {"ns_per_row": statistics.median(nanoseconds), "extra_bytes_per_row": tracemalloc.get_traced_memory()[1] / count}
        tracemalloc.stop()
    return found


def show(found: dict[str, Any]) -> None:
    """Print one table, then what is apart from it."""
    print(f"{found['rows']:,} x {found['width']} float16, random batches of {found['batch']}, {found['cores']} cores, load {found['load']:.1f}\n")
    print("| way | us per batch | times ours |\n| --- | ---: | ---: |")
    for name, value in found["random_rows"]["times_ours"].items():
        print(f"| {name} | {found['random_rows']['median_us'][name]:,.0f} | {value:.2f} |")
    for name in found["random_rows"]["not_installed"]:
        print(f"| {name} | not installed | |")
    tokens = found["token_grids"]
    print(f"\ntokens, {tokens['batch']} grids of 256 x 1664: {tokens['rate_over_copy']:.2f} of the rate of a copy", end="; ")
    print(", ".join(f"{name} {value:,.0f} us" for name, value in tokens["median_us"].items()))
    print(f"first touch: embeddings {found['random_rows']['first_touch_GB_per_s']:.2f}, tokens {tokens['first_touch_GB_per_s']:.2f} GB/s; ", end="")
    print(f"import and compilation {found['import_s']:.2f} s; writing {found['random_rows']['write_MB_per_s']:.0f} MB/s")
    for rows, grown in found["growth"].items():
        print(f"{rows:,} rows of 16 at once: {grown['ns_per_row']:.0f} ns and {grown['extra_bytes_per_row']:.1f} bytes of memory per row beyond the result")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=300)
    parser.add_argument("--grids", type=int, default=512, help="token grids, 0.85 MB each")
    parser.add_argument("--grow-to", type=int, default=4_000_000, help="rows of the largest gather")
    parser.add_argument("--folder", type=Path, help="where to write; default: the folder for temporary files")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        found: dict[str, Any] = {
            "rows": args.rows,
            "width": args.width,
            "batch": args.batch,
            "cores": len(os.sched_getaffinity(0)),
            "load": os.getloadavg()[0],
            "import_s": IMPORT_SECONDS,
            "random_rows": random_rows(folder, args.rows, args.width, args.batch, args.repeats),
            "token_grids": token_grids(folder / "tokens", args.grids, 32, args.repeats // 4),
            "growth": growth(folder / "growth", args.grow_to),
        }
    found = {"ratio_to_memmap": found["random_rows"]["ratio_to_memmap"], **found}
    if args.json:
        print(json.dumps(found))
    else:
        show(found)


if __name__ == "__main__":
    main()

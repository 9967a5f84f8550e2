"""Pulling a store from a local web server beside a plain parallel download with hashing of the same files, in turns in one run.

The plain download is http.client in as many threads: it reads a body of known length into a buffer, hashes it and writes it, and checks nothing. The server
is a process of its own and sends with sendfile. Ratios are medians over the repeats of the plain download's time over that of `pull_store`, which ends with a
store on the disk: `plain` leaves its files to the page cache, `synced` calls fsync on each, as a pull does.

    python benchmarks/pull.py [--megabytes 1000] [--repeats 7] [--parallel 8] [--json]
"""

from __future__ import annotations

import argparse
import hashlib
import http.client
import http.server
import json
import multiprocessing
import os
import shutil
import socket
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from kdstore.store import Plan, StoreWriter, embedding_array, open_store
from kdstore.store.share import pull_store

BUFFER_BYTES = 1 << 20


def write_store(folder: Path, megabytes: int) -> Path:
    """Write a store of random bits in shards of 42 MB: embeddings of 1,280 numbers in units of 16,384 rows."""
    plan = Plan.freeze(((str(i), ()) for i in range(megabytes * 10**6 // 2560)), unit_rows=16384)
    spec, rng = embedding_array(plan, "image", 1280), np.random.default_rng(0)
    with StoreWriter.open(folder, plan=plan, arrays=[spec], identity={}) as writer:
        for unit in writer.pending():
            with writer.attempt(unit) as attempt:
                attempt.append(spec.name, rng.integers(0, 30000, (len(unit), 1, 1280), np.uint16).view(np.float16))
                attempt.index([{"sha256": "", "valid": True, "reason": "", "width": 1, "height": 1}] * len(unit))
        writer.finalise({})
    return folder


def serve(root: Path, listener: socket.socket) -> None:
    class Handler(http.server.SimpleHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def __init__(self, *args: Any) -> None:
            super().__init__(*args, directory=str(root))

        def log_message(self, *args: object) -> None:
            pass

        def copyfile(self, source: Any, outputfile: Any) -> None:
            self.wfile.flush()
            self.connection.sendfile(source)

    server = http.server.ThreadingHTTPServer(listener.getsockname(), Handler, bind_and_activate=False)
    server.socket.close()
    server.socket = listener
    server.serve_forever()


def plain_download(port: int, files: dict[str, int], target: Path, parallel: int, sync: bool) -> None:
    """Fetch, hash and write files in threads, the largest first, one connection for each."""

    def fetch(path: str) -> str:
        connection = http.client.HTTPConnection("127.0.0.1", port)
        connection.request("GET", f"/{path}")
        answer, sha256, buffer = connection.getresponse(), hashlib.sha256(), memoryview(bytearray(BUFFER_BYTES))
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        with open(target / path, "wb", buffering=0) as f:
            while count := answer.readinto(buffer):
                sha256.update(buffer[:count])
                f.write(buffer[:count])
            if sync:
                os.fsync(f.fileno())
        connection.close()
        return sha256.hexdigest()

    with ThreadPoolExecutor(parallel) as pool:
        list(pool.map(fetch, sorted(files, key=lambda path: -files[path])))


def seconds_of(work: Callable[[], Any], target: Path) -> float:
    shutil.rmtree(target, ignore_errors=True)
    os.sync()
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--parallel", type=int, default=8)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        store = open_store(write_store(folder / "store", args.megabytes))
        files = {path: int(entry["size"]) for path, entry in store.manifest["files"].items()}
        listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        port, target = listener.getsockname()[1], folder / "target"
        server = multiprocessing.get_context("fork").Process(target=serve, args=(store.path, listener), daemon=True)
        server.start()
        ways: dict[str, Callable[[], Any]] = {
            "pull": lambda: pull_store(f"http://127.0.0.1:{port}", target, parallel=args.parallel),
            "plain": lambda: plain_download(port, files, target, args.parallel, sync=False),
            "synced": lambda: plain_download(port, files, target, args.parallel, sync=True),
        }
        for work in ways.values():
            seconds_of(work, target)
        taken: dict[str, list[float]] = {way: [] for way in ways}
        for repeat in range(args.repeats):
            for way in sorted(ways, reverse=bool(repeat % 2)):
                taken[way].append(seconds_of(ways[way], target))
        server.terminate()
    found = {
        "cores": len(os.sched_getaffinity(0)),
        "load": os.getloadavg()[0],
        "files": len(files),
        "MB": store.num_bytes / 1e6,
        "ratio_to": {way: statistics.median(a / b for a, b in zip(taken[way], taken["pull"], strict=True)) for way in ("plain", "synced")},
        "ratios": {way: sorted(round(a / b, 2) for a, b in zip(taken[way], taken["pull"], strict=True)) for way in ("plain", "synced")},
        "MB_per_s": {way: store.num_bytes / 1e6 / statistics.median(times) for way, times in taken.items()},
    }
    if args.json:
        print(json.dumps(found))
        return
    print(f"{found['cores']} cores, load {found['load']:.1f}, {found['files']} files, {found['MB']:,.0f} MB, {args.parallel} at once")
    print(", ".join(f"{way} {rate:,.0f} MB/s" for way, rate in found["MB_per_s"].items()))
    for way, ratio in found["ratio_to"].items():
        print(f"pull at {ratio:.2f} of {way} parallel downloads with hashing (repeats {found['ratios'][way]})")


if __name__ == "__main__":
    main()

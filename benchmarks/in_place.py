"""A store used where it is, from a local web server that counts what it is asked for.

First eight processes with one empty cache read all rows, each in an order of its own: every file must be asked for once; the ratio is the time of a
pull with eight transfers over theirs. Then `distill` trains a small student on scenes, from the folder, from the address with an empty cache and with a
full one, in turns: ratios of steps per second to those from the folder. The time of the steps counts, with their waits for data; opening and joining do not.

    python benchmarks/in_place.py [--megabytes 500] [--steps 200] [--bandwidth MB_PER_S] [--repeats 5] [--json]
"""

from __future__ import annotations

import argparse
import functools
import http.server
import json
import multiprocessing
import os
import shutil
import socket
import statistics
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from pull import write_store

from kdstore.data.scenes import Scenes
from kdstore.distill.config import DistillConfig
from kdstore.distill.train import distill
from kdstore.store import Cache, Plan, StoreWriter, embedding_array, open_store
from kdstore.store.share import pull_store

PROCESSES = 8
BLOCK_BYTES = 1 << 18
STUDENT = "scenes-T"


def write_scenes(folder: Path, images: int, dim: int = 1280) -> Path:
    """Write a store of random embeddings of scenes."""
    source, rng = Scenes("train", images), np.random.default_rng(0)
    plan = Plan.freeze(((source.key(i), source.captions(i)) for i in range(images)), unit_rows=256)
    arrays = [embedding_array(plan, "image", dim), embedding_array(plan, "text", dim)]
    identity = {"teacher": {"name": "noise", "embed_dim": dim, "logit_scale": 100.0, "logit_bias": None}}
    with StoreWriter.open(folder, plan=plan, arrays=arrays, identity=identity) as writer:
        for unit in writer.pending():
            with writer.attempt(unit) as attempt:
                shape = (len(unit), 1, dim) if unit.side == "image" else (len(unit), dim)
                attempt.append(f"{unit.side}/embedding", rng.standard_normal(shape, np.float32).astype(np.float16))
                if unit.side == "image":
                    attempt.index([{"sha256": "", "valid": True, "reason": "", "width": 1, "height": 1}] * len(unit))
        writer.finalise({"source": source.spec})
    return folder


def serve(root: Path, log: Path, listener: socket.socket, bandwidth: float) -> None:
    """Send files, each at `bandwidth` bytes per second at most, and write down what was asked for."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: object) -> None:
            pass

        def send_head(self) -> Any:
            with open(log, "a") as lines:
                lines.write(f"{self.path}\n")
            return super().send_head()

        def copyfile(self, source: Any, outputfile: Any) -> None:
            while block := source.read(BLOCK_BYTES):
                self.wfile.write(block)
                time.sleep(len(block) / bandwidth)

    server = http.server.ThreadingHTTPServer(listener.getsockname(), functools.partial(Handler, directory=str(root)), bind_and_activate=False)
    server.socket.close()
    server.socket = listener
    server.serve_forever()


def read_all(address: str, cache: Cache, seed: int) -> None:
    store = open_store(address, cache)
    order = np.random.default_rng(seed).permutation(store.num_images)
    for start in range(0, len(order), 1024):
        store.gather("image/embedding", order[start : start + 1024])


def eight_processes(address: str, folder: Path, log: Path) -> dict[str, Any]:
    """Let processes read a store through one empty cache."""
    log.unlink(missing_ok=True)
    began = time.perf_counter()
    context = multiprocessing.get_context("fork")
    readers = [context.Process(target=read_all, args=(address, Cache(folder / "eight", 2**40), seed)) for seed in range(PROCESSES)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    seconds = time.perf_counter() - began
    asked = Counter(log.read_text().splitlines())
    shards = [count for path, count in asked.items() if "/c/" in path]
    began = time.perf_counter()
    pull_store(address, folder / "pulled", parallel=8)
    return {
        "ended_well": [reader.exitcode for reader in readers] == [0] * PROCESSES,
        "shards": len(shards),
        "asked_at_most": max(shards),
        "seconds": seconds,
        "pull_over_eight": (time.perf_counter() - began) / seconds,
    }


def steps_per_second(store: str, cache: Path, steps: int) -> float:
    with tempfile.TemporaryDirectory() as out:
        settings: dict[str, Any] = {"student": STUDENT, "loss": "crd", "batch_size": 64, "samples": steps * 64, "device": "cpu", "save_every": 10**9}
        result = distill(DistillConfig(cache=store, cache_folder=str(cache), out=f"{out}/run", **settings))
    return result.steps / result.seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=500)
    parser.add_argument("--images", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--bandwidth", type=float, default=100.0, help="of one transfer, MB per second")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_store(folder / "served/large", args.megabytes)
        scenes = write_scenes(folder / "served/scenes", args.images)
        listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        address, log = f"http://127.0.0.1:{listener.getsockname()[1]}", folder / "log"
        server = multiprocessing.get_context("fork").Process(target=serve, args=(folder / "served", log, listener, args.bandwidth * 1e6), daemon=True)
        server.start()
        eight = eight_processes(f"{address}/large", folder, log)
        rates: dict[str, list[float]] = {"folder": [], "cold": [], "warm": []}
        steps_per_second(str(scenes), folder / "cache", args.steps)
        for _ in range(args.repeats):
            shutil.rmtree(folder / "cache", ignore_errors=True)
            for way, store in (("folder", str(scenes)), ("cold", f"{address}/scenes"), ("warm", f"{address}/scenes")):
                rates[way].append(steps_per_second(store, folder / "cache", args.steps))
        server.terminate()
    found = {
        "cores": len(os.sched_getaffinity(0)),
        "load": os.getloadavg()[0],
        "eight": eight,
        "steps_per_s": {way: statistics.median(found) for way, found in rates.items()},
        "ratio_to_folder": {way: statistics.median(a / b for a, b in zip(rates[way], rates["folder"], strict=True)) for way in ("cold", "warm")},
        "ratios": {way: sorted(round(a / b, 2) for a, b in zip(rates[way], rates["folder"], strict=True)) for way in ("cold", "warm")},
    }
    if args.json:
        print(json.dumps(found))
        return
    print(f"{found['cores']} cores, load {found['load']:.1f}, {args.bandwidth:g} MB/s for each transfer")
    counted = f"{eight['shards']} shards, each asked for at most {eight['asked_at_most']} times"
    print(f"{PROCESSES} processes: {counted}, {eight['seconds']:.1f} s; a pull takes {eight['pull_over_eight']:.2f} of that")
    for way, ratio in found["ratio_to_folder"].items():
        print(f"distill, cache {way}: {found['steps_per_s'][way]:.1f} steps/s, {ratio:.2f} of those from the folder (repeats {found['ratios'][way]})")


if __name__ == "__main__":
    main()

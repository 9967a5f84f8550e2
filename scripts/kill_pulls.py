"""Kill a real pull with signal 9 at many moments and start it again; every few kills let it end, and compare. Exit code 1 if anything differs.

    python scripts/kill_pulls.py --kills 100 [--megabytes 32] [--every 5] [--json]

A web server of this process sends a store of random features; `kdstore store pull` runs in a process of its own, forked from this one. The moments are spread
evenly over the bytes that the server has sent. What the server sends in all is compared with the bytes of one pull: the rest was in flight when a pull died.
"""

from __future__ import annotations

import argparse
import http.server
import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from pathlib import Path

import forked
import numpy as np

from kdstore.errors import IncompleteStore, StoreNotFound
from kdstore.store import Plan, StoreWriter, embedding_array, open_store, verify_store
from kdstore.store import share as _imported_before_the_first_fork  # noqa: F401

BLOCK = 1 << 16
PARALLEL = 8


class Server:
    """Serves a folder with ranges, in blocks with a pause, and counts the bytes that it has sent of files that the manifest lists."""

    def __init__(self, root: Path, listed: set[str]) -> None:
        self.sent = 0
        self._lock = threading.Lock()
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args: object) -> None:
                pass

            def do_GET(self) -> None:
                file = root / self.path.lstrip("/")
                if not file.is_file():
                    return self.send_error(404)
                size, start = file.stat().st_size, int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").rstrip("-"))
                self.send_response(206 if start else 200)
                self.send_header("Content-Length", str(size - start))
                if start:
                    self.send_header("Content-Range", f"bytes {start}-{size - 1}/{size}")
                self.end_headers()
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BLOCK)
                with open(file, "rb") as f:
                    f.seek(start)
                    while block := f.read(BLOCK):
                        self.wfile.write(block)
                        if self.path.lstrip("/") in listed:
                            server.count(len(block))
                        time.sleep(0.001)

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.http.handle_error = lambda *who: None  # type: ignore[method-assign]  # clients that were killed
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def count(self, size: int) -> None:
        with self._lock:
            self.sent += size


def write_store(folder: Path, megabytes: int) -> Path:
    """Write a store of random image embeddings in shards of 1 MB."""
    rows = megabytes << 10
    plan = Plan.freeze(((str(i), ()) for i in range(rows)), unit_rows=1024)
    spec = embedding_array(plan, "image", 512)
    rng = np.random.default_rng(0)
    with StoreWriter.open(folder, plan=plan, arrays=[spec], identity={}) as writer:
        for unit in writer.pending():
            with writer.attempt(unit) as attempt:
                attempt.append(spec.name, rng.integers(0, 30000, (len(unit), 1, 512), np.uint16).view(np.float16))
                attempt.index([{"sha256": "", "valid": True, "reason": "", "width": 1, "height": 1}] * len(unit))
        writer.finalise({})
    return folder


def start(url: str, target: Path, log: Path) -> int:
    return forked.start(["store", "pull", url, str(target), "--parallel", str(PARALLEL)], log)


def is_half(target: Path, digest: str) -> bool:
    """Tell whether a killed pull left something that opens and is not the store."""
    try:
        return open_store(target).digest != digest or not verify_store(target).ok
    except (IncompleteStore, StoreNotFound):
        return False


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--every", type=int, default=5, help="kills of one pull before it may end")
    parser.add_argument("--megabytes", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="kill-pulls-"))
    log, rng = folder / "log.txt", random.Random(asked.seed)
    store = open_store(write_store(folder / "store", asked.megabytes))
    server = Server(store.path, set(store.manifest["files"]))
    url = f"http://127.0.0.1:{server.http.server_port}"
    killed, ended, half, same, excess = 0, 0, 0, 0, []
    for pull in range(-(-asked.kills // asked.every)):
        target, before = folder / f"pull-{pull}", server.sent
        for kill in range(asked.every):
            at = before + store.num_bytes * (kill + rng.random()) / asked.every
            pid = start(url, target, log)
            while server.sent < at and os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
                time.sleep(0.0005)
            time.sleep(0.02 * rng.random())
            os.kill(pid, signal.SIGKILL)
            killed, ended = (killed + 1, ended) if forked.finish(pid) == -signal.SIGKILL else (killed, ended + 1)
            time.sleep(0.05)  # the server ends what it was sending
            half += is_half(target, store.digest)
        if (
            forked.finish(start(url, target, log)) == 0
            and open_store(target).digest == store.digest
            and verify_store(target).ok
            and not (target / "_build").exists()
        ):
            same += 1
        else:
            print(f"Pull {pull} did not end as it should; it is in {target}.\n{log.read_text()[-2000:]}", file=sys.stderr)
            return 1
        excess.append(server.sent - before - store.num_bytes)
        shutil.rmtree(target)
    report = {
        "digest": store.digest,
        "bytes_of_a_pull": store.num_bytes,
        "files": len(store.manifest["files"]),
        "killed": killed,
        "ended_before_the_kill": ended,
        "half_stores_seen": half,
        "pulls": len(excess),
        "same_store_in_the_end": same,
        "bytes_sent_again_per_kill": round(sum(excess) / max(1, killed)),
        "most_bytes_sent_again_in_a_pull": max(excess),
    }
    shutil.rmtree(folder)
    print(json.dumps(report, indent=1) if asked.json else "\n".join(f"{name:>32}  {value}" for name, value in report.items()))
    return 1 if half else 0


if __name__ == "__main__":
    sys.exit(main())

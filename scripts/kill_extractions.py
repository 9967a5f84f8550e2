"""Kill a real extraction with signal 9 at many moments, resume each, and compare; then run two at once. A table at the end, exit code 1 if anything differs.

    python scripts/kill_extractions.py --kills 200 --pairs 20 [--json]

Every extraction is `kdstore extract` of the demo teacher over a few scenes in a process of its own, forked from this one, which has imported everything and
computed nothing. The moments are spread evenly over the units of the store, from its first file to the sealing, each a random part of a unit later.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # the last bits of a feature depend on the number of threads
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import forked
import torch

from kdstore.errors import IncompleteStore, StoreNotFound
from kdstore.extract import run as _imported_before_the_first_fork  # noqa: F401
from kdstore.store import open_store, verify_store


@dataclass(frozen=True)
class Kill:
    """One killed and resumed extraction: units recorded when it died, and whether the resumed store equals the uninterrupted one."""

    killed: bool
    units: int
    same: bool


def start(out: Path, images: int, log: Path) -> int:
    settings = [text for name in ("batch=4", "threads=1") for text in ("--set", name)]
    arguments = ["extract", "--teacher", "scenes-S", "--data", f"scenes/val:{images}", "--out", str(out), "--unit-rows", "8"]
    return forked.start([*arguments, *settings], log)


def wait_for_units(store: Path, units: int, pid: int) -> None:
    """Wait until a process has recorded so many units (0: until it has written anything) or has ended."""
    while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        if (store / "_build").exists() and recorded(store) >= units:
            break
        time.sleep(0.0005)


def recorded(store: Path) -> int:
    return len(list((store / "_build/units").glob("*.json")))


def contents(store: Path) -> dict[str, str]:
    """Hash every file of a store but the account of its run."""
    files = (path for path in store.rglob("*") if path.is_file() and path.name != "run.json")
    return {str(path.relative_to(store)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def kill_and_resume(folder: Path, images: int, units: int, delay: float, expected: dict[str, str], log: Path) -> Kill:
    """Kill an extraction `delay` seconds after its `units`th record, look that nothing reads what is there, resume it, and compare."""
    store = folder / "store"
    pid = start(store, images, log)
    wait_for_units(store, units, pid)
    time.sleep(delay)
    os.kill(pid, signal.SIGKILL)
    killed = forked.finish(pid) == -signal.SIGKILL
    units = recorded(store)
    refused = (store / "manifest.json").exists()
    if not refused:
        try:
            open_store(store)
        except (IncompleteStore, StoreNotFound):
            refused = True
    resumed = forked.finish(start(store, images, log)) == 0
    same = refused and resumed and contents(store) == expected
    if same:
        shutil.rmtree(store)
    return Kill(killed, units, same)


def run_two_at_once(folder: Path, images: int, expected: dict[str, str], log: Path) -> tuple[int, int]:
    """Start two extractions into one store; returns how many ended whole (0) and how many were refused (1). One at least must end whole."""
    store = folder / "store"
    ended = [forked.finish(pid) for pid in [start(store, images, log) for _ in range(2)]]
    if not {0} <= set(ended) <= {0, 1} or contents(store) != expected:
        sys.exit(f"Two extractions at once ended with {ended}; their store is in {folder}, and what they said.\n{log.read_text()[-2000:]}")
    shutil.rmtree(store)
    return ended.count(0), ended.count(1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--pairs", type=int, default=20, help="how often two extractions into one store are started at once")
    parser.add_argument("--images", type=int, default=48)
    parser.add_argument("--seed", type=int, default=0, help="of where in its share of the time each kill comes")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(1)  # of the processes that are forked
    folder = Path(tempfile.mkdtemp(prefix="kill-extractions-"))
    log = folder / "log.txt"
    pid = start(folder / "whole", asked.images, log)
    wait_for_units(folder / "whole", 0, pid)
    began = time.monotonic()
    if forked.finish(pid) != 0:
        sys.exit(log.read_text())
    units = len(list((folder / "whole/index").rglob("*.parquet")))
    seconds = (time.monotonic() - began) / units
    expected = contents(folder / "whole")
    rng, kills = random.Random(asked.seed), []
    for number in range(asked.kills):
        after = int((units + 1) * (number + rng.random()) / asked.kills)
        kills.append(kill_and_resume(folder, asked.images, after, seconds * rng.random(), expected, log))
        if not asked.json:
            print(f"{number + 1:4}  {kills[-1]}", flush=True)
        if not kills[-1].same:
            sys.exit(f"The resumed store differs; it is in {folder}, and what the runs said.\n{log.read_text()[-2000:]}")
    pairs = [run_two_at_once(folder, asked.images, expected, log) for _ in range(asked.pairs)]
    by_units = {units: sum(kill.killed and kill.units == units for kill in kills) for units in sorted({kill.units for kill in kills if kill.killed})}
    report = {
        "digest": open_store(folder / "whole").digest,
        "units": units,
        "seconds_of_a_unit": round(seconds, 4),
        "kills": len(kills),
        "ended_before_the_kill": sum(not kill.killed for kill in kills),
        "same_store_after_resume": sum(kill.same for kill in kills),
        "killed_by_units_recorded": by_units,
        "pairs_at_once": len(pairs),
        "ended_whole": sum(whole for whole, _ in pairs),
        "refused": sum(refused for _, refused in pairs),
    }
    damaged = verify_store(folder / "whole").damaged
    shutil.rmtree(folder)
    print(json.dumps({**report, "each": [asdict(kill) for kill in kills]}, indent=1) if asked.json else "\n".join(f"{k:>26}  {v}" for k, v in report.items()))
    return 1 if damaged else 0


if __name__ == "__main__":
    sys.exit(main())

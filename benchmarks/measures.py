"""Seconds and memory of every measure of agreement and geometry, and of exact and approximate retrieval, on random embeddings that are related in pairs.

    python benchmarks/measures.py [--rows 50000] [--width 256]

Memory is what the process holds at its highest, less what it held before the first measure: it only grows from line to line.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from kdstore.metrics import agreement, geometry
from kdstore.metrics.neighbours import exact_search, list_search, nearest, share_found
from kdstore.metrics.unit import unit_rows


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def related(rows: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Two sets of unit rows that share clusters, as the images and texts of one model do."""
    rng = np.random.default_rng(0)
    centre = rng.normal(size=(max(1, rows // 50), width)).astype(np.float32)
    cluster = rng.integers(0, len(centre), rows)
    first, second = (centre[cluster] + 0.7 * rng.normal(size=(rows, width)).astype(np.float32) for _ in range(2))
    return unit_rows(first), unit_rows(second)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--width", type=int, default=256)
    options = parser.parse_args()
    a, b = related(options.rows, options.width)
    found: dict[int, Any] = {}

    def search(probes: int) -> np.ndarray:
        found[probes] = nearest(a, b, 10, list_search(probes) if probes else exact_search)[1]
        return found[probes]

    measures: dict[str, Callable[[], Any]] = {
        "debiased_linear_cka": lambda: agreement.debiased_linear_cka(a, b),
        "similarity_rank_correlation": lambda: agreement.similarity_rank_correlation(a, b),
        "mutual_neighbours": lambda: agreement.mutual_neighbours(a, b),
        "modality_gap": lambda: geometry.modality_gap(a, b),
        "alignment": lambda: geometry.alignment(a, b),
        "uniformity": lambda: geometry.uniformity(a),
        "effective_rank": lambda: geometry.effective_rank(a),
        "hubness": lambda: geometry.hubness(a, b),
        "target_entropy": lambda: geometry.target_entropy(a, b, 100),
        "nearest, exact": lambda: search(0),
        "nearest, lists, 8 probes": lambda: search(8),
        "nearest, lists, 32 probes": lambda: search(32),
    }
    before = peak_mib()
    print(f"{options.rows} x {options.width}: {a.nbytes / 2**20:.0f} MiB each\n| measure | seconds | peak, MiB |\n| --- | ---: | ---: |")
    for name, measure in measures.items():
        began = time.perf_counter()
        measure()
        print(f"| {name} | {time.perf_counter() - began:.1f} | {peak_mib() - before:.0f} |", flush=True)
    some = np.arange(0, options.rows, max(1, options.rows // 1000))
    print(f"found of the exact ten nearest: {', '.join(f'{probes} probes {share_found(found[probes][some], a[some], b):.1f} %' for probes in (8, 32))}")


if __name__ == "__main__":
    main()

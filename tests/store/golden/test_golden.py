"""The golden store: written once by the first version of format 1, read by every later one. Its values follow from a formula.

`python tests/store/golden/test_golden.py` wrote `format-1` and refuses to do so again: a golden store that changes proves nothing.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from kdstore.data.source import Caption
from kdstore.store import ArraySpec, Plan, StoreWriter, embedding_array, open_store, scalar_array, token_array, verify_store
from kdstore.store.layout import PLAIN

GOLDEN = Path(__file__).parent / "format-1"
DIGEST = "sha256:c9b818c9a7a62df4c3f73ecfadb83cf4cf362507707a463a6b491348617f9b36"
UNDECODABLE = 5
ROWS = [
    (f"schl\N{LATIN SMALL LETTER U WITH DIAERESIS}ssel/{i}", tuple(Caption(f"caption {j} of {i}", ("human", "synthetic")[j % 2]) for j in range(i % 3)))
    for i in range(13)
]
IDENTITY = {"format": 1, "teacher": {"name": "golden", "embed_dim": 6, "logit_scale": 100.0}}


def values(spec: ArraySpec) -> np.ndarray:
    """Return what an array holds: sevenths of (row + 3 view + 5 token + 7 channel) modulo 29, NaN or 0 for the undecodable image; lengths are 1 to 4."""
    weights = {"image": 1, "text": 1, "view": 3, "token": 5, "channel": 7}
    sums = sum(weight * index for weight, index in zip((weights[dim] for dim in spec.dims), np.indices(spec.shape), strict=True))
    if spec.name.endswith("/valid"):
        sums = np.ones(spec.shape)
    if spec.name == "text/length":
        sums = 1 + sums % 4
    found = (sums % 29 / 7 if spec.dtype.startswith("float") else sums).astype(spec.dtype)
    if spec.side == "image":
        found[UNDECODABLE] = spec.fill
    if spec.name == "text/tokens":
        rows, tokens, _ = np.indices(spec.shape)
        found[tokens >= 1 + rows % 4] = 0  # padding
    return found


def specs(plan: Plan) -> list[ArraySpec]:
    """Describe every kind of array, with more views, shards and chunks than one and the last of each partial."""
    image = embedding_array(plan, "image", 6, views=2)
    tokens = token_array(plan, "image", 3, 4, dtype="float32")
    return [
        dataclasses.replace(image, chunk=(2, 1, 6)),
        dataclasses.replace(tokens, shard=(4, 1, 3, 4)),
        ArraySpec("image/view", (13, 2, 5), "float32", (8, 1, 5), (8, 2, 5), PLAIN, ("image", "view", "channel")),
        embedding_array(plan, "text", 6, zstd=True),
        token_array(plan, "text", 4, 3, zstd=True),
        scalar_array(plan, "text/length", "uint16"),
    ]


def write(path: Path) -> str:
    plan = Plan.freeze(ROWS, unit_rows=8)
    with StoreWriter.open(path, plan=plan, arrays=specs(plan), identity=IDENTITY) as writer:
        for unit in writer.pending():
            with writer.attempt(unit) as attempt:
                for spec in specs(plan):
                    if spec.side == unit.side:
                        attempt.append(spec.name, values(spec)[unit.start : unit.stop])
                if unit.side == "image":
                    attempt.index([index_row(row) for row in range(unit.start, unit.stop)])
        return writer.finalise({"host": "golden"})


def index_row(row: int) -> dict[str, Any]:
    if row == UNDECODABLE:
        return {"sha256": "", "valid": False, "reason": "the file is empty", "width": 0, "height": 0}
    return {"sha256": f"{row:064x}", "valid": True, "reason": "", "width": 8 + row, "height": 9}


def test_the_golden_store_of_format_1_reads_as_it_was_written() -> None:
    store, plan = open_store(GOLDEN), Plan.freeze(ROWS, unit_rows=8)
    assert store.digest == DIGEST
    assert store.fingerprint == plan.fingerprint
    assert store.identity == IDENTITY
    assert store.arrays.keys() == {"image/valid", "text/valid", *(spec.name for spec in specs(plan))}
    for name, spec in store.arrays.items():
        expected = values(spec)
        for view in range(spec.views):
            found = store.gather(name, np.arange(spec.shape[0]), view if spec.has_views else None)
            assert found.dtype == spec.dtype
            assert found.tobytes() == (expected[:, view] if spec.has_views else expected).tobytes()
    assert store.keys().tolist() == [key for key, _ in ROWS]
    assert store.captions() == [caption.text for _, captions in ROWS for caption in captions]
    assert store.index("text", "kind").to_pylist() == [caption.kind for _, captions in ROWS for caption in captions]
    assert store.index("image", "reason").to_pylist() == [index_row(row)["reason"] for row in range(len(ROWS))]
    assert np.array_equal(store.offsets, plan.offsets)
    assert verify_store(GOLDEN).ok


if __name__ == "__main__":
    assert not GOLDEN.exists(), f"{GOLDEN} exists"
    print(write(GOLDEN))

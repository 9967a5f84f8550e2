"""The golden stores: written once by the first version of format 1, read by every later one. Their values follow from formulas.

`format-1` holds features, `format-1-codes` codes of value codecs. Running this file writes what is not there and never what is: a golden
store that changes proves nothing.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np

from kdstore.data.source import Caption
from kdstore.store import (
    ArraySpec,
    Codec,
    Plan,
    StoreWriter,
    codec_files,
    codec_identity,
    embedding_array,
    open_store,
    parse_chain,
    scalar_array,
    token_array,
    verify_store,
)
from kdstore.store.layout import PLAIN

GOLDEN, CODES = (Path(__file__).parent / name for name in ("format-1", "format-1-codes"))
DIGEST = "sha256:c9b818c9a7a62df4c3f73ecfadb83cf4cf362507707a463a6b491348617f9b36"
CODES_DIGEST = "sha256:82a976f7d64bce94c87e8ce20004fd009c60cd36c410184bda42f984af4c1a23"
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
    return write_arrays(path, plan, specs(plan), IDENTITY, {})


def write_arrays(path: Path, plan: Plan, arrays: list[ArraySpec], identity: dict[str, Any], constants: dict[str, bytes]) -> str:
    with StoreWriter.open(path, plan=plan, arrays=arrays, identity=identity, constants=constants) as writer:
        for unit in writer.pending():
            with writer.attempt(unit) as attempt:
                for spec in arrays:
                    if spec.side == unit.side:
                        attempt.append(spec.name, values(spec)[unit.start : unit.stop])
                if unit.side == "image":
                    attempt.index([index_row(row) for row in range(unit.start, unit.stop)])
        return writer.finalise({"host": "golden"})


CHAINS = {"image/embedding": ("int8", (6,)), "text/embedding": ("pq2", (6,)), "image/tokens": ("pool2+pca2+int8", (9, 4))}


def codec(name: str) -> Codec:
    """Return a codec whose parameters follow from a formula: sevenths again."""
    chain = parse_chain(CHAINS[name][0])
    shapes = chain.parameters(CHAINS[name][1])
    parameters = {parameter: np.float32((1 + np.arange(math.prod(shape)).reshape(shape)) % 29 / 7) for parameter, shape in shapes.items()}
    if "pca-basis" in parameters:
        parameters["pca-basis"] = np.float32(np.eye(2, 4))  # its rows must be orthonormal
    return Codec(chain, CHAINS[name][1], parameters, {})


def code_specs(plan: Plan) -> list[ArraySpec]:
    return [
        embedding_array(plan, "image", 6, dtype="int8"),
        token_array(plan, "image", 4, 2, dtype="int8"),
        embedding_array(plan, "text", 2, dtype="uint8"),
    ]


def decoded(name: str, codes: np.ndarray) -> np.ndarray:
    """Decode as docs/format.md says, with nothing of the package but the parameters above."""
    numbers = codec(name).parameters
    if name == "text/embedding":
        return np.concatenate([numbers["pq-codebooks"][part][codes[..., part]] for part in range(2)], -1)
    values = numbers["int8-mean"] + codes.astype(np.float32) * numbers["int8-scale"]
    return values if name == "image/embedding" else numbers["pca-mean"] + values @ numbers["pca-basis"]


def write_codes(path: Path) -> str:
    plan = Plan.freeze(ROWS, unit_rows=8)
    codecs = {name: codec(name) for name in CHAINS}
    identity = {**IDENTITY, "arrays": {name: {"codec": codec_identity(found)} for name, found in codecs.items()}}
    constants = {file: content for name, found in codecs.items() for file, content in codec_files(name, found).items()}
    return write_arrays(path, plan, code_specs(plan), identity, constants)


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


def test_the_golden_codes_of_format_1_decode_as_the_page_says() -> None:
    store, plan = open_store(CODES), Plan.freeze(ROWS, unit_rows=8)
    assert store.digest == CODES_DIGEST
    for spec in code_specs(plan):
        rows = np.arange(spec.shape[0])
        codes = values(spec)[:, 0] if spec.has_views else values(spec)
        assert np.array_equal(store.gather(spec.name, rows), codes)
        expected = decoded(spec.name, codes)
        if spec.side == "image":
            expected[UNDECODABLE] = np.nan
        np.testing.assert_allclose(store.features(spec.name, rows), expected, rtol=1e-6, atol=1e-6)
    assert verify_store(CODES).ok


if __name__ == "__main__":
    for path, write_store in ((GOLDEN, write), (CODES, write_codes)):
        if not path.exists():
            print(path.name, write_store(path))

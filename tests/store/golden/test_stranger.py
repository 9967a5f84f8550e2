"""A reader written from docs/format.md alone, by somebody who has NumPy and pyarrow but neither kdstore nor zarr, reads the golden store equal."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kdstore.store import open_store

FOLDER = Path(__file__).parent


def crc32c(content: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in content:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


class Stranger:
    def __init__(self, root: Path) -> None:
        self.root, self.manifest = root, json.loads((root / "manifest.json").read_text(encoding="utf-8"))
        digest = self.manifest.pop("digest")
        assert digest == "sha256:" + hashlib.sha256(canonical(self.manifest)).hexdigest()
        assert self.manifest["format"] == 1

    def file(self, path: str) -> bytes:
        entry, content = self.manifest["files"][path], (self.root / path).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (entry["size"], entry["sha256"])
        return content

    def npy(self, path: str, dtype: str) -> np.ndarray:
        content = self.file(path)
        return np.frombuffer(content[10 + struct.unpack("<H", content[8:10])[0] :], dtype)

    def array(self, name: str) -> np.ndarray:
        """Return a whole array, chunk after chunk."""
        metadata = json.loads(self.file(f"{name}/zarr.json"))
        assert metadata == self.manifest["arrays"][name]
        shape, shard = metadata["shape"], metadata["chunk_grid"]["configuration"]["chunk_shape"]
        inner = metadata["codecs"][0]["configuration"]
        chunk, codecs = inner["chunk_shape"], [codec["name"] for codec in inner["codecs"]]
        dtype, r = np.dtype(metadata["data_type"]).newbyteorder("<"), chunk[0]
        views = shape[1] if metadata["dimension_names"][1:2] == ["view"] else 1
        checks, per_shard = self.npy(f"checks/{name}.npy", "<u4"), shard[0] // r * views
        assert len(checks) == -(-shape[0] // r) * views
        out = np.empty((-(-shape[0] // r) * r, *shape[1:]), dtype)
        for c, expected in enumerate(checks.tolist()):
            content = self.file(f"{name}/c/{c // per_shard}" + "/0" * (len(shape) - 1))
            index, end = content[-per_shard * 16 - 4 : -4], content[-4:]
            assert crc32c(index) == struct.unpack("<I", end)[0]
            offset, length = struct.unpack_from("<QQ", index, c % per_shard * 16)
            payload, trailer = content[offset : offset + length - 4], content[offset + length - 4 : offset + length]
            assert crc32c(payload) == expected == struct.unpack("<I", trailer)[0]
            if "zstd" in codecs:
                payload = pa.decompress(payload, int(np.prod(chunk)) * dtype.itemsize, "zstd").to_pybytes()
            rows = slice(c // views * r, (c // views + 1) * r)
            (out[rows, c % views : c % views + 1] if views > 1 else out[rows])[...] = np.frombuffer(payload, dtype).reshape(chunk)
        return out[: shape[0]]

    def column(self, side: str, name: str) -> list[Any]:
        paths = sorted(path for path in self.manifest["files"] if path.startswith(f"index/{side}/"))
        return [value for path in paths for value in pq.read_table(pa.BufferReader(self.file(path)))[name].to_pylist()]


@pytest.mark.parametrize("golden", ["format-1", "format-1-codes"])
def test_a_stranger_reads_the_golden_stores_equal(golden: str) -> None:
    stranger, store = Stranger(FOLDER / golden), open_store(FOLDER / golden)
    assert stranger.manifest["arrays"].keys() == store.arrays.keys()
    for name, spec in store.arrays.items():
        found = stranger.array(name)
        assert found.shape == spec.shape
        for view in range(spec.views):
            expected = store.gather(name, np.arange(spec.shape[0]), view if spec.has_views else None)
            assert (found[:, view] if spec.has_views else found).tobytes() == expected.tobytes()
    assert stranger.npy("index/offsets.npy", "<i8").tolist() == store.offsets.tolist()
    assert stranger.column("image", "key") == store.keys().tolist()
    assert stranger.column("text", "caption") == store.captions()
    assert stranger.column("text", "row") == list(range(store.num_texts))
    texts = zip(stranger.column("text", "caption"), stranger.column("text", "kind"), strict=True)
    offsets, rows = store.offsets.tolist(), list(texts)
    pairs = [[key, [list(row) for row in rows[offsets[i] : offsets[i + 1]]]] for i, key in enumerate(stranger.column("image", "key"))]
    lines = b"".join(canonical(pair) + b"\n" for pair in pairs)
    assert stranger.manifest["plan"]["fingerprint"] == "sha256:" + hashlib.sha256(lines).hexdigest()

"""A store is Zarr to others: TensorStore and zarrs read every array bit for bit, without a word."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kdstore.store import Store, open_store

READERS = {
    "tensorstore": """
import tensorstore
def read(path):
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": path}}
    return tensorstore.open(spec, open=True, read=True).result().read().result()
""",
    "zarrs": """
import zarr, zarrs
zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline", "codec_pipeline.strict": True, "codec_pipeline.validate_checksums": True})
def read(path):
    return zarr.open_array(path, mode="r")[...]
""",
}
MAIN = """
import sys
import numpy
root, target, *names = sys.argv[1:]
numpy.savez(target, **{name: read(root + "/" + name) for name in names})
"""


def read_by(reader: str, store: Store, folder: Path) -> dict[str, Any]:
    """Read all arrays in a process of its own, whose threads no later test can fork."""
    command = [sys.executable, "-W", "error", "-c", READERS[reader] + MAIN, str(store.path), str(folder / "read.npz"), *store.arrays]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    with np.load(folder / "read.npz") as found:
        return dict(found)


@pytest.mark.parametrize("reader", READERS)
def test_another_implementation_reads_every_array_bit_for_bit(reader: str, pristine: Path, sample: Any, tmp_path: Path) -> None:
    store = open_store(pristine)
    found = read_by(reader, store, tmp_path)
    for name, spec in store.arrays.items():
        valid = (np.arange(spec.shape[0]) != sample.undecodable) | (spec.side == "text")
        expected = sample.arrays[name] if name in sample.arrays else valid.astype(np.uint8)
        assert found[name].dtype == spec.dtype
        assert found[name].tobytes() == expected.tobytes()


@pytest.mark.parametrize("reader", READERS)
def test_another_implementation_reads_the_codes_of_the_golden_store(reader: str, tmp_path: Path) -> None:
    store = open_store(Path(__file__).parent / "golden" / "format-1-codes")
    found = read_by(reader, store, tmp_path)
    for name, spec in store.arrays.items():
        values = found[name][:, 0] if spec.has_views else found[name]
        assert values.tobytes() == store.gather(name, np.arange(spec.shape[0])).tobytes()


def test_metadata_names_codecs_of_zarrs_core_only(pristine: Path) -> None:
    def names(value: Any) -> set[str]:
        if isinstance(value, dict):
            own = {value["name"]} if isinstance(value.get("name"), str) else set()
            return own.union(*(names(part) for part in value.values()))
        return set().union(*(names(part) for part in value)) if isinstance(value, list) else set()

    files = list(pristine.rglob("zarr.json"))
    assert len(files) == 3 + 6  # groups, arrays
    found = set().union(*(names(json.loads(path.read_text())) for path in files))
    assert found == {"regular", "default", "sharding_indexed", "bytes", "zstd", "crc32c"}

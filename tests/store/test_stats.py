"""Statistics agree with NumPy over the valid, finite values, whatever the blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kdstore.jsonfile import read_json
from kdstore.store import stats, store_stats, verify_store


@pytest.mark.parametrize("block_values", [1 << 23, 40])
def test_statistics_are_those_of_numpy(copied: Path, sample: Any, monkeypatch: pytest.MonkeyPatch, block_values: int) -> None:
    monkeypatch.setattr(stats, "_BLOCK_VALUES", block_values)
    found = store_stats(copied)["arrays"]
    assert sorted(found) == ["image/embedding", "image/tokens", "text/embedding"]
    for name, of_array in found.items():
        values = sample.arrays[name].astype(np.float64)
        values = np.delete(values, sample.undecodable, 0) if name.startswith("image/") else values
        vectors = values.reshape(-1, values.shape[-1])
        norms = np.linalg.norm(vectors, axis=1)
        assert of_array["rows"] == len(values) * (2 if name == "image/embedding" else 1)
        assert of_array["nan"] == of_array["inf"] == 0
        np.testing.assert_allclose([of_array["norm"][k] for k in ("min", "mean", "max")], [norms.min(), norms.mean(), norms.max()], rtol=1e-12)
        np.testing.assert_allclose(of_array["mean"], vectors.mean(0), rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(of_array["variance"], vectors.var(0), rtol=1e-9)


def test_statistics_lie_beside_the_manifest(copied: Path) -> None:
    found = store_stats(copied)
    assert verify_store(copied).ok
    assert read_json(copied / "stats.json")["arrays"] == found["arrays"]


def test_values_that_are_not_finite_are_counted_and_left_out(sample: Any, tmp_path: Path) -> None:
    arrays = {name: array.copy() for name, array in sample.arrays.items()}
    arrays["text/embedding"][3, 2] = np.inf
    arrays["text/embedding"][40:42, 0] = np.nan
    type(sample)(sample.rows, sample.plan, sample.specs, arrays, sample.identity).write(tmp_path / "store")
    found = store_stats(tmp_path / "store")["arrays"]["text/embedding"]
    assert (found["nan"], found["inf"], found["rows"]) == (2, 1, len(arrays["text/embedding"]))
    finite = np.delete(arrays["text/embedding"], [3, 40, 41], 0).astype(np.float64)
    np.testing.assert_allclose(found["mean"], finite.mean(0), rtol=1e-9)

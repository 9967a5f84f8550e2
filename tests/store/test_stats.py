"""Statistics agree with NumPy over the valid, finite values, whatever the blocks and the workers."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import dask
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kdstore.jsonfile import read_json
from kdstore.store import blocks, open_store, store_stats, token_array, verify_store
from kdstore.store.stats import covariance


def vectors_of(sample: Any, name: str) -> np.ndarray:
    values = sample.arrays[name].astype(np.float64)
    values = np.delete(values, sample.undecodable, 0) if name.startswith("image/") else values
    return values.reshape(-1, values.shape[-1])


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(block_values=st.integers(1, 400), workers=st.sampled_from([1, 3]), window=st.integers(1, 5))
def test_statistics_are_those_of_numpy(copied: Path, sample: Any, block_values: int, workers: int, window: int) -> None:
    with pytest.MonkeyPatch.context() as patch, dask.config.set(num_workers=workers):
        patch.setattr(blocks, "BLOCK_VALUES", block_values)
        patch.setattr(blocks, "IN_FLIGHT", window)
        found = store_stats(copied)["arrays"]
    assert sorted(found) == ["image/embedding", "image/tokens", "text/embedding"]
    for name, of_array in found.items():
        vectors = vectors_of(sample, name)
        norms = np.linalg.norm(vectors, axis=1)
        assert of_array["rows"] == len(sample.arrays[name]) - name.startswith("image/")
        assert of_array["vectors"] == of_array["samples"] == len(vectors)
        assert of_array["nan"] == of_array["inf"] == of_array["at_limit"] == 0
        np.testing.assert_allclose([of_array["norm"][k] for k in ("min", "mean", "max")], [norms.min(), norms.mean(), norms.max()], rtol=1e-12)
        np.testing.assert_allclose(of_array["mean"], vectors.mean(0), rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(of_array["variance"], vectors.var(0), rtol=1e-9)
        np.testing.assert_allclose(of_array["spectrum"], np.linalg.eigvalsh(np.cov(vectors.T, bias=True))[::-1], rtol=1e-8, atol=1e-12)


def test_the_number_of_workers_changes_no_bit(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK_VALUES", 30)
    found = []
    for setting in ({"scheduler": "synchronous"}, {"num_workers": 1}, {"num_workers": 5}):
        with dask.config.set(setting):
            store_stats(copied)
        found.append((copied / "stats.json").read_bytes())
    assert found[0] == found[1] == found[2]


def test_statistics_lie_beside_the_manifest(copied: Path) -> None:
    found = store_stats(copied)
    assert verify_store(copied).ok
    assert read_json(copied / "stats.json")["arrays"] == found["arrays"]


def test_values_that_are_not_finite_are_counted_and_left_out(sample: Any, tmp_path: Path) -> None:
    arrays = {name: array.copy() for name, array in sample.arrays.items()}
    arrays["text/embedding"][3, 2] = np.inf
    arrays["text/embedding"][5, 2:4] = [-65504, 65504]
    arrays["text/embedding"][40:42, 0] = np.nan
    dataclasses.replace(sample, arrays=arrays).write(tmp_path / "store")
    found = store_stats(tmp_path / "store")["arrays"]["text/embedding"]
    assert (found["nan"], found["inf"], found["at_limit"], found["rows"]) == (2, 1, 2, len(arrays["text/embedding"]))
    finite = np.delete(arrays["text/embedding"], [3, 40, 41], 0).astype(np.float64)
    assert found["vectors"] == len(finite)
    np.testing.assert_allclose(found["mean"], finite.mean(0), rtol=1e-9)


def test_padding_of_texts_is_left_out(sample: Any, tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    tokens, lengths = rng.normal(size=(sample.plan.num_texts, 4, 5)).astype("f2"), rng.integers(0, 5, sample.plan.num_texts).astype("u2")
    held = np.arange(4) < lengths[:, None]
    tokens[~held] = 0
    specs = [*sample.specs, token_array(sample.plan, "text", 4, 5)]
    padded = dataclasses.replace(sample, specs=specs, arrays={**sample.arrays, "text/tokens": tokens, "text/length": lengths})
    padded.write(tmp_path / "store")
    found = store_stats(tmp_path / "store")["arrays"]["text/tokens"]
    assert found["vectors"] == found["samples"] == lengths.sum()
    np.testing.assert_allclose(found["mean"], tokens[held].astype(np.float64).mean(0), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("limit", [7, 30, 89])
def test_the_covariance_of_a_sample_meets_all_tokens_and_no_more_than_asked(pristine: Path, sample: Any, limit: int) -> None:
    found = covariance(open_store(pristine), "image/tokens", max_samples=limit)
    vectors = sample.arrays["image/tokens"].astype(np.float64).reshape(-1, 5)
    stride = next(k for k in range(-(-len(vectors) // limit), 1000) if k % 3)
    taken = vectors[::stride]
    taken = taken[np.isfinite(taken).all(1)]
    assert found.samples == len(taken) <= limit
    np.testing.assert_allclose(found.mean_W, taken.mean(0), rtol=1e-9)
    np.testing.assert_allclose(found.covariance_WW, np.cov(taken.T, bias=True), rtol=1e-9, atol=1e-12)

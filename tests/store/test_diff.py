"""The difference of two stores: none with itself, and exactly what was changed otherwise."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kdstore.data.source import Caption
from kdstore.store import Encoding, Plan, blocks, concat_stores, diff_stores, recode_store, subset_store


@pytest.mark.parametrize("block_values", [10, 1 << 18])
def test_a_store_does_not_differ_from_itself(pristine: Path, monkeypatch: pytest.MonkeyPatch, block_values: int) -> None:
    monkeypatch.setattr(blocks, "BLOCK_VALUES", block_values)
    found = diff_stores(pristine, pristine)
    assert found.same
    assert found.identity == found.layout == {}
    assert (found.images_only_in_first, found.images_only_in_second, found.images_in_both, found.texts_in_both) == (0, 0, 45, 66)
    assert all((of_array.unequal, of_array.max_abs) == (0, 0) for of_array in found.arrays.values())
    assert found.arrays["image/tokens"].cosine_min == pytest.approx(1, abs=1e-12)


def test_another_encoding_of_equal_values_is_a_difference_of_layout_alone(pristine: Path, tmp_path: Path) -> None:
    recode_store(pristine, tmp_path / "zstd", Encoding(codec="zstd", chunk_rows=1))
    found = diff_stores(pristine, tmp_path / "zstd")
    assert found.same
    assert {name.split(".")[0] for name in found.identity} == {"lineage"}
    assert found.identity["lineage.operation"] == (None, '"recode"')
    assert {name.split(".")[0] for name in found.layout} == {"image/embedding", "image/tokens", "text/embedding"}


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.sampled_from(["image/embedding", "image/tokens", "text/embedding", "text/length"]), st.integers(0, 10**6)), max_size=5))
def test_changed_values_are_counted_and_measured(pristine: Path, sample: Any, tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[str, int]]) -> None:
    arrays = {name: array.copy() for name, array in sample.arrays.items()}
    for name, place in changes:
        values = arrays[name].reshape(-1)
        place %= len(values)
        if np.isfinite(values[place]):
            values[place] += 1
    path = tmp_path_factory.mktemp("changed") / "store"
    dataclasses.replace(sample, arrays=arrays).write(path)
    found = diff_stores(pristine, path)
    for name, array in arrays.items():
        before, after = sample.arrays[name].astype(np.float64), array.astype(np.float64)
        assert found.arrays[name].unequal == (~((before == after) | np.isnan(before))).sum()
        assert found.arrays[name].max_abs == np.nanmax(np.abs(before - after))
        if name != "text/length":
            a, b = (part.reshape(-1, part.shape[-1]) for part in (before, after))
            cosines = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
            np.testing.assert_allclose([found.arrays[name].cosine_min, found.arrays[name].cosine_mean], [np.nanmin(cosines), np.nanmean(cosines)], rtol=1e-9)
    assert found.same == (not any(of_array.unequal for of_array in found.arrays.values()))


def test_rows_are_compared_by_key_in_whatever_order(pristine: Path, tmp_path: Path) -> None:
    subset_store(pristine, tmp_path / "a", rows=slice(0, 20))
    subset_store(pristine, tmp_path / "b", rows=slice(15, 15 + 25))
    found = diff_stores(tmp_path / "a", tmp_path / "b")
    assert (found.images_only_in_first, found.images_only_in_second, found.images_in_both) == (15, 20, 5)
    assert not found.same
    assert all(of_array.unequal == 0 for of_array in found.arrays.values())
    subset_store(pristine, tmp_path / "c", rows=slice(20, 45))
    concat_stores([tmp_path / "c", tmp_path / "a"], tmp_path / "turned")
    turned = diff_stores(pristine, tmp_path / "turned")
    assert turned.same
    assert turned.texts_in_both == 66


def test_texts_with_another_caption_are_left_out_and_missing_arrays_are_named(pristine: Path, sample: Any, tmp_path: Path) -> None:
    rows = [(key, tuple(Caption("other", c.kind) if i == 7 else c for c in captions)) for i, (key, captions) in enumerate(sample.rows)]
    plan = Plan.freeze(rows, unit_rows=16)
    dataclasses.replace(sample, rows=rows, plan=plan, specs=sample.specs[1:]).write(tmp_path / "store")
    found = diff_stores(pristine, tmp_path / "store")
    assert (found.images_in_both, found.texts_in_both) == (45, 66 - len(rows[7][1]))
    assert found.texts_only_in_first == found.texts_only_in_second == len(rows[7][1])
    assert found.not_compared == ("image/embedding",)
    assert not found.same

"""Stores of the same features put together: rows follow each other, anything else that differs is refused by name."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kdstore.errors import ConfigError, IdentityMismatch, JoinError
from kdstore.store import Encoding, concat_stores, open_store, recode_store, subset_store, verify_store


@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(1, 44), min_size=1, max_size=3, unique=True))
def test_the_parts_of_a_store_put_together_are_the_store(pristine: Path, tmp_path_factory: pytest.TempPathFactory, cuts: list[int]) -> None:
    folder = tmp_path_factory.mktemp("parts")
    bounds = [0, *sorted(cuts), 45]
    parts = [folder / str(i) for i in range(len(bounds) - 1)]
    for part, start, stop in zip(parts, bounds[:-1], bounds[1:], strict=True):
        subset_store(pristine, part, rows=slice(start, stop))
    whole = concat_stores(parts, folder / "whole")
    old, new = open_store(pristine), open_store(folder / "whole")
    assert new.fingerprint == old.fingerprint
    assert new.arrays == old.arrays
    for name, spec in old.arrays.items():
        rows = np.arange(spec.shape[0])
        for view in range(spec.views):
            views = view if spec.has_views else None
            assert new.gather(name, rows, views).tobytes() == old.gather(name, rows, views).tobytes()
    assert new.manifest["files"] == old.manifest["files"]
    assert [ancestor["digest"] for ancestor in new.identity["lineage"]["of"]] == [open_store(part).digest for part in parts]
    assert verify_store(whole.path).ok


def test_stores_of_another_teacher_or_with_other_arrays_are_refused(pristine: Path, sample: Any, tmp_path: Path) -> None:
    subset_store(pristine, tmp_path / "a", rows=slice(0, 20))
    other = dataclasses.replace(sample, identity={**sample.identity, "teacher": {"name": "scenes-L"}})
    other.write(tmp_path / "other")
    with pytest.raises(IdentityMismatch, match=r"identity.teacher.name: there \"scenes-S\", here \"scenes-L\""):
        concat_stores([tmp_path / "a", tmp_path / "other"], tmp_path / "out")
    subset_store(pristine, tmp_path / "b", rows=slice(20, 45), arrays=["image/tokens"])
    with pytest.raises(IdentityMismatch, match=r"arrays.image/embedding.dtype: there \"float16\", here nothing"):
        concat_stores([tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    recode_store(pristine, tmp_path / "c", Encoding(dtype="float32"))
    with pytest.raises(IdentityMismatch, match="float32"):
        concat_stores([tmp_path / "a", tmp_path / "c"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_key_in_two_stores_is_refused(pristine: Path, tmp_path: Path) -> None:
    subset_store(pristine, tmp_path / "a", rows=slice(0, 21))
    subset_store(pristine, tmp_path / "b", rows=slice(20, 45))
    with pytest.raises(JoinError, match="1 keys are in more than one of the stores: bild-20"):
        concat_stores([tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    with pytest.raises(ConfigError, match="nothing to put together"):
        concat_stores([tmp_path / "a"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_encodings_of_equal_features_take_that_of_the_first(pristine: Path, tmp_path: Path) -> None:
    subset_store(pristine, tmp_path / "a", rows=slice(0, 20))
    subset_store(pristine, tmp_path / "b", rows=slice(20, 45))
    recode_store(tmp_path / "b", tmp_path / "c", Encoding(codec="zstd", chunk_rows=2, shard_rows=32))
    concat_stores([tmp_path / "a", tmp_path / "c"], tmp_path / "out")
    store = open_store(tmp_path / "out")
    assert (store.unit_rows, store.arrays["image/embedding"].codecs) == (32, ("bytes", "crc32c"))
    rows = np.arange(45)
    assert store.gather("image/embedding", rows, 1).tobytes() == open_store(pristine).gather("image/embedding", rows, 1).tobytes()

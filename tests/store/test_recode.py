"""A recoded store holds the same rows in other bytes; interrupted, it goes on to the same digest."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dask
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kdstore.errors import ConfigError, StoreError, UnknownName
from kdstore.store import Encoding, blocks, open_store, recode_store, verify_store

POWERS = st.sampled_from([1, 2, 4, 8, 16, 32])


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    codec=st.sampled_from([None, "bytes", "zstd"]),
    dtype=st.sampled_from([None, "float16", "float32"]),
    chunk_rows=st.none() | POWERS,
    shard_rows=st.none() | POWERS,
    block_values=st.sampled_from([1, 50, 1 << 18]),
)
def test_recode_then_gather_is_gather_then_cast(
    pristine: Path, tmp_path_factory: pytest.TempPathFactory, codec: Any, dtype: Any, chunk_rows: int | None, shard_rows: int | None, block_values: int
) -> None:
    out, encoding = tmp_path_factory.mktemp("recoded") / "store", Encoding(codec, dtype, chunk_rows, shard_rows)
    if encoding == Encoding() or (chunk_rows or 1) > (shard_rows or 4):  # image/tokens lie in shards of four rows
        with pytest.raises(ConfigError):
            recode_store(pristine, out, encoding)
        assert not out.exists()
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "BLOCK_VALUES", block_values)
        recoded = recode_store(pristine, out, encoding)
    old, new = open_store(pristine), open_store(out)
    assert (new.digest, new.fingerprint) == (recoded.digest, old.fingerprint)
    for name, spec in old.arrays.items():
        changes = name.endswith(("/embedding", "/tokens"))
        assert new.arrays[name].dtype == (dtype if dtype and changes else spec.dtype)
        for view in range(spec.views):
            views, rows = (view if spec.has_views else None), np.arange(spec.shape[0])
            assert new.gather(name, rows, views).tobytes() == old.gather(name, rows, views).astype(new.arrays[name].dtype).tobytes()
    for side, column in (("image", "key"), ("image", "sha256"), ("image", "reason"), ("image", "width"), ("text", "caption"), ("text", "kind")):
        assert new.index(side, column).to_pylist() == old.index(side, column).to_pylist()
    assert verify_store(out).ok


def test_a_recoded_store_says_where_it_comes_from(pristine: Path, sample: Any, tmp_path: Path) -> None:
    recode_store(pristine, tmp_path / "a", Encoding(codec="zstd"))
    recode_store(tmp_path / "a", tmp_path / "b", Encoding(codec="bytes", dtype="float32"), arrays=["text/embedding"])
    first, second = open_store(tmp_path / "a"), open_store(tmp_path / "b")
    assert second.identity["teacher"] == sample.identity["teacher"]
    lineage = {"operation": "recode", "of": [{"digest": open_store(pristine).digest}]}
    assert first.identity["lineage"] == lineage
    assert second.identity["lineage"] == {"operation": "recode", "of": [{"digest": first.digest, "lineage": lineage}]}
    assert [second.arrays[name].codecs for name in ("text/embedding", "image/embedding")] == [("bytes", "crc32c"), ("bytes", "zstd", "crc32c")]


def test_a_new_dtype_is_part_of_the_identity(sample: Any, tmp_path: Path) -> None:
    dataclasses.replace(sample, identity={**sample.identity, "arrays": {"text/embedding": {"norm": "none"}}}).write(tmp_path / "store")
    recode_store(tmp_path / "store", tmp_path / "out", Encoding(dtype="float32"), arrays=["text/embedding"])
    assert open_store(tmp_path / "out").identity["arrays"] == {"text/embedding": {"norm": "none", "dtype": "float32"}}


def test_an_overflow_is_refused_unless_it_is_allowed(sample: Any, tmp_path: Path) -> None:
    tokens = sample.arrays["image/tokens"].copy()
    tokens[33, 0, 1, 2] = -70000
    dataclasses.replace(sample, arrays={**sample.arrays, "image/tokens": tokens}).write(tmp_path / "store")
    encoding = Encoding(dtype="float16")
    with pytest.raises(StoreError, match=r"row 33 of image/tokens holds values beyond the range of float16"):
        recode_store(tmp_path / "store", tmp_path / "out", encoding)
    recode_store(tmp_path / "store", tmp_path / "out", encoding, allow_overflow=True)
    assert open_store(tmp_path / "out").gather("image/tokens", [33])[0, 1, 2] == -np.inf
    assert verify_store(tmp_path / "out").ok


@pytest.mark.parametrize("moment", [1, 30, 90])
def test_an_interrupted_recode_goes_on_to_the_same_digest(pristine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: int) -> None:
    encoding = Encoding(codec="zstd", dtype="float32")
    whole = recode_store(pristine, tmp_path / "whole", encoding)
    monkeypatch.setattr(blocks, "BLOCK_VALUES", 20)
    reports = []

    def stop(*report: Any) -> None:
        reports.append(report)
        if len(reports) == moment:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        recode_store(pristine, tmp_path / "out", encoding, on_progress=stop)
    assert not (tmp_path / "out/manifest.json").exists()
    assert not list(tmp_path.glob("out/_build/attempts/*"))
    with dask.config.set(scheduler="synchronous"):
        assert recode_store(pristine, tmp_path / "out", encoding).digest == whole.digest
    assert verify_store(tmp_path / "out").ok


def test_a_killed_recode_goes_on_to_the_same_digest(
    pristine: Path, tmp_path: Path, in_child: Callable[[Callable[[], None]], int], die_at_rename: Callable[[int], None]
) -> None:
    whole = recode_store(pristine, tmp_path / "whole", Encoding(chunk_rows=2))

    def work() -> None:
        die_at_rename(12)
        with dask.config.set(scheduler="synchronous"):
            recode_store(pristine, tmp_path / "out", Encoding(chunk_rows=2))

    assert in_child(work) == -9
    assert recode_store(pristine, tmp_path / "out", Encoding(chunk_rows=2)).digest == whole.digest


def test_wrong_encodings_and_paths_are_refused(pristine: Path, tmp_path: Path) -> None:
    for encoding in (Encoding(), Encoding(codec="lz4"), Encoding(dtype="float64"), Encoding(chunk_rows=3), Encoding(shard_rows=0)):
        with pytest.raises(ConfigError):
            recode_store(pristine, tmp_path / "out", encoding)
    with pytest.raises(ConfigError, match="text/length hold no floats"):
        recode_store(pristine, tmp_path / "out", Encoding(dtype="float32"), arrays=["text/length"])
    with pytest.raises(UnknownName, match="image/token"):
        recode_store(pristine, tmp_path / "out", Encoding(codec="zstd"), arrays=["image/token"])
    with pytest.raises(ConfigError, match="is the store that is read"):
        recode_store(pristine, pristine, Encoding(codec="zstd"))
    assert not (tmp_path / "out").exists()

"""Array descriptions: shapes of chunks and shards, and the metadata that format 1 allows."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest

from kdstore.errors import StoreError
from kdstore.store import ArraySpec, Plan, embedding_array, scalar_array, token_array


def plan_of(images: int, texts: int = 0, unit_rows: int = 16384) -> Plan:
    """A plan of which only the numbers of rows matter."""
    rows: Any = range(images), range(texts), range(texts)
    return Plan(*rows, np.zeros(1, np.int64), unit_rows, "")


def test_an_embedding_is_one_shard_per_unit_in_chunks_of_16_rows_of_one_view() -> None:
    spec = embedding_array(plan_of(40000), "image", 1280, views=3)
    assert (spec.shape, spec.chunk, spec.shard) == ((40000, 3, 1280), (16, 1, 1280), (16384, 3, 1280))
    assert spec.dims == ("image", "view", "channel")
    assert embedding_array(plan_of(1, 50), "text", 1280).chunk == (16, 1280)
    assert spec.shard_path(2) == "image/embedding/c/2/0/0"


@pytest.mark.parametrize("images", [1000, 200_000, 12_800_000, 100_000_000])
@pytest.mark.parametrize(("tokens", "width"), [(256, 1664), (49, 192), (729, 1152)])
def test_token_shards_divide_the_unit_and_stay_near_one_gibibyte(images: int, tokens: int, width: int) -> None:
    spec = token_array(plan_of(images), "image", tokens, width)
    size = math.prod(spec.shard) * 2
    assert spec.chunk == (1, 1, tokens, width)
    assert 16384 % spec.shard[0] == 0
    assert spec.num_shards <= 8192
    assert size <= 1 << 30 or math.ceil(images / (spec.shard[0] // 2)) > 8192


@pytest.mark.parametrize(
    "spec",
    [
        embedding_array(plan_of(100), "image", 7, views=2),
        embedding_array(plan_of(100, 20), "text", 7, dtype="float32", zstd=True),
        token_array(plan_of(100), "image", 4, 7),
        scalar_array(plan_of(100), "image/valid", "uint8"),
    ],
    ids=lambda spec: spec.name,
)
def test_metadata_comes_back_as_the_description(spec: ArraySpec) -> None:
    assert ArraySpec.from_metadata(spec.name, spec.to_metadata()) == spec


def _changed(path: str, value: Any) -> dict[str, Any]:
    metadata = copy.deepcopy(embedding_array(plan_of(100), "image", 7).to_metadata())
    *folders, last = path.split(".")
    at: Any = metadata
    for name in folders:
        at = at[int(name) if name.isdigit() else name]
    at[last] = value
    return metadata


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("zarr_format", 2),
        ("node_type", "group"),
        ("shape", [100, 7]),
        ("shape", [-1, 1, 7]),
        ("shape", ["100", 1, 7]),
        ("data_type", "object"),
        ("chunk_grid.configuration.chunk_shape", [16384, 1, 6]),
        ("chunk_grid.configuration.chunk_shape", [24, 1, 7]),
        ("codecs", []),
        ("codecs.0.name", "gzip"),
        ("codecs.0.configuration.chunk_shape", [16, 1, 3]),
        ("codecs.0.configuration.chunk_shape", [0, 1, 7]),
        ("codecs.0.configuration.codecs", [{"name": "bytes", "configuration": {"endian": "little"}}]),
        ("codecs.0.configuration.index_location", "start"),
        ("codecs.0.configuration.index_codecs", []),
        ("chunk_key_encoding", {"name": "v2"}),
        ("dimension_names", None),
    ],
)
def test_what_format_1_does_not_allow_is_refused(path: str, value: Any) -> None:
    with pytest.raises(StoreError, match="not an array of format 1"):
        ArraySpec.from_metadata("image/embedding", _changed(path, value))


def test_a_chunk_that_no_reader_should_allocate_is_refused() -> None:
    with pytest.raises(StoreError, match="not an array of format 1"):
        ArraySpec.from_metadata("image/embedding", embedding_array(plan_of(100), "image", 1 << 40).to_metadata())

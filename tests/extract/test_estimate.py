"""A dry run says what the run then does, and writes nothing."""

import json

import pytest

from kdstore.extract.config import ExtractConfig
from kdstore.extract.estimate import estimate
from kdstore.extract.run import extract
from kdstore.store import open_store

SHARED = {"teacher": "scenes-T", "untrained_seed": 0, "data": "scenes/val:70", "unit_rows": 32, "device": "cpu", "batch": 16}


@pytest.mark.parametrize("changes", [{}, {"tokens": "both"}, {"tokens": "image", "encode": "int8", "reduce": "pool2+pca16+int8"}, {"dtype": "float32"}])
def test_rows_arrays_files_and_bytes_are_those_of_the_run(tmp_path, changes):
    config = ExtractConfig(**SHARED, **changes, out=str(tmp_path / "s"))
    found = estimate(config)
    assert list(tmp_path.iterdir()) == []
    extract(config)
    store = open_store(tmp_path / "s")
    assert (found.images, found.texts) == (store.num_images, store.num_texts)
    assert found.arrays.items() <= {name: f"{list(spec.shape)} {spec.dtype}" for name, spec in store.arrays.items()}.items()
    codecs = [path for path in (tmp_path / "s").rglob("*") if path.is_file() and "codecs" in path.parts]
    assert found.files == len([path for path in (tmp_path / "s").rglob("*") if path.is_file()]) - len(codecs)
    shards = sum(path.stat().st_size for name in found.arrays for path in (tmp_path / "s" / name / "c").rglob("*") if path.is_file())
    assert found.bytes < shards < 2 * found.bytes  # chunks are filled up, and end in their crc32c
    assert found.hours > 0
    assert found.bottleneck in ("reading", "model", "writing")
    assert min(found.images_written, found.texts_written) > 0


def test_many_processes_take_a_part_of_the_hours_each(tmp_path):
    alone, shared = (estimate(ExtractConfig(**SHARED, out=str(tmp_path / "s"), **more)) for more in ({}, {"part": "3/1000"}))
    assert shared.processes == 1000
    assert shared.hours < alone.hours


def test_hours_are_not_shared_by_workers_on_the_same_cores_or_of_a_number_that_nobody_knows(tmp_path):
    cores, cluster = (estimate(ExtractConfig(**SHARED, out=str(tmp_path / "s"), **more)) for more in ({"workers": 8}, {"scheduler": "tcp://h:1"}))
    assert (cores.processes, cluster.processes) == (1, 1)
    assert any("8 workers share one device" in notice for notice in cores.notices)
    assert any("per worker" in notice for notice in cluster.notices)


def test_images_that_need_not_be_read_take_no_time(tmp_path):
    extract(ExtractConfig(**SHARED, out=str(tmp_path / "s")))
    changes = {"parent": str(tmp_path / "s"), "tokens": "text", "out": str(tmp_path / "t")}
    found = estimate(ExtractConfig(**{**SHARED, **changes}))
    assert (found.images_read, found.images_encoded, found.bottleneck) == (0, 0, "model")
    json.dumps(found.__dict__, allow_nan=False)

"""What a study pairs: first weights, batches, captions and dropout are the seed's alone, whatever teaches; and permuted targets teach nothing of a pair."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdstore.distill.config import DistillConfig
from kdstore.distill.pairs import pairs_of_stores
from kdstore.distill.permuted import permute_targets
from kdstore.distill.targets import StoreTargets
from kdstore.distill.train import distill
from kdstore.errors import ConfigError
from kdstore.jsonfile import read_json
from kdstore.store import open_store

NEEDS = ("image/embedding", "text/embedding")


def first_steps(out: Path, student: str, seed: int, **taught: object) -> list[float]:
    """The task's loss in six steps in which nothing is learnt: a function of first weights, batches, captions and dropout."""
    said = {"loss": "clip + crd", "samples": 48, "batch_size": 8, "lr": 0.0, "log_every": 1, "projector": "always", "seed": seed, "device": "cpu"}
    distill(DistillConfig(student=student, out=str(out), **{**said, **taught}))  # type: ignore[arg-type]
    return [json.loads(line)["clip"] for line in (out / "log.jsonl").read_text().splitlines()]


def test_students_of_teachers_of_other_width_and_of_none_begin_alike_and_see_the_same(store, other, source, student, tmp_path):
    assert open_store(store).feature_shape("image/embedding") != open_store(other).feature_shape("image/embedding")
    of_one = first_steps(tmp_path / "one", student, 3, cache=str(store))
    assert of_one == first_steps(tmp_path / "other", student, 3, cache=str(other))
    assert of_one == first_steps(tmp_path / "alone", student, 3, data=source.spec, loss="none")
    assert of_one == first_steps(tmp_path / "permuted", student, 3, cache=str(store), permute_targets=5)
    assert of_one != first_steps(tmp_path / "seed", student, 4, cache=str(store))


def test_permuted_targets_are_another_loss_that_repeats_and_is_recorded(store, student, tmp_path):
    def crd(name: str, **said: object) -> list[float]:
        first_steps(tmp_path / name, student, 0, cache=str(store), **said)
        return [json.loads(line)["crd"] for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]

    plain, permuted = crd("plain"), crd("permuted", permute_targets=5)
    assert permuted == crd("again", permute_targets=5)
    assert len({*map(tuple, (plain, permuted, crd("seed", permute_targets=6)))}) == 3
    assert read_json(tmp_path / "permuted" / "run.json")["settings"]["permute_targets"] == 5


@given(seed=st.integers(0, 2**40))
def test_every_row_is_told_once_and_images_apart_from_texts(make_store_once, source, seed):
    store = open_store(make_store_once)
    pairs = pairs_of_stores([store], source, needs=NEEDS)
    plain = StoreTargets(store, NEEDS)
    (permuted,) = permute_targets([plain], pairs, seed)
    images, texts = pairs.target_rows[0], pairs.texts.rows[0]
    for stands_for, rows in ((permuted.image_row, images), (permuted.text_row, texts)):
        assert sorted(stands_for[rows]) == sorted(rows)  # invalid rows are never told of
        assert (stands_for[rows] != rows).any()
    first_text = texts[pairs.texts.offsets[:-1]]
    image_of_text = np.repeat(np.arange(store.num_images), np.diff(store.offsets))
    assert (image_of_text[permuted.text_row[first_text]] != permuted.image_row[images]).any()
    views = np.zeros(len(images), np.int64)
    assert np.array_equal(permuted.image("image/embedding", images, views), plain.image("image/embedding", permuted.image_row[images], views))
    assert np.array_equal(permuted.text("text/embedding", texts), plain.text("text/embedding", permuted.text_row[texts]))


@pytest.fixture(scope="module")
def make_store_once(make_store):
    return make_store(invalid=(3, 17))


def test_there_must_be_targets_to_permute():
    with pytest.raises(ConfigError, match="permute_targets"):
        DistillConfig(loss="none", permute_targets=1)

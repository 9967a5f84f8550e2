"""Distilling from imported features: what they do not say must be said by the user, and nothing else stands in the way."""

from __future__ import annotations

import numpy as np
import pytest

from kdstore.data.sources import open_source
from kdstore.distill.config import DistillConfig
from kdstore.distill.imported import check_imported
from kdstore.distill.losses import needs_of, parse_loss
from kdstore.distill.train import distill
from kdstore.errors import ConfigError, MissingFeature
from kdstore.store import open_store
from kdstore.store.importing import ImportConfig, import_store


def test_a_store_of_unknown_origin_teaches_once_its_kind_and_scale_are_said(in_tmp):
    source = open_source("scenes/val:8")
    folder = in_tmp / "theirs"
    folder.mkdir()
    rng = np.random.default_rng(0)
    (folder / "keys.txt").write_text("".join(f"{source.key(i)}\n" for i in range(8)))
    np.save(folder / "image.npy", rng.normal(size=(8, 16)).astype("f4"))
    np.save(folder / "text.npy", rng.normal(size=(8, 16)).astype("f4"))
    captions = "".join(f'["{source.captions(i)[0].text}"]\n' for i in range(8))
    (folder / "captions.jsonl").write_text(captions)
    import_store(folder, "store", ImportConfig(format="npy"))
    settings = {"cache": "store", "data": "scenes/val:8", "student": "scenes-T", "batch_size": 4, "samples": 4, "device": "cpu", "threads": 1}
    with pytest.raises(ConfigError, match="softmax or a sigmoid"):
        distill(DistillConfig(**settings, loss="clip-kd"))
    with pytest.raises(MissingFeature, match="logit scale"):
        distill(DistillConfig(**settings, loss="clip-kd", sigmoid_teacher="allow"))
    done = distill(DistillConfig(**settings, loss="clip-kd", sigmoid_teacher="allow", teacher_temperature=100.0))
    assert np.isfinite(done.losses["loss"])


def test_targets_of_views_that_cannot_be_drawn_are_taken_only_on_demand(in_tmp):
    (in_tmp / "theirs").mkdir()
    (in_tmp / "theirs/keys.txt").write_text("a\n")
    np.save(in_tmp / "theirs/image.npy", np.ones((1, 4), "f4"))
    import_store("theirs", "store", ImportConfig(format="npy", logit_bias="none"))
    store = open_store("store")
    store.identity["arrays"]["image/embedding"] |= {"views": ["augmented"], "augmentation": "mean of 30"}
    needs = needs_of(parse_loss("fd"))
    with pytest.raises(MissingFeature, match="mean of 30"):
        check_imported(DistillConfig(cache="store", loss="fd"), [store], needs)
    check_imported(DistillConfig(cache="store", loss="fd", views="unmatched"), [store], needs)
    check_imported(DistillConfig(cache="store", loss="fd"), [store], ["text/embedding"])

"""Distilling from augmented views: the target is always that of the picture which the student is shown."""

from __future__ import annotations

import dataclasses
import json
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kdstore.data.scenes import Scenes
from kdstore.distill.batches import BatchPlan, Maker
from kdstore.distill.config import DistillConfig
from kdstore.distill.pairs import pairs_of_stores
from kdstore.distill.targets import StoreTargets, views_to_show
from kdstore.distill.train import distill
from kdstore.errors import Interrupted, MissingFeature
from kdstore.extract.config import ExtractConfig
from kdstore.extract.run import extract
from kdstore.jsonfile import read_json
from kdstore.models.load import Model, load_model
from kdstore.models.pixels import Kept, split_preprocess
from kdstore.store import Store, open_store

NEEDS = ("image/embedding", "text/embedding")


@pytest.fixture(scope="module")
def trained() -> Model:
    """A trained teacher: random towers see hardly any difference between pictures."""
    return load_model("scenes-S", device="cpu")


@pytest.fixture(scope="module")
def viewed(source: Scenes, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("viewed") / "s"
    extract(ExtractConfig(teacher="scenes-S", data=source.spec, out=str(path), unit_rows=16, device="cpu", views=2, view_flip=0.5, view_strength=0.6))
    return path


def maker(store: Store, source: Scenes, model: Model, memory: int = 0, choice: str = "auto") -> Maker:
    keep, _ = split_preprocess(model.preprocess)
    pairs = pairs_of_stores([store], source)
    stored = views_to_show(choice, [store], NEEDS)
    return Maker(BatchPlan(len(pairs), 8, 3), pairs, source, (StoreTargets(store, NEEDS),), NEEDS, keep, model.tokenizer, Kept(memory), stored)


def losses(path: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (path / "log.jsonl").read_text().splitlines()]


def cosine(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cosine_similarity(a.double(), b.double())


def test_every_target_is_that_of_the_view_shown_and_of_no_other(viewed: Path, source: Scenes, trained: Model) -> None:
    store = open_store(viewed)
    make, (_, finish) = maker(store, source, trained), split_preprocess(trained.preprocess)
    shown = set()
    for step in range(10):
        batch = make(step)
        with torch.inference_mode():
            seen_BD = trained.clip.encode_image(finish(batch.views_BCHW))
        assert cosine(batch.told.teachers[0].image_BD, seen_BD).min() >= 0.9999
        others_B = (make.views(step) + 1) % 3
        other_BD = torch.from_numpy(store.gather("image/embedding", make.pairs.target_rows[0][make.plan.batch(step)], others_B))
        assert cosine(other_BD, seen_BD).max() < 0.9999
        shown |= set(make.views(step).tolist())
    assert shown == {0, 1, 2}


def test_an_image_shows_all_of_its_views_in_turn_whatever_came_before(viewed: Path, source: Scenes, trained: Model) -> None:
    make = maker(open_store(viewed), source, trained)
    steps = range(6 * make.plan.steps_per_epoch)
    found = {step: make.views(step).tolist() for step in reversed(steps)}
    views: dict[int, list[int]] = {}
    for step in steps:
        assert make.views(step).tolist() == found[step]
        for pair, view in zip(make.plan.batch(step).tolist(), found[step], strict=True):
            views.setdefault(pair, []).append(view)
    assert all(set(of_pair[:3]) == {0, 1, 2} and of_pair[:3] == of_pair[3:] for of_pair in views.values())
    assert {of_pair[0] for of_pair in views.values()} == {0, 1, 2}


def test_views_are_kept_apart_within_the_budget(viewed: Path, source: Scenes, trained: Model) -> None:
    store = open_store(viewed)
    none, some, all_of_them = (maker(store, source, trained, memory) for memory in (0, 200_000, 2**30))
    for step in range(20):
        pixels = none(step).views_BCHW
        assert torch.equal(some(step).views_BCHW, pixels)
        assert torch.equal(all_of_them(step).views_BCHW, pixels)
    assert some.kept._used <= 200_000


def test_a_student_of_another_resolution_is_shown_the_teachers_picture_resized_as_it_resizes(
    viewed: Path, source: Scenes, trained: Model, student: str
) -> None:
    store, small = open_store(viewed), load_model(student, untrained=True, device="cpu")
    make, theirs = maker(store, source, small), maker(store, source, trained)
    keep, _ = split_preprocess(small.preprocess)
    for step in range(3):
        pictures = theirs(step).views_BCHW.numpy()
        ours = make(step).views_BCHW.numpy()
        assert ours.shape == (8, 3, 32, 32)
        for picture, pixels, view in zip(pictures, ours, make.views(step), strict=True):
            if view:  # the plain one is resized from the image itself
                assert (keep(Image.fromarray(picture.transpose(1, 2, 0))) == pixels).all()


def test_a_run_says_which_views_it_showed_and_plain_ones_are_those_of_a_store_without_views(
    viewed: Path, source: Scenes, store: Path, student: str, tmp_path: Path
) -> None:
    config = DistillConfig(cache=str(viewed), student=student, out=str(tmp_path / "auto"), samples=24, batch_size=8, log_every=1, device="cpu")
    distill(config)
    distill(dataclasses.replace(config, views="stored", out=str(tmp_path / "stored")))
    distill(dataclasses.replace(config, views="plain", out=str(tmp_path / "plain")))
    said = {name: read_json(tmp_path / name / "config.json")["views"] for name in ("auto", "stored", "plain")}
    assert said == {"auto": "stored", "stored": "stored", "plain": "plain"}
    assert losses(tmp_path / "auto") == losses(tmp_path / "stored") != losses(tmp_path / "plain")
    extract(ExtractConfig(teacher="scenes-S", data=source.spec, out=str(tmp_path / "s"), unit_rows=16, device="cpu"))
    distill(dataclasses.replace(config, cache=str(tmp_path / "s"), out=str(tmp_path / "without")))
    np.testing.assert_allclose(losses(tmp_path / "without"), losses(tmp_path / "plain"), rtol=1e-4)
    with pytest.raises(MissingFeature, match="no augmented views"):
        distill(dataclasses.replace(config, cache=str(store), views="stored", out=str(tmp_path / "x")))
    assert not (tmp_path / "x").exists()


def test_a_stopped_and_resumed_run_shows_the_views_of_one_that_never_stopped(viewed: Path, student: str, tmp_path: Path) -> None:
    config = DistillConfig(cache=str(viewed), student=student, out=str(tmp_path / "run"), samples=96, batch_size=8, log_every=1, device="cpu")
    distill(dataclasses.replace(config, out=str(tmp_path / "whole")))

    def stop(stage: str, done: int, total: int, note: str = "") -> None:
        if stage == "distill" and done == 7:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(Interrupted):
        distill(config, on_progress=stop)
    distill(dataclasses.replace(config, resume=True, threads=1, memory_gib=0.0))
    assert len(losses(tmp_path / "run")) == 12
    for name in ("log.jsonl", "open_clip_model.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_an_array_without_targets_of_all_views_is_no_target_of_augmented_ones(viewed: Path, source: Scenes, tmp_path: Path) -> None:
    extract(ExtractConfig(teacher="scenes-S", data=source.spec, out=str(tmp_path / "s"), device="cpu", views=1, tokens="image"))
    store = open_store(tmp_path / "s")
    with pytest.raises(MissingFeature, match="1 of 2 views in image/tokens"):
        views_to_show("auto", [store], ("image/tokens",))
    assert views_to_show("plain", [store], ("image/tokens",)) == ()
    assert views_to_show("auto", [], NEEDS) == ()

"""The teacher that runs beside the student: the store's loss curve, random views that both see, and what only a store can do."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from kdstore.data.scenes import Scenes
from kdstore.distill.config import DistillConfig
from kdstore.distill.online import online_targets
from kdstore.distill.train import distill
from kdstore.errors import ConfigError, MissingFeature
from kdstore.jsonfile import digest_of
from kdstore.models.encode import encode_image
from kdstore.progress import silent
from kdstore.store import open_store


@pytest.fixture(scope="module")
def online(student: str, source: Scenes) -> DistillConfig:
    """The session's teacher, live: an epoch and a half of it."""
    teacher = {"teacher": "scenes-T", "teacher_untrained_seed": 7, "data": source.spec}
    return DistillConfig(**teacher, student=student, samples=60, batch_size=10, loss="clip-kd + crd", device="cpu", log_every=1)


def losses(config: DistillConfig, out: Path) -> list[float]:
    distill(replace(config, out=str(out)))
    return [json.loads(line)["loss"] for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-5), ("float16", 2e-3)])
def test_the_live_teacher_gives_the_loss_curve_of_its_store(
    online: DistillConfig, make_store: Callable[..., Path], dtype: str, tolerance: float, tmp_path: Path
) -> None:
    store = replace(online, teacher=None, teacher_untrained_seed=None, cache=str(make_store(dtype)))
    np.testing.assert_allclose(losses(online, tmp_path / "online"), losses(store, tmp_path / "store"), rtol=tolerance)


def test_a_run_says_which_teacher_ran_as_a_store_would(online: DistillConfig, store: Path, tmp_path: Path) -> None:
    losses(replace(online, augment="random", samples=10), tmp_path / "run")
    said = json.loads((tmp_path / "run" / "run.json").read_text())["online"]
    assert said["teacher"]["weights_sha256"] == open_store(store).identity["teacher"]["weights_sha256"]
    assert said["preprocessing"]["digest"] == digest_of({k: v for k, v in said["preprocessing"].items() if k != "digest"})
    assert said["views"]["seed"] == online.seed


def test_random_views_follow_from_the_seed_and_the_step_alone(online: DistillConfig, tmp_path: Path) -> None:
    config = replace(online, augment="random", augment_flip=0.5)
    first = losses(config, tmp_path / "a")
    assert first == losses(replace(config, threads=1), tmp_path / "b")
    assert first != losses(replace(config, augment="none"), tmp_path / "c")
    assert first != losses(replace(config, augment_flip=0.0), tmp_path / "d")


def test_teacher_and_student_see_one_picture(online: DistillConfig, source: Scenes) -> None:
    targets = online_targets(replace(online, augment="random"), source, silent)
    assert targets.views is not None
    picture = targets.views.picture(source.image(3).image, 3, 5)
    expected = encode_image(targets.model, targets.model.preprocess(picture)[None]).numpy()
    np.testing.assert_allclose(targets.image("image/embedding", np.array([3, 4]), np.array([5, 1]))[:1], expected, rtol=1e-4, atol=1e-5)
    other = targets.image("image/embedding", np.array([3]), np.array([6]))
    assert not np.allclose(other, expected, rtol=1e-2)


def test_the_teacher_has_no_gradient_and_is_in_eval_mode(online: DistillConfig, source: Scenes, tmp_path: Path) -> None:
    targets = online_targets(online, source, silent)
    before = targets.model.identity["teacher"]["weights_sha256"]
    distill(replace(online, teacher=None, teacher_untrained_seed=None, out=str(tmp_path / "run"), samples=10), source=source, targets=targets)
    assert not targets.model.clip.training
    assert all(p.grad is None for p in targets.model.clip.parameters())
    assert before == online_targets(online, source, silent).model.identity["teacher"]["weights_sha256"]


def test_random_views_of_a_store_are_refused(online: DistillConfig, store: Path) -> None:
    with pytest.raises(ConfigError, match="Unstorable augmentation"):
        replace(online, teacher=None, cache=str(store), augment="random")


def test_a_store_and_a_live_teacher_are_refused(online: DistillConfig, store: Path) -> None:
    with pytest.raises(ConfigError, match="Both a store"):
        replace(online, cache=str(store))


@pytest.mark.parametrize("loss", ["theia", "unic"])
def test_losses_of_statistics_need_a_store(online: DistillConfig, loss: str, tmp_path: Path) -> None:
    with pytest.raises(MissingFeature, match="live"):
        losses(replace(online, loss=loss), tmp_path / "run")
    assert not (tmp_path / "run").exists()

"""Extraction, then evaluation: a model is scored from its store as it is scored live, and what a store lacks is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from kdstore.errors import EvaluationError, JoinError, MissingFeature
from kdstore.evaluate.protocol import VqaConfig
from kdstore.evaluate.vqa import VqaResult, evaluate_vqa
from kdstore.extract.config import ExtractConfig
from kdstore.extract.run import extract
from kdstore.store import open_store


def stored(out: Path, data: str, **settings: Any) -> str:
    return extract(ExtractConfig(**{"teacher": "scenes-S", "data": data, "tokens": "image", "out": str(out), "device": "cpu", **settings})).path


def answered(result: VqaResult) -> list[Any]:
    return [(row.name, row.seed, row.answers, row.head, row.scores) for row in result.rows]


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """The scenes of both splits; the training store holds more, and in its own rows."""
    folder = tmp_path_factory.mktemp("stores")
    return stored(folder / "train", "scenes/train:30"), stored(folder / "test", "scenes/test:16")


def small(**settings: Any) -> VqaConfig:
    return VqaConfig(**{"train_images": 24, "eval_images": 16, "epochs": 1, "width": 16, "layers": 1, "device": "cpu", **settings})


@pytest.mark.parametrize("settings", [{}, {"head": "butd", "grid": 2}, {"head": "pooled"}], ids=str)
def test_frozen_features_of_a_store_are_the_live_ones(settings: dict[str, Any], stores: tuple[str, ...]) -> None:
    """The untrained twin is built from the configuration in the store: no weights of the teacher are read."""
    live = evaluate_vqa(small(model="scenes-S", **settings))
    cached = evaluate_vqa(small(features=stores, **settings))
    assert answered(cached) == answered(live)
    assert cached.content["config_digest"] == live.content["config_digest"]
    assert cached.content["model"]["identity"]["teacher"]["weights_sha256"] == live.content["model"]["identity"]["teacher"]["weights_sha256"]
    assert len(cached.content["model"]["stores"]) == 2
    (held,) = cached.content["model"]["arrays"].items()
    assert held == (array := "image/embedding" if settings.get("head") == "pooled" else "image/tokens", open_store(stores[0]).identity["arrays"][array])
    assert {"layer", "views"} <= held[1].keys()


def test_images_that_no_store_holds_are_counted_with_the_command_that_extracts_them(stores: tuple[str, ...]) -> None:
    with pytest.raises(JoinError, match=r"4 of 20 images of scenes/test:20 are in none of the stores .*first: scenes-1/test/16") as missing:
        evaluate_vqa(small(features=stores, eval_images=20))
    assert "kdstore extract --teacher scenes-S --data scenes/test:20 --tokens image" in missing.value.hint


def test_stores_of_other_features_are_refused(stores: tuple[str, ...], tmp_path: Path) -> None:
    other = stored(tmp_path / "other", "scenes/test:4", teacher="scenes-L")
    with pytest.raises(EvaluationError, match=r"features of different kinds: .*teacher"):
        evaluate_vqa(small(features=(stores[0], other)))
    with pytest.raises(MissingFeature, match="holds no image/tokens"):
        evaluate_vqa(small(features=stored(tmp_path / "bare", "scenes/test:4", tokens="none")))


def test_a_folder_of_images_without_captions_is_extracted_and_found_by_content(tmp_path: Path) -> None:
    """Two splits hold other images under the same names."""
    draw = np.random.default_rng(0)
    for split in ("train", "test"):
        (tmp_path / "vqa" / split / "images").mkdir(parents=True)
        for i in range(3):
            Image.fromarray(draw.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(tmp_path / "vqa" / split / "images" / f"{i}.png")
        rows = [[f"is it {i}?", "yes" if i % 2 else "no", i] for i in range(3)]
        (tmp_path / "vqa" / split / "questions.json").write_text(json.dumps(rows))
    store = stored(tmp_path / "store", f"images:{tmp_path / 'vqa'}")
    settings = {"dataset": "easy-vqa", "folder": str(tmp_path / "vqa"), "train_images": None, "eval_images": None, "controls": False}
    assert answered(evaluate_vqa(small(features=store, **settings))) == answered(evaluate_vqa(small(model="scenes-S", **settings)))

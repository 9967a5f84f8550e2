"""Validation during training: the numbers are those of the exported student, and looking changes nothing."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from kdstore.data.scenes import Scenes
from kdstore.distill.config import DistillConfig
from kdstore.distill.train import distill
from kdstore.errors import ConfigError
from kdstore.jsonfile import read_json
from kdstore.metrics.agreement import mean_cosine, top1_agreement
from kdstore.metrics.retrieval import retrieval_recall
from kdstore.models.encode import encode_image, encode_text
from kdstore.models.load import load_model


@pytest.fixture
def config(student: str, store: Path, tmp_path: Path) -> DistillConfig:
    """Five steps, validated after the third and the last."""
    return DistillConfig(
        cache=str(store), student=student, out=str(tmp_path / "run"), samples=40, batch_size=8, validate_every=3, log_every=1, threads=1, device="cpu"
    )


def scores(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (path / "validation.jsonl").read_text().splitlines()]


def embedded(folder: Path, source: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What an exported student makes of a source: images, captions, and the image of each caption."""
    model = load_model(str(folder), device="cpu")
    captions = [(i, caption.text) for i in range(len(source)) for caption in source.captions(i)]
    image_ND = encode_image(model, torch.stack([model.preprocess(source.image(i).image) for i in range(len(source))])).numpy()
    return image_ND, encode_text(model, [text for _, text in captions]).numpy(), np.array([i for i, _ in captions])


def test_scores_are_those_of_the_exported_student_and_of_its_average(config: DistillConfig, tmp_path: Path) -> None:
    held = Scenes("val", 13)
    distill(dataclasses.replace(config, validate_data=held.spec, ema=0.9))
    assert [line["step"] for line in scores(tmp_path / "run")] == [3, 5]
    last = scores(tmp_path / "run")[-1]
    for name, folder in (("validation", "."), ("validation_ema", "ema")):
        image_ND, text_MD, image_of_text_M = embedded(tmp_path / "run" / folder, held)
        for score, value in retrieval_recall(image_ND, text_MD, image_of_text_M, ks=(1, 5)).items():
            assert last[f"{name}/{score}"] == pytest.approx(value)
    assert read_json(tmp_path / "run" / "run.json")["validation"] == {name: value for name, value in last.items() if name != "step"}


def test_agreement_with_the_teacher_is_that_of_projected_rows(config: DistillConfig, source: Scenes, store: Path, features: Any, tmp_path: Path) -> None:
    warnings: list[str] = []
    distill(
        dataclasses.replace(config, validate_cache=str(store)),
        on_progress=lambda stage, done, total, note: warnings.append(note) if stage == "warning" else None,
    )
    assert warnings == ["40 of 40 pairs of the validation are trained on"]
    last = scores(tmp_path / "run")[-1]
    image_ND, text_MD, _ = embedded(tmp_path / "run", source)
    state = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["objective"]
    for side, rows, its_rows in (("image", image_ND, features.image), ("text", text_MD, features.text)):
        weight, bias = (state[f"heads.0.{side}_projector.{part}"].numpy() for part in ("weight", "bias"))
        assert last[f"validation/teacher_cosine_{side}"] == pytest.approx(mean_cosine(rows @ weight.T + bias, its_rows), abs=1e-5)
    expected = top1_agreement((image_ND, text_MD), (features.image, features.text))
    assert last["validation/teacher_top1_text_of_image"] == pytest.approx(expected)


@pytest.mark.parametrize("loss", ["crd", "none"])
def test_widths_that_no_projector_brings_together_have_no_cosine(loss: str, config: DistillConfig, store: Path, tmp_path: Path) -> None:
    distill(dataclasses.replace(config, loss=loss, validate_cache=str(store)))
    names = scores(tmp_path / "run")[-1].keys()
    assert "validation/teacher_top1_image_of_text" in names
    assert not any("cosine" in name for name in names)


def test_probe_captions_are_labels(config: DistillConfig, tmp_path: Path) -> None:
    rows = ["file_name,caption,label"]
    for i in range(6):
        Image.new("RGB", (40, 40), (40 * i, 0, 255 - 40 * i)).save(tmp_path / f"{i}.png")
        rows.append(f"{i}.png,a picture number {i},{'red' if i > 2 else 'blue'}")
    (tmp_path / "metadata.csv").write_text("\n".join(rows) + "\n")
    table = f"{tmp_path / 'metadata.csv'}?image=file_name&caption=caption&probe=label"
    distill(dataclasses.replace(config, validate_data=table))
    assert scores(tmp_path / "run")[-1]["validation/zeroshot_top1"] in [pytest.approx(100 * k / 6) for k in range(7)]


def test_looking_changes_nothing_and_a_resumed_run_has_the_same_scores(config: DistillConfig, store: Path, tmp_path: Path) -> None:
    def killed(stage: str, done: int, total: int, note: str = "") -> None:
        if done == 4:
            raise MemoryError

    distill(config)
    looking = dataclasses.replace(config, validate_cache=str(store), out=str(tmp_path / "looking"))
    distill(looking)
    again = dataclasses.replace(looking, save_every=2, out=str(tmp_path / "again"))
    with pytest.raises(MemoryError):
        distill(again, on_progress=killed)
    distill(dataclasses.replace(again, resume=True))
    for name in ("log.jsonl", "open_clip_model.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "looking" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    assert scores(tmp_path / "looking") == scores(tmp_path / "again")


def test_a_store_of_another_teacher_is_refused(config: DistillConfig, make_store: Callable[..., Path], tmp_path: Path) -> None:
    other = make_store(logit_scale=3.0, name="other")
    with pytest.raises(ConfigError, match="another teacher than the run learns from"):
        distill(dataclasses.replace(config, validate_cache=str(other)))
    assert not (tmp_path / "run").exists()


def test_a_source_without_captions_is_refused(config: DistillConfig, tmp_path: Path) -> None:
    Image.new("RGB", (40, 40)).save(tmp_path / "0.png")
    (tmp_path / "metadata.csv").write_text("file_name,label\n0.png,blue\n")
    with pytest.raises(ConfigError, match="no image with a caption to validate on"):
        distill(dataclasses.replace(config, validate_data=f"{tmp_path / 'metadata.csv'}?image=file_name&probe=label"))

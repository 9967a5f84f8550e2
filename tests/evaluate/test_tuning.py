"""Training the image tower with the head: what is trained, going on after a kill, other image sizes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from kdstore.errors import Interrupted, ModelError, RunError
from kdstore.evaluate.protocol import VqaConfig
from kdstore.evaluate.tower import ImageTower
from kdstore.evaluate.vqa import VqaResult, evaluate_vqa
from kdstore.models.checkpoint import export_model
from kdstore.models.encode import encode_image_tokens
from kdstore.models.load import Model, load_model
from kdstore.progress import OnProgress, silent

TEXT = {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 1, "layers": 1}


@pytest.fixture(scope="module")
def tiny_vit(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A vision transformer of three blocks on 4 x 4 patches, with weights, as a folder."""
    folder = tmp_path_factory.mktemp("tiny")
    vision = {"image_size": 32, "patch_size": 8, "layers": 3, "width": 64}
    (folder / "tiny-vit.json").write_text(json.dumps({"embed_dim": 16, "vision_cfg": vision, "text_cfg": TEXT}))
    model = load_model(str(folder / "tiny-vit.json"), untrained=True, device="cpu")
    export_model(folder, model.clip, model.config)
    return str(folder)


@pytest.fixture(scope="module")
def tiny_conv(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A convolutional network of timm's, with batch norm, without weights."""
    path = tmp_path_factory.mktemp("tiny") / "tiny-conv.json"
    vision = {"timm_model_name": "mobilenetv3_small_050", "timm_model_pretrained": False, "timm_pool": "avg", "timm_proj": None, "image_size": 64}
    path.write_text(json.dumps({"embed_dim": 1024, "vision_cfg": vision, "text_cfg": TEXT}))
    return str(path)


@pytest.fixture(scope="module")
def settings(tiny_vit: str) -> dict[str, Any]:
    small = {"train_images": 24, "eval_images": 8, "epochs": 2, "batch_images": 1, "width": 16, "layers": 1, "device": "cpu", "controls": False}
    return {"model": tiny_vit, "mode": "full", "save_every": 7, **small}


def tuned(settings: dict[str, Any], folder: Path, on_progress: OnProgress = silent) -> VqaResult:
    return evaluate_vqa(VqaConfig(**settings, out=str(folder / "vqa.json")), on_progress=on_progress)


def outcome(result: VqaResult) -> list[Any]:
    return [(row.name, row.answers, row.head, row.scores) for row in result.rows]


@pytest.fixture(scope="module")
def whole(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> VqaResult:
    return tuned(settings, tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_a_checkpoint_and_the_same_command_gives_the_same_result(
    signum: int, settings: dict[str, Any], whole: VqaResult, tmp_path: Path
) -> None:
    def stop(stage: str, done: int, total: int, note: str) -> None:
        if done == 20 and stage.startswith("model"):
            os.kill(os.getpid(), signum)

    with pytest.raises(Interrupted, match=r"Stopped at step 20 of \d+ of model, seed 0; .*vqa\.rows.* holds a checkpoint") as stopped:
        tuned(settings, tmp_path, stop)
    assert stopped.value.signum == signum
    assert not (tmp_path / "vqa.json").exists()
    steps: list[int] = []
    again = tuned(settings, tmp_path, lambda stage, done, *_: steps.append(done) if stage.startswith("model") else None)
    assert min(steps) > 20
    assert outcome(again) == outcome(whole)


def test_a_killed_process_loses_what_came_after_its_last_checkpoint_alone(settings: dict[str, Any], whole: VqaResult, tmp_path: Path) -> None:
    child = f"""
import os, signal
from kdstore.evaluate.protocol import VqaConfig
from kdstore.evaluate.vqa import evaluate_vqa
def kill(stage, done, total, note):
    if stage.startswith("model") and done == 40:
        os.kill(os.getpid(), signal.SIGKILL)
evaluate_vqa(VqaConfig(**{settings | {"out": str(tmp_path / "vqa.json")}!r}), on_progress=kill)
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # other numbers of threads sum in another order
    assert subprocess.run([sys.executable, "-c", child], env=environment).returncode == -signal.SIGKILL
    (checkpoint,) = tmp_path.rglob("checkpoint.pt")
    steps: list[int] = []
    again = tuned(settings, tmp_path, lambda stage, done, *_: steps.append(done) if stage.startswith("model") else None)
    assert min(steps) == 40, "it went on from step 35"
    assert outcome(again) == outcome(whole)
    assert not checkpoint.exists()
    weights = [load_model(name, device="cpu").identity["teacher"]["weights_sha256"] for name in (str(checkpoint.parent), settings["model"])]
    assert weights[0] != weights[1], "the tuned model lies where its checkpoint was"


def test_a_checkpoint_that_is_cut_is_named(settings: dict[str, Any], tmp_path: Path) -> None:
    def stop(stage: str, done: int, total: int, note: str) -> None:
        if done == 20 and stage.startswith("model"):
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted):
        tuned({**settings, "head": "pooled"}, tmp_path, stop)
    (checkpoint,) = tmp_path.rglob("checkpoint.pt")
    checkpoint.write_bytes(checkpoint.read_bytes()[:5000])
    with pytest.raises(RunError, match=r"checkpoint\.pt cannot be read"):
        tuned({**settings, "head": "pooled"}, tmp_path)


# What is trained


def trained_step(model: Model, blocks: int | None) -> set[str]:
    """Take one step down the sum of all tokens; returns the names of all tensors of the model that changed."""
    before = {name: tensor.clone() for name, tensor in model.clip.state_dict().items()}
    tower = ImageTower(model, blocks, "tokens", None).train()
    optimiser = torch.optim.SGD([p for p in tower.parameters() if p.requires_grad], lr=1.0)
    pixels = torch.randint(0, 255, (4, 3, *model.image_size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    tower(pixels).pow(2).sum().backward()
    optimiser.step()
    return {name for name, tensor in model.clip.state_dict().items() if not torch.equal(tensor, before[name])}


@pytest.mark.parametrize(("name", "parts"), [("scenes-S", ["layer4"]), ("conv", ["trunk.blocks.5"]), ("vit", ["resblocks.2", "ln_post"])])
def test_the_last_block_changes_and_nothing_before_it_not_even_batch_statistics(name: str, parts: list[str], tiny_vit: str, tiny_conv: str) -> None:
    model = load_model({"vit": tiny_vit, "conv": tiny_conv}.get(name, name), untrained=True, device="cpu")
    changed = trained_step(model, 1)
    assert all(any(part in n for n in changed) for part in parts)
    assert all(n.startswith("visual.") and any(part in n for part in parts) for n in changed), changed


@pytest.mark.parametrize("name", ["scenes-S", "conv"])
def test_end_to_end_changes_the_whole_image_tower_with_its_batch_statistics_and_no_text(name: str, tiny_conv: str) -> None:
    model = load_model({"conv": tiny_conv}.get(name, name), untrained=True, device="cpu")
    changed = trained_step(model, None)
    statistics = {n for n in model.clip.state_dict() if n.startswith("visual") and "running_" in n}
    assert statistics <= changed
    assert all(n.startswith("visual.") for n in changed)


def test_a_tower_of_fewer_blocks_is_an_error() -> None:
    with pytest.raises(ModelError, match="has 4 blocks that can be trained apart, but the last 5"):
        ImageTower(load_model("scenes-S", untrained=True, device="cpu"), 5, "tokens", None)


def test_a_frozen_tower_gives_the_tokens_that_frozen_features_are_made_of() -> None:
    model = load_model("scenes-S", device="cpu")
    tower = ImageTower(model, 1, "tokens", None).eval()
    pixels = torch.randint(0, 255, (2, 3, *model.image_size), dtype=torch.uint8)
    with torch.no_grad():
        torch.testing.assert_close(tower(pixels), encode_image_tokens(model, tower.finish(pixels))[1])


# Other image sizes


def test_positions_are_interpolated_for_larger_images_or_they_are_refused(tiny_vit: str, tiny_conv: str) -> None:
    model, large = load_model(tiny_vit, device="cpu"), load_model(tiny_vit, device="cpu", image_size=64)
    assert (large.image_size, large.config["model_cfg"]["vision_cfg"]["image_size"]) == ((64, 64), 64)
    assert large.identity["teacher"]["digest"] != model.identity["teacher"]["digest"]
    assert large.preprocess(Image.new("RGB", (40, 50))).shape == (3, 64, 64)
    assert encode_image_tokens(large, torch.zeros(1, 3, 64, 64))[1].shape == (1, 64, 64)
    small, wide = (m.clip.visual.positional_embedding.detach() for m in (model, large))
    assert torch.equal(wide[0], small[0]), "the class token has no place"
    grid, wider = (p[1:].unflatten(0, (n, n)) for p, n in ((small, 4), (wide, 8)))
    torch.testing.assert_close(wider.mean((0, 1)), grid.mean((0, 1)), atol=2e-3, rtol=0.05)
    with pytest.raises(ModelError, match="Cannot load scenes-S for images of 160 pixels: "):
        load_model("scenes-S", device="cpu", image_size=160)
    assert load_model(tiny_conv, untrained=True, device="cpu", image_size=96).image_size == (96, 96)

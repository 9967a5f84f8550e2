"""The contract of every student in the list: it costs what is said, takes a step, and its export is the same model in plain open_clip."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import open_clip
import pytest
import torch

from kdstore.data.scenes import Scenes
from kdstore.distill.batches import BatchPlan, Maker
from kdstore.distill.building import build_student
from kdstore.distill.config import DistillConfig
from kdstore.distill.distributed import Share, World
from kdstore.distill.loop import Training
from kdstore.distill.objective import Objective
from kdstore.distill.pairs import pairs_of_source
from kdstore.distill.students import STUDENTS, count, table
from kdstore.models.checkpoint import export_model
from kdstore.models.cost import cost_of
from kdstore.models.load import load_model, parameter_counts
from kdstore.models.pixels import Kept, split_preprocess

DOCS = Path(__file__).parents[2] / "docs" / "students.md"
SLOW = ("ViT-S-16", "ViT-B-32", "ViT-B-16", "RN50", "MobileCLIP2-S0", "MobileCLIP2-S2")  # of each a smaller relative takes its step in every run of the tests
NAMES = [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in STUDENTS]


@pytest.mark.parametrize("name", NAMES)
def test_a_student_takes_a_step_and_its_export_is_the_same_model(name: str, tmp_path: Path) -> None:
    source, config = Scenes("train", 2), DistillConfig(student=name, loss="clip", samples=2, batch_size=2, device="cpu", warmup=0.0)
    model = build_student(config, None, torch.device("cpu")).model
    keep, finish = split_preprocess(model.preprocess)
    pairs = pairs_of_source(source)
    batch = Maker(BatchPlan(len(pairs), 2, 0), pairs, source, (), (), keep, model.tokenizer, Kept(0))(0)
    training = Training(
        config, 1, model.clip.train(), Objective("clip", student_dim=model.embed_dim), finish, model.device, torch.float32, Share.of(2, World(), None)
    )
    assert training.take(batch).isfinite().all()
    idle = [name for name, weight in model.clip.named_parameters() if weight.grad is None or not weight.grad.isfinite().all()]
    assert idle == [], "every weight is trained"

    export_model(tmp_path, model.clip.eval(), model.config)
    exported, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{tmp_path}", require_pretrained=True)
    image_BCHW = preprocess(source.image(0).image)[None]
    tokens_BL = open_clip.get_tokenizer(f"local-dir:{tmp_path}")([source.captions(0)[0].text])
    with torch.inference_mode():
        torch.testing.assert_close(exported.eval().encode_image(image_BCHW), model.clip.encode_image(image_BCHW), rtol=0, atol=1e-5)
        torch.testing.assert_close(exported.encode_text(tokens_BL), model.clip.encode_text(tokens_BL), rtol=0, atol=1e-5)
    shutil.rmtree(tmp_path)


@pytest.mark.parametrize("name", STUDENTS)
def test_a_student_costs_what_is_said(name: str) -> None:
    assert dataclasses.replace(count(name), about=STUDENTS[name].about) == STUDENTS[name]


@pytest.mark.parametrize(
    ("name", "image", "text"),
    [("ViT-B-32", 8.82, 5.96), ("RN50", 12.22, 5.96), ("ViT-S-16", 9.20, 3.38)],
)
def test_multiply_accumulates_are_half_of_the_operations_that_open_clip_publishes(name: str, image: float, text: float) -> None:
    """docs/model_profile.csv of open_clip counts two operations for each, with another counter."""
    assert (2 * STUDENTS[name].image_gmacs, 2 * STUDENTS[name].text_gmacs) == pytest.approx((image, text), abs=0.01)


def test_a_resnet_18_costs_what_its_paper_says_and_a_projection() -> None:
    assert STUDENTS["ResNet-18"].image_gmacs == pytest.approx(1.8, abs=0.02)
    assert STUDENTS["ResNet-18"].image_parameters == pytest.approx(11.69 - 0.513 + 0.262, abs=0.01), "512 outputs without a bias for 1000 with one"


@pytest.mark.parametrize("name", STUDENTS)
def test_every_student_has_its_row_in_the_docs_with_the_numbers_of_the_list(name: str) -> None:
    said = STUDENTS[name]
    counts = (f"{n:.2f}" for n in (said.parameters, said.without_token_embedding, said.image_parameters))
    row = f"| `{name}` | {' | '.join(counts)} | {said.image_gmacs:.3g} | {said.text_gmacs:.3g} | {said.pixels} |"
    assert row in DOCS.read_text()


def test_the_list_of_students_needs_no_torch() -> None:
    code = "import sys; from kdstore.distill.students import STUDENTS, table; print(table(STUDENTS)); assert not {'torch', 'open_clip'} & sys.modules.keys()"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.rstrip() == table(STUDENTS)
    assert all(re.search(rf"^{re.escape(name)} ", shown, re.MULTILINE) for name in STUDENTS)


def test_parameters_that_are_counted_are_those_of_the_model_that_is_built() -> None:
    assert cost_of("scenes-T").parameters == parameter_counts(load_model("scenes-T", untrained=True, device="cpu").clip)["total"]


def test_any_config_file_is_a_student_called_by_its_stem(tmp_path: Path) -> None:
    config = open_clip.get_model_config("ViT-S-16")
    config["vision_cfg"]["layers"] = 1
    (tmp_path / "ViT-shallow.json").write_text(json.dumps(config))
    model = load_model(str(tmp_path / "ViT-shallow.json"), untrained=True, device="cpu")
    assert model.name.name == "ViT-shallow"
    assert len(model.clip.visual.transformer.resblocks) == 1
    assert count(str(tmp_path / "ViT-shallow.json")).image_gmacs < STUDENTS["ViT-S-16"].image_gmacs / 10

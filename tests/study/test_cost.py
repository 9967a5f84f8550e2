from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kdstore.errors import ConfigError
from kdstore.evaluate.datasets import open_vqa
from kdstore.extract.config import ExtractConfig
from kdstore.extract.run import extract
from kdstore.models.cost import cost_of
from kdstore.store import open_store
from kdstore.study import rates
from kdstore.study.config import parse_study, read_study
from kdstore.study.controls import CONTROLS
from kdstore.study.cost import BYTES_OF_RUN, STAGES, Amount, StudyCost, cost_of_plan
from kdstore.study.costtable import cost_text
from kdstore.study.downloads import COCO_BYTES, weights_of
from kdstore.study.grid import plan_study

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("study-*.toml"))
RATED = {"device": "a machine", "source": "a test", "teacher_gmacs_per_second": 2.0, "student_gmacs_per_second": 4.0}


def tables(**changed: Any) -> dict[str, dict[str, Any]]:
    """A recipe of two teachers; a table that is given replaces settings, and one of names replaces all."""
    recipe: dict[str, dict[str, Any]] = {
        "study": {"name": "small", "data": "scenes/train:64", "losses": ["clip-kd-free"], "samples": [640], "seeds": [0, 1], "own_samples": 1280},
        "teachers": {"S": "scenes-S", "L": "scenes-L"},
        "students": {"T": "scenes-T"},
        "retrieval": {"data": "scenes/retrieval:20"},
        "vqa": {"train_images": 50, "eval_images": 20, "epochs": 2, "batch_images": 8},
        "cost": RATED,
    }
    whole = ("teachers", "students", "cost")
    return recipe | {name: table if name in whole else {**recipe.get(name, {}), **table} for name, table in changed.items()}


SMALL = {"teachers": {"S": "scenes-S"}, "study": {"without_controls": list(CONTROLS)}}


def test_samples_and_gmacs_are_those_of_the_tasks_and_a_teacher_is_extracted_once_for_all_students() -> None:
    cost = cost_of_plan(config := parse_study(tables(students={"T": "scenes-T", "own": "scenes-S"})), plan_study(config))
    runs = [line for line in cost.lines if line.stage == "distill"]
    pair = {label: cost_of(name).image_gmacs + cost_of(name).text_gmacs for label, name in config.students.items()}
    for line in runs:
        # no teacher, two teachers, random, born-again and permuted under two seeds, and the teacher of the student's own size
        assert (line.all.tasks, line.all.samples) == (13, 12 * 640 + 1280)
        assert line.all.gmacs == pytest.approx(3 * line.all.samples * pair[line.model])
        assert line.all.bytes == 13 * BYTES_OF_RUN * cost_of(config.students[line.model]).parameters
        assert line.all.seconds == pytest.approx(line.all.gmacs / 4.0)
    readers = {line.model: line.readers for line in cost.lines if line.stage == "extract"}
    assert readers == {"S": 8, "L": 4, "random": 4, "own size (T)": 2, "own size (own)": 2}
    assert cost.total().tasks == sum(task.kind in STAGES for task in plan_study(config).tasks.values())
    assert cost.cells == sum(len(arm.cells) for arm in plan_study(config).arms)


def test_the_bytes_of_a_store_are_those_that_its_arrays_have(tmp_path: Path) -> None:
    config = parse_study(tables(**SMALL, extract={"tokens": "image", "reduce": "int8", "views": 1}))
    cost = cost_of_plan(config, plan_study(config))
    expected = {line.model: line.all.bytes for line in cost.lines if line.stage == "extract"}
    extract(ExtractConfig(teacher="scenes-S", data="scenes/train:64", tokens="image", reduce="int8", views=1, out=str(tmp_path / "S"), device="cpu"))
    arrays = open_store(tmp_path / "S").arrays.values()
    features = sum(spec.row_bytes * spec.views * spec.shape[0] for spec in arrays if spec.name.endswith(("/embedding", "/tokens")))
    assert expected["S"] == features


def test_questions_and_images_of_a_vqa_task_are_those_that_are_asked() -> None:
    config = parse_study(tables(**SMALL, vqa={"train_images": 30, "eval_images": 25}))
    lines = [line for line in cost_of_plan(config, plan_study(config)).lines if line.stage == "vqa"]
    asked = len(open_vqa("scenes", "test", num_images=100).questions) / 100  # of an image, as a hundred of them tell
    assert {line.all.samples / line.all.tasks for line in lines} == {round(25 * asked)}


def test_finished_tasks_cost_nothing_more_and_stay_in_the_whole() -> None:
    config = parse_study(tables(**SMALL))
    plan = plan_study(config)
    cost = cost_of_plan(config, plan, {digest for digest, task in plan.tasks.items() if task.kind == "extract"})
    assert cost.stage("extract").tasks == 1
    assert cost.stage("extract", left=True) == Amount()
    assert cost.stage("distill", left=True) == cost.stage("distill")
    assert cost_of_plan(config, plan, plan.tasks).total(left=True) == Amount()


def test_gradient_checkpointing_and_micro_batches_cost_a_forward_pass_each() -> None:
    def trained(**settings: Any) -> float:
        config = parse_study(tables(**SMALL, distill=settings))
        return cost_of_plan(config, plan_study(config)).stage("distill").gmacs

    assert trained(grad_checkpointing=True, micro_batch=32) == pytest.approx(5 / 3 * trained())


def test_data_that_are_elsewhere_are_counted_as_the_recipe_says_and_hours_are_never_invented() -> None:
    def cost(**said: Any) -> StudyCost:
        config = parse_study(tables(teachers=SMALL["teachers"], study={**SMALL["study"], "data": "pairs"}, cost=said))
        return cost_of_plan(config, plan_study(config))

    with pytest.raises(ConfigError, match="How many images pairs has"):
        cost()
    counted = cost(images=1000, captions=2.0)
    store = counted.stage("extract")
    assert (store.samples, store.bytes) == (1000, 3000 * cost_of("scenes-S").embed_dim * 2)
    assert counted.total().seconds is None
    assert "Hours are not known" in cost_text(counted)
    assert any("pairs is not here: 1,000 images with 2 captions each" in note for note in counted.notes)
    shared = cost_text(cost(images=1000, peak_gmacs_per_second=1.0, device="a GPU", source="its maker"))
    assert all(said in shared for said in ("Assumption, not a measurement", "its maker", "at 20%"))


@pytest.mark.parametrize(
    "said",
    [{"teacher_gmacs_per_second": 1.0}, {"peak_gmacs_per_second": 1.0}, {"peak_gmacs_per_second": -1.0, "device": "a", "source": "b"}, {"images": 0}],
)
def test_half_a_rate_and_rates_of_nowhere_are_refused(said: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"\[cost\]"):
        parse_study(tables(cost=said))


def test_a_machine_with_the_data_is_timed_and_every_task_gets_its_hours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates, "SECONDS", 0.02)
    monkeypatch.setattr(rates, "IMPORTS", "import kdstore")
    config = parse_study(tables(**SMALL, cost={}))
    cost = cost_of_plan(config, plan_study(config))
    assert cost.rates is not None
    assert cost.rates.encode.keys() == {"scenes-S", "scenes-T"}
    assert all(line.all.seconds for line in cost.lines)
    assert json.loads(json.dumps(cost.record))["left"]["seconds"] == pytest.approx(cost.total().seconds)
    assert "measured here" in cost_text(cost)


def test_what_must_be_fetched_is_named_with_its_owner_and_images_of_coco_once() -> None:
    study = {**SMALL["study"], "vqa": ["vqav2", "okvqa", "gqa"]}
    config = parse_study(tables(study=study, teachers={"B": "ViT-B-32:laion2b_s34b_b79k"}, vqa={"eval_split": "val"}, folders={"gqa": "here"}))
    cost = cost_of_plan(config, plan_study(config))
    weights, *files = cost.downloads
    assert (weights.origin, weights.bytes) == ("huggingface.co/laion/CLIP-ViT-B-32-laion2B-s34B-b79K", 4 * cost_of("ViT-B-32").parameters)
    assert [file.bytes for file in files].count(COCO_BYTES) == 1
    assert {file.what.partition(":")[0] for file in files if file.here} == {"gqa"}
    text = cost_text(cost)
    assert all(download.origin in text for download in cost.downloads)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_of_a_study_is_a_plan_whose_published_teachers_there_are(recipe: Path) -> None:
    config = read_study(recipe)
    assert plan_study(config).tasks
    cost = cost_of("scenes-T")
    published = [name for name in config.teachers.values() if ":" in name]
    assert all(weights_of(name, cost) for name in published)  # raises for an unknown tag and for the other activation

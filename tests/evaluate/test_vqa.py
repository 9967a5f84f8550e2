"""The VQA protocol end to end on small splits of scenes, with a small model of random weights."""

from __future__ import annotations

import dataclasses
import json
import math
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from kdstore.errors import ConfigError, DiskFull, EvaluationError, StoreError, UnknownName
from kdstore.evaluate import features, task
from kdstore.evaluate.datasets import VQA_DATASETS, open_vqa, read_predictions
from kdstore.evaluate.datasets.form import VqaSplit
from kdstore.evaluate.features import image_features
from kdstore.evaluate.outcomes import read_outcomes
from kdstore.evaluate.protocol import NOT_IN_DIGEST, VqaConfig, parse_seeds
from kdstore.evaluate.results import read_result
from kdstore.evaluate.sights import frozen_sights, open_subject, tuned_sight
from kdstore.evaluate.tables import markdown_table
from kdstore.evaluate.vqa import VqaResult, evaluate_vqa
from kdstore.jsonfile import digest_of, write_json
from kdstore.models.load import load_model
from kdstore.progress import silent

STORE = {"path": "store/x", "digest": "sha256:1", "identity": {"format": 1}}


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder as distillation leaves it: open_clip's layout and run.json."""
    folder = tmp_path_factory.mktemp("runs") / "random"
    folder.mkdir()
    model = load_model("scenes-T", untrained=True, seed=7, device="cpu")
    save_file({name: t.contiguous() for name, t in model.clip.state_dict().items()}, folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps(model.config))
    write_json(folder / "run.json", {"stage": "distill", "settings_digest": "sha256:2", "store": STORE})
    return folder


def small(model_folder: Path, **settings: object) -> VqaConfig:
    settings = {"train_images": 24, "eval_images": 16, "epochs": 1, "width": 16, "layers": 1, "device": "cpu", **settings}
    return VqaConfig(model=f"local-dir:{model_folder}", **settings)  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def result(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> VqaResult:
    return evaluate_vqa(small(model_folder, out=str(tmp_path_factory.mktemp("results") / "new" / "vqa.json")))


def test_rows_are_the_model_and_its_controls(result: VqaResult) -> None:
    assert [row.name for row in result.rows] == ["model", "question-only", "untrained", "vocabulary-oracle"]
    split = open_vqa("scenes", "test", num_images=16)
    for row in result.rows:
        assert row.scores is not None
        assert set(row.scores.groups["perQuestionType"]) == {q.question_type for q in split.questions}
    overall = [row["scores"]["overall"] for row in result.content["rows"]]
    assert all(0 <= score <= overall[-1] <= 100 for score in overall)
    heads = [row.head["parameters"] for row in result.rows if row.head is not None]
    assert len(heads) == 3
    assert heads[0] == heads[1] == heads[2]


def test_the_written_result_proves_itself_and_says_where_it_comes_from(result: VqaResult, model_folder: Path) -> None:
    path = Path(result.content["config"]["out"])
    content = read_result(path)
    assert content == result.content
    assert (
        content["model"]["identity"]["teacher"]["weights_sha256"] == load_model(f"local-dir:{model_folder}", device="cpu").identity["teacher"]["weights_sha256"]
    )
    assert content["model"]["run"] == {"digest": content["model"]["run"]["digest"], "settings_digest": "sha256:2", "store": STORE}
    assert content["model"]["parameters"]["total"] > content["model"]["parameters"]["without_token_embedding"] > 0
    assert content["metric"] == {"name": "vqa", "version": "2021"}
    assert (content["data"]["train"]["name"], content["data"]["evaluated"]["name"]) == ("scenes/train:24", "scenes/test:16")
    assert content["data"]["leaks"] == {"compared": "names", "images": 0, "by_name": 0, "by_content": 0, "questions": 0, "first": []}
    assert content["data"]["evaluated"]["coverage"] == pytest.approx(
        100 * content["data"]["evaluated"]["answerable"] / content["data"]["evaluated"]["num_questions"], abs=0.01
    )
    assert content["config_digest"] == digest_of({k: v for k, v in content["config"].items() if k not in NOT_IN_DIGEST})
    assert {"kdstore", "torch", "open_clip_torch"} <= set(content["made"]["versions"])
    assert result.chance["overall"] <= max(result.chance.values())
    outcomes = read_outcomes(path, content["outcomes"])
    assert len(outcomes) == content["data"]["evaluated"]["num_questions"]
    for run, row in zip(outcomes.runs, content["rows"], strict=True):
        assert (run.row, round(float(run.score_N.mean()), 2)) == (row["row"], row["scores"]["overall"])
    path.write_bytes(path.read_bytes().replace(b'"overall": ', b'"overall": 1', 1))
    with pytest.raises(EvaluationError, match="does not match the digest"):
        read_result(path)


def test_the_same_seed_gives_the_same_result_and_another_seed_another(result: VqaResult, model_folder: Path) -> None:
    again = evaluate_vqa(small(model_folder))
    same = [{k: v for k, v in r.content.items() if k not in ("made", "digest", "config")} for r in (result, again)]
    assert same[0] == same[1]
    both = evaluate_vqa(small(model_folder, seeds=(0, 1), controls=False))
    assert [(row.name, row.seed) for row in both.rows] == [("model", 0), ("model", 1)]
    assert both.rows[0].head == result.rows[0].head != both.rows[1].head


def test_the_own_text_tower_is_a_second_labelled_protocol(result: VqaResult, model_folder: Path) -> None:
    own = evaluate_vqa(small(model_folder, question_encoder="own-text-tower"))
    assert own.content["config"]["question_encoder"] == "own-text-tower"
    assert own.content["config_digest"] != result.content["config_digest"]
    assert own.rows[0].head != result.rows[0].head


def test_the_pooled_baseline_reads_the_embedding(model_folder: Path) -> None:
    pooled = evaluate_vqa(small(model_folder, head="pooled", controls=False))
    head = pooled.rows[0].head
    assert head is not None
    assert head["name"] == "pooled"
    parameters = head["parameters"]
    assert parameters["total"] - parameters["without_projections"] == (load_model("scenes-T", untrained=True, device="cpu").embed_dim + 1) * 16


def test_what_is_finished_is_read_and_only_the_rest_is_trained(model_folder: Path, tmp_path: Path) -> None:
    first = evaluate_vqa(small(model_folder, out=str(tmp_path / "vqa.json"), controls=False))
    stages: list[str] = []
    settings = {"out": str(tmp_path / "vqa.json"), "seeds": (0, 1)}
    both = evaluate_vqa(small(model_folder, **settings), on_progress=lambda stage, *_: stages.append(stage))
    assert "model, seed 0" not in stages
    assert {"model, seed 1", "untrained, seed 0", "encode scenes/train:24"} <= set(stages)
    assert both.rows[0] == first.rows[0]
    stages.clear()
    again = evaluate_vqa(small(model_folder, **settings, metric_version="2016"), on_progress=lambda stage, *_: stages.append(stage))
    assert set(stages) == {"questions"}
    assert [row.answers for row in again.rows] == [row.answers for row in both.rows]
    assert again.content["metric"]["version"] == "2016"
    (kept,) = (tmp_path / "vqa.rows").glob("model-seed1-*/answers.json")
    kept.write_text(kept.read_text().replace('"tuned": 0', '"tuned": 9'))
    with pytest.raises(EvaluationError, match="does not match the digest"):
        evaluate_vqa(small(model_folder, **settings))


def test_finished_rows_are_not_those_of_other_images_with_the_same_questions(model_folder: Path, tmp_path: Path) -> None:
    """As when a data set is blurred: the questions stay, their images are other files."""
    out, folder = str(tmp_path / "vqa.json"), tmp_path / "data"
    settings = {"dataset": "jsonl", "folder": str(folder), "train_images": None, "eval_images": None, "controls": False}
    folder.mkdir()
    for name, level in (("plain", 255), ("other", 0)):
        Image.effect_noise((32, 32), level / 4).save(folder / f"{name}.png")

    def digests(train: str, test: str) -> list[str]:
        for split, image in (("train", train), ("test", test)):
            (folder / f"{split}.jsonl").write_text(json.dumps({"image": image, "question": "is it?", "answer": "yes"}))
        evaluate_vqa(small(model_folder, out=out, **settings))
        return sorted(path.name for path in (tmp_path / "vqa.rows").iterdir())

    plain = digests("plain.png", "plain.png")
    assert digests("plain.png", "plain.png") == plain
    assert len({*plain, *digests("other.png", "plain.png"), *digests("plain.png", "other.png")}) == 3


@pytest.mark.parametrize("mode", ["frozen", "full"])
def test_an_image_that_the_evaluated_split_lacks_is_said_before_any_is_encoded(mode: str, model_folder: Path, tmp_path: Path) -> None:
    for split, names in (("train", ["a.png"]), ("test", ["b.png", "gone.png"])):
        Image.new("RGB", (8, 8)).save(tmp_path / names[0])
        rows = [json.dumps({"image": name, "question": "is it?", "answer": "yes"}) for name in names]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(rows))
    config = small(model_folder, dataset="jsonl", folder=str(tmp_path), mode=mode, pixels_gib=1e-9, out=str(tmp_path / "r" / "vqa.json"))
    said: list[str] = []
    with pytest.raises(EvaluationError, match=r"No image gone\.png"):
        evaluate_vqa(config, on_progress=lambda stage, *told: said.append(stage))
    assert set(said) == {"questions"}
    assert not (tmp_path / "r").exists()


def test_an_untrained_twin_reads_images_as_its_model_does_whatever_else_is_to_be_encoded(model_folder: Path) -> None:
    """Preprocessing comes with weights: of SigLIP and MobileCLIP it is another one than that of their architecture without them."""
    config = small(model_folder)
    asked, subject = task.open_task(config, silent), open_subject(config, silent)
    assert subject.model is not None
    read = subject.model.preprocess
    subject.model.preprocess = lambda image: 0.5 * read(image)
    beside, alone = (frozen_sights(config, asked, subject, needed, silent)[0] for needed in ([None, 0], [0]))
    tuned = tuned_sight(config, asked, subject, 0)
    numbers = np.arange(4)
    assert torch.equal(beside.train.take(numbers), alone.train.take(numbers))
    torch.testing.assert_close(tuned.train.take(numbers).detach(), alone.train.take(numbers), atol=5e-3, rtol=5e-3)


def test_the_answers_of_the_reported_split_decide_nothing_but_its_score(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All answers of the test split become another one: vocabulary, words, losses and answers stay, also where epochs are chosen."""
    settings = {"early_stopping": 0.2, "epochs": 2}
    plain = evaluate_vqa(small(model_folder, **settings))
    opened = task.open_vqa

    def changed(name: str, split: str, **options: Any) -> VqaSplit:
        found = opened(name, split, **options)
        swap = {"yes": "no", "no": "yes"}
        answers = [tuple({**a, "answer": swap.get(a["answer"], "teapot")} for a in q.answers) for q in found.questions]
        return (
            found
            if split == "train"
            else dataclasses.replace(found, questions=tuple(dataclasses.replace(q, answers=a) for q, a in zip(found.questions, answers, strict=True)))
        )

    monkeypatch.setattr(task, "open_vqa", changed)
    other = evaluate_vqa(small(model_folder, **settings))
    assert other.content["data"]["evaluated"] != plain.content["data"]["evaluated"]
    assert other.content["data"]["vocabulary"] == plain.content["data"]["vocabulary"]
    assert other.content["data"]["train"] == plain.content["data"]["train"]
    assert plain.content["data"]["train"]["held_out"] > 0
    for a, b in zip(plain.rows[:3], other.rows[:3], strict=True):
        assert (a.answers, a.head) == (b.answers, b.head)
        assert a.scores != b.scores


def test_a_split_without_answers_is_answered_for_its_server_and_not_scored(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = task.open_vqa

    def unanswered(name: str, split: str, **options: Any) -> VqaSplit:
        found = opened(name, split, **options)
        questions = tuple(dataclasses.replace(q, answers=()) for q in found.questions)
        return found if split != "test" else dataclasses.replace(found, questions=questions, answered=False)

    monkeypatch.setattr(task, "open_vqa", unanswered)
    result = evaluate_vqa(small(model_folder, train_split="train+retrieval", controls=False, out=str(tmp_path / "vqa.json")))
    assert result.content["data"]["vocabulary"]["from"] == "scenes/train:24+scenes/retrieval:24"
    assert result.content["data"]["train"]["num_images"] == 48
    assert (result.rows[0].scores, result.chance, len(result.rows[0].answers)) == (None, {}, result.content["data"]["evaluated"]["num_questions"])
    (written,) = tmp_path.glob("*predictions*")
    assert written.name == "vqa.seed0.predictions.json"
    with pytest.raises(ConfigError, match="no file for its predictions"):
        evaluate_vqa(small(model_folder))
    again = evaluate_vqa(small(model_folder, train_split="train+retrieval", out=str(tmp_path / "vqa.json")))
    assert [row.name for row in again.rows] == ["model"], "a control without a score tells nothing"
    assert tuple(read_predictions(written, open_vqa("scenes", "test", num_images=16)).values()) == result.rows[0].answers


@pytest.mark.parametrize("mixed", [False, True])
def test_questions_may_be_about_two_images_if_all_are(mixed: bool, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = task.open_vqa

    def paired(name: str, split: str, **options: Any) -> VqaSplit:
        found = opened(name, split, **options)
        pairs = [(*q.images, (q.images[0] + 1) % found.num_images) for q in found.questions]
        questions = tuple(dataclasses.replace(q, images=pair) for q, pair in zip(found.questions, pairs, strict=True))
        return dataclasses.replace(found, questions=found.questions[:1] + questions[1:] if mixed else questions)

    single = evaluate_vqa(small(model_folder, controls=False))
    monkeypatch.setattr(task, "open_vqa", paired)
    if mixed:
        with pytest.raises(EvaluationError, match="have 1 to 2 images"):
            evaluate_vqa(small(model_folder))
        return
    both = evaluate_vqa(small(model_folder, controls=False))
    heads = [result.rows[0].head for result in (single, both)]
    assert heads[0] is not None
    assert heads[1] is not None
    assert heads[1]["parameters"]["total"] == heads[0]["parameters"]["total"] + 2 * 16, "a mark for each image"
    assert heads[1]["loss"] != heads[0]["loss"]


def test_questions_that_the_vocabulary_cannot_answer_are_dropped_from_training_alone_and_counted(model_folder: Path) -> None:
    content = evaluate_vqa(small(model_folder, min_answer_count=15, controls=False)).content
    train, evaluated = content["data"]["train"], content["data"]["evaluated"]
    assert 0 < train["dropped"] < train["num_questions"]
    assert 0 < evaluated["coverage"] < 100
    assert evaluated["num_questions"] == len(open_vqa("scenes", "test", num_images=16).questions)


def test_the_summary_has_an_interval_around_every_score_and_the_table_shows_it(result: VqaResult) -> None:
    for row, record in zip(result.rows, result.content["summary"], strict=True):
        assert record["row"] == row.name
        for name, score in record["scores"].items():
            low, high = score["interval"]
            assert low - 0.01 <= score["mean"] <= high + 0.01
            assert 1 < score["images"] <= score["items"]
            assert name == "overall" or score["items"] < len(open_vqa("scenes", "test", num_images=16).questions)
    lines = markdown_table([result.content]).splitlines()
    assert lines[0].startswith("| model ")
    shown = result.content["summary"][0]["scores"]["overall"]
    assert f" {shown['mean']:.1f} [{shown['interval'][0]:.1f}, {shown['interval'][1]:.1f}] |" in lines[2]
    name = result.content["model"]["name"]
    assert [line[2:].split(" | ")[0].strip() for line in lines[2:]] == [
        f"{name}{suffix}" for suffix in ("", ", question-only", ", untrained", ", vocabulary-oracle")
    ]


def test_wrong_settings_get_one_clear_line_before_any_work(model_folder: Path, tmp_path: Path) -> None:
    for field, name in (("dataset", "scene"), ("head", "coatention")):
        with pytest.raises(UnknownName, match=name):
            small(model_folder, **{field: name})
    with pytest.raises(UnknownName, match="2020"):
        evaluate_vqa(small(model_folder, metric_version="2020"))
    said: list[str] = []
    for named, error in (({"model": "none"}, UnknownName), ({"features": "none"}, StoreError), ({"model": "scenes-S", "device": "none"}, ConfigError)):
        with pytest.raises(error, match="none"):
            evaluate_vqa(VqaConfig(**named), on_progress=lambda *told: said.append(str(told)))  # type: ignore[arg-type]
    assert not said  # no question was read
    with pytest.raises(ConfigError, match="is a folder"):
        evaluate_vqa(small(model_folder, out=str(tmp_path)))
    for settings in (
        {"question_encoder": "own"},
        {"epochs": 0},
        {"width": 18},
        {"warmup": 1.0},
        {"eval_images": 0},
        {"seeds": (-1,)},
        {"seeds": (1, 1)},
        {"seeds": (2**63,)},
        {"weight_decay": math.inf},
    ):
        with pytest.raises(ConfigError, match="must"):
            small(model_folder, **settings)
    for settings in (
        {"train_split": "test"},
        {"train_split": "train+test"},
        {"lookup": "exact"},
        {"early_stopping": 1.0},
        {"mode": "head+last-0"},
        {"heads_version": 1},
    ):
        with pytest.raises(ConfigError, match="must"):
            small(model_folder, **settings)
    with pytest.raises(ConfigError, match="no list of seeds"):
        parse_seeds("0;1")
    with pytest.raises(ConfigError, match="Either a model or stores"):
        small(model_folder, features="store/x")
    with pytest.raises(ConfigError, match="no result file"):
        small(model_folder, mode="full")
    with pytest.raises(ConfigError, match="trained on one split where another is scored"):
        evaluate_vqa(small(model_folder, train_split="train+retrieval"))
    with pytest.raises(EvaluationError, match=r"averaged to 9 x 9, but this model gives 16 tokens"):
        evaluate_vqa(small(model_folder, grid=9))
    with pytest.raises(UnknownName, match="scenes split"):
        evaluate_vqa(small(model_folder, eval_split="tests"))
    with pytest.raises(EvaluationError, match="No result file"):
        read_result(tmp_path / "none.json")


def test_features_past_the_memory_lie_in_a_file_whose_space_is_reserved(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, split = load_model(f"local-dir:{model_folder}", device="cpu"), open_vqa("scenes", "test", num_images=3)
    in_memory = image_features([model], split.image, 3, reads="embedding", batch=2)[0]
    monkeypatch.setattr(features, "IN_MEMORY", 0)
    in_file = image_features([model], split.image, 3, reads="embedding", batch=2)[0]
    assert isinstance(in_file, np.memmap)
    assert np.array_equal(in_file, in_memory)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(DiskFull):
            image_features([model], split.image, 3, reads="embedding", batch=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_every_setting_is_either_protocol_or_named_as_none() -> None:
    names = {f.name for f in dataclasses.fields(VqaConfig)}
    assert set(NOT_IN_DIGEST) < names
    assert VqaConfig(model="x").dataset in VQA_DATASETS

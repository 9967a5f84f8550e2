"""Predictions scored without a model, images that are in two splits, and tables of the Hub."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
from PIL import Image
from typer.testing import CliRunner

from kdstore.cli import app
from kdstore.errors import EvaluationError, UnknownName
from kdstore.evaluate.compare import compare
from kdstore.evaluate.datasets import VQA_DATASETS, VqaSplit, open_vqa, read_predictions, scored_split
from kdstore.evaluate.datasets.submission import CSV, OBJECT
from kdstore.evaluate.leaks import check_leaks, find_leaks
from kdstore.evaluate.outcomes import read_outcomes
from kdstore.evaluate.protocol import ScoreConfig, VqaConfig
from kdstore.evaluate.results import read_result
from kdstore.evaluate.score import evaluate_score
from kdstore.evaluate.vqa import evaluate_vqa

ANSWERS = (["red"] * 9 + ["blue"], ["2"] * 10, ["a cat"] * 5 + ["cat"] * 5)


def encoded(shade: int) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (8, 8), (shade, shade, shade)).save(content, "PNG")
    return content.getvalue()


def write_split(root: Path, split: str, images: dict[str, bytes], answered: bool = True) -> VqaSplit:
    """Write a split of one question per image, and open it."""
    rows = [{"image": name, "question": "what?", "question_type": "what", "answers": ANSWERS[n % 3]} for n, name in enumerate(images)]
    for row in rows if not answered else ():
        del row["answers"]
    (root / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name, content in images.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return open_vqa("jsonl", split, folder=root)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_split(tmp_path, "val", {f"{n}.png": encoded(n) for n in range(3)})
    return tmp_path


def predicted(folder: Path, content: Any, **settings: Any) -> ScoreConfig:
    (folder / "mine.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return ScoreConfig(dataset="jsonl", folder=str(folder), predictions=str(folder / "mine.json"), **settings)


@pytest.mark.parametrize("name", VQA_DATASETS)
def test_a_data_set_has_the_split_that_is_scored_where_none_is_named(name: str, tmp_path: Path) -> None:
    """Whatever is missing in an empty folder, it is not the split."""
    if name == "scenes":
        assert open_vqa(name, scored_split(name), num_images=2).answered
        return
    with pytest.raises(EvaluationError, match=scored_split(name)) as missing:
        open_vqa(name, scored_split(name), folder=tmp_path)
    assert "has no split" not in str(missing.value)


GIVEN = [{"question_id": 1, "answer": "Red"}, {"question_id": 2, "answer": "two"}, {"question_id": 3, "answer": "cat"}]


def test_a_prediction_file_is_scored_into_a_result_with_its_outcomes(folder: Path) -> None:
    out = str(folder / "new" / "result.json")
    content = evaluate_score(predicted(folder, GIVEN, out=out))
    assert content == read_result(out)
    assert (content["stage"], content["model"]["name"], content["metric"]) == ("evaluate score", "mine", {"name": "vqa", "version": "2021"})
    assert content["rows"][0]["scores"] == {"overall": 66.67, "what": 66.67}  # 'two' is no '2' where all annotators agree
    assert content["data"]["evaluated"]["num_questions"] == 3
    outcomes = read_outcomes(out, content["outcomes"])
    assert (list(outcomes.item_N), list(outcomes.runs[0].score_N)) == (["1", "2", "3"], [100.0, 0.0, 100.0])
    said = str(folder / "said.json")
    evaluate_score(predicted(folder, GIVEN, out=said, metric_version="2021"))
    assert compare(out, said)["scores"][0]["difference"] == 0  # the default, named
    older = evaluate_score(predicted(folder, GIVEN, metric_version="2016"))
    assert older["rows"][0]["scores"]["overall"] == 100  # 'two' is always made '2'
    assert evaluate_score(predicted(folder, GIVEN, metric="exact"))["rows"][0]["scores"]["overall"] == pytest.approx(100 / 3)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (GIVEN[:2], "1 without a prediction, 0 without a question .first: question 3 has no prediction"),
        ([*GIVEN, {"question_id": 4, "answer": "x"}], "prediction 4 has no question"),
        ([*GIVEN, GIVEN[0]], "mine.json is no prediction file .*: question 1 is answered more than once"),
        ([{**given, "question_id": str(given["question_id"])} for given in GIVEN], "3 without a question .* without quotes"),
        ("[{", "is no prediction file of jsonl/val: Expecting"),
        ("{}", "it is not a JSON list"),
        ([3], "record 0 has no 'question_id' and 'answer'"),
        ([{"question_id": [1], "answer": "x"}], "is no number or text"),
        ([*GIVEN[:2], {"question_id": 3, "answer": None}], "question 3 is None; expected a text"),
        ([*GIVEN[:2], {"question_id": 3, "answer": float("nan")}], "question 3 is nan; expected a text"),
    ],
)
def test_predictions_that_do_not_fit_are_one_clear_line(folder: Path, content: Any, message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        evaluate_score(predicted(folder, content, out=str(folder / "result.json")))
    assert not (folder / "result.json").exists()


def test_wrong_names_are_named_and_a_split_without_answers_is_for_its_owner(folder: Path) -> None:
    with pytest.raises(EvaluationError, match=r"No file none\.json in"):
        read_predictions(folder / "none.json", open_vqa("jsonl", "val", folder=folder))
    for settings, name in (({"metric": "vqaa"}, "vqaa"), ({"metric_version": "2020"}, "2020")):
        with pytest.raises(UnknownName, match=name):
            evaluate_score(predicted(folder, GIVEN, **settings))
    write_split(folder, "test", {f"t{n}.png": encoded(n) for n in range(3)}, answered=False)
    with pytest.raises(EvaluationError, match=r"no answers to score with.* answers each of its questions once"):
        evaluate_score(predicted(folder, GIVEN, split="test"))
    with pytest.raises(EvaluationError, match="question 3 has no prediction"):
        evaluate_score(predicted(folder, GIVEN[:2], split="test"))


def test_objects_and_tables_of_predictions_hide_no_second_answer(tmp_path: Path) -> None:
    split = open_vqa("scenes", "val", num_images=1)
    for form, text, message in (
        (OBJECT, '{"q": "a", "q": "b"}', "question q is answered more than once"),
        (OBJECT, '["q"]', "it is not a JSON object"),
        (CSV, "q,a\nq,b\n", "question q is answered more than once"),
        (CSV, "q,a\nq\n", "row 2 has 1 columns"),
        (CSV, 'q,"a\n', "is no prediction file"),
    ):
        (tmp_path / "p").write_text(text)
        with pytest.raises(EvaluationError, match=message):
            read_predictions(tmp_path / "p", replace(split, submission=form))


def test_the_command_scores_a_file_and_says_what_is_missing(folder: Path) -> None:
    predicted(folder, GIVEN)
    arguments = ["evaluate", "score", "--dataset", "jsonl", "--data-dir", str(folder), "--predictions", str(folder / "mine.json")]
    assert "| mine  | 66.7 [0.0, 100.0] | 66.7 [0.0, 100.0] |" in CliRunner().invoke(app, arguments).stdout
    assert json.loads(CliRunner().invoke(app, [*arguments, "--json", "--metric-version", "2016"]).stdout)["metric"]["version"] == "2016"


def test_images_in_two_splits_are_found_by_name_and_by_content(tmp_path: Path) -> None:
    train = write_split(tmp_path, "train", {f"train/{n}.png": encoded(n) for n in range(4)} | {"shared.png": encoded(99)})
    clean = write_split(tmp_path, "clean", {"clean/7.png": encoded(7)})
    leaky = write_split(tmp_path, "leaky", {"leaky/8.png": encoded(8), "leaky/copy.png": encoded(2), "shared.png": encoded(99)})
    said: list[str] = []
    record = check_leaks(train, leaky, "report", on_progress=lambda stage, done, total, note: said.append(note) if stage == "notice" else None)
    names = [[str(tmp_path / a), str(tmp_path / b)] for a, b in (("shared.png", "shared.png"), ("leaky/copy.png", "train/2.png"))]
    assert record == {"compared": "names and content", "images": 2, "by_name": 1, "by_content": 1, "questions": 2, "first": names}
    assert said == [f"2 images of jsonl/leaky (2 questions) are in jsonl/train too, first {names[0][0]} as {names[0][1]}."]
    with pytest.raises(EvaluationError, match="2 images of jsonl/leaky"):
        check_leaks(train, leaky, "refuse")
    refusing = VqaConfig(model="scenes-S", dataset="jsonl", folder=str(tmp_path), eval_split="leaky", leaks="refuse")
    with pytest.raises(EvaluationError, match="2 images of jsonl/leaky"):
        evaluate_vqa(refusing)
    assert check_leaks(train, clean, "refuse")["images"] == 0
    assert not find_leaks(train, clean).notice()


def test_only_images_of_equal_size_are_read_for_leaks(tmp_path: Path) -> None:
    train = write_split(tmp_path, "train", {"a.png": encoded(1), "b.png": encoded(2)})
    val = write_split(tmp_path, "val", {"long.png": encoded(1) + b"\0", "c.png": encoded(3)})
    read: list[int] = []
    counted = VqaSplit(**{**vars(val), "sha256": lambda i: read.append(i) or val.sha256(i)})  # type: ignore[func-returns-value]
    assert (len(find_leaks(train, counted)), read) == (0, [1] if val.size(1) in (train.size(0), train.size(1)) else [])
    (tmp_path / "a.png").unlink()
    assert find_leaks(train, val).compared == "names"
    assert find_leaks(open_vqa("scenes", "train", num_images=2), open_vqa("scenes", "val", num_images=2)).compared == "names"


def hub(monkeypatch: pytest.MonkeyPatch, columns: dict[str, Any], images: list[int]) -> None:
    content = [{"bytes": encoded(shade), "path": None} for shade in images]
    table = datasets.Dataset.from_dict({**columns, "image": content}).cast_column("image", datasets.Image())
    monkeypatch.setattr(datasets, "load_dataset", lambda repo, config, split: {("lmms-lab/VQAv2", None, "validation"): table}[repo, config, split])


def test_a_table_of_the_hub_is_read_by_its_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [[{"answer": a, "answer_confidence": "yes", "answer_id": n} for n, a in enumerate(given, 1)] for given in ANSWERS]
    columns = {"question_id": [10, 11, 12], "image_id": [5, 5, 6], "question": ["a?", "b?", "c?"], "answers": answers}
    hub(monkeypatch, {**columns, "question_type": ["what"] * 3, "answer_type": ["other"] * 3}, [1, 1, 2])
    split = open_vqa("hf:lmms-lab/VQAv2", "validation")
    assert [(q.question_id, q.images, q.question_type) for q in split.questions] == [(10, (0,), "what"), (11, (0,), "what"), (12, (1,), "what")]
    assert split.questions[2].answers[9] == {"answer": "cat", "answer_confidence": "yes", "answer_id": 10}
    assert (split.metric, split.image_names[1], split.size(1)) == ("vqa", "hf:lmms-lab/VQAv2/validation/6", len(encoded(2)))
    assert split.image(1).sha256 == split.sha256(1)
    hub(monkeypatch, {"q": ["a?", "b?"], "answers": [[""] * 10, [""] * 10]}, [1, 2])
    hidden = open_vqa("hf:lmms-lab/VQAv2?question=q&metric=exact", "validation")
    assert (hidden.answered, hidden.metric, hidden.num_images, hidden.questions[1].question_id) == (False, "exact", 2, 1)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hf:lmms-lab/VQAv2?answers=a", "no column 'a': found question, answers, image"),
        ("hf:lmms-lab/VQAv2?anwers=a", "Unknown option of hf: 'anwers'"),
        ("hf:lmms-lab/VQAv2:validation", "names a split"),
        ("hf:someone/VQA", "The metric of hf:someone/VQA is not known"),
        ("hf:lmms-lab/OK-VQA", "Cannot open the hub dataset lmms-lab/OK-VQA:validation"),
        ("hub:lmms-lab/VQAv2", "Unknown VQA data set"),
    ],
)
def test_a_table_of_the_hub_that_cannot_be_read_says_why(name: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hub(monkeypatch, {"question": ["a?"], "answers": [["x"]]}, [1])
    with pytest.raises(Exception, match=message):
        open_vqa(name, "validation")

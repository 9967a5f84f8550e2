"""Readers of VQA data sets: true layouts, and one clear line for what is missing or wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from kdstore.errors import EvaluationError, UnknownName
from kdstore.evaluate.datasets import open_vqa
from kdstore.metrics.vqa import vqa_accuracy

EASY_ROWS = [["what color is the shape?", "blue", 7], ["is there a circle?", "yes", 3], ["what shape is in the image?", "circle", 7], ["is it teal?", "no", 3]]


def write_easy_vqa(root: Path, split: str, rows: list[list[object]]) -> None:
    (root / split / "images").mkdir(parents=True)
    (root / split / "questions.json").write_text(json.dumps(rows))
    for _, _, image_id in rows:
        Image.new("RGB", (64, 64), (int(str(image_id)), 0, 0)).save(root / split / "images" / f"{image_id}.png")


def test_easy_vqa_is_read_in_its_published_layout(tmp_path: Path) -> None:
    write_easy_vqa(tmp_path, "train", EASY_ROWS)
    split = open_vqa("easy-vqa", "train", folder=tmp_path)
    assert (split.name, split.num_images) == ("easy-vqa/train", 2)
    assert [(q.question_id, *q.images, q.question_type, q.answer_type) for q in split.questions] == [
        (0, 1, "color", "other"),
        (1, 0, "yes/no", "yes/no"),
        (2, 1, "shape", "other"),
        (3, 0, "yes/no", "yes/no"),
    ]
    assert split.image(1).image.getpixel((0, 0)) == (7, 0, 0)
    assert split.sha256(1) == split.image(1).sha256 != split.sha256(0)


def test_a_single_answer_scores_as_exact_match(tmp_path: Path) -> None:
    write_easy_vqa(tmp_path, "train", EASY_ROWS)
    question = open_vqa("easy-vqa", "train", folder=tmp_path).questions[0]
    assert len({a["answer_id"] for a in question.answers}) == 10
    assert [vqa_accuracy(answer, question.answers) for answer in ("blue", "red", "Blue")] == [100, 0, 0]


def test_scenes_give_ten_answers_and_their_own_images() -> None:
    split = open_vqa("scenes", "val", num_images=3)
    assert (split.name, split.num_images, {q.images for q in split.questions}) == ("scenes/val:3", 3, {(0,), (1,), (2,)})
    assert all(len(q.answers) == 10 for q in split.questions)
    assert split.image(2).image.size == (64, 64)
    with pytest.raises(EvaluationError, match="built in"):
        open_vqa("scenes", "val", folder="x")


def test_jsonl_takes_answers_or_one_answer_and_fills_in_types(tmp_path: Path) -> None:
    rows = [
        {"image": "a.png", "question": "how many?", "answers": ["Two", "2", {"answer": "3", "answer_confidence": "maybe"}]},
        {"image": "b.png", "question": "is it?", "answer": "yes", "question_id": "q7", "question_type": "is"},
        {"image": "a.png", "question": "what?", "answer": "dog", "answer_type": "animal"},
    ]
    (tmp_path / "train.jsonl").write_text("\n\n".join(map(json.dumps, rows)) + "\n")
    for name in "ab":
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")
    split = open_vqa("jsonl", "train", folder=tmp_path)
    assert [(q.question_id, *q.images, q.question_type, q.answer_type, len(q.answers)) for q in split.questions] == [
        (1, 0, "all", "number", 3),
        ("q7", 1, "is", "yes/no", 10),
        (5, 0, "all", "animal", 10),
    ]
    assert split.questions[0].answers[2] == {"answer": "3", "answer_confidence": "maybe", "answer_id": 3}
    assert open_vqa("jsonl", "train", folder=tmp_path, num_images=1).num_images == 1


def test_what_is_missing_is_named_with_the_folder_looked_in(tmp_path: Path) -> None:
    for name, file in (("easy-vqa", "questions.json in .*/train"), ("jsonl", "train.jsonl in ")):
        with pytest.raises(EvaluationError, match=f"^No file {file}"):
            open_vqa(name, "train", folder=tmp_path)
        with pytest.raises(EvaluationError, match="none was given"):
            open_vqa(name, "train")
    (tmp_path / "train.jsonl").write_text('{"image": "gone.png", "question": "what?", "answer": "x"}')
    with pytest.raises(EvaluationError, match=f"No image gone.png in {tmp_path}"):
        open_vqa("jsonl", "train", folder=tmp_path).image(0)
    (tmp_path / "gone.png").mkdir()
    for read in ("image", "sha256", "size"):
        with pytest.raises(EvaluationError, match=r"No image gone.png in .*no file"):
            getattr(open_vqa("jsonl", "train", folder=tmp_path), read)(0)
    with pytest.raises(UnknownName, match=r"Did you mean scenes"):
        open_vqa("scene", "train")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "Line 1 of .* is not JSON"),
        ("[1]", "Line 1 of .* is not a JSON object"),
        ('{"image": "a.png", "question": "q", "answer": "x"}\n{"image": "a.png", "question": "q"}', "Line 2 .* it has image, question"),
        ('{"image": "a.png", "question": "q", "answers": []}', "Line 1"),
        ('{"image": "a.png", "question": "q", "answer": 3}', "found 3"),
        ('{"image": "a.png", "question": "q", "answer": "x", "question_id": [1]}', "expected a number or a text"),
        ('{"image": "a.png", "question": "q", "answer": "x", "question_id": 1}\n' * 2, "1 repeated question ids .first: 1"),
        ('{"image": "a.png", "question": "q", "answer": "x", "question_type": "overall"}', "questions of the type 'overall'"),
        ('{"image": "a.png", "question": "q", "answer": "x", "question_type": 3}', "Line 1 .* question_type 3; expected a text"),
        ('{"image": "a.png", "question": "q", "answer": "x", "answer_type": null}', "answer_type None; expected a text"),
        ("", "holds no question"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "train.jsonl").write_text(text)
    with pytest.raises(EvaluationError, match=message):
        open_vqa("jsonl", "train", folder=tmp_path)


def test_question_files_are_utf_8(tmp_path: Path) -> None:
    write_easy_vqa(tmp_path, "train", EASY_ROWS)
    for name, path in (("jsonl", tmp_path / "train.jsonl"), ("easy-vqa", tmp_path / "train" / "questions.json")):
        path.write_bytes('"caf\u00e9"'.encode("latin-1"))
        with pytest.raises(EvaluationError, match=rf"{path.name} is not UTF-8: .* at byte 4"):
            open_vqa(name, "train", folder=tmp_path)


@pytest.mark.parametrize("text", ["{", "[1]", '[["q", "a"]]', '[["q", 3, 4]]'])
def test_a_broken_easy_vqa_file_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "questions.json").write_text(text)
    with pytest.raises(EvaluationError, match=r"questions\.json"):
        open_vqa("easy-vqa", "train", folder=tmp_path)


def test_an_image_that_cannot_be_decoded_is_named(tmp_path: Path) -> None:
    write_easy_vqa(tmp_path, "train", EASY_ROWS)
    (tmp_path / "train" / "images" / "3.png").write_bytes(b"no image")
    with pytest.raises(EvaluationError, match=r"3.png of easy-vqa/train cannot be decoded"):
        open_vqa("easy-vqa", "train", folder=tmp_path).image(0)

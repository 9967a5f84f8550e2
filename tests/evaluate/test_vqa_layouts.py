"""The contract of every VQA data set, on three questions in its owner's layout."""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from kdstore.errors import EvaluationError
from kdstore.evaluate.datasets import VQA_DATASETS, VqaSplit, open_vqa, read_predictions, submission, write_submission
from kdstore.evaluate.datasets.gqa import scene_graphs
from kdstore.evaluate.score import outcomes_of
from kdstore.metrics.answers import METRICS, score_answers
from kdstore.metrics.gqa import gqa_grounding

DOCS = Path(__file__).parents[2] / "docs" / "vqa-datasets.md"

TEN = ["red", "red", "red", "red", "crimson", "red", "red", "dark red", "red", "red"]
IDS = (9, 25, 30)
GQA_TYPES = {"structural": "query", "semantic": "attr", "detailed": "color"}


def write_image(path: Path, shade: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (16, 12), (shade, 255 - shade, 40)).save(path, format="JPEG")  # whatever the suffix says: NLVR2's do lie


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def annotators(answers: Sequence[str] = TEN) -> list[dict[str, Any]]:
    return [{"answer": a, "answer_confidence": "yes", "answer_id": n} for n, a in enumerate(answers, start=1)]


def write_vqa(prefix: str) -> Callable[[Path, str], None]:
    def write(root: Path, split: str) -> None:
        subset = {"train": "train2014", "val": "val2014", "test": "test2015", "test-dev": "test-dev2015"}[split]
        asked = [{"question_id": 10 * i, "image_id": i, "question": f"What color is {i}?"} for i in IDS]
        head = {"info": {}, "license": {}, "data_type": "mscoco", "data_subtype": subset}
        write_json(root / f"{prefix}OpenEnded_mscoco_{subset}_questions.json", {**head, "task_type": "Open-Ended", "questions": asked})
        types = {"question_type": "what color is", "answer_type": "other", "multiple_choice_answer": "red"}
        rows = [{**types, "question_id": q["question_id"], "image_id": q["image_id"], "answers": annotators()} for q in reversed(asked)]
        if not split.startswith("test"):
            write_json(root / f"{prefix}mscoco_{subset}_annotations.json", {**head, "annotations": rows})
        for i in IDS:
            images = subset.replace("-dev", "")
            write_image(root / images / f"COCO_{images}_{i:012d}.jpg", i)

    return write


def write_aokvqa(root: Path, split: str) -> None:
    known = {
        "choices": ["red", "blue", "bus", "cab"],
        "correct_choice_idx": 0,
        "direct_answers": TEN,
        "difficult_direct_answer": False,
        "rationales": ["It is."],
    }
    asked = {"choices": known["choices"], "difficult_direct_answer": False} if split == "test" else known
    write_json(root / f"aokvqa_v1p0_{split}.json", [{"split": split, "image_id": i, "question_id": f"22Mex{i}", "question": "What?", **asked} for i in IDS])
    for i in IDS:
        write_image(root / f"{split}2017" / f"{i:012d}.jpg", i)


def write_vizwiz(root: Path, split: str) -> None:
    known = {} if split == "test" else {"answers": [{"answer": a, "answer_confidence": "maybe"} for a in TEN], "answer_type": "other", "answerable": 1}
    write_json(root / f"{split}.json", [{"image": f"VizWiz_{split}_{i:08d}.jpg", "question": "What is this?", **known} for i in IDS])
    for i in IDS:
        write_image(root / split / f"VizWiz_{split}_{i:08d}.jpg", i)


def write_textvqa(root: Path, split: str) -> None:
    known = {} if split == "test" else {"answers": TEN}
    data = [{"question_id": 34600 + i, "image_id": f"{i:016x}", "question": "what brand?", "set_name": split, "image_width": 16, **known} for i in IDS]
    write_json(root / f"TextVQA_0.5.1_{split}.json", {"dataset_type": split, "dataset_name": "textvqa", "dataset_version": "0.5.1", "data": data})
    for i in IDS:
        write_image(root / ("test_images" if split == "test" else "train_images") / f"{i:016x}.jpg", i)


def gqa_question(i: int, **fields: Any) -> dict[str, Any]:
    known = {
        "answer": "red",
        "fullAnswer": "It is red.",
        "isBalanced": True,
        "types": GQA_TYPES,
        "groups": {"global": "color", "local": "10-bag_color"},
        "entailed": [f"0{IDS[0]}"],
        "semantic": [{"operation": "select", "dependencies": [], "argument": "bag (1)"}, {"operation": "query", "dependencies": [0], "argument": "color"}],
        "annotations": {"question": {"2": "1"}, "answer": {}, "fullAnswer": {"0": "1"}},
    }
    return {"question": "What color is the bag?", "imageId": str(i), **known, **fields}


def write_gqa(root: Path, split: str) -> None:
    tier = split.partition("_")[0]
    questions = {f"0{i}": gqa_question(i) for i in IDS}
    if tier == "test":
        questions = {i: {"question": q["question"], "imageId": q["imageId"]} for i, q in questions.items()}
    else:
        write_json(root / "eval" / f"{tier}_choices.json", {i: {"valid": ["red", "blue"], "plausible": ["red"]} for i in questions})
        scene = {"width": 16, "height": 12, "objects": {"1": {"name": "bag", "x": 0, "y": 0, "w": 8, "h": 12, "attributes": [], "relations": []}}}
        write_json(root / "sceneGraphs" / f"{tier}_sceneGraphs.json", {str(i): scene for i in IDS})
    write_json(root / f"{split}_questions.json", questions)
    for i in IDS:
        write_image(root / "images" / f"{i}.jpg", i)


def write_clevr(root: Path, split: str) -> None:
    program = [{"function": "scene", "inputs": [], "value_inputs": []}, {"function": "query_color", "inputs": [0], "value_inputs": []}]
    known = {} if split == "test" else {"answer": "red", "program": program, "question_family_index": 34}
    rows = [
        {"question_index": n, "image_index": i, "image_filename": f"CLEVR_{split}_{i:06d}.png", "split": split, "question": "What?", **known}
        for n, i in enumerate(IDS)
    ]
    write_json(root / "questions" / f"CLEVR_{split}_questions.json", {"info": {}, "questions": rows})
    for i in IDS:
        write_image(root / "images" / split / f"CLEVR_{split}_{i:06d}.png", i)


def write_nlvr2(root: Path, split: str) -> None:
    place = {"directory": "22"} if split == "train" else {}
    urls = {"left_url": "https://a", "right_url": "https://b"}
    rows = [{"identifier": f"{split}-{i}-2-0", "sentence": "Two dogs.", "label": "True", "synset": "dog", **urls, **place} for i in IDS]
    (root / "nlvr2" / "data").mkdir(parents=True, exist_ok=True)
    (root / "nlvr2" / "data" / f"{split}.json").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    for i in IDS:
        for side in (0, 1):
            write_image(root / ("images/train/22" if split == "train" else split) / f"{split}-{i}-2-img{side}.png", i + side)


def write_daquar(root: Path, split: str) -> None:
    answers = ("red", "2", "picture, lamp")
    lines = [line for i, a in zip(IDS, answers, strict=True) for line in (f"what is on the wall in the image{i} ?", a)]
    root.mkdir(parents=True, exist_ok=True)
    (root / f"qa.894.raw.{split}.txt").write_text("\n".join(lines) + "\n")
    for i in IDS:
        write_image(root / "nyu_depth_images" / f"image{i}.png", i)


def write_easy_vqa(root: Path, split: str) -> None:
    rows = [["what color is the shape?", "blue", 9], ["is there a circle?", "yes", 25], ["what shape is in the image?", "circle", 30]]
    write_json(root / split / "questions.json", rows)
    for i in IDS:
        write_image(root / split / "images" / f"{i}.png", i)


def write_jsonl(root: Path, split: str) -> None:
    rows = [{"image": f"{split}/{i}.jpg", "question": "what?", **({} if split == "test" else {"answers": TEN})} for i in IDS]
    root.mkdir(parents=True, exist_ok=True)
    (root / f"{split}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    for i in IDS:
        write_image(root / split / f"{i}.jpg", i)


@dataclass(frozen=True)
class Layout:
    """How a data set is written, the file with the questions of `val`, and what its server takes for the first of three questions answered `red`."""

    write: Callable[[Path, str], None]
    questions: str
    record: Any = None
    split: str = "val"
    test: str | None = None


LAYOUTS = {
    "vqav2": Layout(write_vqa("v2_"), "v2_OpenEnded_mscoco_val2014_questions.json", {"question_id": 90, "answer": "red"}, test="test-dev"),
    "vqav1": Layout(write_vqa(""), "OpenEnded_mscoco_val2014_questions.json", {"question_id": 90, "answer": "red"}, test="test"),
    "okvqa": Layout(write_vqa(""), "mscoco_val2014_annotations.json", {"question_id": 90, "answer": "red"}),
    "aokvqa": Layout(write_aokvqa, "aokvqa_v1p0_val.json", "22Mex9", test="test"),
    "vizwiz": Layout(write_vizwiz, "val.json", {"image": "VizWiz_val_00000009.jpg", "answer": "red"}, test="test"),
    "textvqa": Layout(write_textvqa, "TextVQA_0.5.1_val.json", {"question_id": 34609, "answer": "red"}, test="test"),
    "gqa": Layout(write_gqa, "val_balanced_questions.json", {"questionId": "09", "prediction": "red"}, "val_balanced", "test_balanced"),
    "clevr": Layout(write_clevr, "questions/CLEVR_val_questions.json", {"question_id": 0, "answer": "red"}, test="test"),
    "nlvr2": Layout(write_nlvr2, "nlvr2/data/dev.json", ("dev-9-2-0", "red"), "dev"),
    "daquar": Layout(write_daquar, "qa.894.raw.test.txt", {"question_id": 0, "answer": "red"}, "test"),
    "easy-vqa": Layout(write_easy_vqa, "test/questions.json", {"question_id": 0, "answer": "red"}, "test"),
    "jsonl": Layout(write_jsonl, "val.jsonl", {"question_id": 1, "answer": "red"}, test="test"),
}
FILES = sorted(LAYOUTS)
WITHOUT_ANSWERS = sorted(name for name, layout in LAYOUTS.items() if layout.test)


def opened(name: str, root: Path) -> VqaSplit:
    if name == "scenes":
        return open_vqa(name, "val", num_images=3)
    LAYOUTS[name].write(root, LAYOUTS[name].split)
    return open_vqa(name, LAYOUTS[name].split, folder=root)


def gold(split: VqaSplit) -> dict[Hashable, Any]:
    texts = {q.question_id: [a["answer"] for a in q.answers] for q in split.questions}
    return {i: max(answers, key=answers.count) for i, answers in texts.items()}


@pytest.mark.parametrize("name", VQA_DATASETS)
def test_a_data_set_opens_and_its_gold_answers_score_the_maximum(name: str, tmp_path: Path) -> None:
    split = opened(name, tmp_path)
    assert (split.num_images, split.answered) == (6 if name == "nlvr2" else 3, True)
    assert [len(q.images) for q in split.questions] == [2 if name == "nlvr2" else 1] * len(split.questions)
    assert {i for q in split.questions for i in q.images} == set(range(split.num_images))
    for question in split.questions:
        assert [a["answer_id"] for a in question.answers] == list(range(1, 11))
        assert question.question
        assert question.answer_type in ("yes/no", "number", "other")
        json.dumps(question.annotation())
    assert split.metric in METRICS
    assert score_answers(split.metric, (q.annotation() for q in split.questions), gold(split)).overall == 100
    for i in range(split.num_images):
        assert split.image(i).sha256 == split.sha256(i)
    assert split.record()["digest"] == opened(name, tmp_path).record()["digest"]


def test_every_data_set_has_a_heading_in_the_docs() -> None:
    headings = {line.removeprefix("## ").partition(":")[0] for line in DOCS.read_text().splitlines() if line.startswith("## ")}
    assert {f"`{name}`" for name in (*VQA_DATASETS, "hf")} <= headings


@pytest.mark.parametrize("name", FILES)
def test_what_is_missing_or_cut_off_is_named_with_its_folder(name: str, tmp_path: Path) -> None:
    layout = LAYOUTS[name]
    with pytest.raises(EvaluationError, match="none was given"):
        open_vqa(name, layout.split)
    with pytest.raises(EvaluationError, match=r"No folder .*nowhere"):
        open_vqa(name, layout.split, folder=tmp_path / "nowhere")
    split = opened(name, tmp_path)
    image = Path(split.image_names[0])
    image.unlink()
    for read in (split.image, split.sha256, split.size):
        with pytest.raises(EvaluationError, match=f"No image {image.name} in {image.parent}"):
            read(0)
    path = tmp_path / layout.questions
    path.write_text(path.read_text()[:-20])
    with pytest.raises(EvaluationError, match=path.name):
        open_vqa(name, layout.split, folder=tmp_path)
    path.unlink()
    with pytest.raises(EvaluationError, match=f"No (file )?{path.name} in {tmp_path}"):
        open_vqa(name, layout.split, folder=tmp_path)


@pytest.mark.parametrize(("name", "content"), [(n, c) for n in FILES for c in ("[]", "{}", "[3]", '{"questions": [{}], "data": [{}], "annotations": [{}]}')])
def test_a_file_of_another_form_or_without_questions_is_one_clear_line(name: str, content: str, tmp_path: Path) -> None:
    opened(name, tmp_path)
    (tmp_path / LAYOUTS[name].questions).write_text(content)
    with pytest.raises(EvaluationError):
        open_vqa(name, LAYOUTS[name].split, folder=tmp_path)


def test_all_pairs_of_one_nlvr2_set_are_drawn_together_in_an_interval(tmp_path: Path) -> None:
    split = opened("nlvr2", tmp_path)
    scores = score_answers(split.metric, (q.annotation() for q in split.questions), gold(split))
    outcomes = outcomes_of(split.questions, [("model", 0, list(gold(split).values()), scores)])
    assert list(outcomes.group_N) == [f"dev-{i}" for i in IDS]


@pytest.mark.parametrize("name", ["vqav2", "aokvqa", "vizwiz", "textvqa", "clevr", "nlvr2", "jsonl"])
def test_repeated_ids_are_refused(name: str, tmp_path: Path) -> None:
    opened(name, tmp_path)
    path = tmp_path / LAYOUTS[name].questions
    text = path.read_text()
    for there, once in (
        ("250", "90"),
        ("22Mex25", "22Mex9"),
        ("_00000025.jpg", "_00000009.jpg"),
        ("34625", "34609"),
        ('_index": 1', '_index": 0'),
        ("-25-", "-9-"),
    ):
        text = text.replace(there, once)
    path.write_text(text.replace('{"image"', '{"question_id": 4, "image"') if name == "jsonl" else text)
    with pytest.raises(EvaluationError, match=r"repeated question ids|do not belong together"):
        open_vqa(name, LAYOUTS[name].split, folder=tmp_path)


@pytest.mark.parametrize("name", ["vqav2", "okvqa", "aokvqa", "vizwiz", "textvqa", "gqa", "clevr", "nlvr2", "daquar"])
def test_an_unknown_split_names_those_there_are(name: str, tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=r"no split 'tset.*Its splits: train"):
        open_vqa(name, "tset", folder=tmp_path)


@pytest.mark.parametrize("name", FILES)
def test_predictions_are_written_as_the_owner_takes_them_and_read_back(name: str, tmp_path: Path) -> None:
    split = opened(name, tmp_path)
    answers: dict[Hashable, Any] = {q.question_id: "red" for q in split.questions}
    content = submission(split, answers)
    assert next(iter(content)) == LAYOUTS[name].record
    write_submission(tmp_path / "p", split, answers)
    assert read_predictions(tmp_path / "p", split) == answers
    lost = dict(list(answers.items())[1:])
    with pytest.raises(EvaluationError, match="has no prediction"):
        submission(split, lost)
    with pytest.raises(EvaluationError, match="other questions"):
        submission(split, {**answers, "other": "red"})


@pytest.mark.parametrize("name", WITHOUT_ANSWERS)
def test_a_split_without_answers_is_read_without_them(name: str, tmp_path: Path) -> None:
    split_name = LAYOUTS[name].test
    assert split_name is not None
    LAYOUTS[name].write(tmp_path, split_name)
    split = open_vqa(name, split_name, folder=tmp_path)
    assert (split.answered, len(split.questions), split.num_images) == (False, 3, 3)
    assert not any(q.answers for q in split.questions)
    assert split.image(2).width == 16
    assert len(submission(split, {q.question_id: "red" for q in split.questions})) == 3


def test_annotations_of_other_questions_are_refused(tmp_path: Path) -> None:
    opened("vqav2", tmp_path)
    path = tmp_path / "v2_mscoco_val2014_annotations.json"
    path.write_text(path.read_text().replace('"question_id": 90', '"question_id": 91'))
    with pytest.raises(EvaluationError, match="do not belong together: question 90 has no annotation"):
        open_vqa("vqav2", "val", folder=tmp_path)


def test_vqa_is_found_in_the_folders_of_the_official_api(tmp_path: Path) -> None:
    opened("vqav2", tmp_path)
    for folder, names in (("Questions", "v2_Open*"), ("Annotations", "v2_ms*"), ("Images/mscoco", "val2014")):
        (tmp_path / folder).mkdir(parents=True)
        for path in tmp_path.glob(names):
            path.rename(tmp_path / folder / path.name)
    assert open_vqa("vqav2", "val", folder=tmp_path).image(1).width == 16


def test_gqa_comes_in_chunks_with_choices_and_scenes(tmp_path: Path) -> None:
    write_gqa(tmp_path, "val_balanced")
    whole = open_vqa("gqa", "val", folder=tmp_path)
    scores = score_answers("gqa", (q.annotation() for q in whole.questions), gold(whole)).aggregate
    assert scores == {"accuracy": 100, "binary": 0, "open": 100, "consistency": 100, "validity": 100, "plausibility": 100, "distribution": 0}
    even = {q.question_id: [[1 / 49] * 7] * 7 for q in whole.questions}  # on an object of half the image that both question and answer name
    assert gqa_grounding((q.annotation() for q in whole.questions), even, scene_graphs(tmp_path, "val")).overall == pytest.approx(100)
    questions = json.loads((tmp_path / "val_balanced_questions.json").read_text())
    (tmp_path / "val_balanced_questions.json").unlink()
    for n, (i, question) in enumerate(questions.items()):
        write_json(tmp_path / "val_balanced_questions" / f"val_balanced_questions_{n}.json", {i: question})
    assert open_vqa("gqa", "val", folder=tmp_path).questions == whole.questions
    for wrong in ({"types": {"structural": "query"}}, {"groups": {}}, {"semantic": [3]}, {"isBalanced": None}, {"answer": 3}):
        write_json(tmp_path / "val_balanced_questions" / "val_balanced_questions_1.json", {"025": gqa_question(25, **wrong)})
        with pytest.raises(EvaluationError, match=r"Question 025 of .* as published files have it"):
            open_vqa("gqa", "val", folder=tmp_path)
    (tmp_path / "val_balanced_questions" / "val_balanced_questions_1.json").unlink()
    with pytest.raises(EvaluationError, match="missing chunks"):
        open_vqa("gqa", "val", folder=tmp_path)
    write_json(tmp_path / "eval" / "val_choices.json", {"09": {"valid": ["red"]}})
    with pytest.raises(EvaluationError, match=r"Question 09 of .*val_choices\.json has no lists"):
        open_vqa("gqa", "val", folder=tmp_path)


def test_equal_answers_are_one_record(tmp_path: Path) -> None:
    split = opened("vqav2", tmp_path)
    first, second = split.questions[0].answers, split.questions[1].answers
    assert [a["answer"] for a in first] == TEN
    assert all(a is b for a, b in zip(first, second, strict=True))

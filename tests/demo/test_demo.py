"""The demo in small: every stage really runs, a second run only draws the report again, and the page needs nothing from outside."""

import copy
import functools
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from kdstore.demo.config import DemoConfig
from kdstore.demo.report import COLUMNS, table_as_markdown, write_report
from kdstore.demo.run import half_width, place_of, run_demo
from kdstore.errors import ConfigError
from kdstore.jsonfile import read_json, write_json


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    config = DemoConfig(
        out=str(out),
        teachers=("scenes-S",),
        seeds=(0, 1),
        images=128,
        samples=128,
        batch_size=32,
        retrieval_images=32,
        vqa_train_images=48,
        vqa_test_images=32,
        vqa_epochs=1,
        device="cpu",
    )
    stages = []
    result = run_demo(config, on_progress=lambda stage, done, total, note: stages.append(stage))
    return config, result, stages


def test_the_table_has_students_teachers_and_controls_with_all_scores(demo):
    _config, result, _ = demo
    groups = {line["group"]: line for line in result.content["table"]}
    assert set(groups) == {
        "student, no teacher",
        "student, from scenes-S",
        "teacher scenes-S",
        "question-only",
        "untrained student",
        "vocabulary-oracle",
    }
    for line in groups.values():
        expected = set(COLUMNS) if line["kind"] != "control" else {c for c in COLUMNS if c.startswith("vqa")}
        assert expected <= set(line["scores"])
        assert line["seeds"] == ([0] if line["kind"] == "teacher" else [0, 1])
    markdown = table_as_markdown(result.content)
    assert markdown.count("\n") == 2 + len(groups)
    assert "&" not in markdown


def test_a_second_run_computes_nothing_again(demo):
    config, result, _ = demo
    before = {p: p.stat().st_mtime_ns for p in result.report.parent.rglob("*") if p.is_file() and p.name not in ("demo.json", "report.html")}
    again = run_demo(config)
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert again.content["table"] == result.content["table"]


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("scenes-S-retrieval.json", ("made", "versions", "kdstore")),
        ("scenes-S-retrieval.json", ("model", "identity", "teacher", "digest")),
        ("scenes-S-vqa.json", ("data", "train", "digest")),
        ("scenes-S-vqa.json", ("data", "evaluated", "digest")),
    ],
)
def test_a_result_of_another_version_other_weights_or_other_questions_is_made_again(demo, name, place):
    config, result, _ = demo
    path = result.report.parent / "results" / name
    before = read_json(path)
    other = copy.deepcopy(before)
    functools.reduce(dict.__getitem__, place[:-1], other)[place[-1]] = "other"
    write_json(path, other)
    run_demo(config)
    assert {**read_json(path), "made": 0, "digest": 0} == {**before, "made": 0, "digest": 0}


def test_teachers_of_one_last_name_have_places_of_their_own():
    assert place_of("scenes-S") == "scenes-S"
    places = {place_of(name) for name in ("x", "/a/x", "b/x", "local-dir:b/x", "./x")}
    assert len(places) == 5
    assert all(Path(place).name == place for place in places)


def test_a_question_type_without_questions_leaves_a_gap(demo, tmp_path):
    _config, result, _ = demo
    content = copy.deepcopy(result.content)
    for line in content["table"]:
        del line["scores"]["vqa exist"]
        line["spread"].pop("vqa exist", None)
    assert "| - |" in table_as_markdown(content)
    assert write_report(tmp_path / "report.html", content).is_file()


def test_the_report_opens_offline(demo):
    _, result, _ = demo
    page = result.report.read_text()
    seen = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag, attrs):
            seen.append(tag)
            for name, value in attrs:
                if name in ("src", "href") and value:
                    assert value.startswith(("data:", "#")), (tag, value)
                if tag == "img" and name == "alt":
                    assert value

    Reader().feed(page)
    assert seen.count("svg") == 3
    assert "img" in seen
    assert not re.search(r"url\(\s*['\"]?http", page)


def test_progress_names_what_runs(demo):
    _, _, stages = demo
    assert any(s.startswith("extract scenes-S: images") for s in stages)
    assert any(s.startswith("distil from no teacher, seed 1") for s in stages)
    assert any(s.startswith("vqa ") for s in stages)


def test_what_was_written_proves_itself(demo):
    _config, result, _ = demo
    content = read_json(result.report.parent / "demo.json")
    assert content["table"] == result.content["table"]


def test_the_t_interval_is_that_of_a_published_table():
    assert half_width([1.0, 2.0, 3.0]) == pytest.approx(4.302652729911275 / np.sqrt(3))


def test_gains_are_paired_by_seed(demo):
    _config, result, _ = demo
    recall = {line["group"]: line["scores"]["image_retrieval_recall@1"] for line in result.content["table"] if line["kind"] == "student"}
    gain = next(d for d in result.content["differences"] if d["score"] == "image_retrieval_recall@1")
    assert len(gain["gains"]) == 2
    assert gain["gain"] == pytest.approx(recall["student, from scenes-S"] - recall["student, no teacher"], abs=0.02)


@pytest.mark.parametrize("wrong", [{"teachers": ()}, {"seeds": ()}, {"samples": 0}, {"images": 63}, {"samples": 63}])
def test_a_demo_of_nothing_is_refused(wrong):
    with pytest.raises(ConfigError):
        DemoConfig(**wrong)

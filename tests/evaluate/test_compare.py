"""Paired comparison of results written by hand, and the page of questions that one alone answers right."""

from __future__ import annotations

import html.parser
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from kdstore.errors import ConfigError, EvaluationError, UnknownName
from kdstore.evaluate.compare import compare, comparison_table
from kdstore.evaluate.datasets import open_vqa
from kdstore.evaluate.outcomes import Outcomes, Run
from kdstore.evaluate.results import write_result
from kdstore.jsonfile import read_json

HOSTILE = '<script>document.title="owned"</script>"><img src=x onerror="document.title=1"> {{ 7 * 7 }}'
NUM_IMAGES, PER_IMAGE = 40, 6


def scores(seed: int, ease: float = 0.0) -> np.ndarray:
    """Right or wrong, by images that are easy or hard for all models alike."""
    rng = np.random.default_rng(seed)
    image_N = np.repeat(np.random.default_rng(9).standard_normal(NUM_IMAGES), PER_IMAGE)
    return 100.0 * (image_N + rng.standard_normal(len(image_N)) + ease > 0)


def written(path: Path, runs: dict[tuple[str, int | None], np.ndarray], **fields: Any) -> str:
    """Write a result of invented answers."""
    kinds = [("count", "color")[n % 2] for n in range(NUM_IMAGES * PER_IMAGE)]
    groups = [str(n // PER_IMAGE) for n in range(len(kinds))]
    columns = [Run(row, seed, score_N, ["yes" if score else "no" for score in score_N]) for (row, seed), score_N in runs.items()]
    outcomes = Outcomes([f"q{n}" for n in range(len(kinds))], groups, kinds, tuple(columns))
    rows = [{"row": row, "seed": seed, "scores": {"overall": float(score_N.mean()), **of_kinds(kinds, score_N)}} for (row, seed), score_N in runs.items()]
    content = {
        "stage": "evaluate vqa",
        "model": {"name": path.stem},
        "data": {"evaluated": {"name": "test", "digest": "sha256:1"}},
        "metric": {"name": "vqa", "version": "2021"},
        "config": {"model": path.stem, "epochs": 4},
        "config_digest": "sha256:2",
        "rows": rows,
    }
    write_result(str(path), {**content, **fields}, outcomes)
    return str(path)


def of_kinds(kinds: list[str], score_N: np.ndarray) -> dict[str, float]:
    return {kind: float(score_N[np.array(kinds) == kind].mean()) for kind in dict.fromkeys(kinds)}


def test_a_comparison_says_how_far_two_are_apart_and_who_is_right_alone(tmp_path: Path) -> None:
    better, worse = scores(1, 0.8), scores(2)
    a, b = written(tmp_path / "a.json", {("model", 0): better}), written(tmp_path / "b.json", {("model", 0): worse})
    content = compare(a, b, out=str(tmp_path / "new" / "c.json"))
    assert read_json(tmp_path / "new" / "c.json") == content
    overall, count, color = content["scores"]
    assert [s["score"] for s in content["scores"]] == ["overall", "count", "color"]
    assert overall["difference"] == pytest.approx(better.mean() - worse.mean())
    assert overall["interval"] == overall["over_images"]
    assert 0 < overall["interval"][0] < overall["difference"] < overall["interval"][1]
    assert overall["p"] < 0.001
    assert "p_holm" not in overall
    assert sorted(s["p_holm"] for s in (count, color)) == [pytest.approx(p) for p in np.maximum.accumulate(np.sort([count["p"], color["p"]]) * [2, 1])]
    assert (overall["only_a_right"], overall["only_b_right"]) == (int((better > worse).sum()), int((worse > better).sum()))
    assert count["only_a_right"] + color["only_a_right"] == overall["only_a_right"]
    assert (overall["items"], overall["images"], count["items"]) == (240, 40, 120)
    assert 0 < overall["p_mcnemar"] < 0.001
    back = compare(b, a)["scores"][0]
    assert back["difference"] == -overall["difference"]
    assert back["p"] == overall["p"]
    assert np.allclose(back["interval"], [-end for end in reversed(overall["interval"])])
    table = comparison_table(content).splitlines()
    assert table[:2] == ["A: a, model", "B: b, model"]
    assert f"| {overall['difference']:+.1f} [" in table[5].replace("|  ", "| ")


def test_a_model_against_itself_differs_in_nothing(tmp_path: Path) -> None:
    a = written(tmp_path / "a.json", {("model", 0): scores(1)})
    for record in compare(a, a)["scores"]:
        assert (record["difference"], record["interval"], record["p"], record["p_mcnemar"]) == (0, [0, 0], 1, 1)


def test_seeds_are_paired_and_widen_the_interval_and_what_draws_nothing_meets_each_of_them(tmp_path: Path) -> None:
    runs_a = {("model", s): scores(s, 0.6) for s in range(3)} | {("oracle", None): np.full(240, 100.0)}
    a, b = written(tmp_path / "a.json", runs_a), written(tmp_path / "b.json", {("model", s): scores(10 + s, 0.1 * s) for s in range(3)})
    content = compare(a, b)
    overall = content["scores"][0]
    assert (content["a"]["seeds"], content["b"]["seeds"]) == ([0, 1, 2], [0, 1, 2])
    assert overall["interval"][0] < overall["over_images"][0] < overall["over_images"][1] < overall["interval"][1]
    per_seed = [scores(s, 0.6).mean() - scores(10 + s, 0.1 * s).mean() for s in range(3)]
    half = 4.302652730 * np.std(per_seed, ddof=1) / np.sqrt(3)
    assert overall["over_seeds"] == pytest.approx([np.mean(per_seed) - half, np.mean(per_seed) + half])
    assert "p_mcnemar" not in overall
    oracle = compare(a, b, row_a="oracle")["scores"][0]
    assert oracle["a"] == 100
    assert oracle["only_b_right"] == 0
    other_order = written(tmp_path / "c.json", {("model", s): scores(10 + s, 0.1 * s) for s in (2, 0, 1)})
    assert compare(a, other_order)["scores"] == content["scores"]
    one = written(tmp_path / "one.json", {("model", 0): scores(0)})
    with pytest.raises(EvaluationError, match=r"differ in seeds: \[0, 1, 2\] and \[0\]"):
        compare(a, one)


def test_no_interval_of_a_difference_goes_beyond_100_percent(tmp_path: Path) -> None:
    right, wrong = np.full(NUM_IMAGES * PER_IMAGE, 100.0), np.zeros(NUM_IMAGES * PER_IMAGE)
    a = written(tmp_path / "a.json", {("model", 0): right, ("model", 1): wrong})
    b = written(tmp_path / "b.json", {("model", 0): wrong, ("model", 1): right})
    for record in compare(a, b)["scores"]:
        assert (record["interval"], record["over_seeds"]) == ([-100, 100], [-100, 100])


def test_what_cannot_be_paired_is_refused_with_what_differs(tmp_path: Path) -> None:
    runs = {("model", 0): scores(0)}
    a = written(tmp_path / "a.json", runs)
    for fields, said in (
        ({"stage": "evaluate retrieval"}, "stage: evaluate vqa and evaluate retrieval"),
        ({"metric": {"name": "vqa", "version": "2016"}}, "metric: .*2021.* and .*2016"),
        ({"config_digest": "sha256:3", "config": {"model": "x", "epochs": 5}}, r"protocol \(epochs: A 4, B 5\)"),
        ({"data": {"evaluated": {"name": "test", "digest": "sha256:9"}}}, r"data \(evaluated: A \"sha256:1\", B \"sha256:9\"\)"),
        ({"classes": {"templates": ["a {}."]}}, r"data \(classes.*: A nothing, B .*a {}\."),
    ):
        with pytest.raises(EvaluationError, match=said):
            compare(a, written(tmp_path / "b.json", runs, **fields))
    other = Outcomes(["q0", "x"], ["0", "1"], ["count", "count"], (Run("model", 0, np.zeros(2)),))
    content = {k: v for k, v in read_json(Path(a)).items() if k not in ("digest", "outcomes", "summary")}
    write_result(str(tmp_path / "c.json"), content, other)
    with pytest.raises(EvaluationError, match="questions: 240 and 2, of which 1 are the same"):
        compare(a, tmp_path / "c.json")
    write_result(str(tmp_path / "old.json"), content)
    with pytest.raises(EvaluationError, match="older form"):
        compare(a, tmp_path / "old.json")
    with pytest.raises(UnknownName, match=r"row of .* 'modell'"):
        compare(a, a, row_a="modell")
    with pytest.raises(ConfigError, match="is a folder") as refused:
        compare(a, a, page=str(tmp_path))
    assert "--out" not in refused.value.hint  # it was --page


@pytest.fixture
def paged(tmp_path: Path) -> Path:
    """The page of two results on a data set of hostile questions, of which the model of A alone answers 7 right, that of B 3."""
    lines = []
    for i in range(5):
        Image.new("RGB", (400, 300), (50 * i, 90, 90)).save(tmp_path / f"{i}.png")
        question = {"image": f"{i}.png", "question": HOSTILE, "answer": "yes", "question_type": "<b>" if i % 2 else "plain"}
        lines += [json.dumps(question)] * 3
    (tmp_path / "test.jsonl").write_text("\n".join(lines))
    split = open_vqa("jsonl", "test", folder=tmp_path)
    right_a, right_b = [n < 8 for n in range(15)], [n < 1 or n >= 12 for n in range(15)]
    for name, right in (("a", right_a), ("b", right_b)):
        runs = tuple(Run("model", s, 100.0 * np.array(right), [HOSTILE if not r else "yes" for r in right]) for s in (0, 1))
        outcomes = Outcomes(
            [str(q.question_id) for q in split.questions], [str(q.images[0]) for q in split.questions], [q.question_type for q in split.questions], runs
        )
        content = {
            "stage": "evaluate vqa",
            "model": {"name": f"<i>{name}</i>"},
            "data": {"evaluated": {"name": split.name, "digest": split.record()["digest"]}},
            "config": {"dataset": "jsonl", "eval_split": "test", "folder": "gone", "eval_images": None},
            "config_digest": "sha256:2",
            "rows": [{"row": "model", "seed": s, "scores": {"overall": float(100 * np.mean(right))}} for s in (0, 1)],
        }
        write_result(str(tmp_path / f"{name}.json"), content, outcomes)
    compare(tmp_path / "a.json", tmp_path / "b.json", page=str(tmp_path / "page.html"), examples=5, folder=str(tmp_path))
    return tmp_path / "page.html"


class Page(html.parser.HTMLParser):
    """What a browser would make of a page: its elements, and the text outside of styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def test_the_page_shows_a_bounded_sample_of_escaped_questions_with_their_images_and_asks_for_nothing(paged: Path) -> None:
    page = Page(paged.read_text(encoding="utf-8"))
    assert [len([c for c in page.of("article") if str(c["class"]).startswith(f"only-{side}")]) for side in "ab"] == [5, 3]
    assert "A alone is right on 7 questions, of which a fixed random sample of 5 is shown" in page.text
    assert page.text.count(HOSTILE) == 2 * 8  # the question, and the wrong answer
    assert not page.of("script")
    assert not page.of("link")
    assert all(str(image["src"]).startswith("data:image/jpeg;base64,") and image["alt"] for image in page.of("img"))
    assert len(page.of("img")) == 8
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    policy = next(meta["content"] for meta in page.of("meta") if "http-equiv" in meta)
    assert str(policy).startswith("default-src 'none'; img-src data:; style-src 'unsafe-inline'")
    assert {"only-all", "only-a", "only-b", "kind-all", "kind-0", "kind-1"} == {str(radio["id"]) for radio in page.of("input")}
    assert "<b>" in page.text
    again = paged.with_name("again.html")
    compare(paged.with_name("a.json"), paged.with_name("b.json"), page=str(again), examples=5, folder=str(paged.parent))
    assert again.read_bytes() == paged.read_bytes()


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs a browser")
def test_in_a_browser_nothing_of_a_hostile_question_runs(paged: Path) -> None:
    browser = ["chromium", "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={paged.parent / 'profile'}", "--dump-dom", paged.as_uri()]
    shown = Page(subprocess.run(browser, capture_output=True, text=True, timeout=60, check=True).stdout)
    assert len(shown.of("article")) == 8
    assert not shown.of("script")
    assert "<i>a</i>, model and <i>b</i>, model on jsonl/test" in shown.text


def test_a_page_of_other_questions_or_of_another_evaluation_is_refused(paged: Path, tmp_path: Path) -> None:
    path = paged.parent / "test.jsonl"
    path.write_text(path.read_text().replace('"yes"', '"no"'))
    with pytest.raises(EvaluationError, match="not those that were scored"):
        compare(paged.parent / "a.json", paged.parent / "b.json", page=str(tmp_path / "x.html"), folder=str(paged.parent))
    a = written(tmp_path / "r.json", {("model", None): scores(0)}, stage="evaluate retrieval")
    with pytest.raises(ConfigError, match="A page shows questions"):
        compare(a, a, page=str(tmp_path / "x.html"))
    assert not (tmp_path / "x.html").exists()

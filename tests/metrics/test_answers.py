"""Every metric of answers through its one entry: official errors, versions, quirks; nothing changed by scoring."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, f1_score

from kdstore.errors import EvaluationError, UnknownName
from kdstore.evaluate import METRICS, anls, predictions_of, score_answers
from kdstore.metrics.textvqa import levenshtein
from kdstore.metrics.vizwiz import CURLY_CONTRACTIONS, average_precision, f1, normalize_vizwiz
from kdstore.metrics.vqa import CONTRACTIONS


def question(question_id: Any, answers: list[str], *, question_type: str = "what", answer_type: str = "other", **extra: Any) -> dict[str, Any]:
    records = [{"answer": a, "answer_id": n} for n, a in enumerate(answers, start=1)]
    return {
        "question_id": question_id,
        "question": "what is it",
        "question_type": question_type,
        "answer_type": answer_type,
        "answers": records,
        "extra": extra,
    }


TYPES = {"structural": "query", "semantic": "attr", "detailed": "color"}
EXTRA: dict[str, dict[str, Any]] = {
    "aokvqa": {"difficult_direct_answer": False},
    "aokvqa-choice": {"choices": ["yes", "no"], "correct_choice_idx": 0},
    "clevr": {"question_family_index": 3},
    "gqa": {"isBalanced": True, "types": TYPES, "groups": {"global": None}, "entailed": [], "semantic": []},
    "nlvr2": {"identifier": "dev-1-0-1"},
    "vizwiz-answerability": {"answerable": 0},
}


def right(metric: str) -> Any:
    return 0.0 if METRICS[metric].predicts is float else "yes"


@pytest.mark.parametrize("metric", METRICS)
def test_a_missing_prediction_an_unknown_question_and_no_question_are_errors_for_every_metric(metric: str) -> None:
    asked = [question(i, ["yes"] * 10, **EXTRA.get(metric, {})) for i in (1, 2)]
    predictions = {1: right(metric), 2: right(metric)}
    assert score_answers(metric, asked, predictions).per_question == {1: 100, 2: 100}
    with pytest.raises(EvaluationError, match=r"1 without a prediction, 0 without a question .first: question 2 has"):
        score_answers(metric, asked, {1: right(metric)})
    with pytest.raises(EvaluationError, match=r"0 without a prediction, 1 without a question .first: prediction 3"):
        score_answers(metric, asked, predictions | {3: right(metric)})
    with pytest.raises(EvaluationError, match="no questions"):
        score_answers(metric, [], {})
    with pytest.raises(EvaluationError, match="Question 1 is there more than once"):
        score_answers(metric, [asked[0]] * 2, {1: right(metric)})
    with pytest.raises(EvaluationError, match="prediction for question 2 is nan"):
        score_answers(metric, asked, predictions | {2: float("nan")})
    if metric not in ("vizwiz-answerability", "aokvqa-choice"):  # which read no answers
        with pytest.raises(EvaluationError, match=r"Question 1.* no (human )?answer to compare with"):
            score_answers(metric, [{**asked[0], "answers": []}], {1: "yes"})


@pytest.mark.parametrize(("metric", "version"), [(metric, version) for metric in METRICS for version in METRICS[metric].versions])
@given(st.lists(st.tuples(st.sampled_from(["yes", "Two", "the cat", "dont", "1,000", ""]), st.integers(0, 10)), min_size=1, max_size=5))
def test_scoring_twice_gives_the_same_and_changes_nothing_and_the_whole_is_the_mean_of_its_questions(
    metric: str, version: str, drawn: list[tuple[str, int]]
) -> None:
    single = metric in ("gqa", "clevr", "nlvr2")
    asked = [question(i, ["yes"] * (10 if single else n) + ["no"] * (0 if single else 10 - n), **EXTRA.get(metric, {})) for i, (_, n) in enumerate(drawn)]
    predictions: dict[Any, Any] = {i: right(metric) if metric == "aokvqa-choice" or right(metric) == 0 else text for i, (text, _) in enumerate(drawn)}
    before = copy.deepcopy((asked, predictions))
    first = score_answers(metric, asked, predictions, version=version)
    assert score_answers(metric, asked, predictions, version=version) == first
    assert (asked, predictions) == before
    assert (first.metric, first.version) == (metric, version)
    assert all(0 <= score <= 100 for score in first.per_question.values())
    if metric != "vizwiz-answerability":
        assert first.overall == pytest.approx(sum(first.per_question.values()) / len(first.per_question), abs=0.0051)
    assert all(sum(members.values()) == len(first.per_question) for members in first.counts.values())


def test_every_metric_and_version_is_in_the_docs() -> None:
    docs = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
    headings = [line for line in docs.splitlines() if line.startswith("## ")]
    assert all(any(f"`{metric}`" in heading for heading in headings) for metric in METRICS)
    assert all(f"- `{version}`" in docs for metric in METRICS.values() for version in metric.versions if version != "official")


def test_an_unknown_metric_or_version_names_the_known_ones() -> None:
    with pytest.raises(UnknownName, match=r"Unknown metric of answers 'vaq'\. Did you mean vqa"):
        score_answers("vaq", [], {})
    with pytest.raises(UnknownName, match="Known: 2016, 2021, m4c"):
        score_answers("vqa", [], {}, version="best")


def test_of_a_repeated_result_record_the_last_wins() -> None:
    assert predictions_of([{"question_id": 1, "answer": "cat"}, {"question_id": 1, "answer": "dog"}]) == {1: "dog"}
    with pytest.raises(EvaluationError, match="needs the field 'questionId'; one has question_id"):
        predictions_of([{"question_id": 1}], "questionId", "prediction")


def test_vqa_has_the_official_fields_and_keeps_unrounded_values_per_question() -> None:
    asked = [question(1, ["cat"] * 10), question(2, ["cat"] + ["dog"] * 9), question(3, ["no"] * 7 + ["yes"] * 3, question_type="is it", answer_type="yes/no")]
    scores = score_answers("vqa", asked, {1: "cat", 2: "cat", 3: "yes"})
    assert (scores.aggregate, scores.main, scores.overall, scores.version) == ({"overall": 73.33}, "overall", 73.33, "2021")
    assert scores.groups == {"perQuestionType": {"what": 65.0, "is it": 90.0}, "perAnswerType": {"other": 65.0, "yes/no": 90.0}}
    assert scores.counts == {"perQuestionType": {"what": 2, "is it": 1}, "perAnswerType": {"other": 2, "yes/no": 1}}
    assert scores.per_question == pytest.approx({1: 100, 2: 30, 3: 90})


def test_nlvr2_is_consistent_only_where_a_sentence_is_right_on_all_its_images_and_ignores_case() -> None:
    asked = [question(i, ["True"], identifier=i) for i in ("dev-8-0-0", "dev-8-1-0", "dev-8-0-1", "dev-9-0-0")]
    scores = score_answers("nlvr2", asked, {"dev-8-0-0": "true", "dev-8-1-0": "False", "dev-8-0-1": "True", "dev-9-0-0": "TRUE"})
    assert scores.aggregate == {"accuracy": 75.0, "consistency": pytest.approx(200 / 3)}
    with pytest.raises(EvaluationError, match="identifier 8-0; expected split-set-pair-sentence"):
        score_answers("nlvr2", [question(1, ["True"], identifier="8-0")], {1: "True"})


def test_clevr_is_exact_and_split_by_family() -> None:
    asked = [question(1, ["Cube"], question_family_index=4), question(2, ["2"], question_family_index=4), question(3, ["no"], question_family_index=80)]
    scores = score_answers("clevr", asked, {1: "cube", 2: "2", 3: "no"})
    assert scores.groups["perFamily"] == {"4": 50.0, "80": 100.0}
    assert scores.counts["perFamily"] == {"4": 2, "80": 1}
    with pytest.raises(EvaluationError, match="no 'question_family_index' in its extra fields; it has none"):
        score_answers("clevr", [question(1, ["x"])], {1: "x"})


def test_ok_vqa_answers_stand_twice_so_that_one_of_five_annotators_is_60_and_two_are_100() -> None:
    asked = [question(i, ["cat", "cat"] * i + ["dog", "dog"] * (5 - i)) for i in range(4)]
    assert score_answers("vqa", asked, dict.fromkeys(range(4), "cat")).per_question == pytest.approx({0: 0, 1: 60, 2: 100, 3: 100})


def test_a_multiple_choice_question_takes_one_of_its_choices_only() -> None:
    asked = [question(1, ["cat"] * 10, multiple_choices=["cat", "dog"])]
    assert score_answers("vqa", asked, {1: "cat"}).overall == 100
    with pytest.raises(EvaluationError, match="question 1 is 'cow', none of its choices cat, dog"):
        score_answers("vqa", asked, {1: "cow"})


@pytest.mark.parametrize(("matches", "score"), [(0, 0), (1, 100 / 3), (2, 200 / 3), (3, 100), (10, 100)])
def test_a_okvqa_leaves_no_annotator_out_and_normalises_nothing(matches: int, score: float) -> None:
    asked = [question(1, ["cat"] * matches + ["Cat"] * (10 - matches), difficult_direct_answer=False)]
    assert score_answers("aokvqa", asked, {1: "cat"}).aggregate == {"accuracy": pytest.approx(score)}


def test_a_okvqa_leaves_questions_out_that_are_difficult_for_direct_answers() -> None:
    asked = [question(1, ["a"] * 10, difficult_direct_answer=True), question(2, ["b"] * 10, difficult_direct_answer=False)]
    assert score_answers("aokvqa", asked, {1: "x", 2: "b"}).per_question == {2: 100}
    with pytest.raises(EvaluationError, match="Every question is marked as difficult"):
        score_answers("aokvqa", asked[:1], {1: "x"})


def test_a_okvqa_choices_are_compared_with_the_right_one_and_others_are_refused() -> None:
    asked = [question(i, ["x"], choices=["a", "b", "c", "d"], correct_choice_idx=2) for i in (1, 2)]
    assert score_answers("aokvqa-choice", asked, {1: "c", 2: "a"}).aggregate == {"accuracy": 50}
    with pytest.raises(EvaluationError, match="question 2 is 'C', none of its choices a, b, c, d"):
        score_answers("aokvqa-choice", asked, {1: "c", 2: "C"})


def test_exact_match_compares_whole_strings_so_several_words_are_one_answer() -> None:
    asked = [question(1, ["chair, table"]), question(2, ["chair"]), question(3, ["one", "two"])]
    assert score_answers("exact", asked, {1: "chair, table", 2: "Chair", 3: "two"}).per_question == {1: 100, 2: 0, 3: 100}


def test_metrics_of_one_answer_refuse_several() -> None:
    with pytest.raises(EvaluationError, match="Question 1 has 2 different answers"):
        score_answers("clevr", [question(1, ["a", "b"], question_family_index=1)], {1: "a"})


def test_textvqa_normalises_both_sides_always_takes_ten_answers_and_does_not_round() -> None:
    asked = [question(1, ["The Cat"] * 10), question(2, ["red,white"] * 9 + ["x"]), question(3, ["yes"] + ["no"] * 9)]
    scores = score_answers("textvqa", asked, {1: "cat", 2: "red white", 3: "Yes?"})
    assert scores.per_question == pytest.approx({1: 100, 2: 0, 3: 30})
    assert scores.aggregate == {"accuracy": pytest.approx(130 / 3, abs=1e-12)}
    with pytest.raises(EvaluationError, match="Question 1: The M4C evaluator takes ten answers, found 3"):
        score_answers("textvqa", [question(1, ["a"] * 3)], {1: "a"})


def test_st_vqa_accuracy_asks_whether_the_processed_prediction_is_among_the_processed_answers() -> None:
    asked = [question(1, ["Bob's, Cafe", "cafe"]), question(2, ["7"])]
    assert score_answers("stvqa", asked, {1: "bob's cafe", 2: "eight"}).aggregate == {"accuracy": 50}


@pytest.mark.parametrize(
    ("prediction", "answer", "expected"),  # inclusive, strict, m4c
    [
        ("ab", "ac", (50, 0, 50)),
        ("abc", "abd", (200 / 3, 200 / 3, 200 / 3)),
        ("abc", "axy", (0, 0, 0)),
        (" AB ", "ab", (100, 100, 100)),
        ("a  b", "a b", (100, 100, 75)),
        ("", "", (100, 100, 100)),
        ("", "a", (0, 0, 0)),
    ],
)
def test_anls_versions_differ_at_one_half_and_in_white_space(prediction: str, answer: str, expected: tuple[float, ...]) -> None:
    assert [anls(prediction, [answer], version) for version in ("inclusive", "strict", "m4c")] == pytest.approx(list(expected))


def test_anls_takes_the_nearest_answer_and_averages_over_questions() -> None:
    asked = [question(1, ["zzz", "abd", "abc"]), question(2, ["zzz"])]
    assert score_answers("anls", asked, {1: "abc", 2: "abc"}).aggregate == {"anls": 50}
    assert anls("ac", [{"answer": "ab"}, {"answer": "x"}]) == 50
    with pytest.raises(UnknownName, match="Known: inclusive, m4c, strict"):
        anls("a", ["a"], "loose")
    with pytest.raises(EvaluationError, match="no human answer"):
        anls("a", [])


def distance_by_definition(a: str, b: str) -> int:
    if not a or not b:
        return len(a) + len(b)
    return min(distance_by_definition(a[1:], b) + 1, distance_by_definition(a, b[1:]) + 1, distance_by_definition(a[1:], b[1:]) + (a[0] != b[0]))


@given(st.text("abc", max_size=5), st.text("abc", max_size=5))
def test_levenshtein_equals_its_recursive_definition(a: str, b: str) -> None:
    assert levenshtein(a, b) == distance_by_definition(a, b)


@pytest.mark.parametrize(
    ("prediction", "answer", "score"),
    [("Coke", "Coke", 0), ("Coke", "coke", 100), ("the cat", "cat", 100), ("two", "two", 0), ("two", "2", 100), ("a\tcat.", "cat", 100), ("cat", "cat ", 0)],
)
def test_vizwiz_normalises_the_prediction_always_and_the_answers_never(prediction: str, answer: str, score: float) -> None:
    for answers in ([answer] * 10, [answer] * 9 + ["x"]):
        assert score_answers("vizwiz", [question("a.jpg", answers)], {"a.jpg": prediction}).overall == score


def test_vizwiz_leaves_each_annotator_out_and_gives_official_fields() -> None:
    asked = [question("a.jpg", ["cat"] + ["x"] * 9), question("b.jpg", ["no"] * 10, answer_type="yes/no"), question("c.jpg", ["cat"] * 2 + ["x"] * 8)]
    scores = score_answers("vizwiz", asked, {"a.jpg": "cat", "b.jpg": "no", "c.jpg": "cat"})
    assert (scores.aggregate, scores.groups) == ({"overall": 63.33}, {"perAnswerType": {"other": 45.0, "yes/no": 100.0}})


def test_vizwiz_writes_most_contractions_with_a_typographic_apostrophe() -> None:
    asked = [question("a.jpg", ["don't"] * 10)]
    assert [score_answers("vizwiz", asked, {"a.jpg": "dont"}, version=version).overall for version in ("curly", "straight")] == [0, 100]
    assert (normalize_vizwiz("dont"), normalize_vizwiz("don't"), normalize_vizwiz("cant")) == ("don\u2019t", "don't", "can't")
    assert len(CURLY_CONTRACTIONS) == 120
    assert sum("'" in value for value in CURLY_CONTRACTIONS.values()) == 8
    assert {key for key in CURLY_CONTRACTIONS if "'" in key} == {"couldn'tve", "hadn'tve"}
    assert {k.replace("\u2019", "'"): v.replace("\u2019", "'") for k, v in CURLY_CONTRACTIONS.items()} == CONTRACTIONS


def test_vizwiz_answerability_finds_the_unanswerable() -> None:
    asked = [question(i, ["x"], answerable=answerable) for i, answerable in enumerate([0, 1, 0, 1])]
    scores = score_answers("vizwiz-answerability", asked, {0: 0.1, 1: 0.2, 2: 0.5, 3: 0.9})
    assert scores.aggregate == {"average_precision": 83.33, "f1_score": 50.0}  # at exactly one half nothing is called unanswerable
    assert scores.per_question == {0: 100, 1: 0, 2: 0, 3: 100}
    with pytest.raises(EvaluationError, match="No question is unanswerable"):
        score_answers("vizwiz-answerability", asked[1:2], {1: 0.5})
    with pytest.raises(EvaluationError, match=r"Question 9 has answerable 0\.5; expected 0 or 1"):
        score_answers("vizwiz-answerability", [question(9, ["x"], answerable=0.5)], {9: 0.5})


@given(st.lists(st.tuples(st.booleans(), st.sampled_from([0.0, 0.1, 0.5, 0.6, 1.0])), min_size=1, max_size=12).filter(lambda rows: any(p for p, _ in rows)))
def test_average_precision_and_f1_equal_scikit_learn_with_ties(rows: list[tuple[bool, float]]) -> None:
    positive, score = [p for p, _ in rows], [s for _, s in rows]
    assert average_precision(positive, score) == pytest.approx(average_precision_score(positive, score), abs=1e-12)
    chosen = [s > 0.5 for s in score]
    assert f1(positive, chosen) == pytest.approx(f1_score(positive, chosen, zero_division=0.0), abs=1e-12)

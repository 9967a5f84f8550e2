"""Every metric of answers through its one entry: official errors, versions, nothing changed by scoring."""

from __future__ import annotations

from typing import Any

import pytest

from kdstore.errors import EvaluationError, UnknownName
from kdstore.evaluate import METRICS, predictions_of, score_answers


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


def any_question(question_id: Any) -> dict[str, Any]:
    """A question that every metric can score, and a prediction of its type."""
    return question(question_id, ["yes"] * 10, question_family_index=3, identifier=f"dev-{question_id}-0-1")


@pytest.mark.parametrize("metric", METRICS)
def test_a_missing_prediction_an_unknown_question_and_no_question_are_errors_for_every_metric(metric: str) -> None:
    asked = [any_question(1), any_question(2)]
    right = 1.0 if METRICS[metric].predicts is float else "yes"
    assert set(score_answers(metric, asked, {1: right, 2: right}).per_question) == {1, 2}
    with pytest.raises(EvaluationError, match=r"1 without a prediction, 0 without a question .first: question 2 has"):
        score_answers(metric, asked, {1: right})
    with pytest.raises(EvaluationError, match=r"0 without a prediction, 1 without a question .first: prediction 3"):
        score_answers(metric, asked, {1: right, 2: right, 3: right})
    with pytest.raises(EvaluationError, match="no questions"):
        score_answers(metric, [], {})
    with pytest.raises(EvaluationError, match="Question 1 is there more than once"):
        score_answers(metric, [any_question(1)] * 2, {1: right})
    with pytest.raises(EvaluationError, match="prediction for question 2 is nan"):
        score_answers(metric, asked, {1: right, 2: float("nan")})


def test_an_unknown_metric_or_version_names_the_known_ones() -> None:
    with pytest.raises(UnknownName, match=r"Unknown metric of answers 'vaq'\. Did you mean vqa"):
        score_answers("vaq", [], {})
    with pytest.raises(UnknownName, match="Known: 2016, 2021, m4c"):
        score_answers("vqa", [], {}, version="best")


def test_of_a_repeated_result_record_the_last_wins() -> None:
    assert predictions_of([{"question_id": 1, "answer": "cat"}, {"question_id": 1, "answer": "dog"}]) == {1: "dog"}
    with pytest.raises(EvaluationError, match="no field 'questionId'; it has question_id"):
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

"""Answer vocabulary, soft targets, oracle and chance."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdstore.errors import EvaluationError
from kdstore.evaluate.answers import answer_vocabulary, best_answers, chance_per_type, label_scores, soft_target, split_words, word_vocabulary
from kdstore.evaluate.datasets import VqaQuestion
from kdstore.metrics.answers import score_answers
from kdstore.metrics.scores import Scores
from kdstore.metrics.vqa import vqa_accuracy

ANSWERS = st.lists(st.sampled_from(["cat", "Cat", "the cat", "two", "2", "none", "red,white", "don't", "dont", "", "\tcat"]), min_size=10, max_size=10)


def asked(answers: list[str], number: int = 0, question_type: str = "what") -> VqaQuestion:
    records = tuple({"answer": a, "answer_id": n} for n, a in enumerate(answers))
    return VqaQuestion(number, (0,), "what is it?", question_type, "other", records)


def score_of(questions: list[VqaQuestion], version: str = "2021") -> Callable[[list[str]], Scores]:
    def score(answers: list[str]) -> Scores:
        predictions = {q.question_id: a for q, a in zip(questions, answers, strict=True)}
        return score_answers("vqa", [q.annotation() for q in questions], predictions, version=version)

    return score


@pytest.mark.parametrize(("num_matches", "target"), [(1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (7, 1.0), (10, 1.0)])
def test_soft_targets_are_0_3_0_6_0_9_and_1(num_matches: int, target: float) -> None:
    vocabulary = answer_vocabulary([asked(["cat"] * 10)])
    assert soft_target(asked(["Cat."] * num_matches + ["dog"] * (10 - num_matches)), vocabulary) == {0: pytest.approx(target)}


def test_a_question_without_an_answer_in_the_vocabulary_has_no_target() -> None:
    assert soft_target(asked(["dog"] * 10), answer_vocabulary([asked(["cat"] * 10)])) == {}


@given(ANSWERS)
def test_soft_targets_are_the_official_scores_where_annotators_disagree(answers: list[str]) -> None:
    question = asked(answers)
    vocabulary = answer_vocabulary([asked([a] * 10, n) for n, a in enumerate(["cat", "2", "0", "red white", "don't", ""])])
    if len({a.strip() for a in answers}) > 1:
        official = {i: vqa_accuracy(label, question.answers) / 100 for i, label in enumerate(vocabulary.labels)}
        assert soft_target(question, vocabulary) == pytest.approx({i: score for i, score in official.items() if score > 0})


def test_a_raw_look_up_finds_only_what_is_written_as_its_label() -> None:
    vocabulary = answer_vocabulary([asked(["two"] * 10)])
    question = asked(["2"] * 2 + ["Two"] * 8)
    assert soft_target(question, vocabulary) == {0: 1.0}
    assert soft_target(question, vocabulary, "raw") == {0: pytest.approx(0.6)}


def test_the_vocabulary_counts_the_most_frequent_normalised_answer_of_each_question() -> None:
    questions = [asked(["Two"] * 6 + ["3"] * 4), asked(["2"] * 9 + ["two"]), asked(["a dog"] * 10), asked(["dog"] * 5 + ["the dog"] * 4 + ["x"])]
    assert answer_vocabulary(questions).labels == ("2", "dog")
    assert answer_vocabulary([*questions, asked(["cat"] * 10)], min_count=2).labels == ("2", "dog")
    with pytest.raises(EvaluationError, match="3 or more training questions"):
        answer_vocabulary(questions, min_count=3)


def test_labels_are_spoken_in_their_most_frequent_spelling() -> None:
    vocabulary = answer_vocabulary([asked(["Blue"] * 10), asked(["blue"] * 3 + ["Blue"] * 7)])
    assert (vocabulary.labels, vocabulary.spellings) == (("blue",), ("Blue",))
    assert vqa_accuracy(vocabulary.spellings[0], ["Blue"] * 10) == 100


@given(st.lists(ANSWERS, min_size=1, max_size=4), ANSWERS, st.sampled_from(["2021", "2016"]))
def test_the_oracle_is_the_best_answer_of_the_whole_vocabulary(train: list[list[str]], answers: list[str], version: str) -> None:
    vocabulary = answer_vocabulary([asked(a, n) for n, a in enumerate(train)])
    question = asked(answers)
    best = max(vqa_accuracy(spelling, question.answers, version) for spelling in vocabulary.spellings)
    (answer,) = best_answers(label_scores([question], vocabulary, score_of([question], version)), vocabulary)
    assert vqa_accuracy(answer, question.answers, version) == best


@given(st.lists(st.tuples(ANSWERS, st.sampled_from(["what", "how"])), min_size=1, max_size=6))
def test_chance_is_the_best_constant_answer_per_question_type(rows: list[tuple[list[str], str]]) -> None:
    questions = [asked(answers, n, kind) for n, (answers, kind) in enumerate(rows)]
    vocabulary = answer_vocabulary(questions)
    chance = chance_per_type(questions, label_scores(questions, vocabulary, score_of(questions)))
    for kind, value in chance.items():
        of_kind = [q for q in questions if kind in ("overall", q.question_type)]
        constant = [sum(vqa_accuracy(s, q.answers) for q in of_kind) / len(of_kind) for s in vocabulary.spellings]
        assert value == pytest.approx(max(constant), abs=0.006)
    assert set(chance) == {"overall", *(q.question_type for q in questions)}


def test_chance_is_over_the_questions_that_count() -> None:
    """GQA scores balanced questions alone; the others are answered to tell consistency."""
    questions = [asked(["cat"] * 10, 0), asked(["cat"] * 10, 1), asked(["dog"] * 10, 2)]
    vocabulary = answer_vocabulary(questions)

    def score(answers: list[str]) -> Scores:
        return score_of(questions[1:])(answers[1:])

    scores = label_scores(questions, vocabulary, score)
    assert (scores[0], chance_per_type(questions, scores)) == (None, {"overall": 50.0, "what": 50.0})
    assert len(best_answers(scores, vocabulary)) == 3


def test_words_are_those_of_the_given_questions_in_alphabetical_order() -> None:
    assert split_words("What's the Man's T-shirt, o'clock? 5:30") == ["what's", "the", "man's", "t", "shirt", "o'clock", "5", "30"]
    assert word_vocabulary([asked(["x"])]) == {"is": 3, "it": 4, "what": 5}

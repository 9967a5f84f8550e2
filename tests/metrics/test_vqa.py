"""VQA accuracy against the golden scores and the published quirks, one by one."""

from __future__ import annotations

import copy
import json
import string
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdstore.errors import EvaluationError, UnknownName
from kdstore.metrics.answers import score_answers
from kdstore.metrics.vqa import (
    ARTICLES,
    CONTRACTIONS,
    NUMBERS,
    PUNCTUATION,
    clean_answer,
    normalize_answer,
    normalize_m4c,
    remove_punctuation,
    vqa_accuracy,
    vqa_scores,
)

GOLDEN = Path(__file__).parent / "golden" / "vqa_accuracy.json"  # made with the published evaluators, as its note says
GOLDEN_NAMES = {"2021": "official_2021", "2016": "official_2016", "m4c": "m4c_textvqa"}
TEXT = st.text(alphabet=string.ascii_letters + string.digits + " .,'-?!/;\t\n$%:", max_size=24)


def scores(prediction: str, answers: list[str]) -> tuple[int, int, int]:
    return tuple(round(vqa_accuracy(prediction, answers, version)) for version in ("2021", "2016", "m4c"))  # type: ignore[return-value]


@pytest.mark.parametrize("version", GOLDEN_NAMES)
def test_every_golden_case_to_the_last_digit(version: str) -> None:
    golden = json.loads(GOLDEN.read_text())
    cases = golden["cases"]
    assert [round(vqa_accuracy(c["prediction"], c["answers"], version), 2) for c in cases] == [c[GOLDEN_NAMES[version]] for c in cases]
    annotations = [
        {
            "question_id": i,
            "question_type": "any",
            "answer_type": c["answer_type"],
            "answers": [{"answer": a, "answer_id": n} for n, a in enumerate(c["answers"], 1)],
        }
        for i, c in enumerate(cases)
    ]
    predictions = [{"question_id": i, "answer": c["prediction"]} for i, c in enumerate(cases)]
    result = vqa_scores(predictions, annotations, version=version)
    assert result["accuracy"]["overall"] == golden["overall"][GOLDEN_NAMES[version]]
    assert [result["evalQA"][i] for i in range(len(cases))] == [c[GOLDEN_NAMES[version]] for c in cases]
    assert (result["vqa_version"], result["num_questions"]) == (version, len(cases))
    scores = score_answers("vqa", annotations, {i: c["prediction"] for i, c in enumerate(cases)}, version=version)
    assert (scores.overall, scores.groups["perAnswerType"]) == (result["accuracy"]["overall"], result["accuracy"]["perAnswerType"])


@pytest.mark.parametrize(
    ("answers", "prediction", "expected"),
    [
        (["yes"] * 10, "Yes.", (0, 100, 100)),
        (["yes"] * 9 + ["no"], "Yes.", (100, 100, 100)),
        (["none"] * 10, "none", (100, 0, 100)),
        (["none"] * 9 + ["some"], "none", (100, 0, 100)),
        (["the cat"] * 10, "the cat", (100, 0, 100)),
        (["the cat"] * 9 + ["dog"], "cat", (100, 0, 100)),
        (["2"] * 10, "two", (0, 100, 100)),
        (["2"] * 9 + ["3"], "two", (100, 100, 100)),
        (["0"] * 9 + ["3"], "none", (100, 100, 100)),
        (["Cat"] * 9 + ["dog"], "Cat", (100, 0, 100)),
        (["dont know"] * 9 + ["yes"], "don't know", (100, 0, 100)),
        (["red,white"] * 9 + ["blue"], "red white", (100, 100, 0)),
        (["1,000-2,000"] * 9 + ["5"], "10002000", (100, 100, 0)),
        (["what's up"] * 9 + ["hi"], "whats up", (100, 100, 0)),
        (["im"] * 9 + ["yes"], "I'm", (0, 0, 0)),
    ],
)
def test_the_three_versions_differ_as_published(answers: list[str], prediction: str, expected: tuple[int, int, int]) -> None:
    assert scores(prediction, answers) == expected


@pytest.mark.parametrize(
    ("text", "after_punctuation", "normalized"),
    [
        ("red,white", "red white", "red white"),
        ("red, white", "red white", "red white"),
        ("1,000", "1000", "1000"),
        ("1,000-2,000", "10002000", "10002000"),
        ("10-20", "10 20", "10 20"),
        ("t-shirt", "t shirt", "t shirt"),
        ("a-b - c", "ab  c", "ab c"),
        ("3.", "3", "3"),
        ("1.5.", "1.5", "1.5"),
        (".5", ".5", ".5"),
        ("3.5", "3.5", "3.5"),
        ("U.S.A.", "USA", "usa"),
        ("dont know", "dont know", "don't know"),
        ("im", "im", "im"),
        ("I'm", "I'm", "i'm"),
    ],
)
def test_normalisation_gives_the_published_examples(text: str, after_punctuation: str, normalized: str) -> None:
    assert remove_punctuation(text) == after_punctuation
    assert normalize_answer(text) == normalized


def test_punctuation_is_the_published_21_characters_in_order() -> None:
    assert list(PUNCTUATION) == [";", "/", "[", "]", '"', "{", "}", "(", ")", "=", "+", "\\", "_", "-", ">", "<", "@", "`", ",", "?", "!"]


@pytest.mark.parametrize("kept", ["5:30", "$5", "5%", "a&b", "*", "#1", "~x", "^", "|", "rock'n"])
def test_characters_outside_the_list_are_kept(kept: str) -> None:
    assert remove_punctuation(kept) == kept


def test_context_of_punctuation_is_tested_on_the_original_string() -> None:
    assert remove_punctuation("x /y-z") == "x y z"
    assert remove_punctuation("x; -y") == "x y"  # the hyphen has its space in the original


def test_digit_comma_digit_anywhere_deletes_every_punctuation_character() -> None:
    assert remove_punctuation("1,2 or a-b") == "12 or ab"


@given(st.integers(0, 80))
def test_only_the_first_32_removable_periods_go(num_periods: int) -> None:
    assert remove_punctuation("x" + "." * num_periods) == "x" + "." * max(0, num_periods - 32)


def test_periods_before_a_digit_do_not_count_to_the_limit_of_32() -> None:
    assert remove_punctuation(".5" * 40 + "." * 33) == ".5" * 40 + "."


def test_number_words_become_digits_and_none_becomes_zero() -> None:
    assert normalize_answer("None Zero one two three four five six seven eight nine Ten eleven") == "0 0 1 2 3 4 5 6 7 8 9 10 eleven"


@pytest.mark.parametrize("article", ["a", "An", "the", "The the"])
def test_articles_alone_become_the_empty_answer(article: str) -> None:
    assert normalize_answer(article) == ""


def test_contraction_table_keeps_its_published_quirks() -> None:
    assert len(CONTRACTIONS) == 120
    assert not {"its", "ill", "well", "were", "shell", "id", "wed", "shed", "lets"} & set(CONTRACTIONS)
    assert normalize_answer("somebody'd") == "somebodyd"
    assert normalize_answer("Id've") == "id've"  # the key has a capital, the text no longer has
    assert (normalize_answer("let's"), normalize_answer("lets")) == ("let's", "lets")


@pytest.mark.parametrize(
    ("text", "processed"), [("red,white", "redwhite"), ("1,000-2,000", "1000 2000"), ("what's", "what 's"), ("let's go", "let 's go"), ("3:30 p.m.", "3:30 pm")]
)
def test_m4c_cleans_words_its_own_way(text: str, processed: str) -> None:
    assert normalize_m4c(text) == processed


def test_m4c_takes_exactly_ten_answers() -> None:
    with pytest.raises(EvaluationError, match="ten answers, found 9"):
        vqa_accuracy("yes", ["yes"] * 9, "m4c")


@given(st.integers(0, 10), st.sampled_from(["2021", "2016", "m4c"]))
def test_ten_annotators_give_0_30_60_90_100(num_matches: int, version: str) -> None:
    score = vqa_accuracy("cat", ["cat"] * num_matches + ["dog"] * (10 - num_matches), version)
    assert score == pytest.approx([0, 30, 60, 90, 100][min(num_matches, 4)])


def test_a_single_annotator_always_scores_zero_and_ten_empty_answers_match_an_empty_one() -> None:
    assert vqa_accuracy("yes", ["yes"]) == 0
    assert vqa_accuracy("", [""] * 10) == 100


def test_equal_records_without_ids_are_left_out_by_position() -> None:
    assert vqa_accuracy("yes", [{"answer": "yes"}] * 10) == 100
    assert vqa_accuracy("yes", [{"answer": "yes"}] * 5 + [{"answer": "no"}] * 5) == 100


def test_the_gate_is_computed_before_normalisation() -> None:
    assert vqa_accuracy("two", ["2"] * 9 + ["two"], "2021") == 100
    assert vqa_accuracy("two", ["2"] * 9 + ["2 "], "2021") == 0  # 2021 strips answers before it looks
    assert vqa_accuracy("two", ["2"] * 9 + ["2 "], "2016") == 100


def test_unanimous_2021_answers_are_compared_with_their_case() -> None:
    assert (vqa_accuracy("cat", ["Cat"] * 10), vqa_accuracy(" Cat\n", ["Cat"] * 10)) == (0, 100)


def test_2016_answers_keep_their_line_breaks() -> None:
    assert (vqa_accuracy("a b", ["x\ny"] * 10, "2016"), vqa_accuracy("x\ny", ["x\ny"] * 10, "2016")) == (0, 0)
    assert vqa_accuracy("x\ny", ["x\ny"] * 10, "2021") == 100


def reference_punctuation(text: str) -> str:
    """The first pass once more, character by character and without a regular expression."""
    grouped = any(a.isdecimal() and b == "," and c.isdecimal() for a, b, c in zip(text, text[1:], text[2:], strict=False))
    kept = []
    for c in text:
        if c not in PUNCTUATION:
            kept.append(c)
        elif not (grouped or c + " " in text or " " + c in text):
            kept.append(" ")
    out, removed = [], 0
    for i, c in enumerate(kept):
        if c == "." and not (i + 1 < len(kept) and kept[i + 1].isdecimal()) and removed < 32:
            removed += 1
        else:
            out.append(c)
    return "".join(out)


def reference_normalisation(text: str) -> str:
    """Both passes once more."""
    words = [NUMBERS.get(w, w) for w in reference_punctuation(text).lower().split()]
    return " ".join(CONTRACTIONS.get(w, w) for w in words if w not in ARTICLES)


def reference_accuracy(prediction: str, answers: list[str], version: str) -> float:
    """The official rules step by step on records with ids of their own, which are left out where they are equal."""
    records = [{"answer": answer, "answer_id": i} for i, answer in enumerate(answers)]
    given = prediction.replace("\n", " ").replace("\t", " ").strip()
    if version == "2021":
        records = [{**r, "answer": r["answer"].replace("\n", " ").replace("\t", " ").strip()} for r in records]
    disagree = len({r["answer"] for r in records}) > 1
    if disagree:
        normalise = reference_normalisation if version == "2021" else reference_punctuation
        records = [{**r, "answer": normalise(r["answer"])} for r in records]
    if disagree or version == "2016":
        given = reference_normalisation(given)
    accuracies = []
    for record in records:
        matching = [other for other in records if other != record and other["answer"] == given]
        accuracies.append(min(1, float(len(matching)) / 3))
    return 100 * (float(sum(accuracies)) / len(accuracies))


WORDS = st.lists(st.sampled_from([*CONTRACTIONS, *NUMBERS, "the", ".", "1,2", "-", " "]), max_size=8).map(" ".join)


@given(st.one_of(TEXT, WORDS))
def test_normalisation_equals_a_second_writing_of_the_rules(text: str) -> None:
    assert normalize_answer(text) == reference_normalisation(text)


@given(st.one_of(TEXT, WORDS))
def test_normalising_a_normalised_answer_changes_nothing_but_beyond_32_periods(text: str) -> None:
    assert normalize_answer(normalize_answer(text)) == normalize_answer(text)
    assert normalize_answer(normalize_answer("x" + 40 * ".")) == "x" != normalize_answer("x" + 40 * ".")


FEW = st.sampled_from(["yes", "Yes.", "yes ", "the yes", "none", "0", "dont", "don't", "1,0", "10", "a-b", "a\nb", "", "The"])


@given(FEW, st.lists(FEW, min_size=1, max_size=12), st.sampled_from(["2021", "2016"]))
def test_accuracy_equals_a_literal_reading_of_the_official_rules(prediction: str, answers: list[str], version: str) -> None:
    assert vqa_accuracy(prediction, answers, version) == reference_accuracy(prediction, answers, version)


@given(TEXT, st.lists(TEXT, min_size=10, max_size=10))
def test_scores_are_percentages_and_repeat_on_untouched_inputs(prediction: str, texts: list[str]) -> None:
    answers = [{"answer": t, "answer_id": n, "answer_confidence": "yes"} for n, t in enumerate(texts)]
    before = copy.deepcopy(answers)
    for version in GOLDEN_NAMES:
        first = vqa_accuracy(prediction, answers, version)
        assert 0 <= first <= 100
        assert vqa_accuracy(prediction, answers, version) == first == vqa_accuracy(prediction, texts, version)
    assert answers == before


@given(TEXT, st.lists(TEXT, min_size=1, max_size=12), st.randoms())
def test_the_order_of_annotators_does_not_matter(prediction: str, answers: list[str], random: object) -> None:
    shuffled = answers.copy()
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert vqa_accuracy(prediction, shuffled) == pytest.approx(vqa_accuracy(prediction, answers))


def annotation(question_id: int, answer: str, num_matches: int, question_type: str = "what", answer_type: str = "other") -> dict:
    texts = [answer] * num_matches + ["something else"] * (10 - num_matches)
    return {
        "question_id": question_id,
        "question_type": question_type,
        "answer_type": answer_type,
        "answers": [{"answer": t, "answer_id": n} for n, t in enumerate(texts)],
    }


def test_aggregates_are_means_of_unrounded_values_with_official_names() -> None:
    annotations = [annotation(1, "cat", 10), annotation(2, "cat", 1), annotation(3, "yes", 3, "is it", "yes/no")]
    result = vqa_scores([{"question_id": q, "answer": a} for q, a in [(1, "cat"), (2, "cat"), (3, "yes")]], annotations)
    assert result["accuracy"] == {"overall": 73.33, "perQuestionType": {"what": 65.0, "is it": 90.0}, "perAnswerType": {"other": 65.0, "yes/no": 90.0}}
    assert result["evalQA"] == {1: 100.0, 2: 30.0, 3: 90.0}
    assert result["evalQuesType"] == {"what": {1: 100.0, 2: 30.0}, "is it": {3: 90.0}}
    assert result["evalAnsType"] == {"other": {1: 100.0, 2: 30.0}, "yes/no": {3: 90.0}}


def test_rounding_comes_after_the_mean() -> None:
    records = [{"question_id": q, "question_type": "", "answer_type": "", "answers": ["a b"] * n + ["x"] * (3 - n)} for q, n in enumerate([0, 3])]
    result = vqa_scores([{"question_id": q, "answer": "a b"} for q in range(2)], records)
    assert (result["evalQA"], result["accuracy"]["overall"]) == ({0: 0, 1: 66.67}, 33.33)  # and not 33.34


def test_a_repeated_prediction_counts_by_its_last_answer() -> None:
    predictions = [{"question_id": 1, "answer": "cat"}, {"question_id": 1, "answer": "dog"}]
    assert vqa_scores(predictions, [annotation(1, "dog", 9)])["accuracy"]["overall"] == 100


@pytest.mark.parametrize(
    ("ids", "message"),
    [([1], "1 without a prediction, 0 without a question .first: question 2 has"), ([1, 2, 3], "0 without a prediction, 1 without .* .first: prediction 3")],
)
def test_missing_and_extra_predictions_are_named(ids: list[int], message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        vqa_scores([{"question_id": q, "answer": "x"} for q in ids], [annotation(1, "x", 9), annotation(2, "x", 9)])


def test_bad_input_gets_one_clear_line() -> None:
    with pytest.raises(EvaluationError, match="no questions"):
        vqa_scores([], [])
    with pytest.raises(EvaluationError, match="Question 1 is there more than once"):
        vqa_scores([], [annotation(1, "x", 9)] * 2)
    with pytest.raises(EvaluationError, match="Question 1: An answer must be a string"):
        vqa_scores([{"question_id": 1, "answer": 3}], [annotation(1, "x", 9)])
    with pytest.raises(EvaluationError, match="needs the field 'question_type'; one has question_id, answers"):
        vqa_scores([{"question_id": 1, "answer": "x"}], [{"question_id": 1, "answers": ["x"] * 10}])
    with pytest.raises(EvaluationError, match="no human answer"):
        vqa_accuracy("x", [])
    with pytest.raises(UnknownName, match="2020"):
        vqa_accuracy("x", ["x"], version="2020")


def test_cleaning_turns_breaks_into_spaces() -> None:
    assert clean_answer("\ta\nb ") == "a b"

"""VQA accuracy by string comparison: the official evaluator in both of its versions, and the M4C evaluator of TextVQA.

Two behaviours of the official evaluator are in circulation, so a score means nothing without its version:

- `2021`: where annotators disagree, answers and prediction are normalised alike; where all agree, both are compared as they are.
- `2016`: the prediction is always normalised; answers lose their punctuation where annotators disagree and are never normalised further.
- `m4c`: another clean-up of words, then the full normalisation of both sides, always.

The quirks are the definition: the period rule, its limit of 32 and the odd contractions stay as published. Two things differ on purpose:
the inputs are never changed (the published code edits the annotations, so a second call may give another score), and "the other
annotators" are found by position, which is the published result whenever answer ids are unique.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.resources import files
from typing import Any

from kdstore.errors import EvaluationError, UnknownName
from kdstore.metrics.scores import Question, QuestionId, Scores, answer_text, by_id, check_choice, check_same_ids, field_of, rounded_percent, scores_of

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
ARTICLES = frozenset({"a", "an", "the"})
NUMBERS = {
    "none": "0",
    "zero": "0",
    "one": "1",
    "two": "2",
    "three": "3",
    "four": "4",
    "five": "5",
    "six": "6",
    "seven": "7",
    "eight": "8",
    "nine": "9",
    "ten": "10",
}
CONTRACTIONS: dict[str, str] = json.loads(files("kdstore.metrics").joinpath("contractions.json").read_text(encoding="utf-8"))

_DIGIT_COMMA_DIGIT = re.compile(r"\d,\d")
_REMOVABLE_PERIOD = re.compile(r"\.(?!\d)")
_MOST_PERIODS = 32  # the published call passes the flag re.UNICODE, whose value is 32, where the count belongs

Answer = str | dict[str, Any]
"""A human answer: its text, or the official record with the field `answer`."""


def vqa_accuracy(prediction: str, answers: Sequence[Answer], version: str = "2021") -> float:
    """Return the accuracy of one prediction, 0 to 100, not rounded; `answers` are those of all annotators.

    Each annotator in turn is left out, by position: min(1, matches among the others / 3), averaged.
    Raises UnknownName for an unknown version, EvaluationError for an answer that is no string or, in `m4c`, other than ten answers.
    """
    if version not in VERSIONS:
        raise UnknownName.of("version of the VQA accuracy", version, VERSIONS)
    return 100 * _fraction(prediction, answers, VERSIONS[version])


def vqa_scores(
    predictions: Iterable[Mapping[str, Any]], annotations: Iterable[Mapping[str, Any]], *, version: str = "2021", decimals: int = 2
) -> dict[str, Any]:
    """Score result records (`question_id`, `answer`) on annotation records (`question_id`, `question_type`, `answer_type`, `answers`).

    Returns the official fields: `accuracy` with `overall`, `perQuestionType` and `perAnswerType`, then `evalQA`, `evalQuesType` and
    `evalAnsType` per question id, all in percent rounded to `decimals`; besides, `vqa_version` and `num_questions`. Means are of unrounded values.
    A repeated prediction: the last wins. Raises EvaluationError if the ids of the two sides differ, an annotation is repeated or lacks a
    field, or there is no question.
    """
    if version not in VERSIONS:
        raise UnknownName.of("version of the VQA accuracy", version, VERSIONS)
    annotation_of = by_id(annotations)
    answer_of = {field_of(p, "question_id", "prediction"): field_of(p, "answer", "prediction") for p in predictions}
    check_same_ids(answer_of, annotation_of)
    fractions = vqa_fractions(annotation_of, answer_of, version)
    of_question_type = _split(fractions, annotation_of, "question_type")
    of_answer_type = _split(fractions, annotation_of, "answer_type")
    return {
        "accuracy": {
            "overall": rounded_percent(fractions.values(), decimals),
            "perQuestionType": {kind: rounded_percent(group.values(), decimals) for kind, group in of_question_type.items()},
            "perAnswerType": {kind: rounded_percent(group.values(), decimals) for kind, group in of_answer_type.items()},
        },
        "evalQA": _percents(fractions, decimals),
        "evalQuesType": {kind: _percents(group, decimals) for kind, group in of_question_type.items()},
        "evalAnsType": {kind: _percents(group, decimals) for kind, group in of_answer_type.items()},
        "vqa_version": version,
        "num_questions": len(fractions),
    }


def score_vqa(question_of: Mapping[QuestionId, Question], predictions: Mapping[QuestionId, str], version: str) -> Scores:
    """Score as the official evaluator of VQA v1, VQA v2 and OK-VQA: `overall`, `perQuestionType`, `perAnswerType`, rounded to two decimals.

    A question with `multiple_choices` among its extra fields must be answered by one of them.
    """
    for question_id, question in question_of.items():
        choices = (question.get("extra") or {}).get("multiple_choices")
        if choices is not None:
            check_choice(question_id, predictions[question_id], choices)
    breakdowns = {
        name: {question_id: field_of(question, of, "question") for question_id, question in question_of.items()}
        for name, of in (("perQuestionType", "question_type"), ("perAnswerType", "answer_type"))
    }
    fractions = vqa_fractions(question_of, predictions, version)
    return scores_of("vqa", version, fractions, main="overall", mean=rounded_percent, breakdowns=breakdowns)


def vqa_fractions(question_of: Mapping[QuestionId, Question], predictions: Mapping[QuestionId, str], version: str) -> dict[QuestionId, float]:
    """Return the accuracy of every question, 0 to 1, in the order of the questions; an error names its question."""
    fractions = {}
    for question_id, question in question_of.items():
        try:
            fractions[question_id] = _fraction(predictions[question_id], field_of(question, "answers", "question"), VERSIONS[version])
        except EvaluationError as e:
            raise EvaluationError(f"Question {question_id}: {e.message}", e.hint) from e
    return fractions


@functools.lru_cache(maxsize=1 << 18)  # a validation split of VQA v2 holds about 100,000 different answers
def remove_punctuation(text: str) -> str:
    """Apply the published punctuation rules: whether a character goes or becomes a space is decided on `text` as it came in."""
    has_grouped_digits = _DIGIT_COMMA_DIGIT.search(text) is not None
    edited = text
    for p in PUNCTUATION:
        if p in text:
            edited = edited.replace(p, "" if has_grouped_digits or f"{p} " in text or f" {p}" in text else " ")
    return _REMOVABLE_PERIOD.sub("", edited, count=_MOST_PERIODS)


@functools.lru_cache(maxsize=1 << 18)
def normalize_answer(text: str) -> str:
    """Apply both published passes: punctuation, then lower case, number words, articles and contractions."""
    return " ".join(CONTRACTIONS.get(word, word) for word in words_of(text))


def words_of(text: str) -> list[str]:
    """Apply both passes but for the contractions, which come last and word by word."""
    numbers = (NUMBERS.get(word, word) for word in remove_punctuation(text).lower().split())
    return [word for word in numbers if word not in ARTICLES]


def clean_answer(text: str) -> str:
    """Turn line breaks and tabs into spaces and strip the ends: what the evaluator does before anything else."""
    return text.replace("\n", " ").replace("\t", " ").strip()


@functools.lru_cache(maxsize=1 << 18)
def normalize_m4c(text: str) -> str:
    """Apply the clean-up of the M4C answer processor: its word rules, then both official passes."""
    words = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    return normalize_answer(clean_answer(words))


def _compared_2021(prediction: str, answers: list[str]) -> tuple[str, list[str]]:
    cleaned = [clean_answer(a) for a in answers]
    if len(set(cleaned)) > 1:
        return normalize_answer(clean_answer(prediction)), [normalize_answer(a) for a in cleaned]
    return clean_answer(prediction), cleaned


def _compared_2016(prediction: str, answers: list[str]) -> tuple[str, list[str]]:
    disagree = len(set(answers)) > 1
    return normalize_answer(clean_answer(prediction)), [remove_punctuation(a) for a in answers] if disagree else answers


def _compared_m4c(prediction: str, answers: list[str]) -> tuple[str, list[str]]:
    if len(answers) != 10:
        raise EvaluationError(f"The M4C evaluator takes ten answers, found {len(answers)}.", "Use version 2021 for other numbers of annotators.")
    return normalize_m4c(prediction), [normalize_m4c(a) for a in answers]


def _fraction(prediction: str, answers: Sequence[Answer], compared: Callable[[str, list[str]], tuple[str, list[str]]]) -> float:
    texts = [answer_text(a) for a in answers]
    if not texts:
        raise EvaluationError("There is no human answer to compare with.", "Give the answers of all annotators.")
    given, wanted = compared(answer_text(prediction), texts)
    return left_out_accuracy([given == answer for answer in wanted])


def left_out_accuracy(hits: Sequence[bool]) -> float:
    """Return the accuracy of a prediction that agrees with annotator i where `hits[i]`, 0 to 1: min(1, matches among the others / 3), averaged."""
    num_hits = sum(hits)
    # Summed in the annotators' order, as published: another order may round to another last digit.
    return float(sum(min(1.0, (num_hits - hit) / 3) for hit in hits)) / len(hits)


def _split(fractions: dict[QuestionId, float], annotation_of: Mapping[QuestionId, Question], name: str) -> dict[str, dict[QuestionId, float]]:
    """Split per-question values by a field of the annotation."""
    groups: dict[str, dict[QuestionId, float]] = {}
    for question_id, fraction in fractions.items():
        groups.setdefault(field_of(annotation_of[question_id], name, "annotation"), {})[question_id] = fraction
    return groups


def _percents(fractions: Mapping[QuestionId, float], decimals: int) -> dict[QuestionId, float]:
    return {question_id: round(100 * fraction, decimals) for question_id, fraction in fractions.items()}


VERSIONS: dict[str, Callable[[str, list[str]], tuple[str, list[str]]]] = {"2021": _compared_2021, "2016": _compared_2016, "m4c": _compared_m4c}
"""Version name -> function that brings a prediction and its answers to the strings that are compared."""

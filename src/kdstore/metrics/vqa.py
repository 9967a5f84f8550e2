"""VQA accuracy by string comparison: the official evaluator in both of its versions, and the M4C evaluator of TextVQA.

Two behaviours of the official evaluator are in circulation, so a score means nothing without its version:

- `2021`: where annotators disagree, answers and prediction are normalised alike; where all agree, both are compared as they are.
- `2016`: the prediction is always normalised; answers lose their punctuation where annotators disagree and are never normalised further.
- `m4c`: another clean-up of words, then the full normalisation of both sides, always.

The quirks are the definition: the period rule, its limit of 32 and the odd contractions stay as published. Two things differ on purpose:
the inputs are never changed (the published code edits the annotations, so a second call may give another score), and "the other
annotators" are found by position, which is the published result whenever answer ids are unique.

Multiple-choice tasks are left out.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.resources import files
from typing import Any

from kdstore.errors import EvaluationError, UnknownName

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
    annotation_of = _by_id(annotations)
    answer_of = {_field(p, "question_id", "prediction"): _field(p, "answer", "prediction") for p in predictions}
    _check_same_questions(answer_of, annotation_of)
    fractions: dict[Any, float] = {}
    by_question_type: dict[str, dict[Any, float]] = {}
    by_answer_type: dict[str, dict[Any, float]] = {}
    for question_id, annotation in annotation_of.items():
        try:
            fraction = _fraction(answer_of[question_id], _field(annotation, "answers", "annotation"), VERSIONS[version])
        except EvaluationError as e:
            raise EvaluationError(f"Question {question_id}: {e.message}", e.hint) from e
        fractions[question_id] = fraction
        by_question_type.setdefault(_field(annotation, "question_type", "annotation"), {})[question_id] = fraction
        by_answer_type.setdefault(_field(annotation, "answer_type", "annotation"), {})[question_id] = fraction
    return {
        "accuracy": {
            "overall": _percent_mean(fractions, decimals),
            "perQuestionType": {kind: _percent_mean(group, decimals) for kind, group in by_question_type.items()},
            "perAnswerType": {kind: _percent_mean(group, decimals) for kind, group in by_answer_type.items()},
        },
        "evalQA": _percents(fractions, decimals),
        "evalQuesType": {kind: _percents(group, decimals) for kind, group in by_question_type.items()},
        "evalAnsType": {kind: _percents(group, decimals) for kind, group in by_answer_type.items()},
        "vqa_version": version,
        "num_questions": len(fractions),
    }


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
    numbers = (NUMBERS.get(word, word) for word in remove_punctuation(text).lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in numbers if word not in ARTICLES)


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
    texts = [_text_of(a) for a in answers]
    if not texts:
        raise EvaluationError("There is no human answer to compare with.", "Give the answers of all annotators.")
    given, wanted = compared(_text_of(prediction), texts)
    hits = [given == answer for answer in wanted]
    num_hits = sum(hits)
    # Summed in the annotators' order, as published: another order may round to another last digit.
    return float(sum(min(1.0, (num_hits - hit) / 3) for hit in hits)) / len(hits)


def _text_of(answer: Answer) -> str:
    text = answer if isinstance(answer, str) else answer.get("answer") if isinstance(answer, dict) else None
    if not isinstance(text, str):
        raise EvaluationError(f"An answer must be a string or a record with a string 'answer', found {answer!r}.", "Correct the answers file.")
    return text


def _percents(fractions: dict[Any, float], decimals: int) -> dict[Any, float]:
    return {question_id: round(100 * fraction, decimals) for question_id, fraction in fractions.items()}


def _percent_mean(fractions: dict[Any, float], decimals: int) -> float:
    return round(100 * float(sum(fractions.values())) / len(fractions), decimals)  # the published expression: ties of the rounding depend on it


def _by_id(annotations: Iterable[Mapping[str, Any]]) -> dict[Any, Mapping[str, Any]]:
    annotation_of: dict[Any, Mapping[str, Any]] = {}
    for annotation in annotations:
        question_id = _field(annotation, "question_id", "annotation")
        if question_id in annotation_of:
            raise EvaluationError(f"Question {question_id} has more than one annotation.", "Keep one annotation per question id.")
        annotation_of[question_id] = annotation
    if not annotation_of:
        raise EvaluationError("There are no questions to score.", "Give at least one annotation.")
    return annotation_of


def _check_same_questions(answer_of: dict[Any, Any], annotation_of: dict[Any, Any]) -> None:
    missing = [q for q in annotation_of if q not in answer_of]
    extra = [q for q in answer_of if q not in annotation_of]
    if missing or extra:
        first = f"question {missing[0]} has no prediction" if missing else f"prediction {extra[0]} has no question"
        raise EvaluationError(
            f"Predictions and annotations differ in question ids: {len(missing)} without a prediction, {len(extra)} without a question (first: {first}).",
            "Predict every question of the split, and no other.",
        )


def _field(record: Mapping[str, Any], name: str, what: str) -> Any:
    if name not in record:
        raise EvaluationError(f"A {what} has no field '{name}'; it has {', '.join(map(str, record)) or 'none'}.", "Use the official field names.")
    return record[name]


VERSIONS: dict[str, Callable[[str, list[str]], tuple[str, list[str]]]] = {"2021": _compared_2021, "2016": _compared_2016, "m4c": _compared_m4c}
"""Version name -> function that brings a prediction and its answers to the strings that are compared."""

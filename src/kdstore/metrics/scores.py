"""The one form of a score of answers, and the checks and means that all metrics of answers share.

Means keep the expression of the published evaluator, not only its formula: which way a tie rounds depends on it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kdstore.errors import EvaluationError

QuestionId = Hashable
Question = Mapping[str, Any]
"""A question as a record; its fields are in `kdstore.metrics.answers`."""


@dataclass(frozen=True)
class Scores:
    """What a set of predictions scores under one version of one metric.

    `per_question`: 0 to 100, unrounded, for each question that counts, in the order of the questions. `aggregate`: the official fields with the
    official rounding, in percent unless the metric says otherwise; `main` names the one to quote. `groups`: an official breakdown such as
    `perAnswerType` -> member -> score, and `counts` the number of questions behind each.
    """

    metric: str
    version: str
    main: str
    per_question: dict[QuestionId, float]
    aggregate: dict[str, float]
    groups: dict[str, dict[str, float]] = field(default_factory=dict)
    counts: dict[str, dict[str, int]] = field(default_factory=dict)

    @property
    def overall(self) -> float:
        """The aggregate to quote."""
        return self.aggregate[self.main]


def rounded_percent(fractions: Iterable[float], decimals: int = 2) -> float:
    """Return the mean in percent, rounded as the VQA and VizWiz evaluators do it."""
    values = list(fractions)
    return round(100 * float(sum(values)) / len(values), decimals)


def percent(fractions: Iterable[float]) -> float:
    """Return the mean in percent, unrounded; the multiplication comes last, as in the evaluators of GQA and A-OKVQA."""
    values = list(fractions)
    return sum(values) / len(values) * 100


def scores_of(
    metric: str,
    version: str,
    fractions: Mapping[QuestionId, float],
    *,
    main: str = "accuracy",
    mean: Callable[[Iterable[float]], float] = percent,
    breakdowns: Mapping[str, Mapping[QuestionId, str]] | None = None,
    others: Mapping[str, float] | None = None,
) -> Scores:
    """Build the scores of per-question fractions in 0 to 1: their mean as `main`, `others` after it, and the mean within each breakdown."""
    groups: dict[str, dict[str, list[float]]] = {}  # members in order of appearance
    for name, member_of in (breakdowns or {}).items():
        members = groups.setdefault(name, {})
        for question_id, fraction in fractions.items():
            members.setdefault(member_of[question_id], []).append(fraction)
    return Scores(
        metric,
        version,
        main,
        {question_id: 100 * fraction for question_id, fraction in fractions.items()},
        {main: mean(fractions.values()), **(others or {})},
        {name: {member: mean(values) for member, values in members.items()} for name, members in groups.items()},
        {name: {member: len(values) for member, values in members.items()} for name, members in groups.items()},
    )


def by_id(questions: Iterable[Question]) -> dict[QuestionId, Question]:
    """Key questions by id; raises EvaluationError if there is none or an id is repeated."""
    question_of: dict[QuestionId, Question] = {}
    for question in questions:
        question_id = field_of(question, "question_id", "question")
        if question_id in question_of:
            raise EvaluationError(f"Question {question_id} is there more than once.", "Keep one record per question id.")
        question_of[question_id] = question
    if not question_of:
        raise EvaluationError("There are no questions to score.", "Give at least one question.")
    return question_of


def check_same_ids(predictions: Mapping[QuestionId, Any], question_of: Mapping[QuestionId, Question]) -> None:
    """Raise EvaluationError unless every question has a prediction and every prediction a question."""
    missing = [q for q in question_of if q not in predictions]
    extra = [q for q in predictions if q not in question_of]
    if missing or extra:
        first = f"question {missing[0]} has no prediction" if missing else f"prediction {extra[0]} has no question"
        raise EvaluationError(
            f"Predictions and questions differ in their ids: {len(missing)} without a prediction, {len(extra)} without a question (first: {first}).",
            "Write ids as the data set does, without quotes if they are numbers there."
            if {str(q) for q in extra} & {str(q) for q in missing}
            else "Predict every question of the split, and no other.",
        )


def check_choice(question_id: QuestionId, prediction: str, choices: Sequence[str]) -> None:
    """Raise EvaluationError unless a multiple-choice question is answered by one of its choices."""
    if prediction not in choices:
        raise EvaluationError(
            f"The prediction for question {question_id} is {prediction!r}, none of its choices {', '.join(choices)}.", "Answer with one of the choices."
        )


def field_of(record: Mapping[str, Any], name: str, what: str) -> Any:
    """Return a field; raises EvaluationError that names the fields there are."""
    if name not in record:
        raise EvaluationError(f"Every {what} needs the field '{name}'; one has {', '.join(map(str, record)) or 'none'}.", "Use the official field names.")
    return record[name]


def extra_of(question: Question, name: str) -> Any:
    """Return a field of a question's `extra`; raises EvaluationError that names the question."""
    extra = question.get("extra") or {}
    if name not in extra:
        raise EvaluationError(
            f"Question {question['question_id']} has no '{name}' in its extra fields; it has {', '.join(map(str, extra)) or 'none'}.",
            "Read the questions with the reader of their own data set, or choose another metric.",
        )
    return extra[name]


def answer_texts(question: Question) -> list[str]:
    """Return the texts of a question's answers; raises EvaluationError if there is none or one is no string."""
    answers: Sequence[Any] = field_of(question, "answers", "question")
    if not answers:
        raise EvaluationError(f"Question {question['question_id']} has no answer to compare with.", "Score a split with answers; test splits are for a server.")
    return [answer_text(a) for a in answers]


def answer_text(answer: Any) -> str:
    """Return the text of an answer, itself or its field `answer`."""
    text = answer.get("answer") if isinstance(answer, Mapping) else answer
    if not isinstance(text, str):
        raise EvaluationError(f"An answer must be a string or a record with a string 'answer', found {answer!r}.", "Correct the answers file.")
    return text


def gold_of(question: Question) -> str:
    """Return the one answer of a question, however often it is repeated; raises EvaluationError if there are several."""
    texts = set(answer_texts(question))
    if len(texts) > 1:
        raise EvaluationError(f"Question {question['question_id']} has {len(texts)} different answers; this metric needs one.", "Choose another metric.")
    return texts.pop()

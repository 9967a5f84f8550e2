"""Metrics of the M4C evaluators for questions about text in images: TextVQA and ST-VQA accuracy, and ANLS.

ANLS is the mean over questions of the best similarity to an answer, 1 - Levenshtein distance / length of the longer, where similarities below one
half count as 0. Implementations disagree exactly at one half and in the clean-up before, so the version says which it was:

- `inclusive`: one half counts; case and runs of white space do not matter (the prose of the challenge, and what most toolkits do);
- `strict`: as before, and one half is 0 (the formula of the challenge, and the Python package `anls`);
- `m4c`: one half counts; case and white space at the ends do not matter, white space inside does.

Two empty strings are equal in all of them; the M4C evaluator divides by zero there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kdstore.errors import EvaluationError, UnknownName
from kdstore.metrics.scores import Question, QuestionId, Scores, answer_text, answer_texts, scores_of
from kdstore.metrics.vqa import Answer, normalize_m4c, vqa_fractions

ANLS_VERSIONS = ("inclusive", "strict", "m4c")


def score_textvqa(question_of: Mapping[QuestionId, Question], predictions: Mapping[QuestionId, str], version: str) -> Scores:
    """Score the accuracy of the M4C evaluator: ten answers, both sides processed always, each annotator left out in turn; the mean unrounded."""
    return scores_of("textvqa", version, vqa_fractions(question_of, predictions, "m4c"))


def score_stvqa(question_of: Mapping[QuestionId, Question], predictions: Mapping[QuestionId, str], version: str) -> Scores:
    """Score 1 where the processed prediction is among the processed answers: the M4C evaluator's ST-VQA accuracy."""
    right = {i: float(normalize_m4c(predictions[i]) in map(normalize_m4c, answer_texts(question))) for i, question in question_of.items()}
    return scores_of("stvqa", version, right)


def score_anls(question_of: Mapping[QuestionId, Question], predictions: Mapping[QuestionId, str], version: str) -> Scores:
    """Score the average normalised Levenshtein similarity, in percent."""
    similarity = {i: _best_similarity(predictions[i], answer_texts(question), version) for i, question in question_of.items()}
    return scores_of("anls", version, similarity, main="anls")


def anls(prediction: str, answers: Sequence[Answer], version: str = "inclusive") -> float:
    """Return the similarity of one prediction to the nearest answer, 0 to 100.

    Raises UnknownName for an unknown version, EvaluationError for an answer that is no string, or if there is none.
    """
    if version not in ANLS_VERSIONS:
        raise UnknownName.of("version of ANLS", version, ANLS_VERSIONS)
    if not answers:
        raise EvaluationError("There is no human answer to compare with.", "Give the answers of all annotators.")
    return 100 * _best_similarity(prediction, [answer_text(a) for a in answers], version)


def levenshtein(a: str, b: str) -> int:
    """Return how many characters must be inserted, deleted or replaced to turn `a` into `b`."""
    distances = list(range(len(b) + 1))  # from the part of `a` seen so far to every start of `b`
    for i, of_a in enumerate(a, start=1):
        diagonal, distances[0] = distances[0], i
        for j, of_b in enumerate(b, start=1):
            diagonal, distances[j] = distances[j], min(diagonal + (of_a != of_b), distances[j] + 1, distances[j - 1] + 1)
    return distances[-1]


def _best_similarity(prediction: str, answers: Sequence[str], version: str) -> float:
    def cleaned(text: str) -> str:
        return text.lower().strip() if version == "m4c" else " ".join(text.lower().split())

    return max(_similarity(cleaned(prediction), cleaned(answer), at_half=version != "strict") for answer in answers)


def _similarity(a: str, b: str, *, at_half: bool) -> float:
    if a == b:
        return 1.0
    distance, length = levenshtein(a, b), max(len(a), len(b))
    counts = 2 * distance <= length if at_half else 2 * distance < length
    return 1 - distance / length if counts else 0.0

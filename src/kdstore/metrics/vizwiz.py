"""VizWiz: accuracy of answers, and how well unanswerable questions are told.

Accuracy is not that of VQA: the prediction is always normalised, the answers never, so that no prediction matches an answer `Coke`. The published
contraction table mixes apostrophes: most entries have the typographic one, so that a prediction `dont` misses the answer `don't`. That is
the version `curly`, the published behaviour; `straight` has the apostrophes of VQA.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kdstore.errors import EvaluationError
from kdstore.metrics.scores import Question, QuestionId, Scores, answer_texts, extra_of, field_of, rounded_percent, scores_of
from kdstore.metrics.vqa import CONTRACTIONS, clean_answer, left_out_accuracy, words_of

_STRAIGHT_KEYS = {"couldn'tve", "hadn'tve"}
_STRAIGHT_VALUES = {"aint", "arent", "cant", "couldve", "couldnt", "weve", "wheres", "whove"}
CURLY_CONTRACTIONS = {
    key if key in _STRAIGHT_KEYS else key.replace("'", "\u2019"): value if key in _STRAIGHT_VALUES else value.replace("'", "\u2019")
    for key, value in CONTRACTIONS.items()
}
"""The published table: that of VQA with typographic apostrophes but for ten places."""

VIZWIZ_VERSIONS = ("curly", "straight")


def score_vizwiz(question_of: Mapping[QuestionId, Question], predictions: Mapping[QuestionId, str], version: str) -> Scores:
    """Score accuracy, each annotator left out in turn: `overall` and `perAnswerType`, rounded to two decimals."""
    fractions, answer_type = {}, {}
    for question_id, question in question_of.items():
        given = normalize_vizwiz(predictions[question_id], version)
        fractions[question_id] = left_out_accuracy([given == answer for answer in answer_texts(question)])
        answer_type[question_id] = field_of(question, "answer_type", "question")
    return scores_of("vizwiz", version, fractions, main="overall", mean=rounded_percent, breakdowns={"perAnswerType": answer_type})


def normalize_vizwiz(prediction: str, version: str = "curly") -> str:
    """Normalise a prediction as the VizWiz evaluator does, with its contraction table or that of VQA."""
    contractions = CURLY_CONTRACTIONS if version == "curly" else CONTRACTIONS
    return " ".join(contractions.get(word, word) for word in words_of(clean_answer(prediction)))


def score_vizwiz_answerability(question_of: Mapping[QuestionId, Question], predictions: Mapping[QuestionId, float], version: str) -> Scores:
    """Score predicted answerabilities (0 to 1) against `answerable` (0 or 1) of the extra fields; the positive class is *unanswerable*.

    Per question: whether the side of one half is right. Raises EvaluationError if no question is unanswerable, where precision has no meaning.
    """
    positive, score = [], []
    for question_id, question in question_of.items():
        answerable = extra_of(question, "answerable")
        if answerable not in (0, 1):
            raise EvaluationError(f"Question {question_id} has answerable {answerable!r}; expected 0 or 1.", "Restore the annotations file.")
        positive.append(answerable == 0)
        score.append(1.0 - predictions[question_id])
    if not any(positive):
        raise EvaluationError("No question is unanswerable, so there is nothing to find.", "Score a split with both kinds.")
    chosen = [s > 0.5 for s in score]
    right = {question_id: float(c == p) for question_id, c, p in zip(question_of, chosen, positive, strict=True)}
    others = {"average_precision": round(100 * average_precision(positive, score), 2), "f1_score": round(100 * f1(positive, chosen), 2)}
    return Scores("vizwiz-answerability", version, "average_precision", {i: 100 * r for i, r in right.items()}, others)


def average_precision(positive: Sequence[bool], score: Sequence[float]) -> float:
    """Return the sum over thresholds of precision times gained recall, 0 to 1, without interpolation; equal scores share one threshold."""
    ranked = sorted(zip(score, positive, strict=True), key=lambda pair: -pair[0])
    total, num_found, found_before = 0.0, 0, 0
    for rank, (value, is_positive) in enumerate(ranked, start=1):
        num_found += is_positive
        if rank == len(ranked) or ranked[rank][0] != value:
            total += (num_found - found_before) * num_found / rank
            found_before = num_found
    return total / num_found


def f1(positive: Sequence[bool], chosen: Sequence[bool]) -> float:
    """Return the harmonic mean of precision and recall, 0 to 1."""
    return 2 * sum(p and c for p, c in zip(positive, chosen, strict=True)) / (sum(positive) + sum(chosen))

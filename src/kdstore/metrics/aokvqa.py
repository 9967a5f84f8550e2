"""A-OKVQA: direct answers and multiple choice, compared as strings without normalisation.

Ten direct answers per question; unlike VQA accuracy no annotator is left out: min(1, matches / 3). As in the published evaluator, questions
marked as difficult for direct answers do not count there, and a choice must be one of those offered.
"""

from __future__ import annotations

from collections.abc import Mapping

from kdstore.errors import EvaluationError
from kdstore.metrics.scores import Question, QuestionId, Scores, answer_texts, check_choice, extra_of, scores_of


def score_aokvqa(question_of: Mapping[QuestionId, Question], predictions: Mapping[QuestionId, str], version: str) -> Scores:
    """Score direct answers; `difficult_direct_answer` in a question's extra fields takes it out."""
    counted = {i: question for i, question in question_of.items() if not extra_of(question, "difficult_direct_answer")}
    if not counted:
        raise EvaluationError("Every question is marked as difficult for direct answers.", "Score metric aokvqa-choice, or a whole split.")
    fractions = {i: min(1.0, answer_texts(question).count(predictions[i]) / 3) for i, question in counted.items()}
    return scores_of("aokvqa", version, fractions)


def score_aokvqa_choice(question_of: Mapping[QuestionId, Question], predictions: Mapping[QuestionId, str], version: str) -> Scores:
    """Score choices: `choices` and `correct_choice_idx` of the extra fields."""
    right = {}
    for question_id, question in question_of.items():
        choices = extra_of(question, "choices")
        check_choice(question_id, predictions[question_id], choices)
        right[question_id] = float(predictions[question_id] == choices[extra_of(question, "correct_choice_idx")])
    return scores_of("aokvqa-choice", version, right)

"""Metrics that compare an answer with the one right answer as a string: exact match, CLEVR, NLVR2.

No lower-casing and no normalisation, except in NLVR2, whose evaluator compares without case.
"""

from __future__ import annotations

from collections.abc import Mapping

from kdstore.errors import EvaluationError
from kdstore.metrics.scores import Question, QuestionId, Scores, answer_texts, extra_of, gold_of, percent, scores_of


def score_exact(question_of: Mapping[QuestionId, Question], predictions: Mapping[QuestionId, str], version: str) -> Scores:
    """Score 1 where the prediction is one of the answers, as strings: DAQUAR (answers of several words are one string), easy-VQA and the like."""
    right = {question_id: float(predictions[question_id] in answer_texts(question)) for question_id, question in question_of.items()}
    breakdowns = {"perQuestionType": {question_id: str(question.get("question_type", "all")) for question_id, question in question_of.items()}}
    return scores_of("exact", version, right, breakdowns=breakdowns)


def score_clevr(question_of: Mapping[QuestionId, Question], predictions: Mapping[QuestionId, str], version: str) -> Scores:
    """Score exact matches, also per question type and per family (`question_family_index`, 0 to 89)."""
    right = {question_id: float(predictions[question_id] == gold_of(question)) for question_id, question in question_of.items()}
    breakdowns = {
        "perQuestionType": {question_id: str(question.get("question_type", "all")) for question_id, question in question_of.items()},
        "perFamily": {question_id: str(extra_of(question, "question_family_index")) for question_id, question in question_of.items()},
    }
    return scores_of("clevr", version, right, breakdowns=breakdowns)


def score_nlvr2(question_of: Mapping[QuestionId, Question], predictions: Mapping[QuestionId, str], version: str) -> Scores:
    """Score accuracy (the evaluator prints it as precision) and consistency: the share of sentences that are answered rightly on all their images.

    Examples of one sentence share their `identifier` (split-set-pair-sentence) but for the pair.
    """
    right = {question_id: float(predictions[question_id].lower() == gold_of(question).lower()) for question_id, question in question_of.items()}
    all_right: dict[tuple[str, ...], float] = {}
    for question_id, question in question_of.items():
        parts = str(extra_of(question, "identifier")).split("-")
        if len(parts) != 4:
            raise EvaluationError(f"Question {question_id} has the identifier {'-'.join(parts)}; expected split-set-pair-sentence.", "Restore the file.")
        sentence = (*parts[:2], parts[3])
        all_right[sentence] = min(all_right.get(sentence, 1.0), right[question_id])
    return scores_of("nlvr2", version, right, others={"consistency": percent(all_right.values())})

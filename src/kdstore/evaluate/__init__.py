"""Evaluation of models, and of features in stores; here are the metrics of answers, which need neither."""

from kdstore.metrics.answers import METRICS, predictions_of, score_answers
from kdstore.metrics.gqa import gqa_grounding
from kdstore.metrics.scores import Scores
from kdstore.metrics.textvqa import anls
from kdstore.metrics.vqa import vqa_accuracy, vqa_scores

__all__ = ["METRICS", "Scores", "anls", "gqa_grounding", "predictions_of", "score_answers", "vqa_accuracy", "vqa_scores"]

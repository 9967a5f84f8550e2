"""Evaluation: what a model's frozen features are worth in visual question answering and in retrieval."""

from kdstore.metrics.vqa import vqa_accuracy

__all__ = ["vqa_accuracy"]

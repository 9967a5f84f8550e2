"""Zero-shot classification: the class whose name, in an ensemble of templates, is embedded nearest to the image.

As in CLIP: every text is normalised, the mean over a class's templates is normalised again. Scale and bias of the logits change no order, so SigLIP models are
scored alike. Images with one label give accuracies, a source where some have several gives the mean average precision.

N images, C classes, T templates, D width.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kdstore.config import as_dict
from kdstore.data.source import PROBE
from kdstore.evaluate.classes import Labels, class_names, constant_scores, filled, hits_of_ranks, number_labels, templates
from kdstore.evaluate.gallery import Array, data_record, open_gallery, open_model, protocol_digest, subject_record, usable_images
from kdstore.evaluate.outcomes import Outcomes
from kdstore.evaluate.protocol import ZeroshotConfig
from kdstore.evaluate.results import check_out, made_record, write_result
from kdstore.jsonfile import digest_of
from kdstore.metrics.classification import classification_scores, mean_average_precision, truth_ranks
from kdstore.metrics.unit import unit_rows
from kdstore.progress import OnProgress, silent

_CLASSES_AT_ONCE = 64


@dataclass(frozen=True)
class ZeroshotResult:
    """Scores in percent by name, and the whole result as it was written."""

    scores: dict[str, float]
    content: dict[str, Any]


def evaluate_zeroshot(config: ZeroshotConfig, *, on_progress: OnProgress = silent) -> ZeroshotResult:
    """Score a model, or a store with its teacher's texts; writes the result file if one is named.

    A store alone can be scored with the templates `plain`, where the class names are captions of it. Raises EvaluationError for labels that are none of the
    class names, a single class, features that are not finite and data without labels.
    """
    check_out(config.out)
    started = time.perf_counter()
    names, ensemble = class_names(config.classnames) if config.classnames else None, templates(config.templates)
    model = open_model(config.model, config.pretrained, config.device, config.precision, on_progress)
    subject, gallery = open_gallery(model, config.cache, config.data, config.encode_batch, on_progress)
    images = usable_images(gallery, lambda caption: caption.kind == PROBE, "label")
    labels = number_labels(images.captions, names)
    if labels.notice:
        on_progress("notice", 0, 0, labels.notice)
    class_CD = class_embeddings(gallery.embed_texts, labels.names, ensemble)
    score_NC = unit_rows(images.image_ND) @ class_CD.T
    rows, outcomes = _scored(score_NC, labels, images.keys)
    content = {
        "stage": "evaluate zeroshot",
        "model": subject_record(subject),
        "data": {"evaluated": data_record(gallery.spec, images, [sorted(labels.names[c] for c in found) for found in labels.of_image])},
        "classes": {"number": len(labels.names), "names": digest_of(list(labels.names)), "templates": list(ensemble)},
        "config": as_dict(config),
        "config_digest": protocol_digest(config),
        "rows": rows,
        "made": made_record(model.device if model else None, time.perf_counter() - started),
    }
    return ZeroshotResult(rows[0]["scores"], write_result(config.out, content, outcomes))


def class_embeddings(embed_texts: Callable[[list[str]], Array], names: Sequence[str], ensemble: Sequence[str]) -> Array:
    """Return the unit embedding of each class, float32 [C, D]: the normalised mean of the unit embeddings of its name in every template."""
    parts = []
    for start in range(0, len(names), _CLASSES_AT_ONCE):
        some = names[start : start + _CLASSES_AT_ONCE]
        text_RD = unit_rows(embed_texts([filled(template, name) for name in some for template in ensemble]))
        parts.append(unit_rows(text_RD.reshape(len(some), len(ensemble), -1).mean(axis=1)))
    return np.concatenate(parts)


def _scored(score_NC: Array, labels: Labels, keys: list[str]) -> tuple[list[dict[str, Any]], Outcomes | None]:
    """Return the rows of the result, the model's first, and which images it had right; average precision is of no single image."""
    label_N = labels.single_N
    if label_N is None:
        truth_NC = np.zeros(score_NC.shape, bool)
        truth_NC[[n for n, found in enumerate(labels.of_image) for _ in found], [c for found in labels.of_image for c in found]] = True
        return [{"row": "model", "scores": {"mean_average_precision": mean_average_precision(score_NC, truth_NC)}}], None
    rank_N = truth_ranks(score_NC, label_N)
    rows = [
        {"row": "model", "scores": classification_scores(rank_N, label_N, len(labels.names))},
        {"row": "constant", "scores": constant_scores(label_N)},
    ]
    return rows, hits_of_ranks(keys, {"": rank_N}, len(labels.names))

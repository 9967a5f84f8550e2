"""What labels can be read off frozen image embeddings: a linear probe and the nearest neighbours, from a model or from a store.

The linear probe is that of the CLIP paper: scikit-learn's logistic regression by L-BFGS on unit embeddings, its C searched on a part of the training images
in steps that halve down to an eighth of a decade, then fitted again on all of them; the reported images are seen once, at the end. The neighbours are
DINO's protocol: the k nearest training images by cosine vote with weight exp(cosine / temperature).

N training images, M evaluated ones, C classes, D width.
"""

from __future__ import annotations

import math
import time
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split

from kdstore.config import as_dict
from kdstore.data.source import PROBE
from kdstore.errors import EvaluationError
from kdstore.evaluate.classes import class_names, constant_scores, hits_of_ranks, number_labels
from kdstore.evaluate.gallery import Array, data_record, open_gallery, open_model, protocol_digest, subject_record, usable_images
from kdstore.evaluate.protocol import ProbeConfig
from kdstore.evaluate.results import check_out, made_record, write_result
from kdstore.jsonfile import digest_of
from kdstore.metrics.classification import classification_scores, neighbour_votes, truth_ranks
from kdstore.metrics.unit import unit_rows
from kdstore.progress import OnProgress, silent

COARSE = (-6, -4, -2, 0, 2, 4, 6)
"""Decades of C that are tried first."""
FINE = (1.0, 0.5, 0.25, 0.125)
"""Decades to either side of the best one that are tried next, in turn."""


@dataclass(frozen=True)
class ProbeResult:
    """Scores in percent by name (`lp_acc1`, `knn_acc1`, ...), the C that was chosen, and the whole result as it was written."""

    scores: dict[str, float]
    c: float
    content: dict[str, Any]


def evaluate_probe(config: ProbeConfig, *, on_progress: OnProgress = silent) -> ProbeResult:
    """Fit both probes and score them; writes the result file if one is named.

    Raises EvaluationError for images with several labels, a class that training lacks or has once, fewer training images than neighbours, images that are in
    both parts, and features that are not finite.
    """
    check_out(config.out)
    started = time.perf_counter()
    names = class_names(config.classnames) if config.classnames else None
    model = open_model(config.model, config.pretrained, config.device, config.precision, on_progress)
    parts = []
    for cache, data in ((config.train_cache, config.train_data), (config.cache, config.data)):
        subject, gallery = open_gallery(model, cache, data, config.encode_batch, on_progress)
        parts.append((subject, gallery.spec, usable_images(gallery, lambda caption: caption.kind == PROBE, "label")))
    (of_train, train_spec, train), (subject, spec, evaluated) = parts
    for what in ("teacher", "preprocessing"):
        if of_train.identity.get(what) != subject.identity.get(what):
            raise EvaluationError(f"The two stores hold features of a different {what}.", "Name two stores of one teacher, extracted alike.")
    if shared := set(train.keys) & set(evaluated.keys):
        raise EvaluationError(f"{len(shared)} of the scored images are trained on, {min(shared)} among them.", "Name images that are not in the training data.")
    labels = number_labels([*train.captions, *evaluated.captions], names)
    if labels.notice:
        on_progress("notice", 0, 0, labels.notice)
    if labels.single_N is None:
        raise EvaluationError("Some images have several labels, and a probe tells classes apart.", "Name a label that is one per image.")
    label_N, label_M = labels.single_N[: len(train.keys)], labels.single_N[len(train.keys) :]
    _check_classes(label_N, label_M, labels.names, config)
    train_ND, evaluated_MD = unit_rows(train.image_ND), unit_rows(evaluated.image_ND)
    vote_MC = neighbour_votes(train_ND, label_N, evaluated_MD, len(labels.names), k=config.neighbours, temperature=config.temperature)
    score_MC, fit = _linear_probe(train_ND, label_N, evaluated_MD, len(labels.names), config, on_progress)
    ranks = {"lp_": truth_ranks(score_MC, label_M), "knn_": truth_ranks(vote_MC, label_M)}
    scores = {f"{probe}{name}": score for probe, rank_M in ranks.items() for name, score in classification_scores(rank_M, label_M, len(labels.names)).items()}
    constant = {f"{probe}{name}": score for probe in ranks for name, score in constant_scores(label_M).items()}
    content = {
        "stage": "evaluate probe",
        "model": subject_record(subject),
        "data": {"train": data_record(train_spec, train, train.captions), "evaluated": data_record(spec, evaluated, evaluated.captions)},
        "classes": {"number": len(labels.names), "names": digest_of(list(labels.names))},
        "probe": fit,
        "config": as_dict(config),
        "config_digest": protocol_digest(config),
        "seed": config.seed,
        "rows": [{"row": "model", "seed": config.seed, "scores": scores}, {"row": "constant", "scores": constant}],
        "made": made_record(model.device if model else None, time.perf_counter() - started),
    }
    return ProbeResult(scores, fit["c"], write_result(config.out, content, hits_of_ranks(evaluated.keys, ranks, len(labels.names), config.seed)))


def _linear_probe(
    train_ND: Array, label_N: Array, evaluated_MD: Array, num_classes: int, config: ProbeConfig, on_progress: OnProgress
) -> tuple[Array, dict[str, Any]]:
    """Search C on a part of the training images, fit on all of them, and return scores [M, C] and what was found."""
    rows = np.arange(len(label_N))
    fit_rows, val_rows = train_test_split(rows, test_size=config.val_share, random_state=config.seed, stratify=label_N)
    tried: dict[float, float] = {}
    unfinished = 0

    def accuracy(decade: float) -> float:
        nonlocal unfinished
        if decade not in tried:
            probe, ended = _fitted(train_ND[fit_rows], label_N[fit_rows], 10.0**decade, config.max_iterations)
            unfinished += not ended
            tried[decade] = 100 * float((probe.predict(train_ND[val_rows]) == label_N[val_rows]).mean())
            on_progress("linear probe", len(tried), len(COARSE) + 2 * len(FINE) + 1, f"C = 10^{decade:g}: {tried[decade]:.2f} % of the validation part")
        return tried[decade]

    def best(decades: tuple[float, ...]) -> float:
        return max(decades, key=lambda decade: (accuracy(decade), -decade))  # of equal ones the smaller C

    peak = best(COARSE)
    for step in FINE:
        peak = best((peak - step, peak, peak + step))
    probe, ended = _fitted(train_ND, label_N, 10.0**peak, config.max_iterations)
    total = len(tried) + 1
    on_progress("linear probe", total, total, f"C = 10^{peak:g}")
    score_MC = np.full((len(evaluated_MD), num_classes), np.finfo(np.float64).min)
    decision = probe.decision_function(evaluated_MD)
    score_MC[:, probe.classes_] = decision if decision.ndim == 2 else np.stack([-decision, decision], axis=1)
    searched = {f"{10.0**decade:.4g}": tried[decade] for decade in sorted(tried)}
    return score_MC, {"c": 10.0**peak, "val_acc1": tried[peak], "searched": searched, "unfinished_fits": unfinished + (not ended)}


def _fitted(row_ND: Array, label_N: Array, c: float, max_iterations: int) -> tuple[LogisticRegression, bool]:
    """Fit in float64, in which L-BFGS ends; returns the regression and whether it ended by itself."""
    with warnings.catch_warnings(record=True) as raised:
        warnings.simplefilter("always", ConvergenceWarning)
        probe = LogisticRegression(C=c, max_iter=max_iterations).fit(row_ND.astype(np.float64), label_N)
    return probe, not any(issubclass(warning.category, ConvergenceWarning) for warning in raised)


def _check_classes(label_N: Array, label_M: Array, names: tuple[str, ...], config: ProbeConfig) -> None:
    counts = np.bincount(label_N, minlength=len(names))
    if lacking := [names[c] for c in np.unique(label_M) if not counts[c]]:
        raise EvaluationError(f"No training image has the labels {', '.join(lacking[:4])} ({len(lacking)} in all), which are scored.", "Train on all classes.")
    if single := [names[c] for c in np.flatnonzero(counts == 1)]:
        raise EvaluationError(
            f"One training image alone has the label {single[0]} ({len(single)} such labels).", "C is chosen on a part: give two of each class."
        )
    if (counts > 0).sum() < 2:
        raise EvaluationError("The training images have one class, and nothing to tell apart.", "Name data with two classes or more.")
    num_classes, chosen_on = int((counts > 0).sum()), math.ceil(config.val_share * len(label_N))
    if min(chosen_on, len(label_N) - chosen_on) < num_classes:
        found = f"C is to be chosen on {chosen_on} of {len(label_N)} training images, and each part needs one of each of {num_classes} classes."
        raise EvaluationError(found, "Give more training images, or another --set val_share=0.2.")
    if len(label_N) < config.neighbours:
        raise EvaluationError(f"{config.neighbours} neighbours were asked for among {len(label_N)} training images.", "Ask for fewer: --neighbours K.")

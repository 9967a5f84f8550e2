"""How far a student agrees with its teacher on the same images and captions, and how either lies on the sphere.

Every number is taken on the same fixed number of images, drawn by the seed, each with its first caption that both know: CKA, neighbours and entropies depend on
how many there are, so fewer is an error, and only results of one number compare.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from kdstore.config import as_dict
from kdstore.data.source import PROBE
from kdstore.data.sources import open_source
from kdstore.errors import EvaluationError
from kdstore.evaluate.gallery import Array, Gallery, gallery_of_source, gallery_of_store, open_model, protocol_digest, subject_record
from kdstore.evaluate.protocol import AgreementConfig
from kdstore.evaluate.results import check_out, made_record, write_result
from kdstore.jsonfile import digest_of
from kdstore.metrics.agreement import debiased_linear_cka, mean_cosine, mutual_neighbours, similarity_rank_correlation, top1_agreement
from kdstore.metrics.geometry import sphere_measures
from kdstore.models.load import Model
from kdstore.progress import OnProgress, silent
from kdstore.store import Store, open_store


@dataclass(frozen=True)
class AgreementResult:
    """Measures by row (`image`, `text`: of both; `student`, `teacher`: of one), and the whole result as it was written."""

    rows: dict[str, dict[str, float]]
    content: dict[str, Any]


def measures_as_text(rows: dict[str, dict[str, float]]) -> str:
    """Write the measures as lines of what of, name and value: too many for a table of columns."""
    return "\n".join(f"{row:>8}  {name:<24} {value:.4f}" for row, scores in rows.items() for name, value in scores.items())


@dataclass(frozen=True, eq=False)
class _Side:
    """One of the two: its embeddings of N images and of a caption of each, and the scale of its logits (None: an imported store does not say)."""

    image_ND: Array
    text_ND: Array
    scale: float | None


def evaluate_agreement(config: AgreementConfig, *, on_progress: OnProgress = silent) -> AgreementResult:
    """Compare two models on `samples` images; writes the result file if one is named. Raises EvaluationError for fewer images that both can embed."""
    check_out(config.out)
    started = time.perf_counter()
    stores = [open_store(path) for path in config.cache]
    models = [model for name in config.model if (model := open_model(name, None, config.device, config.precision, on_progress)) is not None]
    galleries = [gallery_of_source(model, open_source(config.data or stores[0].recorded_source), config.encode_batch, on_progress) for model in models]
    galleries += [gallery_of_store(store, on_progress) for store in stores]
    pairs = _shared_pairs(galleries, config)
    keys, captions = list(pairs), list(pairs.values())
    subjects: list[Model | Store] = [*models, *stores]
    student, teacher = (_embedded(subject, gallery, keys, captions) for subject, gallery in zip(subjects, galleries, strict=True))
    rows = _measures(student, teacher, config.neighbours, on_progress)
    content = {
        "stage": "evaluate agreement",
        "model": subject_record(subjects[0]),
        "teacher": subject_record(subjects[1]),
        "data": {"evaluated": {"name": galleries[0].spec, "num_images": len(keys), "digest": digest_of([keys, captions])}},
        "config": as_dict(config),
        "config_digest": protocol_digest(config),
        "seed": config.seed,
        "rows": [{"row": name, "scores": scores} for name, scores in rows.items()],
        "made": made_record(models[0].device if models else None, time.perf_counter() - started),
    }
    return AgreementResult(rows, write_result(config.out, content))


def _shared_pairs(galleries: list[Gallery], config: AgreementConfig) -> dict[str, str]:
    """Draw images that both galleries hold, each with its first caption that both have: key -> caption."""
    student, teacher = ({key: [c.text for c in of_image if c.kind != PROBE] for key, of_image in zip(g.keys, g.captions, strict=True)} for g in galleries)
    shared = {key: text for key, texts in student.items() if (text := next((t for t in texts if t in teacher.get(key, ())), None)) is not None}
    if len(shared) < config.samples:
        found = f"{len(shared)} images with a caption are in both {galleries[0].spec} and {galleries[1].spec}, and {config.samples} were asked for."
        raise EvaluationError(found, "Name more data, or ask for fewer: --samples N (results of different numbers do not compare).")
    chosen = np.random.default_rng(config.seed).permutation(len(shared))[: config.samples]
    keys = sorted(shared)  # the draw is that of the keys, in whatever order the two hold them
    return {keys[i]: shared[keys[i]] for i in np.sort(chosen)}


def _embedded(subject: Model | Store, gallery: Gallery, keys: list[str], captions: list[str]) -> _Side:
    row_of = {key: row for row, key in enumerate(gallery.keys)}
    image_ND = gallery.embed_images([row_of[key] for key in keys])
    undecodable = int((~np.isfinite(image_ND).all(axis=1)).sum())
    if undecodable:
        raise EvaluationError(f"{undecodable} of the {len(keys)} images drawn from {gallery.spec} cannot be decoded.", "Name data without them.")
    scale = subject.logit_scale if isinstance(subject, Model) else subject.identity["teacher"].get("logit_scale")
    return _Side(image_ND, gallery.embed_texts(captions), scale)


def _measures(student: _Side, teacher: _Side, k: int, on_progress: OnProgress) -> dict[str, dict[str, float]]:
    rows: dict[str, dict[str, float]] = {}
    for name, a_ND, b_ND in (("image", student.image_ND, teacher.image_ND), ("text", student.text_ND, teacher.text_ND)):
        on_progress("measures", len(rows), 4, name)
        rows[name] = _of_both(a_ND, b_ND, k)
    rows["image"]["top1_text_agreement"] = top1_agreement((student.image_ND, student.text_ND), (teacher.image_ND, teacher.text_ND))
    rows["text"]["top1_image_agreement"] = top1_agreement((student.text_ND, student.image_ND), (teacher.text_ND, teacher.image_ND))
    for name, side in (("student", student), ("teacher", teacher)):
        on_progress("measures", len(rows), 4, name)
        rows[name] = sphere_measures(side.image_ND, side.text_ND, side.scale, k, at_k=f"@{k}")
    on_progress("measures", 4, 4, "")
    return rows


def _of_both(a_ND: Array, b_ND: Array, k: int) -> dict[str, float]:
    """A cosine stands only where the widths are equal: between spaces of their own it would mean nothing else than that."""
    return {
        **({"cosine": mean_cosine(a_ND, b_ND)} if a_ND.shape == b_ND.shape else {}),
        "debiased_cka": debiased_linear_cka(a_ND, b_ND),
        f"mutual_neighbours@{k}": mutual_neighbours(a_ND, b_ND, k),
        "rank_correlation": similarity_rank_correlation(a_ND, b_ND),
    }

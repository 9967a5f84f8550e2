"""Image and text retrieval on the pairs of a source or of a store, with the recall that repeated captions allow.

Images that cannot be decoded, and images without a caption, are left out with their captions, and counted; labels (captions of the kind `probe`) are no
captions here. Every candidate is looked at unless `index=lists` is asked for, which says what it misses.

N images, M texts, D width, K depth.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from kdstore.config import as_dict
from kdstore.data.source import PROBE
from kdstore.evaluate.gallery import (
    Array,
    Gallery,
    Images,
    data_record,
    open_gallery,
    open_model,
    protocol_digest,
    subject_record,
    usable_images,
)
from kdstore.evaluate.outcomes import Outcomes, Run
from kdstore.evaluate.protocol import RETRIEVAL_DATA, RetrievalConfig
from kdstore.evaluate.results import check_out, made_record, write_result
from kdstore.metrics.neighbours import exact_search, list_search, share_found
from kdstore.metrics.retrieval import KS, hits_of_ranking, nearest_both_ways, recall_ceiling, recall_of_hits
from kdstore.metrics.unit import unit_rows
from kdstore.progress import OnProgress, silent


@dataclass(frozen=True)
class RetrievalResult:
    """Recall and ceiling in percent by key (`image_retrieval_recall@1`, ...), and the whole result as it was written."""

    recall: dict[str, float]
    ceiling: dict[str, float]
    num_images: int
    num_texts: int
    content: dict[str, Any]


def evaluate_retrieval(config: RetrievalConfig, *, on_progress: OnProgress = silent) -> RetrievalResult:
    """Measure recall at 1, 5 and 10 in both directions; writes the result file if one is named."""
    check_out(config.out)
    started = time.perf_counter()
    data = config.data or (None if config.cache else RETRIEVAL_DATA)
    model = open_model(config.model, config.pretrained, config.device, config.precision, on_progress)
    subject, gallery = open_gallery(model, config.cache, data, config.encode_batch, on_progress)
    pairs = _embed_pairs(gallery)
    on_progress("recall", 0, 1, f"{len(pairs.images.keys)} images, {len(pairs.captions)} texts")
    found = nearest_both_ways(pairs.images.image_ND, pairs.text_MD, max(KS), exact_search if config.index == "exact" else list_search(config.probes))
    hits = hits_of_ranking(*found, pairs.image_of_text_M)
    recall = recall_of_hits(*hits)
    ceiling = recall_ceiling(pairs.captions, pairs.image_of_text_M)
    on_progress("recall", 1, 1, "")
    content = {
        "stage": "evaluate retrieval",
        "model": subject_record(subject),
        "data": {"evaluated": {**data_record(gallery.spec, pairs.images, pairs.images.captions), "num_texts": len(pairs.captions)}},
        "config": as_dict(config),
        "config_digest": protocol_digest(config),
        "recall_at": list(KS),
        "index": {"kind": config.index} | ({} if config.index == "exact" else _shares_found(pairs, found, config.index_sample)),
        "rows": [{"row": "model", "scores": recall}, {"row": "ceiling", "scores": ceiling}],
        "made": made_record(model.device if model else None, time.perf_counter() - started),
    }
    return RetrievalResult(recall, ceiling, len(pairs.images.keys), len(pairs.captions), write_result(config.out, content, _outcomes(pairs, *hits)))


@dataclass(frozen=True, eq=False)
class _Pairs:
    images: Images
    text_MD: Array
    image_of_text_M: Array
    captions: list[str]


def _embed_pairs(gallery: Gallery) -> _Pairs:
    images = usable_images(gallery, lambda caption: caption.kind != PROBE, "caption")
    captions = [text for of_image in images.captions for text in of_image]
    image_of_text_M = np.repeat(np.arange(len(images.keys)), [len(of_image) for of_image in images.captions])
    return _Pairs(images, gallery.embed_texts(captions), image_of_text_M, captions)


def _shares_found(pairs: _Pairs, found: tuple[Array, Array], num_queries: int) -> dict[str, Any]:
    """Say which share of the exact nearest a sample of the queries has found, in percent, in either direction."""
    image_ND, text_MD = pairs.images.image_ND, pairs.text_MD
    shares: dict[str, Any] = {"sample": num_queries}
    for side, found_QK, query_QD, candidate_CD in (("image", found[0], text_MD, image_ND), ("text", found[1], image_ND, text_MD)):
        some = np.random.default_rng(0).permutation(len(query_QD))[:num_queries]
        shares[f"{side}_nearest_{found_QK.shape[1]}_found"] = share_found(found_QK[some], unit_rows(query_QD[some]), unit_rows(candidate_CD))
    return shares


def _outcomes(pairs: _Pairs, image_hit_MK: Array, text_hit_NK: Array) -> Outcomes:
    """Turn hits into outcomes: an item is an image's key, with the caption's number for a text; the model draws nothing, so there is no seed."""
    of_text = [pairs.images.keys[image] for image in pairs.image_of_text_M]
    first_M = np.searchsorted(pairs.image_of_text_M, pairs.image_of_text_M)
    texts = [f"{key}#{m - first}" for m, (key, first) in enumerate(zip(of_text, first_M, strict=True))]
    sides = (("image", image_hit_MK, texts, of_text), ("text", text_hit_NK, pairs.images.keys, pairs.images.keys))
    kinds = [(f"{side}_retrieval_recall@{k}", np.asarray(hit[:, :k].any(axis=1)), items, groups) for side, hit, items, groups in sides for k in KS]
    return Outcomes(
        item_N=[item for _, _, items, _ in kinds for item in items],
        group_N=[group for _, _, _, groups in kinds for group in groups],
        kind_N=[kind for kind, hit, _, _ in kinds for _ in hit],
        runs=(Run("model", None, 100.0 * np.concatenate([hit for _, hit, _, _ in kinds])),),
    )

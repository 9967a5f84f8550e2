"""What may explain why one teacher makes a better student than another: measures of a teacher, of two teachers, of a teacher and its student.

Teachers are known by their stores alone. All is measured on `samples` images of one store, drawn by a fixed seed from its plan, so the same for all teachers of
a study, with the first caption of each: CKA, neighbours and entropies depend on how many there are. Nothing is read of a store but these rows, and of its index
one unit at a time. What captions say is tested by pairs of a true and a false caption of a source such as `scenes/retrieval:1000?swapped=color,...`.

Tasks that a study makes of it:

    extract            of every teacher over [study] probes, embeddings alone: images that no student has seen, with swapped captions
    diagnose-teacher   needs that store; settings: samples, words (the classes of words swapped, in the order of the source)
    diagnose-pair      needs two of them; settings: samples
    diagnose-student   needs the run, the teacher's store of probes, and the store it learned from; settings: samples, words

A student is its run folder, so that its measures need torch, which is imported where a model is opened.

N images, M captions, P classes of words, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc

from kdstore.data.source import PROBE, Source
from kdstore.errors import EvaluationError, IdentityMismatch
from kdstore.metrics.agreement import debiased_linear_cka, mutual_neighbours, top1_agreement
from kdstore.metrics.geometry import caption_margins, preference, spectrum, sphere_measures
from kdstore.metrics.retrieval import retrieval_recall
from kdstore.store import Store, fingerprint_of, open_store

if TYPE_CHECKING:
    from kdstore.models.load import Model

Array = npt.NDArray[Any]
NEIGHBOURS = 10
SEED = 0

EXPLAINED = {
    "parameters": "Parameters of both towers, without the token embedding.",
    "recall_t2i@1": "Captions whose image comes first among the probes, percent; higher is stronger.",
    "recall_i2t@1": "Images that have one of their captions first among the probes, percent; higher is stronger.",
    "modality_gap": "Distance of the mean image from the mean caption on the sphere; 0 is none.",
    "alignment": "Mean squared distance of an image from its caption; lower is closer.",
    "image_uniformity": "Log of the mean Gaussian potential of pairs of images; lower is more evenly spread.",
    "text_uniformity": "Log of the mean Gaussian potential of pairs of captions; lower is more evenly spread.",
    "image_effective_rank": "Directions that the images use, as exp of the entropy of singular values; higher is more.",
    "text_effective_rank": "Directions that the captions use, as exp of the entropy of singular values; higher is more.",
    "image_hubness": "Skewness of how often an image is among a caption's 10 nearest; 0 has no hubs.",
    "text_hubness": "Skewness of how often a caption is among an image's 10 nearest; 0 has no hubs.",
    "image_target_entropy": "Entropy in nats of an image's soft target over the captions, at the model's own scale; higher is softer.",
    "text_target_entropy": "Entropy in nats of a caption's soft target over the images, at the model's own scale; higher is softer.",
    "swapped_color": "Images for which the true caption beats the one with another colour, percent; 50 is chance.",
    "swapped_shape": "Images for which the true caption beats the one with another shape, percent; 50 is chance.",
    "swapped_relation": "Images for which the true caption beats the one with the opposite relation, percent; 50 is chance.",
    "swapped_count": "Images for which the true caption beats the one with two counts exchanged, percent; 50 is chance.",
    "swapped_binding": "Images for which the true caption beats the one with two objects' colours exchanged, percent; 50 is chance.",
    "margin_color": "Mean lead of the true caption over that with another colour, in logits at the model's own scale.",
    "margin_shape": "Mean lead of the true caption over that with another shape, in logits at the model's own scale.",
    "margin_relation": "Mean lead of the true caption over that with the opposite relation, in logits at the model's own scale.",
    "margin_count": "Mean lead of the true caption over that with two counts exchanged, in logits at the model's own scale.",
    "margin_binding": "Mean lead of the true caption over that with two objects' colours exchanged, in logits at the model's own scale.",
    "image_cka": "Debiased linear CKA of the two models' images; 1 is the same structure, 0 none in common.",
    "text_cka": "Debiased linear CKA of the two models' captions; 1 is the same structure, 0 none in common.",
    "image_neighbours": "Share of an image's 10 nearest images that the two models have in common; 1 is all.",
    "text_neighbours": "Share of a caption's 10 nearest captions that the two models have in common; 1 is all.",
    "image_top1": "Share of the images for which the two models choose the same caption; 1 is all.",
    "text_top1": "Share of the captions for which the two models choose the same image; 1 is all.",
    "capacity_gap": "How many times the student's parameters the teacher has, both without token embedding.",
}
"""Measure -> what it is, and its direction. A student's agreement with its teacher stands as `probes/MEASURE`, and on rows trained on as `seen/MEASURE`."""


@dataclass(frozen=True, eq=False)
class Drawn:
    """Rows of a plan that are looked at: N images, their M captions with the place of their image among the N, and each image's P pairs of swapped captions."""

    image_N: Array
    text_M: Array
    image_of_text_M: Array
    swapped_NP2: Array


@dataclass(frozen=True, eq=False)
class Side:
    """What one model makes of them, float32; `scale` is of its logits (None: an imported store does not say)."""

    image_ND: Array
    text_MD: Array
    swapped_NP2D: Array
    scale: float | None


def diagnose_teacher(store: str | Path, *, samples: int, words: Sequence[str] = ()) -> dict[str, Any]:
    """Measure one teacher: `measures`, and the `spectrum` of its images. Raises EvaluationError for fewer images, or other probes than pairs of `words`."""
    opened = open_store(store)
    drawn = draw(opened, samples, words)
    side = read_side(opened, drawn)
    measures = measures_of_one(side, drawn, words)
    if (config := opened.identity["teacher"].get("config")) is not None:  # imported stores lack it
        measures["parameters"] = _parameters_of(config)
    return {"measures": measures, "spectrum": spectrum(side.image_ND).tolist()}


def diagnose_pair(first: str | Path, second: str | Path, *, samples: int) -> dict[str, Any]:
    """Measure how far two teachers agree; raises IdentityMismatch for stores of different rows."""
    stores = open_store(first), open_store(second)
    if stores[0].fingerprint != stores[1].fingerprint:
        raise IdentityMismatch(f"{first} and {second} hold different rows.", "Give stores that were extracted from the same source.")
    drawn = draw(stores[0], samples)
    a, b = (read_side(store, drawn) for store in stores)
    return {"measures": measures_of_two(a, b, drawn)}


def diagnose_student(
    run: str | Path, probes: tuple[str | Path, Source], seen: tuple[str | Path, Source], *, samples: int, words: Sequence[str] = ()
) -> dict[str, Any]:
    """Measure a student as its teacher is, and how far the two agree on `probes` and on rows `seen` in training: each a store of the teacher and its source."""
    from kdstore.evaluate.gallery import open_model
    from kdstore.models.load import parameter_counts
    from kdstore.progress import silent

    model = open_model(str(run), None, "auto", "fp32", silent)
    assert model is not None
    measures: dict[str, float] = {}
    for name, (path, source) in (("probes", probes), ("seen", seen)):
        store = open_store(path)
        drawn = draw(store, samples, words if name == "probes" else ())
        student = encode_side(model, source, store, drawn)
        if name == "probes":
            measures |= measures_of_one(student, drawn, words)
            measures["parameters"] = parameter_counts(model.clip)["without_token_embedding"]
            if (config := store.identity["teacher"].get("config")) is not None:
                measures["capacity_gap"] = _parameters_of(config) / measures["parameters"]
        measures |= {f"{name}/{measure}": value for measure, value in measures_of_two(student, read_side(store, drawn), drawn).items()}
    return {"measures": measures}


def draw(store: Store, samples: int, words: Sequence[str] = ()) -> Drawn:
    """Draw images that have a caption, both valid; the same for all stores of one plan in which the same rows are valid. Raises EvaluationError for fewer.

    With `words`, each image must have two texts of the kind `probe` for each of them.
    """
    store.require("image/embedding", "text/embedding")
    units = range(-(-store.num_texts // store.unit_rows))
    is_probe_M = np.concatenate([pc.equal(store.index("text", "kind", slice(unit, unit + 1)), PROBE).to_numpy() for unit in units]).astype(bool)
    caption_M = store.text_valid & ~is_probe_M
    before_M = np.concatenate([[0], np.cumsum(caption_M)])
    captions_N = before_M[store.offsets[1:]] - before_M[store.offsets[:-1]]
    usable = np.flatnonzero(store.image_valid & (captions_N > 0))
    if len(usable) < samples:
        raise EvaluationError(f"{store.path} has {len(usable)} images with a caption, and {samples} are to be measured.", "Name more data, or measure fewer.")
    image_N = np.sort(np.random.default_rng(SEED).permutation(usable)[:samples])
    rows = [np.arange(store.offsets[row], store.offsets[row + 1]) for row in image_N]
    text = [of_image[caption_M[of_image]] for of_image in rows]
    swapped = [of_image[is_probe_M[of_image]] for of_image in rows] if words else [np.empty(0, np.int64)] * samples
    if wrong := next((len(found) for found in swapped if len(found) != 2 * len(words)), None):
        found = f"{store.path} has images with {wrong} texts of the kind probe, expected two for each of {', '.join(words)}"
        raise EvaluationError(f"{found}.", "Name a source of pairs, such as scenes/retrieval:1000?swapped=color,shape (docs/scenes.md).")
    return Drawn(image_N, np.concatenate(text), np.repeat(np.arange(samples), [len(t) for t in text]), np.stack(swapped).reshape(samples, -1, 2))


def read_side(store: Store, drawn: Drawn) -> Side:
    """Read what a store's teacher made of the rows."""
    image_ND, text_MD, swapped_SD = (
        store.features(f"{side}/embedding", rows) for side, rows in (("image", drawn.image_N), ("text", drawn.text_M), ("text", drawn.swapped_NP2.ravel()))
    )
    scale = store.identity["teacher"].get("logit_scale")
    return Side(image_ND, text_MD, swapped_SD.reshape(*drawn.swapped_NP2.shape, swapped_SD.shape[1]), scale)


def encode_side(model: Model, source: Source, store: Store, drawn: Drawn, batch: int = 256) -> Side:
    """Let a model embed the same rows of the store's source; raises IdentityMismatch for another source."""
    from kdstore.evaluate.gallery import gallery_of_source
    from kdstore.progress import silent

    if fingerprint_of((source.key(i), source.captions(i)) for i in range(len(source))) != store.fingerprint:
        raise IdentityMismatch(f"{source.spec} is not what {store.path} was extracted from.", "Name its source.")
    gallery = gallery_of_source(model, source, batch, silent)
    captions = [(int(store.offsets[row]), source.captions(row)) for row in drawn.image_N.tolist()]
    text_of_row = {first + place: caption.text for first, of_image in captions for place, caption in enumerate(of_image)}
    texts = sorted(set(text_of_row.values()))
    place = {text: number for number, text in enumerate(texts)}
    embedded_UD = gallery.embed_texts(texts)
    text_MD, swapped_SD = (embedded_UD[[place[text_of_row[row]] for row in rows.ravel().tolist()]] for rows in (drawn.text_M, drawn.swapped_NP2))
    image_ND = gallery.embed_images(drawn.image_N.tolist())
    return Side(image_ND, text_MD, swapped_SD.reshape(*drawn.swapped_NP2.shape, embedded_UD.shape[1]), model.logit_scale)


def measures_of_one(side: Side, drawn: Drawn, words: Sequence[str]) -> dict[str, float]:
    """Measure how one model lies on the sphere, what it finds, and of which words it takes notice: names of EXPLAINED."""
    image_ND, text_ND = side.image_ND, _first(side.text_MD, drawn)
    recall = retrieval_recall(image_ND, side.text_MD, drawn.image_of_text_M, (1,))
    measures = {
        "recall_t2i@1": recall["image_retrieval_recall@1"],
        "recall_i2t@1": recall["text_retrieval_recall@1"],
        **sphere_measures(image_ND, text_ND, side.scale, NEIGHBOURS),
    }
    for p, word in enumerate(words):
        true_ND, false_ND = side.swapped_NP2D[:, p, 0], side.swapped_NP2D[:, p, 1]
        pairs_N = (true_ND != false_ND).any(axis=1)  # the same text stands twice where an image has nothing to exchange
        if pairs_N.any():
            margin_N = caption_margins(image_ND[pairs_N], true_ND[pairs_N], false_ND[pairs_N])
            measures[f"swapped_{word}"] = preference(margin_N)
            if side.scale is not None:
                measures[f"margin_{word}"] = side.scale * float(margin_N.mean())
    return measures


def measures_of_two(a: Side, b: Side, drawn: Drawn) -> dict[str, float]:
    """Measure how far two models agree on the same rows: names of EXPLAINED, 1 where they are the same."""
    (a_image, a_text), (b_image, b_text) = ((side.image_ND, _first(side.text_MD, drawn)) for side in (a, b))
    return {
        "image_cka": debiased_linear_cka(a_image, b_image),
        "text_cka": debiased_linear_cka(a_text, b_text),
        "image_neighbours": mutual_neighbours(a_image, b_image, NEIGHBOURS) / 100,
        "text_neighbours": mutual_neighbours(a_text, b_text, NEIGHBOURS) / 100,
        "image_top1": top1_agreement((a_image, a_text), (b_image, b_text)) / 100,
        "text_top1": top1_agreement((a_text, a_image), (b_text, b_image)) / 100,
    }


def _first(text_MD: Array, drawn: Drawn) -> Array:
    """Return the first caption of each image [N, D]."""
    return text_MD[np.searchsorted(drawn.image_of_text_M, np.arange(len(drawn.image_N)))]


def _parameters_of(config: dict[str, Any]) -> int:
    """Count the parameters of an open_clip configuration, without token embedding."""
    from kdstore.models.cost import parameters_of

    return parameters_of(config)["without_token_embedding"]

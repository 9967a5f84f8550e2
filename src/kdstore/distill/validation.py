"""Validation during training: pairs that are not trained on, looked at with the student as it is.

Retrieval both ways; zero-shot accuracy where images have captions of the kind `probe` (sources.md), whose different texts are the classes; and, with a store of
a teacher's features of these pairs, how far the student agrees with it. Every process encodes its share of the pairs, the first one scores them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from kdstore.data.source import PROBE, Source, UndecodableImage
from kdstore.data.sources import open_source
from kdstore.distill.config import DistillConfig
from kdstore.distill.loop import Training
from kdstore.distill.pairs import Pairs, Rows
from kdstore.errors import ConfigError, SourceError
from kdstore.metrics.agreement import mean_cosine, top1_agreement
from kdstore.metrics.classification import zeroshot_accuracy
from kdstore.metrics.retrieval import retrieval_recall
from kdstore.models import towers
from kdstore.models.pixels import Kept, Pixels
from kdstore.progress import OnProgress
from kdstore.store import Cache, Store, join_sources, open_store

Array = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class HeldOut:
    """N images, their M captions, and C classes where they have labels; a teacher's embeddings of all of them where there is a store of it."""

    source: Source
    rows_N: Rows  # of the source
    texts: list[str]  # the captions, then the classes
    image_of_text_M: Rows
    labels: list[set[int]]  # of each image; all empty where there are no classes
    teacher: int = -1  # which of the run's teachers the embeddings are of; -1: none
    teacher_image_ND: Array | None = None
    teacher_text_TD: Array | None = None  # T = M + C


@dataclass(frozen=True, eq=False)
class Validation:
    """Scores a student in training on what is held out; the same numbers on every process."""

    held: HeldOut
    keep: Callable[..., Pixels]
    tokenizer: Callable[[list[str]], Tensor] | None  # None: the teacher's text embeddings are the student's
    kept: Kept

    def __call__(self, t: Training) -> dict[str, float]:
        """Return scores by name, of the student and of the average of its weights."""
        t.clip.eval()
        try:
            scores = self._scores(t, t.clip, "validation")
        finally:
            t.clip.train()
        return scores if t.average is None else scores | self._scores(t, t.average.student, "validation_ema")

    def _scores(self, t: Training, student: nn.Module, name: str) -> dict[str, float]:
        held = self.held

        def images(rows: list[int]) -> Tensor:
            pixels = torch.from_numpy(self.kept.get("view", rows, self._pixels)).to(t.device)
            return towers.image_embedding(student, t.finish(pixels))

        def texts(rows: list[int]) -> Tensor:
            if self.tokenizer is not None:
                given = self.tokenizer([held.texts[row] for row in rows])
            else:
                assert held.teacher_text_TD is not None
                given = torch.from_numpy(held.teacher_text_TD[rows])
            return towers.text_embedding(student, given.to(t.device))

        image_NS, text_TS = _encoded(t, images, len(held.rows_N)), _encoded(t, texts, len(held.texts))
        scores = t.share.world.from_first(lambda: self._compared(t, image_NS, text_TS))
        return {f"{name}/{score}": value for score, value in scores.items()}

    def _compared(self, t: Training, image_NS: Tensor, text_TS: Tensor) -> dict[str, float]:
        held, num_captions = self.held, len(self.held.image_of_text_M)
        image, text = image_NS.cpu().numpy(), text_TS.cpu().numpy()
        scores = retrieval_recall(image, text[:num_captions], held.image_of_text_M, ks=(1, 5))
        if any(held.labels):
            labelled = [i for i, labels in enumerate(held.labels) if labels]
            scores["zeroshot_top1"] = zeroshot_accuracy(image[labelled], text[num_captions:], [held.labels[i] for i in labelled])
        if held.teacher_image_ND is None or held.teacher_text_TD is None:
            return scores
        its_image, its_text = held.teacher_image_ND, held.teacher_text_TD[:num_captions]
        scores["teacher_top1_text_of_image"] = top1_agreement((image, text[:num_captions]), (its_image, its_text))
        scores["teacher_top1_image_of_text"] = top1_agreement((text[:num_captions], image), (its_text, its_image))
        if not t.objective.heads:  # a control that learns from no teacher
            return scores
        head = t.objective.heads[held.teacher]
        for side, rows, its_rows in (("image", image_NS, its_image), ("text", text_TS[:num_captions], its_text)):
            with torch.no_grad():
                projected = getattr(head, f"{side}_projector")(rows).cpu().numpy()
            if projected.shape[1] == its_rows.shape[1]:
                scores[f"teacher_cosine_{side}"] = mean_cosine(projected, its_rows)
        return scores

    def _pixels(self, rows: list[int]) -> list[Pixels]:
        return [self._view(int(self.held.rows_N[row])) for row in rows]

    def _view(self, row: int) -> Pixels:
        source = self.held.source
        try:
            return self.keep(source.image(row).image)
        except UndecodableImage as e:
            raise SourceError(f"Image {source.key(row)} cannot be decoded: {e.reason}.", "Validate on other images, or on a store of them.") from e


def make_validation(
    config: DistillConfig,
    teachers: Sequence[Store],
    source: Source,
    pairs: Pairs,
    keep: Callable[..., Pixels],
    tokenizer: Callable[[list[str]], Tensor] | None,
    on_progress: OnProgress,
) -> Validation | None:
    """Return what a run is validated with, None for nothing; `teachers` are the stores that it trains with, `source` and `pairs` what it trains on.

    Raises ConfigError for a store of another teacher, a frozen text tower without a store or no usable image, and what opening and joining raise.
    """
    if config.validate_data is None and config.validate_cache is None:
        return None
    if tokenizer is None and config.validate_cache is None:
        raise ConfigError("With a frozen text tower, validation takes its texts from a store of the teacher.", "Give one: --set validate_cache=STORE.")
    held = _held_out(config, teachers)
    keys = {held.source.key(int(row)) for row in held.rows_N}
    trained_on = sum(source.key(int(row)) in keys for row in pairs.source_rows)
    if trained_on:
        on_progress("warning", 0, 0, f"{trained_on} of {len(keys)} pairs of the validation are trained on")
    return Validation(held, keep, tokenizer, Kept(int(config.memory_gib * 2**30)))


def _held_out(config: DistillConfig, teachers: Sequence[Store]) -> HeldOut:
    store = None if config.validate_cache is None else open_store(config.validate_cache, Cache.default(config.cache_folder, config.cache_gib))
    source = open_source(config.validate_data or (store.recorded_source if store is not None else ""))
    teacher = -1 if store is None else _teacher_of(store, teachers)
    images = _of_source(source) if store is None else _of_store(store, source)
    images = [(row, store_row, texts) for row, store_row, texts in images if any(kind != PROBE for _, kind, _ in texts)]
    if not images:
        raise ConfigError(f"{source.spec} has no image with a caption to validate on.", "Name a source of captioned images as validate_data.")
    captions = [(i, text, text_row) for i, (_, _, texts) in enumerate(images) for text, kind, text_row in texts if kind != PROBE]
    classes = {text: text_row for _, _, texts in images for text, kind, text_row in texts if kind == PROBE}
    number = {text: c for c, text in enumerate(classes)}
    found = HeldOut(
        source,
        np.array([row for row, _, _ in images]),
        [text for _, text, _ in captions] + list(classes),
        np.array([i for i, _, _ in captions]),
        [{number[text] for text, kind, _ in texts if kind == PROBE} for _, _, texts in images],
    )
    if store is None:
        return found
    text_rows = [text_row for _, _, text_row in captions] + list(classes.values())
    image_ND = store.features("image/embedding", np.array([store_row for _, store_row, _ in images]))
    parts = vars(found) | {"teacher": teacher, "teacher_image_ND": image_ND, "teacher_text_TD": store.features("text/embedding", np.array(text_rows))}
    return HeldOut(**parts)


def _encoded(t: Training, encode: Callable[[list[int]], Tensor], count: int) -> Tensor:
    """Encode rows 0 to count - 1, each process its share; returns float32 [count, S] on every process."""
    world, at_once = t.share.world, t.share.piece
    mine = (np.arange(-(-count // world.size)) * world.size + world.rank) % count  # all shares of one size
    with world.together(), torch.no_grad(), torch.autocast(t.device.type, t.precision, enabled=t.precision != torch.float32):
        part = torch.cat([encode(mine[i : i + at_once].tolist()).float() for i in range(0, len(mine), at_once)])
    return torch.stack(world.gather(part), 1).flatten(0, 1)[:count]


def _teacher_of(store: Store, teachers: Sequence[Store]) -> int:
    """Return which of the run's teachers a store is of; raises ConfigError."""
    for k, of_run in enumerate(teachers):
        if of_run.identity["teacher"] == store.identity["teacher"]:
            return k
    raise ConfigError(f"{store.path} (validate_cache) holds features of another teacher than the run learns from.", "Extract it with the same teacher.")


def _of_source(source: Source) -> list[tuple[int, int, list[tuple[str, str, int]]]]:
    """Return (source row, no store row, its (text, kind, no text row)) of all images."""
    return [(row, -1, [(caption.text, caption.kind, -1) for caption in source.captions(row)]) for row in range(len(source))]


def _of_store(store: Store, source: Source) -> list[tuple[int, int, list[tuple[str, str, int]]]]:
    """Return (source row, store row, its (text, kind, text row)) of the images that both have and that are valid, with the captions of the store."""
    source_rows = join_sources(store, source).source_row_of_store
    texts, kinds = store.index("text", "caption").to_pylist(), store.index("text", "kind").to_pylist()
    rows = np.flatnonzero((source_rows >= 0) & store.image_valid).tolist()
    ranges = [range(store.offsets[row], store.offsets[row + 1]) for row in rows]
    return [(int(source_rows[row]), row, [(texts[m], kinds[m], m) for m in of_row if store.text_valid[m]]) for row, of_row in zip(rows, ranges, strict=True)]

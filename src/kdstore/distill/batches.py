"""The plan of batches and the making of one.

What a step trains on is a pure function of (seed, step), however many processes share it: the store's order of the pairs per epoch, and one caption per
(seed, epoch, pair), drawn by the same hash. Of a store with augmented views an image shows one view per epoch, all of them in turn from one that the hash
says, and the target is asked for by the same number. So batches depend neither on the number of threads nor on the version of NumPy, and a run resumes at
any step. The short last batch of an epoch is dropped, because contrastive terms would change their meaning in it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kdstore.data.source import Source, UndecodableImage
from kdstore.distill.distributed import Share
from kdstore.distill.encoded import Supervision, TeacherRows, map_rows
from kdstore.distill.pairs import Pairs, Rows
from kdstore.distill.targets import Targets
from kdstore.distill.views import Kept, Pixels
from kdstore.errors import ConfigError, JoinError, SourceError
from kdstore.store import StoredViews
from kdstore.store.order import CAPTION, VIEW, Order, draw


@dataclass(frozen=True)
class BatchPlan:
    """Which pairs make which batch, and which of them are this process's `share` (None: all)."""

    num_pairs: int
    batch_size: int
    seed: int
    share: Share | None = None

    def __post_init__(self) -> None:
        if self.num_pairs < self.batch_size:
            raise ConfigError(
                f"A batch takes {self.batch_size} pairs, but only {self.num_pairs} can be trained on.", f"Set a batch_size of at most {self.num_pairs}."
            )

    @property
    def steps_per_epoch(self) -> int:
        return self.num_pairs // self.batch_size

    @property
    def dropped(self) -> int:
        """Pairs in the short last batch of every epoch, another choice each time."""
        return self.num_pairs % self.batch_size

    def epoch(self, step: int) -> int:
        return step // self.steps_per_epoch

    def batch(self, step: int) -> Rows:
        """Return the pairs [B] of a step, B those of the share."""
        places_B = np.arange(self.batch_size) if self.share is None else self.share.places
        return Order(self.num_pairs, self.seed).rows(self.epoch(step), step % self.steps_per_epoch * self.batch_size + places_B)


@dataclass(frozen=True, eq=False)
class Batch:
    """One batch, ready for the step: kept views [B, C, H, W], tokens [B, L], and what it is supervised with."""

    views_BCHW: Tensor
    tokens_BL: Tensor
    told: Supervision

    def to(self, device: torch.device) -> Batch:
        """Copy to `device`, without waiting where the batch is pinned."""
        return map_rows(lambda t: t.to(device, non_blocking=True), self)

    def pinned(self) -> Batch:
        """Copy to page-locked memory."""
        return map_rows(Tensor.pin_memory, self)


@dataclass(frozen=True, eq=False)
class Maker:
    """Makes the batch of a step; called from several threads, in any order."""

    plan: BatchPlan
    pairs: Pairs
    source: Source
    targets: Targets | None
    keep: Callable[..., Pixels]
    tokenizer: Callable[[list[str]], Tensor] | None  # None: the teacher's text embeddings stand where tokens would
    kept: Kept
    stored: StoredViews | None = None  # the views to show; None: the plain one alone
    pin: bool = False
    one_tokenizer: threading.Lock = field(default_factory=threading.Lock)  # tokenizers of transformers are not thread-safe

    def __call__(self, step: int) -> Batch:
        pairs_B = self.plan.batch(step)
        text_rows_B, views_B = self.text_rows(step), self.views(step)
        caption_ids_B = self.pairs.caption_ids[text_rows_B]
        teachers = self._teachers(pairs_B, views_B, text_rows_B)
        batch = Batch(
            torch.from_numpy(self.kept.get("view", (pairs_B * self._num_views + views_B).tolist(), self._pixels)),
            teachers[0].text_BD.float() if self.tokenizer is None else torch.from_numpy(self.kept.get("tokens", caption_ids_B.tolist(), self._tokens)).long(),
            Supervision(torch.from_numpy(caption_ids_B), teachers=teachers),
        )
        return batch.pinned() if self.pin else batch

    def _teachers(self, pairs_B: Rows, views_B: Rows, text_rows_B: Rows) -> tuple[TeacherRows, ...]:
        if self.targets is None:
            return ()
        image_BD = self.targets.image_embeddings(self.pairs.target_rows[pairs_B], views_B)
        return (TeacherRows(torch.from_numpy(image_BD), torch.from_numpy(self.targets.text_embeddings(text_rows_B))),)

    def text_rows(self, step: int) -> Rows:
        """Return the text row [B] of the caption that each pair of a step shows."""
        pairs_B = self.plan.batch(step)
        start, stop = self.pairs.text_offsets[pairs_B], self.pairs.text_offsets[pairs_B + 1]
        choice = draw(self.plan.seed, self.plan.epoch(step), CAPTION, pairs_B) % (stop - start).astype(np.uint64)
        return self.pairs.text_rows[start + choice.astype(np.int64)]

    def views(self, step: int) -> Rows:
        """Return the view [B] in which each pair of a step is shown."""
        count = np.uint64(self._num_views)
        first_B = draw(self.plan.seed, VIEW, self.plan.batch(step)) % count
        return ((first_B + np.uint64(self.plan.epoch(step))) % count).astype(np.int64)

    @property
    def _num_views(self) -> int:
        return 1 if self.stored is None else self.stored.count

    def _pixels(self, shown: list[int]) -> list[Pixels]:
        return [self._view(*divmod(number, self._num_views)) for number in shown]

    def _view(self, pair: int, view: int) -> Pixels:
        row, target = int(self.pairs.source_rows[pair]), int(self.pairs.target_rows[pair])
        try:
            loaded = self.source.image(row)
        except UndecodableImage as e:
            raise SourceError(
                f"Image {self.source.key(row)} cannot be decoded: {e.reason}.", "Extract a store of this data and give it as --cache: it leaves bad images out."
            ) from e
        if self.pairs.sha256 is not None and (expected := self.pairs.sha256[target].as_py()) != loaded.sha256:
            raise JoinError(
                f"Image {self.source.key(row)} is not the one the store was extracted from: expected sha256 {expected[:12]}, found {loaded.sha256[:12]}.",
                'Give the original data, or accept targets of other images with --set changed_images="allow".',
            )
        return self.keep(loaded.image if self.stored is None else self.stored.picture(loaded.image, target, view))

    def _tokens(self, caption_ids: list[int]) -> list[npt.NDArray[np.int32]]:
        assert self.tokenizer is not None
        with self.one_tokenizer:
            return list(self.tokenizer([self.pairs.captions[i].as_py() for i in caption_ids]).to(torch.int32).numpy())

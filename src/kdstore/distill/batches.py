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
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kdstore.data.source import Source
from kdstore.distill.distributed import Share
from kdstore.distill.encoded import Supervision, TeacherRows, map_rows
from kdstore.distill.pairs import Pairs, Rows, Texts, sides_of
from kdstore.distill.targets import Targets
from kdstore.distill.views import Views, readable_image
from kdstore.errors import ConfigError, JoinError
from kdstore.models.pixels import Kept, Pixels
from kdstore.store.order import CAPTION, DROP, VIEW, Order, draw


@dataclass(frozen=True)
class BatchPlan:
    """Which pairs make which batch, and which of them are this process's `share` (None: all)."""

    num_pairs: int
    batch_size: int
    seed: int
    share: Share | None = None
    block: int = 1  # pairs that lie together
    window: int | None = None  # pairs that are shuffled with each other; None: all

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

    @property
    def windowed(self) -> bool:
        return self.window is not None and self.window < self.num_pairs

    @cached_property
    def order(self) -> Order:
        return Order(self.num_pairs, self.seed, self.block, self.window)

    def epoch(self, step: int) -> int:
        return step // self.steps_per_epoch

    def batch(self, step: int) -> Rows:
        """Return the pairs [B] of a step, B those of the share."""
        places_B = np.arange(self.batch_size) if self.share is None else self.share.places
        return self.order.rows(self.epoch(step), step % self.steps_per_epoch * self.batch_size + places_B)


@dataclass(frozen=True, eq=False)
class Batch:
    """One batch, ready for the step: kept views [B, C, H, W], tokens [B, L] of a caption or two, and what it is supervised with."""

    views_BCHW: Tensor
    tokens_BL: Tensor
    told: Supervision
    synthetic_BL: Tensor | None = None

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
    targets: tuple[Targets, ...]
    needs: tuple[str, ...]  # arrays that are read of the targets
    keep: Callable[..., Pixels]
    tokenizer: Callable[[list[str]], Tensor] | None  # None: the teacher's text embeddings stand where tokens would
    kept: Kept
    stored: tuple[Views, ...] = ()  # the views to show, of each store; none: the plain one alone
    pin: bool = False
    announce: Callable[[int], None] | None = None  # tells the stores that a step comes
    one_tokenizer: threading.Lock = field(default_factory=threading.Lock)  # tokenizers of transformers are not thread-safe

    def __call__(self, step: int) -> Batch:
        if self.announce is not None:
            self.announce(step)
        pairs_B, views_B, teachers = self.plan.batch(step), self.views(step), self.teachers(step)
        ids_B = self.pairs.texts.ids[self.texts(step)]
        synthetic_ids_B = None if self.pairs.synthetic is None else self.pairs.synthetic.ids[self.synthetic_texts(step)]
        first = teachers[0] if teachers else TeacherRows()
        batch = Batch(
            torch.from_numpy(self.kept.get("view", (pairs_B * self._num_views + views_B).tolist(), self._pixels)),
            self._tokens(ids_B, first.text_BD),
            Supervision(torch.from_numpy(ids_B), None if synthetic_ids_B is None else torch.from_numpy(synthetic_ids_B), teachers),
            None if synthetic_ids_B is None else self._tokens(synthetic_ids_B, first.synthetic_BD),
        )
        return batch.pinned() if self.pin else batch

    def teachers(self, step: int) -> tuple[TeacherRows, ...]:
        """Return what each teacher says of the batch of a step."""
        return tuple(self._teacher(k, targets, step) for k, targets in enumerate(self.targets))

    def texts(self, step: int) -> Rows:
        """Return the number [B], among `pairs.texts`, of the caption that each pair of a step shows."""
        return self._drawn(self.pairs.texts, step)

    def synthetic_texts(self, step: int) -> Rows:
        """Return the number [B], among `pairs.synthetic`, of the synthetic caption of each pair of a step."""
        assert self.pairs.synthetic is not None
        return self._drawn(self.pairs.synthetic, step)

    def views(self, step: int) -> Rows:
        """Return the view [B] in which each pair of a step is shown."""
        count = np.uint64(self._num_views)
        first_B = draw(self.plan.seed, VIEW, self.plan.batch(step)) % count
        return ((first_B + np.uint64(self.plan.epoch(step))) % count).astype(np.int64)

    @property
    def _num_views(self) -> int:
        return self.stored[0].count if self.stored else 1

    @cached_property
    def _lacking(self) -> list[bool]:
        """Whether each of the targets lacks something that is read of them."""
        return [bool(self.pairs.lacking(k, sides_of(self.needs))) for k in range(len(self.targets))]

    def _drawn(self, texts: Texts, step: int) -> Rows:
        pairs_B = self.plan.batch(step)
        start, stop = texts.offsets[pairs_B], texts.offsets[pairs_B + 1]
        choice = draw(self.plan.seed, self.plan.epoch(step), CAPTION, pairs_B) % (stop - start).astype(np.uint64)
        return start + choice.astype(np.int64)

    def _teacher(self, k: int, targets: Targets, step: int) -> TeacherRows:
        """Read a teacher's rows; those that lack a side that the loss reads are told by `valid_B` and hold zeros."""
        pairs_B, views_B = self.plan.batch(step), self.views(step)
        image_B, text_B = self.pairs.target_rows[k][pairs_B], self.pairs.texts.rows[k][self.texts(step)]
        synthetic_B = text_B if self.pairs.synthetic is None else self.pairs.synthetic.rows[k][self.synthetic_texts(step)]
        rows_of = {"image": (image_B,), "text": (text_B, synthetic_B)}
        valid_B = np.logical_and.reduce([rows_B >= 0 for side in sides_of(self.needs) for rows_B in rows_of[side]])

        def read(array: str, rows_B: Rows, *, wanted: bool = True) -> Tensor | None:
            if not wanted or array not in self.needs:
                return None
            views = (views_B[valid_B],) if array.startswith("image/") else ()
            found = (targets.image if views else targets.text)(array, rows_B[valid_B], *views)
            if valid_B.all():
                return torch.from_numpy(found)
            all_B = np.zeros((len(rows_B), *targets.shape(array)), found.dtype)
            all_B[valid_B] = found
            return torch.from_numpy(all_B)

        drawn_B = draw(self.plan.seed, self.plan.epoch(step), DROP, k, pairs_B)
        return TeacherRows(
            read("image/embedding", image_B),
            read("text/embedding", text_B),
            torch.from_numpy(valid_B) if self._lacking[k] else None,
            read("text/embedding", synthetic_B, wanted=self.pairs.synthetic is not None),
            read("image/tokens", image_B),
            torch.from_numpy((drawn_B >> np.uint64(11)) * 2.0**-53),
        )

    def _pixels(self, shown: list[int]) -> list[Pixels]:
        return [self._view(*divmod(number, self._num_views)) for number in shown]

    def _tokens(self, ids_B: Rows, embedding_BD: Tensor | None) -> Tensor:
        if self.tokenizer is None:
            assert embedding_BD is not None
            return embedding_BD.float()
        return torch.from_numpy(self.kept.get("tokens", ids_B.tolist(), self._tokenized)).long()

    def _view(self, pair: int, view: int) -> Pixels:
        row = int(self.pairs.source_rows[pair])
        loaded = readable_image(self.source, row)
        held = [(k, int(rows[pair])) for k, rows in enumerate(self.pairs.target_rows) if rows[pair] >= 0]
        for k, target in held if self.pairs.sha256 else ():
            expected = self.pairs.sha256[k][target].as_py()
            if expected and expected != loaded.sha256:  # stores of imported features may not know which bytes they are of
                raise JoinError(
                    f"Image {self.source.key(row)} is not the one the store was extracted from: expected sha256 {expected[:12]}, found {loaded.sha256[:12]}.",
                    'Give the original data, or accept targets of other images with --set changed_images="allow".',
                )
        if not self.stored:
            return self.keep(loaded.image)
        k, target = held[0]  # all stores have the same views
        return self.keep(self.stored[k].picture(loaded.image, target, view))

    def _tokenized(self, caption_ids: list[int]) -> list[npt.NDArray[np.int32]]:
        assert self.tokenizer is not None
        with self.one_tokenizer:
            return list(self.tokenizer([self.pairs.captions[i].as_py() for i in caption_ids]).to(torch.int32).numpy())

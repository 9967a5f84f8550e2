"""Which image-caption pairs a run trains on: the rows of a source, joined by key with the valid rows of one store or several.

Without a store they are all rows of the source. Every image that is left out is counted under its reason; rows are never matched by order. Of several
stores an image is one image by its key, and a caption one caption by its text, so that stores of other captions or of parts of the data go together.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from kdstore.data.source import PROBE, Source
from kdstore.progress import OnProgress, silent
from kdstore.store import Store, join_sources

Rows = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
SIDES = ("image", "text")
SYNTHETIC = "synthetic"  # a kind of captions
INVALID = "not valid in the store"  # the reason that an extraction has told already


@dataclass(frozen=True, eq=False)
class Texts:
    """Captions of P images: those of image p are numbers `offsets[p]:offsets[p + 1]`; number t has the id `ids[t]` and row `rows[k][t]` of targets k."""

    offsets: Rows
    ids: Rows
    rows: tuple[Rows, ...]

    @property
    def images(self) -> Rows:
        """The image of each text."""
        return np.repeat(np.arange(len(self.offsets) - 1), np.diff(self.offsets))

    def kept(self, images: Bools, texts: Bools) -> Texts:
        """Return those of some texts that belong to some images, the images numbered anew."""
        texts = texts & images[self.images]
        counts = np.bincount(self.images[texts], minlength=len(images))[images]
        return Texts(_offsets(counts), self.ids[texts], tuple(rows[texts] for rows in self.rows))


@dataclass(frozen=True, eq=False)
class Pairs:
    """P images with their captions.

    `source_rows` [P] are rows of the source, `target_rows[k]` [P] the image rows of the same images in targets k, -1 for what they lack (also in
    `Texts.rows`). `captions` holds each text once, by its id. Where a loss takes a caption of either kind, `synthetic` are the synthetic ones and `texts` the
    others. `sha256[k]` says by target row which image teacher k saw.
    """

    source_rows: Rows
    target_rows: tuple[Rows, ...]
    texts: Texts
    captions: pa.Array
    synthetic: Texts | None = None
    sha256: tuple[pa.ChunkedArray, ...] = ()
    left_out: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.source_rows)

    def lacking(self, k: int, sides: Collection[str] = SIDES) -> dict[str, int]:
        """How many `images`, and `captions` of images that they have, targets k lack among these sides; without those of which they lack none."""
        images = self.target_rows[k] >= 0
        captions = sum(int((images[texts.images] & (texts.rows[k] < 0)).sum()) for texts in self.all_texts)
        lacking = {"images": int((~images).sum()) if "image" in sides else 0, "captions": captions if "text" in sides else 0}
        return {what: count for what, count in lacking.items() if count}

    @property
    def all_texts(self) -> tuple[Texts, ...]:
        """The captions of each kind that is drawn apart."""
        return (self.texts,) if self.synthetic is None else (self.texts, self.synthetic)


@dataclass(frozen=True, eq=False)
class _Table:
    """Usable images of one store or source in its order: their source rows and target rows, and the rows, texts and kinds of their captions."""

    source_rows: Rows
    target_rows: Rows
    counts: Rows
    text_rows: Rows
    texts: pa.Array
    synthetic: Bools


def sides_of(needs: Sequence[str]) -> tuple[str, ...]:
    """Return the sides of the arrays among what a loss needs."""
    return tuple(side for side in SIDES if any(name.startswith(f"{side}/") for name in needs))


def pairs_of_source(source: Source, teachers: int = 1, *, both_kinds: bool = False) -> Pairs:
    """All pairs of a source that have a caption; image and text rows of all targets are numbered in its order."""
    by_image = [source.captions(i) for i in range(len(source))]
    captions = [caption for of_image in by_image for caption in of_image]
    usable, synthetic = (np.array([test(caption.kind) for caption in captions], bool) for test in (PROBE.__ne__, SYNTHETIC.__eq__))
    rows, offsets = np.arange(len(source), dtype=np.int64), _offsets([len(of_image) for of_image in by_image])
    texts = pa.array([caption.text for caption in captions], pa.large_string())
    table, has = _table(rows, rows, offsets, usable, synthetic, texts)
    pairs = _joined([table] * max(1, teachers), len(source), both_kinds=both_kinds, whole=())
    return replace(pairs, left_out=_counts({"without a caption": ~has}) | pairs.left_out)


def pairs_of_stores(
    stores: Sequence[Store],
    source: Source,
    *,
    needs: Sequence[str] = (),
    both_kinds: bool = False,
    whole: Collection[str] = (),
    by_content: bool = False,
    on_progress: OnProgress = silent,
) -> Pairs:
    """The pairs that stores and source share by key, whose image and caption are valid in a store; raises JoinError for a store that shares none.

    Rows of which a store lacks an array among `needs` (a part, or a child for some rows) are left out of it. `by_content`: images of other keys too, by their
    bytes. `both_kinds`: images with a synthetic caption and another one, if there are synthetic ones beside others. `whole`: the sides of which what any
    store lacks is left out.
    """
    tables, reasons = [], []
    for store in stores:
        join = join_sources(store, source, by_content=by_content, on_progress=on_progress)
        there, valid = join.source_row_of_store >= 0, store.image_valid
        image_held, text_held = (_held(store, side, needs) for side in SIDES)
        rows = np.flatnonzero(there & valid & image_held).astype(np.int64)
        kinds = store.index("text", "kind")
        usable = store.text_valid & text_held & pc.not_equal(kinds, PROBE).to_numpy()
        synthetic = pc.equal(kinds, SYNTHETIC).to_numpy()
        texts = store.index("text", "caption").combine_chunks()
        table, has = _table(join.source_row_of_store[rows], rows, store.offsets, usable, synthetic, texts)
        tables.append(table)
        reasons.append({"not in the source": ~there, "not in the store": join.store_row_of_source < 0, INVALID: there & ~valid})
        reasons[-1] |= {"not in this part of the store": there & valid & ~image_held, "without a caption": ~has}
    nowhere = {"in no store": np.logical_and.reduce([of_store["not in the store"] for of_store in reasons])}
    pairs = _joined(tables, len(source), both_kinds=both_kinds, whole=whole)
    left_out = _counts(reasons[0] if len(stores) == 1 else nowhere) | pairs.left_out
    return replace(pairs, sha256=tuple(store.index("image", "sha256") for store in stores), left_out=left_out)


def _held(store: Store, side: str, needs: Sequence[str]) -> Bools:
    """Tell of which rows of a side a store has all arrays that are needed."""
    valid = store.image_valid if side == "image" else store.text_valid
    return np.logical_and.reduce([np.ones(len(valid), bool), *(store.holds(name) for name in needs if name.startswith(f"{side}/") and name in store.arrays)])


def _table(source_rows: Rows, target_rows: Rows, offsets: Rows, usable: Bools, synthetic: Bools, texts: pa.Array) -> tuple[_Table, Bools]:
    """Keep the images that have a usable caption, and say which those are."""
    before = np.concatenate([[0], np.cumsum(usable)])  # usable texts before each text row
    starts, stops = before[offsets[target_rows]], before[offsets[target_rows + 1]]
    has, counts = stops > starts, stops - starts
    ends = _offsets(counts[has])
    ranks = np.arange(ends[-1]) - np.repeat(ends[:-1], counts[has]) + np.repeat(starts[has], counts[has])
    text_rows = np.flatnonzero(usable)[ranks].astype(np.int64)
    return _Table(
        source_rows[has], target_rows[has], counts[has], text_rows, texts.take(pa.array(text_rows)).cast(pa.large_string()), synthetic[text_rows]
    ), has


def _joined(tables: Sequence[_Table], num_source: int, *, both_kinds: bool, whole: Collection[str]) -> Pairs:
    """Join tables into pairs in the order of the first one, behind them what only later ones have.

    A caption that an image has twice in one table stays twice, and is drawn twice as often.
    """
    every = np.concatenate([table.source_rows for table in tables]).astype(np.int64)
    source_rows = every[np.sort(np.unique(every, return_index=True)[1])]
    pair_of = np.full(num_source, -1)
    pair_of[source_rows] = np.arange(len(source_rows))

    texts = pa.chunked_array([table.texts for table in tables], pa.large_string()).combine_chunks().dictionary_encode()
    ids = np.split(texts.indices.to_numpy().astype(np.int64), np.cumsum([len(table.texts) for table in tables])[:-1])
    distinct = max(len(texts.dictionary), 1)
    names = [np.repeat(pair_of[t.source_rows], t.counts) * distinct + of_table for t, of_table in zip(tables, ids, strict=True)]  # a caption of an image
    union, synthetic, own = names[0], tables[0].synthetic, tables[0].text_rows
    for name, table in zip(names[1:], tables[1:], strict=True):
        new = ~np.isin(name, union)
        union, synthetic, own = (np.concatenate(parts) for parts in ((union, name[new]), (synthetic, table.synthetic[new]), (own, np.full(new.sum(), -1))))
    order = np.argsort(union // distinct, kind="stable")
    union, synthetic, own = union[order], synthetic[order], own[order]
    text_rows = (own, *(_rows_of(name, union, table.text_rows) for name, table in zip(names[1:], tables[1:], strict=True)))
    found = Texts(_offsets(np.bincount(union // distinct, minlength=len(source_rows))), union % distinct, text_rows)
    target_rows = tuple(_rows_of(pair_of[table.source_rows], np.arange(len(source_rows)), table.target_rows) for table in tables)
    return _chosen(Pairs(source_rows, target_rows, found, texts.dictionary), synthetic, both_kinds=both_kinds, whole=whole)


def _chosen(pairs: Pairs, synthetic: Bools, *, both_kinds: bool, whole: Collection[str]) -> Pairs:
    """Leave out what a run cannot use, and part synthetic captions from others where it takes one of each."""
    split = both_kinds and bool(synthetic.any()) and not synthetic.all()
    if not whole and not split:
        return pairs

    def with_one_of(texts: Bools) -> Bools:
        return np.bincount(pairs.texts.images[texts], minlength=len(pairs)) > 0

    held, everywhere = np.ones(len(synthetic), bool), np.ones(len(pairs), bool)
    if "text" in whole:
        held = np.logical_and.reduce([rows >= 0 for rows in pairs.texts.rows])
    if "image" in whole:
        everywhere = np.logical_and.reduce([rows >= 0 for rows in pairs.target_rows])
    everywhere &= with_one_of(held)
    kinds = [held & ~synthetic, held & synthetic] if split else [held]
    images = np.logical_and.reduce([everywhere, *map(with_one_of, kinds)])
    texts = [pairs.texts.kept(images, of_kind) for of_kind in kinds]
    left_out = _counts({"not in every store": ~everywhere, "without a caption of each kind": everywhere & ~images})
    target_rows = tuple(rows[images] for rows in pairs.target_rows)
    return Pairs(pairs.source_rows[images], target_rows, texts[0], pairs.captions, texts[1] if split else None, left_out=left_out)


def _rows_of(names: Rows, sought: Rows, rows: Rows) -> Rows:
    """Return the row of each sought name, the first where there are several, -1 where there is none."""
    order = np.argsort(names, kind="stable")
    if not len(names):
        return np.full(len(sought), -1)
    at = np.searchsorted(names[order], sought).clip(max=len(names) - 1)
    found = order[at]
    return np.where(names[found] == sought, rows[found], -1).astype(np.int64)


def _offsets(counts: npt.ArrayLike) -> Rows:
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)


def _counts(left_out: dict[str, Bools]) -> dict[str, int]:
    return {reason: int(rows.sum()) for reason, rows in left_out.items() if rows.any()}

"""Which image-caption pairs a run trains on: the rows of a source, joined by key with the valid rows of a store.

Without a store they are all rows of the source. Every image that is left out is counted under its reason; rows are never matched by order.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from kdstore.data.source import Source
from kdstore.store import Store, join_sources

Rows = npt.NDArray[np.int64]
PROBE = "probe"  # captions that test a teacher and are not trained on
INVALID = "not valid in the store"  # the reason that an extraction has told already


@dataclass(frozen=True, eq=False)
class Pairs:
    """P images with their captions.

    `source_rows` [P] are rows of the source, `target_rows` [P] the image rows of the same images in the targets. The texts of image p are rows
    `text_rows[text_offsets[p]:text_offsets[p + 1]]` of the targets. Text row t reads `captions[caption_ids[t]]`, where equal captions have one id.
    `sha256` says by target row which image the teacher saw.
    """

    source_rows: Rows
    target_rows: Rows
    text_rows: Rows
    text_offsets: Rows
    caption_ids: Rows
    captions: pa.Array
    sha256: pa.ChunkedArray | None = None
    left_out: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.source_rows)


def pairs_of_source(source: Source) -> Pairs:
    """All pairs of a source that have a caption; image and text rows are numbered in its order."""
    by_image = [source.captions(i) for i in range(len(source))]
    captions = [caption for of_image in by_image for caption in of_image]
    texts = pa.array([caption.text for caption in captions], pa.large_string())
    offsets = np.cumsum([0, *(len(of_image) for of_image in by_image)], dtype=np.int64)
    rows = np.arange(len(source), dtype=np.int64)
    has, text_rows, text_offsets = _usable_texts(rows, offsets, np.array([caption.kind != PROBE for caption in captions], bool))
    return Pairs(rows[has], rows[has], text_rows, text_offsets, *_numbered(texts), None, _counts({"without a caption": ~has}))


def pairs_of_store(store: Store, source: Source) -> Pairs:
    """The pairs that store and source share by key, whose image and caption are valid in the store; raises JoinError if they share none."""
    join = join_sources(store, source)
    source_row_of_store = join.source_row_of_store
    there, valid = source_row_of_store >= 0, store.image_valid
    rows = np.flatnonzero(there & valid).astype(np.int64)
    usable = store.text_valid & pc.not_equal(store.index("text", "kind"), PROBE).to_numpy()
    texts = store.index("text", "caption").combine_chunks()
    has, text_rows, text_offsets = _usable_texts(rows, store.offsets, usable)
    left_out = _counts({"not in the source": ~there, "not in the store": join.store_row_of_source < 0, INVALID: there & ~valid, "without a caption": ~has})
    return Pairs(source_row_of_store[rows[has]], rows[has], text_rows, text_offsets, *_numbered(texts), store.index("image", "sha256"), left_out)


def _usable_texts(rows: Rows, offsets: Rows, usable: npt.NDArray[np.bool_]) -> tuple[npt.NDArray[np.bool_], Rows, Rows]:
    """Say which image `rows` have a usable text, and give the usable text rows of those images with their offsets."""
    before = np.concatenate([[0], np.cumsum(usable)])  # usable texts before each text row
    starts, stops = before[offsets[rows]], before[offsets[rows + 1]]
    has = stops > starts
    counts = (stops - starts)[has]
    text_offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    ranks = np.arange(text_offsets[-1]) - np.repeat(text_offsets[:-1], counts) + np.repeat(starts[has], counts)
    return has, np.flatnonzero(usable)[ranks].astype(np.int64), text_offsets


def _numbered(texts: pa.Array) -> tuple[Rows, pa.Array]:
    """Return the id of each text and the distinct texts by id."""
    encoded = texts.dictionary_encode()
    return encoded.indices.to_numpy().astype(np.int64), encoded.dictionary


def _counts(left_out: dict[str, npt.NDArray[np.bool_]]) -> dict[str, int]:
    return {reason: int(rows.sum()) for reason, rows in left_out.items() if rows.any()}

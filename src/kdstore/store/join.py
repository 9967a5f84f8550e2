"""Joining a store with a source: which source row belongs to which store row, by fingerprint, by key or by content, never by position."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from kdstore.data.source import Source, UndecodableImage
from kdstore.errors import CannotWrite, ConfigError, JoinError
from kdstore.jsonfile import write_bytes
from kdstore.progress import OnProgress, silent
from kdstore.store.blocks import Int64, in_order
from kdstore.store.plan import fingerprint_of, parquet_bytes, repeated
from kdstore.store.reader import Store

_READ_ROWS = 16  # images hashed by one task


@dataclass(frozen=True, eq=False)
class Join:
    """Row maps between a store of N images and a source of S pairs; -1 where the other side has no such key."""

    source_row_of_store: npt.NDArray[np.int64]
    """[N]"""
    store_row_of_source: npt.NDArray[np.int64]
    """[S]"""
    by: Literal["fingerprint", "key", "content"]

    @property
    def matched(self) -> int:
        """Images that both hold."""
        return int((self.source_row_of_store >= 0).sum())

    @property
    def missing_in_source(self) -> int:
        """Images of the store that the source does not hold."""
        return len(self.source_row_of_store) - self.matched

    @property
    def missing_in_store(self) -> int:
        """Pairs of the source that the store has no features of."""
        return len(self.store_row_of_source) - self.matched


@dataclass(frozen=True)
class JoinReport:
    """How a store and a source go together; what is known of contents is None where no image was read.

    `matched` counts images with the same key, `content_differs` those of them whose encoded bytes are others than the teacher saw, and
    `content_unknown` those for which one side has no bytes. `matched_by_content` counts images of other keys with the same bytes: the first
    of the source for every image of the store. Missing are those that neither matches.
    """

    images: int
    pairs: int
    by: Literal["fingerprint", "key", "content"]
    matched: int
    matched_by_content: int | None
    missing_in_source: int
    missing_in_store: int
    content_differs: int | None
    content_unknown: int | None
    differing_keys: tuple[str, ...]
    """The first of them."""


def join_sources(store: Store, source: Source, *, by_content: bool = False, on_progress: OnProgress = silent) -> Join:
    """Match the rows of a store and a source; raises JoinError if none matches or a key of the source comes twice.

    Equal fingerprints (same keys and captions in the same order) need no matching. Otherwise rows match by key: the captions that belong to the features are
    those of the store's index. With `by_content` those whose keys are on one side only match by the sha256 of their encoded images, which reads the source's.
    """
    join = _join_by_key(store, source)
    if by_content and join.by == "key":
        join = _also_by_content(join, *_digests_of(store, source, on_progress))
    if not join.matched and join.by != "fingerprint":
        source_keys = [source.key(i) for i in range(min(4, len(source)))]
        raise JoinError(
            f"No {'image' if by_content else 'key'} of {source.spec} ({_some(source_keys)}) is in {store.path} "
            f"({_some(store.index('image', 'key')[:4].to_pylist())}).",
            "Name the source that the store was extracted from; kdstore store join looks for equal contents, --set join=content trains on them.",
        )
    return join


def report_join(store: Store, source: Source, *, content: bool = True, out: str | Path | None = None, on_progress: OnProgress = silent) -> JoinReport:
    """Compare a store with a source by key and, unless `content` is False, by the sha256 of every encoded image, which reads them all.

    `out` names a parquet file to write, and nothing else is written: `store_row`, `source_row`, `by` (key or content) and `content_differs`
    (null if not known) of every match, in the order of the store. Raises JoinError for a key of the source that comes twice, ConfigError for
    an `out` that is there already, CannotWrite, and what the source raises.
    """
    if out is not None and os.path.lexists(out):
        raise ConfigError(f"{out} is there already.", "Name a new file with --out.")
    if out is not None and not Path(out).absolute().parent.is_dir():
        raise CannotWrite(f"Cannot write {out}: there is no such folder.", "Make it, or choose another path.")
    join = _join_by_key(store, source)
    keys = store.index("image", "key")
    by_key, source_rows = join.source_row_of_store >= 0, join.source_row_of_store
    differs, unknown = np.zeros(store.num_images, bool), np.ones(store.num_images, bool)
    if content:
        ours, theirs = _digests_of(store, source, on_progress)
        source_rows = _also_by_content(join, ours, theirs).source_row_of_store
        held = source_rows >= 0
        unknown[held] = ~(ours[held].any(axis=1) & theirs[source_rows[held]].any(axis=1))
        differs[held] = ~unknown[held] & (ours[held] != theirs[source_rows[held]]).any(axis=1)
    matches = np.flatnonzero(source_rows >= 0)
    if out is not None:
        columns = {
            "store_row": matches,
            "source_row": source_rows[matches],
            "by": np.where(by_key[matches], "key", "content"),
            "content_differs": pa.array(differs[matches], mask=unknown[matches]),
        }
        write_bytes(Path(out), parquet_bytes(pa.table(columns)))
    return JoinReport(
        images=store.num_images,
        pairs=len(source),
        by=join.by,
        matched=join.matched,
        matched_by_content=len(matches) - join.matched if content else None,
        missing_in_source=store.num_images - len(matches),
        missing_in_store=len(source) - len(np.unique(source_rows[matches])),
        content_differs=int(differs.sum()) if content else None,
        content_unknown=int((unknown[matches]).sum()) if content else None,
        differing_keys=tuple(keys.take(pa.array(np.flatnonzero(differs)[:20])).to_pylist()),
    )


def match_digests(digests: npt.NDArray[np.uint8], among: npt.NDArray[np.uint8]) -> Int64:
    """Return where each of `digests` [A, 32] lies first in `among` [B, 32], -1 if nowhere or if it is all zero (not known).

    The first 64 bits are sorted and searched, which takes 8 bytes per digest; a match counts when all 32 bytes agree.
    """
    heads, sought = (np.ascontiguousarray(part[:, :8]).view(">u8")[:, 0].astype(np.uint64) for part in (among, digests))
    order = np.argsort(heads, kind="stable")
    heads = heads[order]
    place, found = np.searchsorted(heads, sought), np.full(len(digests), -1)
    waiting = np.flatnonzero(digests.any(axis=1))
    while len(waiting):  # once for nearly all; again only where two digests begin with the same 64 bits
        waiting = waiting[place[waiting] < len(heads)]
        waiting = waiting[heads[place[waiting]] == sought[waiting]]
        candidates = order[place[waiting]]
        equal = (among[candidates] == digests[waiting]).all(axis=1)
        found[waiting[equal]] = candidates[equal]
        waiting = waiting[~equal]
        place[waiting] += 1
    return found


def positions(keys: pa.Array, among: pa.Array) -> Int64:
    """Return where each of `keys` lies in `among`, -1 if nowhere."""
    return pc.index_in(keys, value_set=among).fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)


def _join_by_key(store: Store, source: Source) -> Join:
    num_store, num_source = store.num_images, len(source)
    if num_store == num_source and fingerprint_of((source.key(i), source.captions(i)) for i in range(num_source)) == store.fingerprint:
        return Join(np.arange(num_store), np.arange(num_source), "fingerprint")
    source_keys = pa.array((source.key(i) for i in range(num_source)), pa.large_string())
    store_keys = store.index("image", "key").combine_chunks()
    if twice := repeated(source_keys):
        raise JoinError(f"{len(twice)} keys of {source.spec} come more than once: {', '.join(twice[:5])}.", "Choose a key column that is unique.")
    return Join(positions(store_keys, source_keys), positions(source_keys, store_keys), "key")


def _also_by_content(join: Join, ours: npt.NDArray[np.uint8], theirs: npt.NDArray[np.uint8]) -> Join:
    """Match by their digests, [N, 32] and [S, 32], what the keys leave: for every image of the store the first of the source."""
    source_rows, store_rows = join.source_row_of_store.copy(), join.store_row_of_source.copy()
    for_store, for_source = np.flatnonzero(source_rows < 0), np.flatnonzero(store_rows < 0)
    found = match_digests(ours[for_store], theirs[for_source])
    matched = for_store[found >= 0], for_source[found[found >= 0]]
    source_rows[matched[0]] = matched[1]
    store_rows[matched[1][::-1]] = matched[0][::-1]  # of several images of the store the first
    return Join(source_rows, store_rows, "content")


def _digests_of(store: Store, source: Source, on_progress: OnProgress) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    return as_digests(store.index("image", "sha256").to_pylist()), _source_digests(source, on_progress)


def _source_digests(source: Source, on_progress: OnProgress) -> npt.NDArray[np.uint8]:
    """Return the sha256 [S, 32] of every encoded image, zeros where there are no bytes; reading and decoding run on all of dask's workers."""

    def read(start: int, stop: int) -> npt.NDArray[np.uint8]:
        return as_digests([_sha256(source, i) for i in range(start, stop)])

    digests = np.zeros((len(source), 32), np.uint8)
    starts = range(0, len(source), _READ_ROWS)
    blocks = [(start, min(start + _READ_ROWS, len(source))) for start in starts]
    for (start, stop), found in zip(blocks, in_order(read, blocks), strict=True):
        digests[start:stop] = found
        on_progress("images read", stop, len(source), "")
    return digests


def _sha256(source: Source, i: int) -> str:
    try:
        return source.image(i).sha256
    except UndecodableImage as e:
        return e.sha256


def as_digests(hexes: Sequence[str]) -> npt.NDArray[np.uint8]:
    """Decode sha256 in hex to [rows, 32], '' to zeros."""
    return np.frombuffer(b"".join(bytes.fromhex(text).ljust(32, b"\0") for text in hexes), np.uint8).reshape(-1, 32)


def _some(keys: Sequence[str]) -> str:
    return ", ".join(itertools.islice(keys, 3)) + (", ..." if len(keys) > 3 else "") if keys else "no keys"

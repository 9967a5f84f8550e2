"""New arrays for the rows of a store that exists, or for some of them: a child, which is a store of its own and names its parent.

A parent never changes. A child holds the same images and texts (or those of chosen keys, in the parent's order), what the index says of them,
and arrays that the parent lacks; `identity.parent` pins the digest of the store whose rows they are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from kdstore.errors import ConfigError, IdentityMismatch, MissingFeature
from kdstore.jsonfile import differing_fields
from kdstore.store.blocks import Int64
from kdstore.store.codecs import Codec
from kdstore.store.derive import Part, plan_of, rows_of_keys
from kdstore.store.gather import integers, wrapped
from kdstore.store.join import positions
from kdstore.store.manifest import Manifest
from kdstore.store.plan import Plan, Side
from kdstore.store.reader import Store, open_store

OF_ROWS_AND_ARRAYS = ("source", "arrays", "lineage", "parent", "withdrawn")  # parts of an identity in which a child may differ


def plan_child(parent: Store, keys: Sequence[str] | None, unit_rows: int) -> tuple[Int64, Plan]:
    """Return the parent's image rows that a child takes (all, or those of `keys`) and the child's plan; raises JoinError for keys that are not there."""
    if keys is not None and not keys:
        raise ConfigError("There is no key.", "Give one line or more, or leave --keys out.")
    rows = np.arange(parent.num_images) if keys is None else rows_of_keys(parent, keys)
    return rows, plan_of([Part.of(parent, rows)], unit_rows)


def child_identity(parent: Store, identity: dict[str, Any]) -> dict[str, Any]:
    """Return the identity of a child; raises IdentityMismatch with the differing fields unless all that made the features is the parent's."""
    there, here = ({name: part for name, part in of.items() if name not in OF_ROWS_AND_ARRAYS} for of in (parent.identity, identity))
    if differs := differing_fields(there, here):
        hint = "Name the parent's own teacher, or make a store without --parent."
        raise IdentityMismatch(f"{parent.path} holds features of another kind ({differs}).", hint)
    return {**identity, "parent": {"digest": parent.digest}}


class Family(Store):
    """A store with the arrays of its children; rows are numbered as in the parent, whatever part of them a child holds.

    Where a child has more views of an array than its parent, all of them are the child's, the plain one too.
    """

    def __init__(self, manifest: Manifest, children: Sequence[Store]) -> None:
        super().__init__(manifest)
        self._children = tuple(children)
        self._lent: dict[str, tuple[Store, Int64 | None]] = {}
        own = set(self.arrays)
        for child in children:
            of = child.identity.get("parent")
            if not isinstance(of, dict) or of.get("digest") != self.digest:
                raise IdentityMismatch(f"{child.path} is no child of {self.path} ({self.digest}).", "Name the store that it was made for.")
            child_identity(self, child.identity)
            places = _places(self, child)
            for name in child.arrays.keys() - {"image/valid", "text/valid"}:
                if name in self.arrays and not (name in own and child.arrays[name].views > self.arrays[name].views == 1):
                    raise IdentityMismatch(f"{child.path} holds {name} as another of these stores does.", "Leave one of them out.")
                spec = child.arrays[name]
                rows = self.num_images if spec.side == "image" else self.num_texts
                self.arrays[name] = dataclasses.replace(spec, shape=(rows, *spec.shape[1:]))
                self._lent[name] = child, places[spec.side]
                self.codecs.pop(name, None)
                if name in child.codecs:
                    self.codecs[name] = child.codecs[name]

    def __reduce__(self) -> tuple[Any, ...]:
        return _open_again, (super().__reduce__(), tuple(child.__reduce__() for child in self._children))

    @property
    def digests(self) -> list[str]:
        return [self.digest, *sorted(child.digest for child in self._children)]

    def holds(self, name: str) -> npt.NDArray[np.bool_]:
        """Tell which rows of an array there are, bool [N] or [M]: of a child's it may be a part."""
        if name not in self._lent:
            return super().holds(name)
        child, place = self._lent[name]
        held = child.holds(name)
        return held if place is None else (place >= 0) & held[place]

    def located(self, name: str, rows: npt.ArrayLike) -> tuple[Store, npt.ArrayLike]:
        """Return the store that has an array, and where rows lie in it; raises MissingFeature for those that it does not hold, IndexError."""
        if name not in self._lent:
            return super().located(name, rows)
        child, place = self._lent[name]
        if place is None:
            return child, rows
        asked = wrapped(integers(rows, "row"), len(place), "row")
        if (lacking := asked[place[asked] < 0]).size:
            held = int((place >= 0).sum())
            raise MissingFeature(f"{child.path} holds {name} for {held} of {len(place)} rows; row {lacking[0]} is not among them.", "See Family.holds.")
        return child, place[asked]

    def gather(self, name: str, rows: npt.ArrayLike, views: npt.ArrayLike | None = None, out: npt.NDArray[Any] | None = None) -> npt.NDArray[Any]:
        """Return rows as `Store.gather` does; raises MissingFeature for rows that the child which has this array does not hold."""
        if name not in self._lent:
            return super().gather(name, rows, views, out)
        child, places = self.located(name, rows)
        return child.gather(name, places, views, out)

    def features(
        self, name: str, rows: npt.ArrayLike, views: npt.ArrayLike | None = None, out: npt.NDArray[np.float32] | None = None
    ) -> npt.NDArray[np.float32]:
        """Return features as `Store.features` does, by the lengths and the validity of the store that has them."""
        if name not in self._lent:
            return super().features(name, rows, views, out)
        child, places = self.located(name, rows)
        return child.features(name, places, views, out)

    def codec(self, name: str) -> Codec:
        """Return the codec of an array in `codecs`, its parameters read once."""
        return self._lent[name][0].codec(name) if name in self._lent else super().codec(name)


def _places(parent: Store, child: Store) -> dict[Side, Int64 | None]:
    """Return per side where a row of the parent lies in the child, -1 if nowhere, or None if both have the same rows.

    Raises JoinError for keys that the parent lacks, IdentityMismatch for rows in another order or other captions.
    """
    if child.fingerprint == parent.fingerprint:
        return {"image": None, "text": None}
    rows = positions(child.index("image", "key").combine_chunks(), parent.index("image", "key").combine_chunks())
    ascending = bool((rows >= 0).all() and (np.diff(rows) > 0).all())
    part = Part.of(parent, rows) if ascending else None
    if part is None or not np.array_equal(np.diff(parent.offsets)[rows], np.diff(child.offsets)):
        raise IdentityMismatch(f"{child.path} does not hold rows of {parent.path} in their order.", "Extract it again with --parent.")
    if not child.index("text", "sha256").combine_chunks().equals(parent.index("text", "sha256").take(pa.array(part.texts)).combine_chunks()):
        raise IdentityMismatch(f"{child.path} has other captions than {parent.path}.", "Extract it again with --parent.")
    return {"image": _inverse(part.images, parent.num_images), "text": _inverse(part.texts, parent.num_texts)}


def _inverse(rows: Int64, size: int) -> Int64:
    """Return where each of 0..size-1 lies in `rows`, -1 if nowhere."""
    place = np.full(size, -1)
    place[rows] = np.arange(len(rows))
    return place


def open_family(path: str | Path, *children: str | Path) -> Family:
    """Open a store with children of it; raises IdentityMismatch for a store that is not its child, and what `open_store` raises."""
    return family_of(open_store(path), [open_store(child) for child in children])


def family_of(parent: Store, children: Sequence[Store]) -> Family:
    """Make one of stores that are open; raises what `open_family` raises."""
    return Family(parent._manifest, children)


def _open_again(parent: tuple[Any, ...], children: tuple[tuple[Any, ...], ...]) -> Family:
    opened, *others = (reopen(*args) for reopen, args in (parent, *children))
    return Family(opened._manifest, others)

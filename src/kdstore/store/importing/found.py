"""What an import needs to know of a folder of features, whatever its layout."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy.typing as npt

from kdstore.data.source import Caption
from kdstore.errors import SourceError
from kdstore.store.plan import Side

_SHA256 = re.compile("[0-9a-f]{64}")
Pair = tuple[str, tuple[Caption, ...]]
Rows = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True, eq=False)
class Found:
    """Features in a folder: the shape of a row of each array, and what the layout says of it.

    `pairs` yields key and captions of every image in order, and is run through once before `read(side, start, stop)` is asked for rows of all arrays of a
    side (floats [rows, ...]) or `sha256(start, stop)` for the hashes of encoded images, '' where unknown.
    """

    shapes: dict[str, tuple[int, ...]]
    encoding: dict[str, dict[str, Any]]
    pairs: Callable[[], Iterator[Pair]]
    read: Callable[[Side, int, int], Rows]
    sha256: Callable[[int, int], list[str]]
    says: dict[str, Any] = field(default_factory=dict)
    notices: tuple[str, ...] = ()


def checked_sha256(text: str) -> str:
    """Return a sha256 in lower-case hex, '' as it is; raises SourceError for what is none."""
    if text and not _SHA256.fullmatch(text.lower()):
        raise SourceError(f"'{text[:80]}' is no sha256.", "Name another field with --sha256, or leave it out.")
    return text.lower()


def unknown_sha256(start: int, stop: int) -> list[str]:
    """Say of no image what its bytes were."""
    return [""] * (stop - start)

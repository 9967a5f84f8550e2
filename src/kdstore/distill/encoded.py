"""What an objective is a function of: the student's side of a batch, and what the batch is supervised with.

All are records of row tensors, one row per pair, so that a loop can treat them alike whatever a loss asks for: take slices, concatenate micro-batches,
gather them over ranks, cut the graph at the features. `map_rows` does all of that. A field that no term asks for is None in every batch of a run.

Shapes: B pairs, S width of the student, D of a teacher, T tokens, W their width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import TypeVar, cast

import torch
from torch import Tensor

Record = TypeVar("Record")


@dataclass(frozen=True, eq=False)
class Encoded:
    """What a student's towers return for a batch, before normalisation: `synthetic_BS` of a second caption, `tokens_BTW` of the image's patches."""

    image_BS: Tensor
    text_BS: Tensor
    synthetic_BS: Tensor | None = None
    tokens_BTW: Tensor | None = None


@dataclass(frozen=True, eq=False)
class TeacherRows:
    """One teacher's features of the same pairs, as its towers return them.

    `valid_B` says which pairs this teacher has; None: all of them, in every batch. `draw_B` are uniform numbers in [0, 1) that follow from seed and step,
    for terms that choose at random: an objective draws nothing itself.
    """

    image_BD: Tensor | None = None
    text_BD: Tensor | None = None
    valid_B: Tensor | None = None
    synthetic_BD: Tensor | None = None
    tokens_BTW: Tensor | None = None
    draw_B: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Supervision:
    """What is known of a batch: an id for each caption, equal for equal ones, and each teacher's rows."""

    caption_ids_B: Tensor
    synthetic_ids_B: Tensor | None = None
    teachers: tuple[TeacherRows, ...] = ()


def map_rows(function: Callable[..., Tensor], first: Record, *others: Record) -> Record:
    """Apply `function` to the tensors that stand in the same place of records of one structure; what is None stays None."""
    if first is None:
        return first
    if isinstance(first, Tensor):
        return cast(Record, function(first, *others))
    if isinstance(first, tuple):
        return cast(Record, tuple(map_rows(function, *parts) for parts in zip(first, *others, strict=True)))
    assert is_dataclass(first)
    parts = {field.name: map_rows(function, *(getattr(record, field.name) for record in (first, *others))) for field in fields(first)}
    return cast(Record, replace(first, **parts))  # type: ignore[type-var]


def join_rows(records: Sequence[Record]) -> Record:
    """Concatenate records of one structure: the micro-batches of a batch."""
    return map_rows(lambda *tensors: torch.cat(tensors), *records)


def row_tensors(record: object) -> list[Tensor]:
    """Return the tensors of a record in a fixed order."""
    found: list[Tensor] = []
    map_rows(lambda tensor: found.append(tensor) or tensor, record)  # type: ignore[func-returns-value]
    return found

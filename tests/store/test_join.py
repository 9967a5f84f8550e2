"""Joining a store with a source that is the same, reordered, reduced, extended, or another one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kdstore.data.source import Caption, LoadedImage
from kdstore.errors import JoinError
from kdstore.store import join_sources, open_store


@dataclass
class Rows:
    """A source without images."""

    rows: list[tuple[str, tuple[Caption, ...]]]
    spec: str = "rows"

    def __len__(self) -> int:
        return len(self.rows)

    def key(self, i: int) -> str:
        return self.rows[i][0]

    def captions(self, i: int) -> tuple[Caption, ...]:
        return self.rows[i][1]

    def image(self, i: int) -> LoadedImage:
        raise AssertionError("a join reads no image")


def test_the_same_source_joins_by_fingerprint(pristine: Path, sample: Any) -> None:
    join = join_sources(open_store(pristine), Rows(sample.rows))
    assert join.by == "fingerprint"
    assert (join.matched, join.missing_in_source, join.missing_in_store) == (45, 0, 0)
    assert np.array_equal(join.source_row_of_store, np.arange(45))
    assert np.array_equal(join.store_row_of_source, np.arange(45))


def test_other_captions_join_by_key(pristine: Path, sample: Any) -> None:
    join = join_sources(open_store(pristine), Rows([(key, ()) for key, _ in sample.rows]))
    assert join.by == "key"
    assert join.matched == 45


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.permutations(range(60)), st.integers(1, 60))
def test_reordered_and_partial_sources_join_by_key(pristine: Path, sample: Any, order: list[int], kept: int) -> None:
    rows = [sample.rows[i] if i < 45 else (f"new {i}", ()) for i in order[:kept]]
    held = [i for i in order[:kept] if i < 45]
    store = open_store(pristine)
    if not held:
        with pytest.raises(JoinError, match="No key of rows"):
            join_sources(store, Rows(rows))
        return
    join = join_sources(store, Rows(rows))
    assert (join.matched, join.missing_in_source, join.missing_in_store) == (len(held), 45 - len(held), kept - len(held))
    assert join.store_row_of_source.tolist() == [i if i < 45 else -1 for i in order[:kept]]
    assert all(order[source] == row for row, source in enumerate(join.source_row_of_store.tolist()) if source >= 0)


def test_a_key_that_comes_twice_is_refused(pristine: Path, sample: Any) -> None:
    with pytest.raises(JoinError, match="1 keys of rows come more than once: bild-7"):
        join_sources(open_store(pristine), Rows([*sample.rows, sample.rows[7]]))


def test_an_empty_source_matches_nothing(pristine: Path) -> None:
    with pytest.raises(JoinError, match=r"No key of rows \(no keys\)"):
        join_sources(open_store(pristine), Rows([]))

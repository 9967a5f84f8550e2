"""Freezing an enumeration: numbering, units, fingerprint, and what is refused."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdstore.data.mapped import repeats
from kdstore.data.source import Caption
from kdstore.errors import ConfigError, DamagedStore, SourceError
from kdstore.store import Plan, fingerprint_of

ROWS = [("a", (Caption("one"), Caption("two", "synthetic"))), ("b", ()), ("c", (Caption("one"),))]

sources = st.lists(
    st.tuples(
        st.text(st.characters(exclude_categories=["Cs"])),
        st.lists(st.builds(Caption, st.text(st.characters(exclude_categories=["Cs"]))), max_size=3).map(tuple),
    ),
    max_size=20,
    unique_by=lambda row: row[0],
)


def test_texts_are_numbered_by_image() -> None:
    plan = Plan.freeze(ROWS)
    assert plan.offsets.tolist() == [0, 2, 2, 3]
    assert plan.texts(0, 3) == ["one", "two", "one"]
    assert plan.kinds.to_pylist() == ["human", "synthetic", "human"]


@given(sources, st.sampled_from([1, 2, 8, 64]))
def test_units_cover_every_row_of_both_sides_once(rows: list[tuple[str, tuple[Caption, ...]]], unit_rows: int) -> None:
    plan = Plan.freeze(rows, unit_rows=unit_rows)
    for side in ("image", "text"):
        units = [unit for unit in plan.units if unit.side == side]
        assert [row for unit in units for row in range(unit.start, unit.stop)] == list(range(plan.rows(side)))
        assert all(unit.start == unit.number * unit_rows and 0 < len(unit) <= unit_rows for unit in units)


@given(sources)
def test_a_saved_plan_loads_as_it_was(rows: list[tuple[str, tuple[Caption, ...]]]) -> None:
    plan = Plan.freeze(rows, unit_rows=4)
    with tempfile.TemporaryDirectory() as folder:
        sha256 = plan.save(Path(folder) / "plan.arrow")
        loaded = Plan.load(Path(folder) / "plan.arrow", plan.fingerprint, 4, sha256)
    assert loaded.summary() == plan.summary()
    assert loaded.keys.equals(plan.keys)
    assert loaded.captions.equals(plan.captions)
    assert loaded.kinds.equals(plan.kinds)
    assert np.array_equal(loaded.offsets, plan.offsets)
    assert plan.fingerprint == fingerprint_of(rows)


@pytest.mark.parametrize("change", ["flipped", "cut", "emptied", "gone"])
def test_a_changed_plan_file_is_refused(change: str, tmp_path: Path) -> None:
    path, plan = tmp_path / "plan.arrow", Plan.freeze(ROWS)
    sha256 = plan.save(path)
    content = path.read_bytes()
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 1
    path.unlink() if change == "gone" else path.write_bytes({"flipped": flipped, "cut": content[:-9], "emptied": b""}[change])
    with pytest.raises(DamagedStore, match="not the plan"):
        Plan.load(path, plan.fingerprint, 4, sha256)


@given(st.lists(st.lists(st.integers(-3, 3), max_size=5), max_size=5), st.integers(0, 3))
def test_repeats_are_the_values_that_came_before(parts: list[list[int]], spare: int) -> None:
    values = [value for part in parts for value in part]
    found = repeats((np.array(part, np.int64) for part in parts), len(values) + spare)
    assert found.tolist() == sorted(value for i, value in enumerate(values) if value in values[:i])


@pytest.mark.parametrize(
    "other",
    [
        [ROWS[1], ROWS[0], ROWS[2]],
        ROWS[:2],
        [("a", (Caption("one"), Caption("two"))), *ROWS[1:]],
        [("a", (Caption("one"),)), ("b", (Caption("two", "synthetic"),)), ROWS[2]],
    ],
    ids=["order", "rows", "kind", "caption moved to the next image"],
)
def test_the_fingerprint_sees_every_change(other: list[tuple[str, tuple[Caption, ...]]]) -> None:
    assert fingerprint_of(other) != fingerprint_of(ROWS)


def test_the_fingerprint_is_what_the_format_says() -> None:
    assert fingerprint_of([]) == "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    # printf '["a",[["one","human"]]]\n' | sha256sum
    assert fingerprint_of([("a", (Caption("one"),))]) == "sha256:72f6fb04ada1016f3bce70b602123776360352f024cc11f0a0133ea1ab8d6d90"


def test_repeated_keys_are_named() -> None:
    with pytest.raises(SourceError, match="more than once: a"):
        Plan.freeze([*ROWS, ROWS[0]])


def test_unit_rows_must_be_a_power_of_two() -> None:
    with pytest.raises(ConfigError, match="found 12"):
        Plan.freeze(ROWS, unit_rows=12)


def test_units_grow_until_no_array_has_more_than_8192_shards() -> None:
    assert Plan.freeze(((str(i), ()) for i in range(8193)), unit_rows=1).unit_rows == 2
    assert Plan.freeze([("a", tuple(Caption(str(i)) for i in range(16385)))], unit_rows=1).unit_rows == 4

"""Joining a store with a source that is the same, reordered, reduced, extended, or another one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from kdstore.data.source import Caption, LoadedImage, UndecodableImage
from kdstore.errors import JoinError
from kdstore.store import join_sources, open_store, report_join
from kdstore.store.join import match_digests


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


@dataclass
class Pictures(Rows):
    """A source whose images are known by the sha256 of their bytes: '' cannot be decoded."""

    sha256: tuple[str, ...] = ()

    def image(self, i: int) -> LoadedImage:
        if not self.sha256[i]:
            raise UndecodableImage("no bytes")
        return LoadedImage(Image.new("RGB", (1, 1)), self.sha256[i])


def hashes(sample: Any, rows: list[int]) -> tuple[str, ...]:
    return tuple(sample.index_row(i)["sha256"] for i in rows)


def test_a_report_of_the_same_data_finds_nothing(pristine: Path, sample: Any) -> None:
    report = report_join(open_store(pristine), Pictures(sample.rows, sha256=hashes(sample, list(range(45)))))
    assert (report.by, report.matched, report.matched_by_content, report.missing_in_source, report.missing_in_store) == ("fingerprint", 45, 0, 0, 0)
    assert (report.content_differs, report.content_unknown) == (0, 2)  # the undecodable image, and image 0, whose hash is all zero here


def test_a_report_tells_changed_renamed_and_missing_images(pristine: Path, sample: Any, tmp_path: Path) -> None:
    order = [30, 31, 5, 6, 7, 40]
    rows = [sample.rows[30], sample.rows[31], ("renamed 5", ()), ("renamed 6", ()), sample.rows[7], ("new", ())]
    contents = [*hashes(sample, [30]), "f" * 64, *hashes(sample, order[2:5]), "e" * 64]
    report = report_join(open_store(pristine), Pictures(rows, sha256=tuple(contents)), out=tmp_path / "join.parquet")
    assert (report.by, report.matched, report.matched_by_content) == ("key", 3, 2)
    assert (report.missing_in_source, report.missing_in_store) == (40, 1)
    assert (report.content_differs, report.differing_keys) == (1, (sample.rows[31][0],))
    assert [p.name for p in tmp_path.iterdir()] == ["join.parquet"]
    table = pq.read_table(tmp_path / "join.parquet").to_pylist()
    assert [(row["store_row"], row["source_row"], row["by"], row["content_differs"]) for row in table] == [
        (5, 2, "content", False),
        (6, 3, "content", False),
        (7, 4, "key", False),
        (30, 0, "key", False),
        (31, 1, "key", True),
    ]


def test_a_report_without_contents_reads_no_image(pristine: Path, sample: Any) -> None:
    report = report_join(open_store(pristine), Rows([*sample.rows[40:], ("new", ())]), content=False)
    assert (report.matched, report.missing_in_source, report.missing_in_store) == (5, 40, 1)
    assert report.content_differs is report.matched_by_content is report.content_unknown is None


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 40), max_size=30), st.lists(st.integers(0, 40), max_size=30))
def test_digests_that_begin_alike_are_told_apart(sought: list[int], among: list[int]) -> None:
    def digests(numbers: list[int]) -> np.ndarray:
        """Four different beginnings only; 0 is no digest."""
        made = np.zeros((len(numbers), 32), np.uint8)
        for row, number in zip(made, numbers, strict=True):
            row[7], row[31] = number % 4, number
        return made

    found = match_digests(digests(sought), digests(among)).tolist()
    assert found == [among.index(number) if number and number in among else -1 for number in sought]

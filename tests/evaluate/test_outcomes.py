"""Outcomes of single items beside a result: what was written is read, and what was not written is refused."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdstore.errors import EvaluationError
from kdstore.evaluate.outcomes import Outcomes, Run, encode_outcomes, outcomes_path, read_outcomes, write_outcomes

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
SCORES = st.floats(0, 100)


def small(**runs: list[float]) -> Outcomes:
    fields = [f"q{i}" for i in range(4)], ["a", "a", "b", "b"], ["count", "color", "count", "color"]
    return Outcomes(*fields, tuple(Run(row, 0, np.array(score), ["x", "y", "x", ""]) for row, score in (runs or {"model": [0, 30, 60, 100]}).items()))


@given(st.data(), st.integers(1, 20))
def test_what_is_written_is_read(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, num_items: int) -> None:
    columns = [data.draw(st.lists(TEXTS, min_size=num_items, max_size=num_items)) for _ in range(3)]
    scores = [np.array(data.draw(st.lists(SCORES, min_size=num_items, max_size=num_items))) for _ in range(3)]
    items = [f"{i} {text}" for i, text in enumerate(columns[0])]
    runs = (Run("model", 0, scores[0], columns[2]), Run("model", 12, scores[1]), Run("vocabulary-oracle", None, scores[2], columns[1]))
    result = tmp_path_factory.mktemp("outcomes") / "vqa.json"
    record = write_outcomes(result, Outcomes(items, columns[1], columns[2], runs))
    read = read_outcomes(result, record)
    assert (read.item_N, read.group_N, read.kind_N) == (items, columns[1], columns[2])
    for written, found in zip(runs, read.runs, strict=True):
        assert (found.row, found.seed, found.answer_N) == (written.row, written.seed, written.answer_N)
        assert np.array_equal(found.score_N, written.score_N)
    assert [p.name for p in result.parent.iterdir()] == ["vqa.outcomes.parquet"]


def test_outcomes_that_are_gone_flipped_cut_or_of_another_result_are_refused(tmp_path: Path) -> None:
    result = tmp_path / "x.json"
    record = write_outcomes(result, small())
    content = outcomes_path(result).read_bytes()
    with pytest.raises(EvaluationError, match="older form"):
        read_outcomes(result, None)
    for wrong in (content[:-1], content[:100] + bytes([content[100] ^ 1]) + content[101:], encode_outcomes(small(model=[0, 0, 0, 0]))[0]):
        outcomes_path(result).write_bytes(wrong)
        with pytest.raises(EvaluationError, match=r"x\.outcomes\.parquet does not hold the outcomes that .*x\.json says"):
            read_outcomes(result, record)
    outcomes_path(result).unlink()
    with pytest.raises(EvaluationError, match="No file"):
        read_outcomes(result, record)


def test_a_record_that_agrees_with_a_file_of_another_form_is_refused(tmp_path: Path) -> None:
    result = tmp_path / "x.json"
    columns = {"item": ["a", "b"], "group": ["a", "b"], "kind": ["k", "k"], "score:model:0": [1.0, 2.0]}

    def read(changed: dict[str, object], **fields: object) -> Outcomes:
        path = outcomes_path(result)
        pq.write_table(pa.table({**columns, **changed}), path)
        content = path.read_bytes()
        runs = [{"row": "model", "seed": 0, "answers": False}]
        return read_outcomes(result, {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content), "items": 2, "runs": runs, **fields})

    assert len(read({})) == 2
    for changed in ({"score:model:0": [1.0, None]}, {"score:model:0": ["1", "2"]}, {"kind": [1, 2]}, {"item": ["a", None]}):
        with pytest.raises(EvaluationError, match="does not hold"):
            read(changed)
    for changed, said in (
        ({"score:model:0": [1.0, float("nan")]}, "0 and 100"),
        ({"score:model:0": [1.0, 101.0]}, "0 and 100"),
        ({"item": ["a", "a"]}, "twice"),
    ):
        with pytest.raises(EvaluationError, match=said):
            read(changed)
    for fields in ({"items": 3}, {"items": "many"}, {"bytes": 1}, {"runs": [{"row": "model", "seed": 1, "answers": False}]}, {"runs": 3}):
        with pytest.raises(EvaluationError, match="does not hold"):
            read({}, **fields)


def test_a_file_that_would_burst_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    result = tmp_path / "x.json"
    table = pa.table({"item": ["a" * (1 << 25)], "group": ["a"], "kind": ["k"], "score:model:": [1.0]})
    pq.write_table(table, outcomes_path(result), compression="zstd", write_statistics=False)
    content = outcomes_path(result).read_bytes()
    assert len(content) < 1 << 16
    runs = [{"row": "model", "seed": None, "answers": False}]
    with pytest.raises(EvaluationError, match="more than"):
        read_outcomes(result, {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content), "items": 1, "runs": runs})


def test_columns_that_do_not_fit_are_refused() -> None:
    for columns, said in (
        ((["a"], ["a"], ["k"], (Run("model", 0, np.zeros(2)),)), "one length"),
        (([], [], [], ()), "one length"),
        ((["a"], ["a"], ["k"], (Run("model", 0, np.zeros(1)), Run("model", 0, np.zeros(1)))), "of their own"),
        ((["a"], ["a"], ["k"], (Run("mo:del", 0, np.zeros(1)),)), "no ':'"),
        ((["a"], ["a"], ["k"], (Run("model", 0, np.array([-1.0])),)), "between 0 and 100"),
    ):
        with pytest.raises(EvaluationError, match=said):
            Outcomes(*columns)

"""Tables of results written by hand: what is shown, what is marked, what is refused."""

from __future__ import annotations

import csv
import io
from typing import Any

import pytest

from kdstore.errors import EvaluationError
from kdstore.evaluate.tables import csv_table, markdown_table

PROTOCOL = "sha256:" + "ab" * 32


def result(name: str, scores: dict[str, dict[str, Any]], *, seeds: tuple[int, ...] = (0, 1), **fields: Any) -> dict[str, Any]:
    return {
        "stage": "evaluate vqa",
        "model": {"name": name, "identity": {"teacher": {"weights_sha256": f"w-{name}"}}, "run": {"store": {"digest": "sha256:store"}}},
        "data": {"evaluated": {"name": "scenes/test"}},
        "metric": {"name": "vqa", "version": "2021"},
        "config_digest": PROTOCOL,
        "summary": [{"row": "model", "seeds": list(seeds), "scores": scores}],
        "made": {"versions": {"kdstore": "0.1"}},
        "digest": f"sha256:{name}",
        **fields,
    }


def score(mean: float, low: float, high: float) -> dict[str, Any]:
    return {"mean": mean, "interval": [low, high]}


def test_the_best_is_bold_only_where_its_interval_is_above_all_others() -> None:
    first = result("a", {"overall": score(67.456, 66.1, 68.9), "count": score(50, 48, 52)})
    second = result("b", {"overall": score(70, 69, 71), "count": score(53, 51, 55), "ap": {"mean": 12.345}})
    assert markdown_table([first, second]).splitlines() == [
        "| model |               overall |             count |    ap |",
        "| ----- | --------------------: | ----------------: | ----: |",
        "| a     |     67.5 [66.1, 68.9] | 50.0 [48.0, 52.0] |     - |",
        "| b     | **70.0 [69.0, 71.0]** | 53.0 [51.0, 55.0] | 12.35 |",
    ]


def test_what_differs_between_models_is_a_column_and_what_a_stranger_named_stays_in_its_cell() -> None:
    first = result("a|b\nc", {"overall": score(1, 0, 2)})
    other = result("d", {"overall": score(1, 0, 2)}, seeds=(0,), config_digest="sha256:" + "cd" * 32)
    lines = markdown_table([first, other]).splitlines()
    assert [cell.strip() for cell in lines[0].strip("|").split("|")] == ["model", "seeds", "protocol", "overall"]
    assert lines[2].startswith("| a\\|b c | 0 1 ")
    assert "| abababab |" in lines[2]
    assert "| cdcdcdcd |" in lines[3]
    assert len({len(line) for line in lines}) == 1


def test_other_items_under_one_name_are_a_column_and_nothing_is_the_best_of_them() -> None:
    """As scenes before their questions changed, or two folders of one layout; stores of one set of images have names of their own."""

    def of(name: str, low: float, data: str, digest: str, row: str = "model", **fields: Any) -> dict[str, Any]:
        summary = [{"row": row, "seeds": [0], "scores": {"overall": score(low + 1, low, low + 2)}}]
        return result(name, {}, data={"evaluated": {"name": data, "digest": digest}}, summary=summary, **fields)

    mixed = markdown_table([of("a", 10, "test", "sha256:1"), of("b", 90, "test", "sha256:2")])
    assert mixed.splitlines()[0].split() == ["|", "model", "|", "items", "|", "overall", "|"]
    assert "**" not in mixed
    agreement = [of("a", 10, "test", f"sha256:{teacher}", "image", teacher={"name": teacher}) for teacher in "tu"]
    assert [line.split(" | ")[0] for line in markdown_table(agreement).splitlines()[2:]] == ["| a & t, image", "| a & u, image"]
    assert markdown_table(agreement).splitlines()[0].split()[3] == "items"
    stores = markdown_table([of("a", 10, "store/a", "sha256:1"), of("b", 90, "store/b", "sha256:1")])
    assert stores.splitlines()[0].split() == ["|", "model", "|", "data", "|", "overall", "|"]
    assert stores.count("**") == 2


def test_csv_keeps_every_digit_and_where_it_comes_from() -> None:
    third = 100 / 3
    first, second = result("a", {"overall": score(third, 30, 40)}), result('b,"', {"ap": {"mean": 12.5}})
    rows = list(csv.DictReader(io.StringIO(csv_table([first, second]))))
    assert [row["model"] for row in rows] == ["a", 'b,"']
    assert float(rows[0]["overall"]) == third
    assert (rows[0]["overall low"], rows[0]["overall high"], rows[1]["overall"], rows[1]["ap low"]) == ("30", "40", "", "")
    assert rows[0] | {"row": "model", "data": "scenes/test", "metric": "vqa 2021", "seeds": "0 1", "protocol": PROTOCOL} == rows[0]
    assert rows[0] | {"weights": "w-a", "stores": "sha256:store", "result": "sha256:a", "kdstore": "0.1"} == rows[0]


def test_a_name_that_a_spreadsheet_would_run_is_a_text_in_csv_and_a_number_stays_one() -> None:
    bad = [result(f"{sign}1+1", {"-x": score(-1.5, -2, 0)}, data={"evaluated": {"name": "@SUM(A1)"}}) for sign in "=+-@\t"]
    rows = list(csv.DictReader(io.StringIO(csv_table(bad))))
    assert [row["model"] for row in rows] == [f"'{sign}1+1" for sign in "=+-@\t"]
    assert {(row["data"], row["'-x"], row["'-x low"]) for row in rows} == {("'@SUM(A1)", "-1.5", "-2")}


def test_a_result_of_an_older_form_has_a_mean_over_its_rows_and_no_interval() -> None:
    old = result("old", {})
    del old["summary"]
    old["rows"] = [{"row": "model", "scores": {"overall": 50.0}}, {"row": "question-only", "scores": {"overall": 30.0}}]
    assert markdown_table([old]).splitlines()[2:] == ["| old                |   50.00 |", "| old, question-only |   30.00 |"]


def test_a_table_across_stages_is_refused() -> None:
    with pytest.raises(EvaluationError, match="of one stage, found evaluate probe, evaluate vqa"):
        markdown_table([result("a", {}), result("b", {}, stage="evaluate probe")])
    with pytest.raises(EvaluationError, match="found none"):
        csv_table([])

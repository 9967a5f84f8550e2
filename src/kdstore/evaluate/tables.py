"""Results of one stage side by side: Markdown for people, CSV for programs.

What is not the same for all models (data, metric, seeds, protocol) becomes a column of the Markdown table rather than a reason to refuse it: a table
may hold several protocols, but not silently. A paired difference is another matter: see `compare`.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from typing import Any

from kdstore.errors import EvaluationError
from kdstore.evaluate.summary import summarise
from kdstore.jsonfile import digest_of

_SHOWN = ("data", "items", "metric", "seeds", "protocol")  # in Markdown, where they differ; items where one name stands for several
_TRACED = (*_SHOWN, "weights", "stores", "result", "kdstore")  # in CSV, always


def markdown_table(results: Sequence[dict[str, Any]]) -> str:
    """Render results of one stage in percent: means over seeds with their 95 % intervals; a score that a row lacks is a dash.

    A model's score is bold where its interval lies above those of all other models on the same items. Raises EvaluationError for results of several stages.
    """
    lines = list(_lines(results))
    scores = _score_names(lines)
    models = [(origin, record) for origin, record in lines if record["row"] == "model"] or lines  # agreement has rows of other names

    def distinct(*labels: str) -> int:
        return len({tuple(origin[label] for label in labels) for origin, _ in models})

    shown = [name for name in _SHOWN if distinct(name) > 1 and (name != "items" or distinct("data", name) > distinct("data"))]
    alike = distinct("items", "metric") == 1
    best = {name: _best([record["scores"].get(name) for _, record in models]) if alike else None for name in scores}
    table = [["model", *shown, *scores]]
    for origin, record in lines:
        name = origin["model"] if record["row"] == "model" else f"{origin['model']}, {record['row']}"
        table.append([name, *(_short(origin[label]) for label in shown), *(_cell(record["scores"].get(score), best[score]) for score in scores)])
    return aligned_table(table, num_texts=1 + len(shown))


def csv_table(results: Sequence[dict[str, Any]]) -> str:
    """Render results of one stage in full precision: where each row comes from, then for each score its mean and the ends of its interval."""
    lines = list(_lines(results))
    scores = _score_names(lines)
    sink = io.StringIO()
    rows = csv.writer(sink, lineterminator="\n")
    rows.writerow(map(inert, ["model", "row", *_TRACED, *(f"{score}{end}" for score in scores for end in ("", " low", " high"))]))
    for origin, record in lines:
        found = [record["scores"].get(score, {}) for score in scores]
        values = [value for score in found for value in (score.get("mean", ""), *score.get("interval", ("", "")))]
        rows.writerow([*map(inert, [origin["model"], record["row"], *(origin[label] for label in _TRACED)]), *values])
    return sink.getvalue()


def table_rows(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return what `csv_table` renders as records."""
    return [{**origin, **record} for origin, record in _lines(results)]


def _lines(results: Sequence[dict[str, Any]]) -> Iterator[tuple[dict[str, str], dict[str, Any]]]:
    """Yield for each row of each result, in order, where it comes from and its summary; of results of an older form the summary is made here."""
    stages = {result["stage"] for result in results}
    if len(stages) != 1:
        raise EvaluationError(f"A table holds results of one stage, found {', '.join(sorted(stages)) or 'none'}.", "Make one table per stage.")
    for result in results:
        for record in result.get("summary") or summarise(result["rows"], None):
            yield _origin(result, record), record


def _origin(result: dict[str, Any], record: dict[str, Any]) -> dict[str, str]:
    model, data = result["model"], result["data"]
    run = model.get("run") or {}
    stores = model.get("stores") or [store["digest"] for store in [run.get("store")] if store]
    return {
        "model": " & ".join(str(result[side]["name"]) for side in ("model", "teacher") if side in result),  # agreement is of both
        "data": str(data.get("evaluated", {}).get("name") or data.get("source")),
        "items": digest_of(items_asked(result)),
        "metric": " ".join(str(part) for part in result.get("metric", {}).values()),
        "seeds": " ".join(map(str, record["seeds"])),
        "protocol": result["config_digest"],
        "weights": str((model["identity"] or {"teacher": {}})["teacher"].get("weights_sha256", "")),  # a file of predictions has none
        "stores": " ".join(stores),
        "result": result.get("digest", ""),
        "kdstore": result["made"]["versions"]["kdstore"],
    }


def items_asked(result: dict[str, Any]) -> dict[str, Any]:
    """Return what tells which items a result scores: the digests of its data and, of images by class, the names and templates."""
    digests = {name: part["digest"] for name, part in result["data"].items() if isinstance(part, dict) and "digest" in part}
    return digests | ({"classes": result["classes"]} if "classes" in result else {})


def _score_names(lines: Sequence[tuple[dict[str, str], dict[str, Any]]]) -> list[str]:
    return list(dict.fromkeys(score for _, record in lines for score in record["scores"]))


def _best(scores: Sequence[dict[str, Any] | None]) -> dict[str, Any] | None:
    """Return the score whose interval lies above all others; None if they overlap, or one has none."""
    known = [score for score in scores if score is not None]
    if len(known) < 2 or any("interval" not in score for score in known):
        return None
    first, *others = sorted(known, key=lambda score: score["interval"][0], reverse=True)
    return first if first["interval"][0] > max(score["interval"][1] for score in others) else None


def _cell(score: dict[str, Any] | None, best: dict[str, Any] | None) -> str:
    if score is None:
        return "-"
    if "interval" not in score:
        return f"{score['mean']:.2f}"
    low, high = score["interval"]
    text = f"{score['mean']:.1f} [{low:.1f}, {high:.1f}]"
    return f"**{text}**" if score is best else text


def inert(text: str) -> str:
    """Put a quote before what a spreadsheet would run: a stranger may have named it."""
    return f"'{text}" if text.startswith(tuple("=+-@\t\r")) else text


def _short(text: str) -> str:
    return text.removeprefix("sha256:")[:8] if text.startswith("sha256:") else text


def aligned_table(table: Sequence[Sequence[str]], num_texts: int) -> str:
    """Write a Markdown table with columns of one width, the first ones of texts; what a stranger named cannot end a cell."""
    cells = [[" ".join(cell.split()).replace("|", "\\|") for cell in row] for row in table]
    widths = [max(3, *map(len, column)) for column in zip(*cells, strict=True)]
    padded = [[c.ljust(w) if i < num_texts else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))] for row in cells]
    rule = ["-" * w if i < num_texts else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    return "\n".join(f"| {' | '.join(row)} |" for row in [padded[0], rule, *padded[1:]]) + "\n"

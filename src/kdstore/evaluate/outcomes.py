"""What became of every item of a result: beside `X.json` lies `X.outcomes.parquet`, one row per item and two columns per run.

An item is whatever is scored by itself: a question, the query of a retrieval at one depth. Wide rather than long, so that all runs
(a row of the result under one seed) have the same items by form, and nothing is stored twice. The result records the file's sha256,
its size and its columns; the file is written first, so a result never stands without its outcomes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from kdstore.errors import EvaluationError
from kdstore.jsonfile import write_bytes
from kdstore.parquet import REFUSALS, bounded_column, first_line, is_text, open_parquet

SUFFIX = ".outcomes.parquet"
_TEXT_BYTES, _SLACK_BYTES = 1 << 10, 1 << 24  # what a row may take in one column, on average, and what a file of few rows may take beyond
_FIELDS = ("item", "group", "kind")
_REPAIR = "Restore it from where the result comes from, or evaluate again."


@dataclass(frozen=True)
class Run:
    """One row of a result under one seed (None where nothing is drawn): scores in percent, 0 to 100, and the answers where there are such."""

    row: str
    seed: int | None
    score_N: np.ndarray  # float64
    answer_N: Sequence[str] | None = None

    @property
    def columns(self) -> dict[str, Any]:
        name = _name(self.row, self.seed)
        answers = {} if self.answer_N is None else {f"answer:{name}": list(self.answer_N)}
        return {f"score:{name}": np.asarray(self.score_N, np.float64), **answers}


@dataclass(frozen=True)
class Outcomes:
    """The items, in one order for all runs.

    `kind` names the score that an item counts for (a question type, `image_retrieval_recall@1`), `item` is unique within its kind, and
    `group` is the image: items of one image are not independent. Raises EvaluationError for columns that do not fit.
    """

    item_N: Sequence[str]
    group_N: Sequence[str]
    kind_N: Sequence[str]
    runs: tuple[Run, ...]

    def __post_init__(self) -> None:
        num_items = len(self.item_N)
        lengths = {len(self.group_N), len(self.kind_N), *(len(column) for run in self.runs for column in run.columns.values())}
        if not num_items or lengths != {num_items}:
            raise EvaluationError(f"Outcomes are columns of one length, found {num_items} items beside {sorted(lengths)}.", _REPAIR)
        if len(set(zip(self.kind_N, self.item_N, strict=True))) != num_items:
            raise EvaluationError("Outcomes hold an item twice under one kind.", "Give every question an id of its own.")
        if len({(run.row, run.seed) for run in self.runs}) != len(self.runs) or any(":" in run.row for run in self.runs):
            raise EvaluationError("Outcomes need a row and a seed of their own for every run, and no ':' in a row's name.", _REPAIR)
        for run in self.runs:
            if not ((run.score_N >= 0) & (run.score_N <= 100)).all():  # NaN is neither
                raise EvaluationError(f"The row {run.row} has scores that are not between 0 and 100.", "A score is in percent; an item without one is no item.")

    def __len__(self) -> int:
        return len(self.item_N)


def outcomes_path(result: str | Path) -> Path:
    """Return where the outcomes of a result file lie."""
    path = Path(result)
    return path.with_name(path.name.removesuffix(".json") + SUFFIX)


def encode_outcomes(outcomes: Outcomes) -> tuple[bytes, dict[str, Any]]:
    """Return the file's bytes and what the result records of them."""
    columns: dict[str, Any] = dict(zip(_FIELDS, (list(outcomes.item_N), list(outcomes.group_N), list(outcomes.kind_N)), strict=True))
    for run in outcomes.runs:
        columns |= run.columns
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink, compression="zstd", write_statistics=False)
    content = sink.getvalue().to_pybytes()
    runs = [{"row": run.row, "seed": run.seed, "answers": run.answer_N is not None} for run in outcomes.runs]
    return content, {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content), "items": len(outcomes), "runs": runs}


def write_outcomes(result: str | Path, outcomes: Outcomes) -> dict[str, Any]:
    """Write the outcomes of a result file atomically; returns what the result records. Raises DiskFull, CannotWrite."""
    content, record = encode_outcomes(outcomes)
    write_bytes(outcomes_path(result), content)
    return record


def read_outcomes(result: str | Path, record: dict[str, Any] | None) -> Outcomes:
    """Read the outcomes of a result file that records them as `record`; raises EvaluationError unless they are what was written."""
    if record is None:
        found = f"{result} holds no outcomes of single items: its scores are no means of such (agreement, average precision), or it is of an older form."
        raise EvaluationError(found, "Put it in a table: kdstore evaluate table. If it is old, evaluate again.")
    path = outcomes_path(result)
    if not path.is_file():
        raise EvaluationError(f"No file {path} beside the result, which needs it.", _REPAIR)
    try:
        content = path.read_bytes() if path.stat().st_size == record["bytes"] else b""
        if hashlib.sha256(content).hexdigest() != record["sha256"]:
            raise ValueError("its size or its sha256 is another")
        return _parse(content, record)
    except EvaluationError as e:
        raise EvaluationError(f"{path}: {e.message}", e.hint) from e
    except (*REFUSALS, TypeError) as e:
        raise EvaluationError(f"{path} does not hold the outcomes that {result} says: {first_line(e)}.", _REPAIR) from e


def _parse(content: bytes, record: dict[str, Any]) -> Outcomes:
    rows = int(record["items"])
    limit = rows * _TEXT_BYTES + _SLACK_BYTES
    names = [_name(run["row"], run["seed"]) for run in record["runs"]]
    texts = [*_FIELDS, *(f"answer:{name}" for name, run in zip(names, record["runs"], strict=True) if run["answers"])]
    file = open_parquet(pa.BufferReader(content), rows, limit, texts)
    found = {name: _texts(bounded_column(file, content, name, limit, is_text)) for name in texts}
    runs = []
    for name, run in zip(names, record["runs"], strict=True):
        score_N = bounded_column(file, content, f"score:{name}", limit, pa.types.is_float64).to_numpy()
        runs.append(Run(run["row"], run["seed"], score_N, found.get(f"answer:{name}")))
    return Outcomes(found["item"], found["group"], found["kind"], tuple(runs))


def _name(row: str, seed: int | None) -> str:
    return f"{row}:{'' if seed is None else seed}"


def _texts(column: pa.ChunkedArray) -> list[str]:
    """Return texts as a list in which equal ones are one object: a long text that a dictionary repeats is not written out."""
    found: list[str] = []
    for chunk in column.chunks:
        values = chunk.dictionary.to_pylist()
        found += [values[i] for i in chunk.indices.to_pylist()]
    return found

"""VQA tables of the Hugging Face Hub: `hf:ORG/NAME[/CONFIG]`, with the columns that the common copies of VQA data sets have.

Columns and metric are named in the spec where they are others: `hf:ORG/NAME?question=Q&answers=A&image=I&question_id=ID&metric=exact`.
`HUB_METRICS` holds the copies whose layout was read on their cards; nothing is guessed for others, they say their metric.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import pyarrow as pa

from kdstore.data.images import decode_image
from kdstore.data.source import UndecodableImage
from kdstore.data.tables import hub_rows, read_cell
from kdstore.errors import EvaluationError, UnknownName
from kdstore.evaluate.datasets.files import Answers, answer_type
from kdstore.evaluate.datasets.form import VqaQuestion, VqaSplit
from kdstore.evaluate.datasets.submission import RECORDS, records

HUB = "hf:"
COLUMNS = ("question", "answers", "image", "question_id", "image_id", "question_type", "answer_type")
NEEDED = ("question", "answers", "image")
HUB_METRICS = {"lmms-lab/VQAv2": "vqa", "lmms-lab/OK-VQA": "vqa", "lmms-lab/textvqa": "textvqa", "lmms-lab/VizWiz-VQA": "vizwiz"}


def open_hub(spec: str) -> Callable[[Path | None, str, int | None], VqaSplit]:
    """Return the reader of a table of the Hub, by columns of these names unless the spec names others; raises UnknownName for a wrong option.

    Rows of one `image_id` are one image. Rows without an answer, or whose answers are all empty, make a split without answers.
    """
    name, _, query = spec.removeprefix(HUB).partition("?")
    if ":" in name:
        raise EvaluationError(f"{spec} names a split, and so do other settings.", f"Write {HUB}{name.partition(':')[0]} and name the split apart.")
    options = dict(parse_qsl(query, keep_blank_values=True))
    for option in options:
        if option not in (*COLUMNS, "metric"):
            raise UnknownName.of(f"option of {HUB}", option, (*COLUMNS, "metric"))
    return functools.partial(_open, name, options)


def _open(name: str, options: dict[str, str], folder: Path | None, split: str, num_images: int | None) -> VqaSplit:
    if folder is not None:
        raise EvaluationError(f"{HUB}{name} comes from the Hub and takes no folder, found {folder}.", "Leave the folder out.")
    repository = "/".join(name.split("/")[:2])
    metric = options.get("metric", HUB_METRICS.get(repository))
    if metric is None:
        raise EvaluationError(f"The metric of {HUB}{name} is not known.", f"Name it: '{HUB}{name}?metric=vqa' (or exact, textvqa, ...).")
    where = f"{HUB}{name}/{split}"
    table = hub_rows(f"{name}:{split}").data.table
    column_of = {c: table[options.get(c, c)] for c in COLUMNS if options.get(c, c) in table.column_names}
    for c in COLUMNS:
        if c not in column_of and (c in options or c in NEEDED):
            raise EvaluationError(f"{where} has no column '{options.get(c, c)}': found {', '.join(table.column_names)}.", f"Name it: ?{c}=COLUMN.")
    values = {c: column.to_pylist() for c, column in column_of.items() if c != "image"}
    return _split(where, column_of["image"], values, metric, vizwiz=repository == "lmms-lab/VizWiz-VQA")


def _split(where: str, images: pa.ChunkedArray, values: dict[str, list[Any]], metric: str, *, vizwiz: bool) -> VqaSplit:
    answered = any(_texts(answers) for answers in values["answers"])
    answers_of = Answers(where)
    rows: list[int] = []
    number: dict[Any, int] = {}
    questions = []
    for row, question in enumerate(values["question"]):
        image_id = values["image_id"][row] if "image_id" in values else row
        if number.setdefault(image_id, len(rows)) == len(rows):
            rows.append(row)
        question_id = values["question_id"][row] if "question_id" in values else row
        given = _texts(values["answers"][row])
        if not isinstance(question, str) or not isinstance(question_id, int | str) or bool(given) != answered:
            raise EvaluationError(f"Row {row} of {where} has no question, no id or no answer.", "Name other columns: ?question=COLUMN&answers=COLUMN.")
        given_records = answers_of(given)
        kinds = [values[c][row] if c in values and isinstance(values[c][row], str) else other for c, other in _other_types(given_records)]
        questions.append(VqaQuestion(question_id, (number[image_id],), question, kinds[0], kinds[1], given_records))
    names = tuple(f"{where}/{values['image_id'][row] if 'image_id' in values else row}" for row in rows)

    def read(i: int) -> bytes:
        try:
            return read_cell(images, None, rows[i])
        except UndecodableImage as e:
            raise EvaluationError(f"Row {rows[i]} of {where} has no image: {e.reason}.", "Name another column: ?image=COLUMN.") from e

    return VqaSplit(
        where,
        tuple(questions),
        names,
        lambda i: decode_image(read(i)),
        lambda i: hashlib.sha256(read(i)).hexdigest(),
        lambda i: len(read(i)),
        metric,
        answered,
        records("image", "answer") if vizwiz else RECORDS,
    )


def _other_types(answers: tuple[dict[str, Any], ...]) -> tuple[tuple[str, str], tuple[str, str]]:
    return ("question_type", "all"), ("answer_type", answer_type(answers))


def _texts(answers: Any) -> list[Any]:
    """Return the answers of a cell: a text, a list of texts or of records; none where all are empty, as test splits have them."""
    listed = answers if isinstance(answers, list) else [] if answers is None else [answers]
    return listed if any(a["answer"] if isinstance(a, dict) and "answer" in a else a for a in listed) else []

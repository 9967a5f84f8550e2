"""Reading the files of VQA data sets: found or named with the folder they were looked for in, whole or named with what is wrong.

Files are read whole with the standard library's parser: the largest that a machine of 24 GB should read at once is the annotation file of
VQA v2 train (docs/vqa-datasets.md has time and memory).
"""

from __future__ import annotations

import hashlib
import json
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from kdstore.data.images import MAX_BYTES, decode_image
from kdstore.errors import EvaluationError
from kdstore.evaluate.datasets.form import VqaQuestion, VqaSplit
from kdstore.evaluate.datasets.submission import RECORDS, Submission
from kdstore.metrics.vqa import normalize_answer

ANNOTATORS = 10
ANSWER_FIELDS = ("answer", "answer_confidence", "raw_answer")
_RESTORE = "Restore the file from its origin."


def folder_of(dataset: str, folder: Path | None) -> Path:
    """Return the folder; raises EvaluationError if none was given or it is none."""
    if folder is None:
        raise EvaluationError(f"The data set {dataset} is read from a folder, and none was given.", "Give its folder: --data-dir PATH or folder = 'PATH'.")
    if not folder.is_dir():
        raise EvaluationError(f"No folder {folder}, from which {dataset} is to be read.", "Give the folder that holds the data set: --data-dir PATH.")
    return folder


def chosen(dataset: str, split: str, splits: Sequence[str]) -> str:
    """Return the split; raises EvaluationError unless it is one of these."""
    if split not in splits:
        raise EvaluationError(f"{dataset} has no split '{split}'.", f"Its splits: {', '.join(splits)}.")
    return split


def one_of(folder: Path, *names: str) -> Path:
    """Return the first of these files (paths from `folder`) that is there; raises EvaluationError that names them all."""
    for name in names:
        if (folder / name).exists():
            return folder / name
    hint = f"Give the folder that holds the data set, and one of its splits (docs/vqa-datasets.md). Looked for: {', '.join(names)}."
    raise EvaluationError(f"No {Path(names[0]).name} in {(folder / names[0]).parent}.", hint)


def read_text(path: Path) -> str:
    """Read a file of UTF-8; raises EvaluationError naming file and folder."""
    if not path.is_file():
        raise EvaluationError(f"No file {path.name} in {path.parent}.", "Give the folder that holds the data set, and one of its splits: docs/vqa-datasets.md.")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as e:
        raise EvaluationError(f"{path} is not UTF-8: {e.reason} at byte {e.start}.", "Save it as UTF-8.") from e


def read_json(path: Path) -> Any:
    """Read a JSON file; raises EvaluationError for one that is missing, cut off or no JSON."""
    text = read_text(path)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as e:
        raise EvaluationError(f"{path} is not JSON, or not all of it: {e}.", _RESTORE) from e


def read_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Read a file of one JSON object per line, with the number of the line."""
    for line, text in enumerate(read_text(path).split("\n"), start=1):
        if text.strip():
            try:
                row = json.loads(text)
            except (ValueError, RecursionError) as e:
                raise EvaluationError(f"Line {line} of {path} is not JSON: {e}.", _RESTORE) from e
            if not isinstance(row, dict):
                raise EvaluationError(f"Line {line} of {path} is not a JSON object.", _RESTORE)
            yield line, row


def rows_of(path: Path, content: Any, fields: Mapping[str, type], inside: str | None = None) -> list[Any]:
    """Return the records of a file, in the field `inside` or at its top; raises EvaluationError unless each has these fields of these types."""
    rows = content.get(inside) if inside and isinstance(content, dict) else None if inside else content
    if not isinstance(rows, list):
        raise EvaluationError(f"{path} holds no list of records{f' {inside!r}' if inside else ''}.", _RESTORE)
    for n, row in enumerate(rows):
        for name, kind in fields.items():
            if not isinstance(row, dict) or not isinstance(row.get(name), kind):
                found = repr(row.get(name)) if isinstance(row, dict) else repr(row)
                raise EvaluationError(f"Record {n} of {path} must have '{name}' ({kind.__name__}), found {found[:80]}.", _RESTORE)
    return rows


class Answers:
    """Makes answer records of texts or records: with ids, a single one repeated as ten annotators, and equal ones one object, since splits hold millions."""

    def __init__(self, where: str) -> None:
        self._where = where
        self._known: dict[tuple[Any, ...], dict[str, Any]] = {}

    def __call__(self, answers: Iterable[Any]) -> tuple[dict[str, Any], ...]:
        """Return the records; raises EvaluationError for an answer that is no text."""
        given = list(answers)
        return tuple(self._record(a, n) for n, a in enumerate(given * ANNOTATORS if len(given) == 1 else given, start=1))

    def _record(self, answer: Any, number: int) -> dict[str, Any]:
        fields = answer if isinstance(answer, dict) else {"answer": answer}
        key = (number, fields.get("answer"), fields.get("answer_confidence"), fields.get("raw_answer"))
        try:
            return self._known[key]
        except (KeyError, TypeError):  # a new one, or no text
            pass
        if not isinstance(key[1], str) or not all(value is None or isinstance(value, str) for value in key[2:]):
            raise EvaluationError(
                f"{self._where}: an answer must be a text or a record with the text 'answer', found {fields.get('answer', answer)!r}.", "Correct the answers."
            )
        self._known[key] = record = {**{name: fields[name] for name in ANSWER_FIELDS if name in fields}, "answer_id": number}
        return record


def answer_type(answers: Sequence[dict[str, Any]]) -> str:
    """Guess the official type: `yes/no`, `number` or `other`, of the first most frequent answer; `other` where there is none."""
    texts = [a["answer"] for a in answers]
    answer = normalize_answer(max(texts, key=texts.count)) if texts else ""
    return "yes/no" if answer in ("yes", "no") else "number" if answer.isdecimal() else "other"


class ImageFiles:
    """Numbers image files in the order in which questions name them."""

    def __init__(self) -> None:
        self._number: dict[Path, int] = {}

    def __call__(self, path: Path) -> int:
        return self._number.setdefault(path, len(self._number))

    def split(self, name: str, questions: Iterable[VqaQuestion], *, metric: str = "vqa", answered: bool = True, submission: Submission = RECORDS) -> VqaSplit:
        """Return the split of these questions on these files."""
        asked = tuple(questions)  # may number the images as it goes
        paths = tuple(self._number)
        read = _reader(paths)
        return VqaSplit(
            name,
            asked,
            tuple(map(str, paths)),
            lambda i: decode_image(read(i)),
            lambda i: hashlib.sha256(read(i)).hexdigest(),
            lambda i: _size(paths[i]),
            metric,
            answered,
            submission,
        )


def _reader(paths: tuple[Path, ...]) -> Callable[[int], bytes]:
    def read(i: int) -> bytes:
        if _size(paths[i]) > MAX_BYTES:
            raise EvaluationError(f"{paths[i]} is larger than any image that is read ({MAX_BYTES:,} bytes).", _RESTORE)
        try:
            return paths[i].read_bytes()
        except OSError as e:
            raise EvaluationError(f"Image {paths[i]} cannot be read: {e.strerror}.", "Make it readable, or take its questions out.") from e

    return read


def _size(path: Path) -> int:
    hint = "Give the folder that holds the images, as the questions name them."
    try:
        found = path.stat()
    except OSError as e:
        raise EvaluationError(f"No image {path.name} in {path.parent} ({e.strerror}).", hint) from e
    if not stat.S_ISREG(found.st_mode):
        raise EvaluationError(f"No image {path.name} in {path.parent} (it is no file).", hint)
    return found.st_size

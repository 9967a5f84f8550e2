"""VQA data sets: a data set is one function of (folder, split, number of images wanted) in `VQA_DATASETS`."""

from __future__ import annotations

import functools
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from kdstore.data.images import decode_image
from kdstore.data.scenes import Scenes
from kdstore.errors import EvaluationError, UnknownName
from kdstore.evaluate.datasets.form import VqaQuestion, VqaSplit
from kdstore.metrics.vqa import normalize_answer

__all__ = ["VQA_DATASETS", "VqaQuestion", "VqaSplit", "open_vqa"]

COLORS = frozenset({"black", "blue", "brown", "cyan", "gray", "green", "grey", "orange", "pink", "purple", "red", "teal", "white", "yellow"})


def open_vqa(name: str, split: str, *, folder: str | Path | None = None, num_images: int | None = None) -> VqaSplit:
    """Open a split of a registered data set, or the questions on its first `num_images` images.

    Raises UnknownName for an unknown data set, EvaluationError for a missing file or a question that cannot be read, or if no question is left.
    """
    if name not in VQA_DATASETS:
        raise UnknownName.of("VQA data set", name, VQA_DATASETS)
    opened = VQA_DATASETS[name](Path(folder) if folder is not None else None, split, num_images)
    if num_images is not None:
        questions = tuple(q for q in opened.questions if max(q.images) < num_images)
        opened = replace(opened, name=f"{opened.name}:{num_images}", questions=questions, image_names=opened.image_names[:num_images])
    if not opened.questions:
        raise EvaluationError(f"{opened.name} holds no question.", "Give a split that has questions.")
    repeated = [i for i, n in Counter(q.question_id for q in opened.questions).items() if n > 1]
    if repeated:
        raise EvaluationError(f"{opened.name} has {len(repeated)} repeated question ids (first: {repeated[0]}).", "Give every question an id of its own.")
    return opened


def _scenes(folder: Path | None, split: str, num_images: int | None) -> VqaSplit:
    if folder is not None:
        raise EvaluationError(f"scenes are built in and take no folder, found {folder}.", "Leave the folder out.")
    return _drawn_scenes(split, num_images)


@functools.lru_cache(maxsize=4)  # several models are evaluated on the same scenes: ask about them once
def _drawn_scenes(split: str, num_images: int | None) -> VqaSplit:
    source = Scenes(split, num_images)
    questions = tuple(
        VqaQuestion(q.question_id, (i,), q.question, q.question_type, q.answer_type, q.answers) for i in range(len(source)) for q in source.questions(i)
    )
    return VqaSplit(f"scenes/{split}", questions, tuple(source.key(i) for i in range(len(source))), source.image, lambda i: source.image(i).sha256)


def _easy_vqa(folder: Path | None, split: str, num_images: int | None) -> VqaSplit:
    """Read `SPLIT/questions.json`, rows of [question, answer, image id], and `SPLIT/images/ID.png`; question types follow from the answer."""
    root = _folder_of("easy-vqa", folder) / split
    rows = _read_json(root / "questions.json")
    image_ids = sorted({image_id for _, _, image_id in rows})
    number = {image_id: i for i, image_id in enumerate(image_ids)}
    questions = []
    for question_id, (question, answer, image_id) in enumerate(rows):
        question_type = "yes/no" if answer in ("yes", "no") else "color" if answer in COLORS else "shape"
        questions.append(VqaQuestion(question_id, (number[image_id],), question, question_type, _answer_type([answer]), _records([answer])))
    return _image_files(f"easy-vqa/{split}", tuple(questions), tuple(root / "images" / f"{image_id}.png" for image_id in image_ids))


def _jsonl(folder: Path | None, split: str, num_images: int | None) -> VqaSplit:
    """Read `SPLIT.jsonl`: one object per line with `image` (a path from the folder), `question`, and `answers` or `answer`.

    Optional are `question_id` (else the line's number), `question_type` (else `all`) and `answer_type` (else from the answers).
    """
    path = _folder_of("jsonl", folder) / f"{split}.jsonl"
    number: dict[Path, int] = {}
    questions = []
    for line, row in _read_jsonl(path):
        answers = row.get("answers", [row["answer"]] if "answer" in row else None)
        if not (isinstance(row.get("image"), str) and isinstance(row.get("question"), str) and isinstance(answers, list) and answers):
            raise EvaluationError(
                f"Line {line} of {path} must have the texts 'image' and 'question', and 'answers' (a list) or 'answer'; it has {', '.join(row)}.",
                "Correct the line.",
            )
        question_id = row.get("question_id", line)
        if not isinstance(question_id, int | str):
            raise EvaluationError(f"Line {line} of {path} has the question_id {question_id!r}; expected a number or a text.", "Correct the line.")
        image = number.setdefault(path.parent / row["image"], len(number))
        records = _records(answers)
        types = {"question_type": "all", "answer_type": _answer_type([r["answer"] for r in records])}
        types |= {name: row[name] for name in types if name in row}
        for name, value in types.items():
            if not isinstance(value, str):
                raise EvaluationError(f"Line {line} of {path} has the {name} {value!r}; expected a text.", "Correct the line.")
        questions.append(VqaQuestion(question_id, (image,), row["question"], types["question_type"], types["answer_type"], records))
    return _image_files(f"jsonl/{split}", tuple(questions), tuple(number))


def _folder_of(dataset: str, folder: Path | None) -> Path:
    if folder is None:
        raise EvaluationError(f"The data set {dataset} is read from a folder, and none was given.", "Give its folder: --data-dir PATH or folder = 'PATH'.")
    return folder


def _read_text(path: Path) -> str:
    if not path.is_file():
        raise EvaluationError(f"No file {path.name} in {path.parent}.", "Give the folder that holds the data set, and one of its splits.")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as e:
        raise EvaluationError(f"{path} is not UTF-8: {e.reason} at byte {e.start}.", "Save it as UTF-8.") from e


def _read_json(path: Path) -> list[tuple[str, str, int]]:
    text = _read_text(path)
    try:
        rows = [(question, answer, image_id) for question, answer, image_id in json.loads(text)]
    except (ValueError, TypeError) as e:
        raise EvaluationError(f"{path} is not a JSON list of [question, answer, image id]: {e}.", "Restore the file from its origin.") from e
    for row in rows:
        if not (isinstance(row[0], str) and isinstance(row[1], str) and isinstance(row[2], int)):
            raise EvaluationError(f"{path} holds {list(row)}; expected [question, answer, image id].", "Restore the file from its origin.")
    return rows


def _read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for line, text in enumerate(_read_text(path).splitlines(), start=1):
        if text.strip():
            try:
                row = json.loads(text)
            except ValueError as e:
                raise EvaluationError(f"Line {line} of {path} is not JSON: {e}.", "Correct the line.") from e
            if not isinstance(row, dict):
                raise EvaluationError(f"Line {line} of {path} is not a JSON object.", "Correct the line.")
            yield line, row


def _records(answers: list[Any]) -> tuple[dict[str, Any], ...]:
    """Turn answers (texts or records) into records with ids; a single one is repeated as ten annotators."""
    repeated = answers * 10 if len(answers) == 1 else answers
    records = tuple({**(a if isinstance(a, dict) else {"answer": a}), "answer_id": n} for n, a in enumerate(repeated, start=1))
    for record in records:
        if not isinstance(record.get("answer"), str):
            raise EvaluationError(f"An answer must be a text or a record with the text 'answer', found {record.get('answer')!r}.", "Correct the answers.")
    return records


def _answer_type(answers: list[str]) -> str:
    """Guess the official type: `yes/no`, `number` or `other`, of the first most frequent answer."""
    answer = normalize_answer(max(answers, key=answers.count))
    return "yes/no" if answer in ("yes", "no") else "number" if answer.isdecimal() else "other"


def _image_files(name: str, questions: tuple[VqaQuestion, ...], paths: tuple[Path, ...]) -> VqaSplit:
    def read(i: int) -> bytes:
        try:
            return paths[i].read_bytes()
        except OSError as e:
            raise EvaluationError(
                f"No image {paths[i].name} in {paths[i].parent} ({e.strerror}).", "Give the folder that holds the images, as the questions name them."
            ) from e

    return VqaSplit(name, questions, tuple(str(p) for p in paths), lambda i: decode_image(read(i)), lambda i: hashlib.sha256(read(i)).hexdigest())


VQA_DATASETS: dict[str, Callable[[Path | None, str, int | None], VqaSplit]] = {"scenes": _scenes, "easy-vqa": _easy_vqa, "jsonl": _jsonl}
"""Name -> reader of (folder, split, number of images wanted); a reader of files may ignore the number."""

"""GQA 1.2: an object of questions by id, whole or in chunks (`NAME/NAME_0.json`, ...), on images of Visual Genome and others in `images`.

Consistency needs an answer to every entailed question, which the balanced files may lack: answer `val_all` to report it. Validity and
plausibility need `TIER_choices.json` of the owners' eval.zip; where it is missing they are not in the score.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kdstore.errors import EvaluationError
from kdstore.evaluate.datasets.files import Answers, ImageFiles, answer_type, chosen, folder_of, one_of, read_json
from kdstore.evaluate.datasets.form import VqaQuestion, VqaSplit
from kdstore.evaluate.datasets.submission import records

SPLITS = (*(f"{tier}_{part}" for tier in ("train", "val", "testdev", "test", "challenge") for part in ("balanced", "all")), "submission_all")
UNANSWERED = ("test", "challenge", "submission")
_EXTRA = ("imageId", "isBalanced", "types", "groups", "entailed", "semantic", "annotations")
_RESTORE = "Restore the file from its origin."


def open_gqa(folder: Path | None, split: str, num_images: int | None) -> VqaSplit:
    """Open a split (`train`: train_balanced, and so on); test, challenge and submission have no answers."""
    root = folder_of("gqa", folder)
    split = chosen("gqa", split if "_" in split else f"{split}_balanced", SPLITS)
    tier = split.partition("_")[0]
    answered = tier not in UNANSWERED
    choices = _choices(root, tier)
    answers_of, images, questions = Answers(f"gqa/{split}"), ImageFiles(), []
    for path in _files(root, f"{split}_questions"):
        for question_id, row in _questions(path, answered):
            records_ = answers_of([row["answer"]]) if answered else ()
            extra = {name: row[name] for name in _EXTRA if name in row}
            if choices is not None and question_id in choices:
                extra["choices"] = choices[question_id]
            kind = row["types"]["structural"] if answered else "all"
            image = images(root / "images" / f"{row['imageId']}.jpg")
            questions.append(VqaQuestion(question_id, (image,), row["question"], kind, answer_type(records_), records_, extra))
    return images.split(f"gqa/{split}", questions, metric="gqa", answered=answered, submission=records("questionId", "prediction"))


def scene_graphs(folder: str | Path, split: str) -> dict[str, dict[str, Any]]:
    """Read the scene graphs of train or val, by image: what `kdstore.metrics.gqa.gqa_grounding` compares attention with."""
    tier = split.partition("_")[0]
    name = f"{tier}_sceneGraphs.json"
    path = one_of(Path(folder), name, f"sceneGraphs/{name}")
    scenes = read_json(path)
    for image, scene in _object(path, scenes).items():
        if not (isinstance(scene, dict) and {"width", "height", "objects"} <= scene.keys()):
            raise EvaluationError(f"Image {image} of {path} has no width, height and objects.", _RESTORE)
    return scenes


def _files(root: Path, name: str) -> list[Path]:
    """Return the file of this name, or its chunks in their order."""
    chunks = [(int(number[1]), p) for p in root.glob(f"{name}/{name}_*.json") if (number := re.fullmatch(rf"{name}_(\d+)\.json", p.name))]
    if chunks and not (root / f"{name}.json").exists():
        if sorted(number for number, _ in chunks) != list(range(len(chunks))):
            raise EvaluationError(f"{root / name} has {len(chunks)} chunks, and not those of 0 to {len(chunks) - 1}.", "Restore the missing chunks.")
        return [path for _, path in sorted(chunks)]
    return [root / f"{name}.json"]


def _questions(path: Path, answered: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    needed: dict[str, type] = {"question": str, "imageId": str}
    if answered:
        needed |= {"answer": str, "isBalanced": bool, "types": dict, "groups": dict, "entailed": list, "semantic": list}
    for question_id, row in _object(path, read_json(path)).items():
        wrong = [name for name, kind in needed.items() if not isinstance(row, dict) or not isinstance(row.get(name), kind)]
        if wrong or (answered and not _is_described(row)):
            raise EvaluationError(
                f"Question {question_id} of {path} has no {', '.join(wrong) or 'types, groups and program'} as published files have it.", _RESTORE
            )
        yield question_id, row


def _is_described(row: dict[str, Any]) -> bool:
    """Whether a question has what the metric breaks its score down by."""
    types = all(isinstance(row["types"].get(name), str) for name in ("structural", "semantic", "detailed"))
    return types and "global" in row["groups"] and all(isinstance(step, dict) and {"operation", "argument"} <= step.keys() for step in row["semantic"])


def _choices(root: Path, tier: str) -> dict[str, Any] | None:
    path = next((root / p for p in (f"{tier}_choices.json", f"eval/{tier}_choices.json") if (root / p).is_file()), None)
    if path is None:
        return None
    choices = _object(path, read_json(path))
    for question_id, of_question in choices.items():
        if not (isinstance(of_question, dict) and isinstance(of_question.get("valid"), list) and isinstance(of_question.get("plausible"), list)):
            raise EvaluationError(f"Question {question_id} of {path} has no lists 'valid' and 'plausible'.", _RESTORE)
    return choices


def _object(path: Path, content: Any) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise EvaluationError(f"{path} is no JSON object by id.", _RESTORE)
    return content

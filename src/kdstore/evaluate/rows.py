"""Rows of a VQA result that are finished, and checkpoints of those that are not, in a folder beside the result.

A row's folder is named by the digest of all that decides its answers: the protocol, what the images' features are made by, the training questions with
their answers, the evaluated questions without theirs, and names and sizes of the images. So a rerun finds what is done, other settings never meet it, and
more seeds or controls cost only themselves. An image file of equal name and size is taken to be what it was: nothing is hashed for a row that is finished.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

import kdstore
from kdstore.config import as_dict
from kdstore.errors import EvaluationError
from kdstore.evaluate.fit import Kept
from kdstore.evaluate.protocol import NOT_IN_DIGEST, VqaConfig
from kdstore.evaluate.task import VqaTask
from kdstore.jsonfile import digest_of, disk_errors, make_folders, read_json, write_json
from kdstore.models.checkpoint import export_model, write_tensors
from kdstore.models.load import Model

ANSWERS, CHECKPOINT, HEAD = "answers.json", "checkpoint.pt", "head.safetensors"


@dataclass(frozen=True)
class Row:
    """One row of a result under one seed: `model`, `question-only` or `untrained`; `settings` is the digest of what decides it."""

    name: str
    seed: int
    settings: str

    def folder(self, out: str | None) -> Path | None:
        """Return where it is kept; None where nothing is."""
        return None if out is None else rows_folder(out) / f"{self.name}-seed{self.seed}-{self.settings.removeprefix('sha256:')[:12]}"


def rows_folder(out: str) -> Path:
    """Return the folder of the rows of a result file."""
    return Path(out).with_name(Path(out).name.removesuffix(".json") + ".rows")


def row_of(name: str, seed: int, config: VqaConfig, task: VqaTask, images: dict[str, Any]) -> Row:
    """Name a row; `images` says what its features are made by."""
    decides = {
        "row": name,
        "seed": seed,
        "images": images,
        "protocol": {k: v for k, v in as_dict(config).items() if k not in (*NOT_IN_DIGEST, "metric_version")},
        "train": task.train.digest,
        "asked": [[q.question_id, q.question] for q in task.evaluated.questions],
        "images_asked_about": task.images_digest,
        "evaluated": task.evaluated.name,
        "version": kdstore.__version__,
    }
    return Row(name, seed, digest_of(decides))


def kept_answers(row: Row, out: str | None) -> dict[str, Any] | None:
    """Return what `keep_answers` kept of a row; None if it is not finished. Raises EvaluationError for a damaged file."""
    folder = row.folder(out)
    if folder is None or not (folder / ANSWERS).is_file():
        return None
    found = read_json(folder / ANSWERS, EvaluationError)
    if found.get("settings") != row.settings:
        raise EvaluationError(f"{folder / ANSWERS} is of another row.", "Remove it.")
    return found


def keep_answers(row: Row, out: str | None, content: dict[str, Any]) -> None:
    """Keep a finished row: `answers`, one for each question of the evaluated split, and what is said of its head; its checkpoint goes."""
    folder = row.folder(out)
    if folder is not None:
        write_json(folder / ANSWERS, {**content, "settings": row.settings})
        (folder / CHECKPOINT).unlink(missing_ok=True)


def keep_model(row: Row, out: str | None, model: Model, head: nn.Module) -> None:
    """Keep a tuned model as a folder that `--model` takes, and its head beside it."""
    folder = row.folder(out)
    assert folder is not None, "a tower is not trained without a result file"
    export_model(folder, model.clip, model.config, model.tokenizer)
    write_tensors(folder / HEAD, head)


def checkpoint_of(row: Row, out: str | None) -> Kept | None:
    """Return where a row's checkpoint lies, its folder made; None where nothing is kept. Raises DiskFull, CannotWrite."""
    folder = row.folder(out)
    if folder is None:
        return None
    with disk_errors(folder):
        make_folders(folder)
    return Kept(folder / CHECKPOINT, row.settings)

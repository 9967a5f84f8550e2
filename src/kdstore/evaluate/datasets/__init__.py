"""VQA data sets: one reader per layout in `VQA_DATASETS`, tables of the Hub by `hf:ORG/NAME`, and the form that all of them have."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from kdstore.errors import EvaluationError, UnknownName
from kdstore.evaluate.datasets.aokvqa import open_aokvqa
from kdstore.evaluate.datasets.builtin import open_scenes
from kdstore.evaluate.datasets.clevr import open_clevr
from kdstore.evaluate.datasets.daquar import open_daquar
from kdstore.evaluate.datasets.easyvqa import open_easy_vqa
from kdstore.evaluate.datasets.form import VqaQuestion, VqaSplit
from kdstore.evaluate.datasets.gqa import open_gqa
from kdstore.evaluate.datasets.hub import HUB, open_hub
from kdstore.evaluate.datasets.jsonl import open_jsonl
from kdstore.evaluate.datasets.nlvr2 import open_nlvr2
from kdstore.evaluate.datasets.submission import read_predictions, submission, write_submission
from kdstore.evaluate.datasets.textvqa import open_textvqa
from kdstore.evaluate.datasets.vizwiz import open_vizwiz
from kdstore.evaluate.datasets.vqa import open_ok_vqa, open_vqa_v1, open_vqa_v2

__all__ = [
    "VQA_DATASETS",
    "VqaQuestion",
    "VqaSplit",
    "check_vqa_name",
    "open_vqa",
    "read_predictions",
    "scored_split",
    "submission",
    "write_submission",
]


def check_vqa_name(name: str) -> None:
    """Raise UnknownName unless it is that of a registered data set or begins with `hf:`."""
    if not name.startswith(HUB) and name not in VQA_DATASETS:
        raise UnknownName.of("VQA data set", name, VQA_DATASETS, f"Or {HUB}ORG/NAME.")


def scored_split(name: str) -> str:
    """Name the split of a data set that is scored where none is named: one whose answers are public, and that is not for training."""
    return SCORED_SPLITS.get(name, "val")


def open_vqa(name: str, split: str, *, folder: str | Path | None = None, num_images: int | None = None) -> VqaSplit:
    """Open a split of a registered data set or of one of the Hub, or the questions on its first `num_images` images.

    Raises UnknownName for an unknown data set, EvaluationError for a missing file or a question that cannot be read, or if no question is left.
    """
    check_vqa_name(name)
    reader = open_hub(name) if name.startswith(HUB) else VQA_DATASETS[name]
    opened = reader(Path(folder) if folder is not None else None, split, num_images)
    if num_images is not None:
        questions = tuple(q for q in opened.questions if max(q.images) < num_images)
        opened = replace(opened, name=f"{opened.name}:{num_images}", questions=questions, image_names=opened.image_names[:num_images])
    if not opened.questions:
        raise EvaluationError(f"{opened.name} holds no question.", "Give a split that has questions.")
    if any(q.question_type == "overall" for q in opened.questions):
        raise EvaluationError(f"{opened.name} has questions of the type 'overall', which is what the score of all of them is called.", "Rename the type.")
    repeated = [i for i, n in Counter(q.question_id for q in opened.questions).items() if n > 1]
    if repeated:
        raise EvaluationError(f"{opened.name} has {len(repeated)} repeated question ids (first: {repeated[0]}).", "Give every question an id of its own.")
    return opened


VQA_DATASETS: dict[str, Callable[[Path | None, str, int | None], VqaSplit]] = {
    "scenes": open_scenes,
    "vqav2": open_vqa_v2,
    "vqav1": open_vqa_v1,
    "okvqa": open_ok_vqa,
    "aokvqa": open_aokvqa,
    "vizwiz": open_vizwiz,
    "textvqa": open_textvqa,
    "gqa": open_gqa,
    "clevr": open_clevr,
    "nlvr2": open_nlvr2,
    "daquar": open_daquar,
    "easy-vqa": open_easy_vqa,
    "jsonl": open_jsonl,
}
"""Name -> reader of (folder, split, number of images wanted); a reader of files may ignore the number."""

SCORED_SPLITS = {"easy-vqa": "test", "daquar": "test", "nlvr2": "dev"}
"""Data set -> what it has for `val`."""

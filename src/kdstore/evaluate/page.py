"""A page of the questions that one model answers right and another wrong: one HTML file that opens offline.

Questions, answers and names are a stranger's: the template escapes them, and the page's own policy forbids every script and every request, so the
filters are radio buttons and CSS. Of many questions a fixed sample is shown, and the page says of how many.
"""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from PIL import Image

import kdstore
from kdstore.errors import ConfigError, EvaluationError
from kdstore.evaluate.datasets import open_vqa
from kdstore.evaluate.datasets.form import VqaSplit
from kdstore.jsonfile import write_bytes
from kdstore.progress import OnProgress, silent

_STAGES = ("evaluate vqa", "evaluate score")
_PIXELS = 256  # longest side of a picture on the page


@dataclass(frozen=True)
class Answered:
    """What a model answered, by seed, and the mean score of its answers, in percent."""

    name: str
    score_N: np.ndarray
    answer_SN: Sequence[Sequence[str]]


def open_questions(result: dict[str, Any], folder: str | None = None) -> VqaSplit:
    """Open the questions that a result was scored on, from `folder` if they lie elsewhere now; raises EvaluationError if they are not the same."""
    if result["stage"] not in _STAGES:
        raise ConfigError(f"A page shows questions with their images, and these results are of '{result['stage']}'.", "Leave --page out.")
    config = result["config"]
    name = config["eval_split"] if "eval_split" in config else config["split"]
    split = open_vqa(config["dataset"], name, folder=folder or config["folder"], num_images=config.get("eval_images"))
    if split.record()["digest"] != result["data"]["evaluated"]["digest"]:
        hint = "Name the data set's folder as it was: --data-dir PATH. Scenes of another version ask other questions."
        raise EvaluationError(f"The questions of {split.name} are not those that were scored.", hint)
    return split


def write_page(
    path: str | Path,
    split: VqaSplit,
    item_N: Sequence[str],
    sides: tuple[Answered, Answered],
    *,
    right_from: float,
    examples: int,
    seed: int = 0,
    on_progress: OnProgress = silent,
) -> None:
    """Write the page: of each side at most `examples` questions, drawn by the seed, that it alone answers with a score of `right_from` or more.

    `item_N` are the ids of the questions behind the sides' columns. Raises EvaluationError for an image that cannot be decoded.
    """
    question_of = {str(q.question_id): q for q in split.questions}
    right_a, right_b = (side.score_N >= right_from for side in sides)
    groups, cards = [], []
    for name, found_N in (("a", right_a & ~right_b), ("b", right_b & ~right_a)):
        found = np.flatnonzero(found_N)
        chosen = np.sort(np.random.default_rng(seed).permutation(found)[:examples])
        groups.append({"id": name, "found": len(found), "shown": len(chosen)})
        cards += [(name, int(n)) for n in chosen]
    kinds = sorted({question_of[item_N[n]].question_type for _, n in cards})
    records = []
    for done, (right, n) in enumerate(cards):
        question = question_of[item_N[n]]
        answers = [_counted(answer_N[n] for answer_N in side.answer_SN) for side in sides]
        records.append(
            {
                "right": right,
                "kind": kinds.index(question.question_type),
                "id": question.question_id,
                "question": question.question,
                "images": [{"name": split.image_names[i], "data": _picture(split.image(i).image)} for i in question.images],
                "truth": _counted(str(record["answer"]) for record in question.answers),
                "sides": [{"answers": given, "score": side.score_N[n]} for given, side in zip(answers, sides, strict=True)],
            }
        )
        on_progress("page", done + 1, len(cards), "")
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(_template())
    page = template.render(split=split.name, sides=[side.name for side in sides], groups=groups, kinds=kinds, cards=records, version=kdstore.__version__)
    write_bytes(Path(path), page.encode())


def _template() -> str:
    return files("kdstore.evaluate").joinpath("page.html").read_text(encoding="utf-8")


def _counted(answers: Iterable[str]) -> list[tuple[str, int]]:
    return Counter(answers).most_common()


def _picture(image: Image.Image) -> str:
    """Return a small JPEG as a data URI."""
    small = image.convert("RGB")
    small.thumbnail((_PIXELS, _PIXELS))
    sink = io.BytesIO()
    small.save(sink, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(sink.getvalue()).decode()}"

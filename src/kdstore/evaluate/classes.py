"""Class names, templates and labels of zero-shot classification and probes: named sets, files of lines, and the labels of a source.

ImageNet's names and templates are those that open_clip ships. The names of the small sets are the data sets' own; the other templates are short and our own:
scores with them stand beside each other, not beside published ones, for which the paper's are given with `--templates FILE`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import open_clip

from kdstore.errors import ConfigError, EvaluationError, UnknownName
from kdstore.evaluate.outcomes import Outcomes, Run

PLACES = ("{}", "{c}")
"""What a template has where the name goes."""


@dataclass(frozen=True, eq=False)
class Labels:
    """The names of C classes, and which of them each of N images has."""

    names: tuple[str, ...]
    of_image: list[set[int]]
    notice: str = ""

    @property
    def single_N(self) -> np.ndarray | None:
        """The label of each image, int64 [N]; None where some image has several."""
        return np.array([min(found) for found in self.of_image]) if all(len(found) == 1 for found in self.of_image) else None


def class_names(name: str) -> tuple[str, ...]:
    """Return a named set of class names, or the lines of a file; raises UnknownName and ConfigError."""
    return _lines(name, "class names", CLASS_NAMES)


def templates(name: str) -> tuple[str, ...]:
    """Return a named set of templates, or the lines of a file, each with a place for the name; raises UnknownName and ConfigError."""
    found = _lines(name, "templates", TEMPLATES)
    if without := next((line for line in found if not any(place in line for place in PLACES)), None):
        raise ConfigError(f"The template '{without}' has no place for the class name.", "Write {} where it goes.")
    return found


def filled(template: str, name: str) -> str:
    """Put a class name into a template; nothing else in either is read as a format."""
    return re.sub(r"\{c?\}", lambda _: name, template)


def number_labels(texts: Sequence[tuple[str, ...]], names: Sequence[str] | None) -> Labels:
    """Number the labels of N images by a list of class names; without one by themselves, in sorted order, underscores read as spaces.

    With names, a label is one of them, or a number from 0; labels that are all neither, and as many as the names, stand for them in sorted order, as in folders
    of WordNet ids, which `notice` says. Raises EvaluationError for any other label, for numbers without names and for a single class.
    """
    distinct = sorted({text for of_image in texts for text in of_image}, key=lambda text: (not text.isdecimal(), int(text) if text.isdecimal() else 0, text))
    notice = ""
    if names is None:
        if all(text.isdecimal() for text in distinct):
            raise EvaluationError(
                f"The labels are numbers ({', '.join(distinct[:4])}, ...) without names.", "Give the names: --classnames FILE, a line per class."
            )
        names, number = [text.replace("_", " ") for text in distinct], {text: c for c, text in enumerate(distinct)}
    else:
        number = {text: c for text in distinct if (c := _number(text, names)) is not None}
        if not number and len(distinct) == len(names):
            number = {text: c for c, text in enumerate(distinct)}
            notice = f"The labels ({distinct[0]}, ...) are none of the class names: in sorted order they are taken for them ({names[0]}, ...)."
    if unknown := [text for text in distinct if text not in number]:
        found = f"{len(unknown)} of {len(distinct)} labels are none of the {len(names)} class names: {', '.join(unknown[:4])}."
        raise EvaluationError(found, "Give --classnames FILE with a line for each label, or labels that are line numbers from 0.")
    if len(names) < 2:
        raise EvaluationError(f"There is one class, '{names[0]}', and nothing to choose from.", "Name data or class names with two classes or more.")
    return Labels(tuple(names), [{number[text] for text in of_image} for of_image in texts], notice)


def constant_scores(label_N: np.ndarray) -> dict[str, float]:
    """Return, in percent, what the answer that is right most often gets everywhere: the floor of any score."""
    counts = np.bincount(label_N)
    return {"acc1": 100 * float(counts.max() / counts.sum()), "mean_per_class_recall": 100 / int((counts > 0).sum())}


def hits_of_ranks(keys: list[str], ranks: dict[str, np.ndarray], num_classes: int, seed: int | None = None) -> Outcomes:
    """Turn ranks of the truth, by the prefix of their scores, into outcomes: an item is an image, by its key, once for each accuracy."""
    depths = {"acc1": 1, "acc5": 5} if num_classes >= 5 else {"acc1": 1}
    hits = {f"{prefix}{name}": 100.0 * (rank_N < depth) for prefix, rank_N in ranks.items() for name, depth in depths.items()}
    items = keys * len(hits)
    return Outcomes(items, items, [kind for kind in hits for _ in keys], (Run("model", seed, np.concatenate(list(hits.values()))),))


def _number(text: str, names: Sequence[str]) -> int | None:
    """Find a label among the names, as text or as a number; None if it is neither. Raises EvaluationError for a name that stands twice."""
    places = [c for c, name in enumerate(names) if _plain(name) == _plain(text)]
    if len(places) > 1:
        raise EvaluationError(f"The class name '{text}' stands twice in the list, as numbers {places[0]} and {places[1]}.", "Give labels as numbers from 0.")
    if places:
        return places[0]
    return int(text) if text.isdecimal() and int(text) < len(names) else None


def _plain(name: str) -> str:
    return name.replace("_", " ").casefold()


def _lines(name: str, what: str, known: dict[str, tuple[str, ...]]) -> tuple[str, ...]:
    if name in known:
        return known[name]
    path = Path(name)
    if not path.is_file():
        raise UnknownName.of(f"set of {what}", name, known, "Or give the path of a file with one per line.")
    try:
        lines = tuple(line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(
            f"Cannot read the {what} in {name}: {getattr(e, 'strerror', None) or 'it is no UTF-8 text'}.", "Give a text file, one per line."
        ) from e
    if not lines:
        raise ConfigError(f"The file of {what} {name} is empty.", "Write one per line.")
    return lines


CLASS_NAMES: dict[str, tuple[str, ...]] = {
    "imagenet": tuple(open_clip.IMAGENET_CLASSNAMES),
    "cifar10": ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
    "stl10": ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck"),
    "digits": ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
}

TEMPLATES: dict[str, tuple[str, ...]] = {
    "plain": ("{}",),
    "photo": ("a photo of a {}.",),
    "photos": ("a photo of a {}.", "a blurry picture of a {}.", "a {} seen from near.", "a small {} far away.", "one {} among other things.", "this is a {}."),
    "textures": ("a surface that looks {}.", "something {} seen from near.", "a {} pattern."),
    "satellite": ("a satellite picture of {}.", "{} seen from above.", "an aerial view of {}."),
    "digits": ("the number {}.", "the digit {}, written by hand.", "a sign with the number {}."),
    "imagenet": tuple(template("{}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES),
    "imagenet-simple": tuple(template("{}") for template in open_clip.SIMPLE_IMAGENET_TEMPLATES),
}
"""`imagenet` (80) and `imagenet-simple` (7) are OpenAI's, from open_clip; the others are ours."""

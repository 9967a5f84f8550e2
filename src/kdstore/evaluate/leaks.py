"""Images that are in two splits: a model that was trained on an image has seen what it is asked about.

Names are compared first, then sizes; only images of equal size are hashed, so that nothing else is read. Where images are drawn, or are not there
(features may come from a store), names alone are compared, and the result says so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kdstore.errors import EvaluationError
from kdstore.evaluate.datasets.form import VqaSplit
from kdstore.progress import OnProgress, silent

SHOWN = 20  # pairs of names in a result


@dataclass(frozen=True)
class Leaks:
    """The images of the evaluated split that are images of the other too, as (name, name there), and how many questions are asked about them."""

    evaluated: str
    train: str
    same_name: tuple[tuple[str, str], ...]
    same_content: tuple[tuple[str, str], ...]
    num_questions: int
    compared: str

    def __len__(self) -> int:
        return len(self.same_name) + len(self.same_content)

    def record(self) -> dict[str, Any]:
        """Say it in a result, with the first names."""
        pairs = (*self.same_name, *self.same_content)
        counts = {"images": len(self), "by_name": len(self.same_name), "by_content": len(self.same_content), "questions": self.num_questions}
        return {"compared": self.compared, **counts, "first": [list(pair) for pair in pairs[:SHOWN]]}

    def notice(self) -> str:
        """Say it in one line; '' if there is none."""
        if not len(self):
            return ""
        name, there = (*self.same_name, *self.same_content)[0]
        return f"{len(self)} images of {self.evaluated} ({self.num_questions} questions) are in {self.train} too, first {name} as {there}."


def find_leaks(train: VqaSplit, evaluated: VqaSplit, *, on_progress: OnProgress = silent) -> Leaks:
    """Find the images of `evaluated` that `train` has, by name or by content."""
    number_of = {name: i for i, name in enumerate(train.image_names)}
    same_name = {i: number_of[name] for i, name in enumerate(evaluated.image_names) if name in number_of}
    sizes = image_sizes(train), image_sizes(evaluated)
    same_content = {}
    if sizes[0] and sizes[1]:
        same_content = _same_content(train, evaluated, sizes[0], {i: size for i, size in sizes[1].items() if i not in same_name}, on_progress)
    leaked = same_name.keys() | same_content.keys()

    def named(found: dict[int, int]) -> tuple[tuple[str, str], ...]:
        return tuple((evaluated.image_names[i], train.image_names[there]) for i, there in sorted(found.items()))

    return Leaks(
        evaluated=evaluated.name,
        train=train.name,
        same_name=named(same_name),
        same_content=named(same_content),
        num_questions=sum(not leaked.isdisjoint(q.images) for q in evaluated.questions),
        compared="names and content" if sizes[0] and sizes[1] else "names",
    )


def check_leaks(train: VqaSplit, evaluated: VqaSplit, leaks: str, *, on_progress: OnProgress = silent) -> dict[str, Any]:
    """Return the record of the images that are in both splits, with a notice if there are any; raises EvaluationError if `leaks` is `refuse`."""
    found = find_leaks(train, evaluated, on_progress=on_progress)
    if found and leaks == "refuse":
        raise EvaluationError(found.notice(), "Take these images out of one split, or report them: --set leaks=report.")
    if found:
        on_progress("notice", 0, 0, found.notice())
    return found.record()


def image_sizes(split: VqaSplit) -> dict[int, int]:
    """Return the size of every image; none if one has no size."""
    sizes = {}
    for i in range(split.num_images):
        try:
            size = split.size(i)
        except EvaluationError:  # its image is not there; who needs its pixels will say so
            return {}
        if size is None:
            return {}
        sizes[i] = size
    return sizes


def _same_content(train: VqaSplit, evaluated: VqaSplit, train_sizes: dict[int, int], sizes: dict[int, int], on_progress: OnProgress) -> dict[int, int]:
    """Return evaluated image -> image of `train` with the same bytes; what is read are images of a size that both splits have."""
    both = set(train_sizes.values()) & set(sizes.values())
    there = [i for i, size in train_sizes.items() if size in both]
    here = [i for i, size in sizes.items() if size in both]
    hashes: dict[str, int] = {}
    found = {}
    for n, i in enumerate(there):
        hashes.setdefault(train.sha256(i), i)
        _tell(on_progress, n, len(there) + len(here))
    for n, i in enumerate(here, start=len(there)):
        if (twin := hashes.get(evaluated.sha256(i))) is not None:
            found[i] = twin
        _tell(on_progress, n, len(there) + len(here))
    return found


def _tell(on_progress: OnProgress, n: int, total: int) -> None:
    if (n + 1) % 256 == 0 or n + 1 == total:
        on_progress("images in both splits", n + 1, total, "")

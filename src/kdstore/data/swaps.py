"""Two captions of a scene, a true and a false one, that differ in one class of words: what of a caption does a model take in?

All objects of one colour, or shape, are given one that is absent; a relation turns round; two shapes exchange their numbers; or, of the same words, two objects
exchange their colours, which only a model that binds words to objects takes in. The false caption is thus true of another scene that is drawn just as often,
so no length, word or order of words tells which of the two is false. One object's colour replaced would: such captions repeat fewer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

from kdstore.data.scenes import ATTRIBUTES, RELATION_GAP, Dice, Scene, Scenes, count_caption, order_caption, relation_text, relations, unique
from kdstore.data.source import PROBE, Caption, LoadedImage
from kdstore.errors import SourceError, UnknownName

OPTION = "swapped"
OPPOSITES = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}

Pair = tuple[str, str]
"""The true caption and the false one."""


class SwappedScenes:
    """Scenes with two more captions of the kind `probe` for each of some classes of words, the true one first; where there are none, one text stands twice."""

    notices: tuple[str, ...] = ()

    def __init__(self, scenes: Scenes, words: Sequence[str]) -> None:
        if scenes.probe is not None:
            raise SourceError(f"Labels ({scenes.spec}) and swapped captions cannot be told apart in one source.", "Leave one of them out.")
        for word in words:
            if word not in SWAPS:
                raise UnknownName.of("class of words of scenes", word, SWAPS)
        self.scenes, self.words = scenes, tuple(words)
        self.spec = f"{scenes.spec}?{OPTION}={','.join(words)}"

    def __len__(self) -> int:
        return len(self.scenes)

    def key(self, i: int) -> str:
        return self.scenes.key(i)

    def captions(self, i: int) -> tuple[Caption, ...]:
        own, scene = self.scenes.captions(i), self.scenes.scene(i)
        pairs = (swapped_captions(scene, word, self.scenes.split, i) or (own[0].text,) * 2 for word in self.words)
        return own + tuple(Caption(text, PROBE) for pair in pairs for text in pair)

    def image(self, i: int) -> LoadedImage:
        return self.scenes.image(i)


def swapped_captions(scene: Scene, word: str, split: str, index: int) -> Pair | None:
    """Return a true and a false caption of a scene that differ in a class of words, one of SWAPS; None where the scene has nothing to exchange."""
    return SWAPS[word](Dice("swaps-1", word, split, index), scene)


def _rename(attribute: str) -> Callable[[Dice, Scene], Pair | None]:
    def pair(dice: Dice, scene: Scene) -> Pair | None:
        down = sorted(scene.things, key=lambda t: t.y)
        there = {getattr(t, attribute) for t in down}
        old = dice.pick(sorted(there))
        new = dice.pick([value for value in ATTRIBUTES[attribute] if value not in there])
        named = [replace(t, **{attribute: new}) if getattr(t, attribute) == old else t for t in down]  # type: ignore[arg-type]
        return order_caption(down), order_caption(named)

    return pair


def _exchange_colors(dice: Dice, scene: Scene) -> Pair | None:
    down = sorted(scene.things, key=lambda t: t.y)
    choices = [(i, j) for j in range(len(down)) for i in range(j) if down[i].color != down[j].color]
    if not choices:
        return None
    i, j = dice.pick(choices)
    exchanged = {i: replace(down[i], color=down[j].color), j: replace(down[j], color=down[i].color)}
    return order_caption(down), order_caption([exchanged.get(k, t) for k, t in enumerate(down)])


def _turn_round(dice: Dice, scene: Scene) -> Pair | None:
    """Relate two objects that no others are named like: else the false caption might be true of another two."""
    known = dice.shuffled(unique(scene.things, "color", "shape"))
    for a, b in ((a, b) for a in known for b in known if a is not b):
        words = [word for word, gap in relations(a, b).items() if gap >= RELATION_GAP]
        if words:
            word = dice.pick(words)
            return relation_text(a, word, b), relation_text(a, OPPOSITES[word], b)
    return None


def _exchange_counts(dice: Dice, scene: Scene) -> Pair | None:
    counts = Counter(t.shape for t in scene.things)
    choices = [(a, b) for a in sorted(counts) for b in sorted(counts) if counts[a] < counts[b]]
    if not choices:
        return None
    a, b = dice.pick(choices)
    return count_caption(counts), count_caption({**counts, a: counts[b], b: counts[a]})


SWAPS: dict[str, Callable[[Dice, Scene], Pair | None]] = {
    "color": _rename("color"),
    "shape": _rename("shape"),
    "relation": _turn_round,
    "count": _exchange_counts,
    "binding": _exchange_colors,
}

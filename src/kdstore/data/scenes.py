"""The built-in world: small pictures of coloured shapes with captions, hard negatives and questions, deterministic from (split, index).

What makes it informative is on purpose (docs/scenes.md has the measured gates): hues of neighbouring colour names overlap, grounds are
textured and tinted, objects occlude each other and vary in size and turn, a third are striped or hollow, and most questions need an
attribute bound to the right object. The generator treats all colours and all shapes alike and mirrors every relation, so that the text
of a question says nothing about its answer.

Only `random.Random.random()` and raw Philox words are drawn, the two streams that their libraries promise never to change.
"""

from __future__ import annotations

import colorsys
import functools
import hashlib
import math
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
from PIL import Image, ImageDraw

from kdstore.data.source import PROBE, Caption, LoadedImage
from kdstore.errors import SourceError, UnknownName

T = TypeVar("T")

IMAGE_SIZE = 64
SHAPES = ("circle", "square", "triangle", "star", "cross")
HUES = {"red": 0.0, "orange": 30.0, "yellow": 56.0, "green": 115.0, "cyan": 180.0, "blue": 225.0, "purple": 272.0, "pink": 322.0}
COLORS = tuple(HUES)
FILLS = ("solid", "striped", "hollow")
RADII = {"small": (7.5, 9.5), "large": (12.0, 15.0)}  # pixels
SIZES = tuple(RADII)
ATTRIBUTES: dict[str, Sequence[str]] = {"shape": SHAPES, "color": COLORS, "fill": FILLS, "size": SIZES}
QUESTION_TYPES = ("exist", "count", "query color", "query shape", "relation", "compare")
NUMBER_WORDS = {1: "a", 2: "two", 3: "three", 4: "four"}

# A scene's split follows from a hash of its content, so no two splits can share a scene, nor one scene's twin.
SPLITS = {"train": range(12), "val": range(12, 13), "test": range(13, 14), "retrieval": range(14, 16)}
DEFAULT_SIZE = {"train": 10_000, "val": 1_000, "test": 2_000, "retrieval": 1_000}

HUE_SPREAD = 0.55  # of the gap to the neighbouring name; names overlap past 0.5
MOST_THINGS = 4
MIN_GAP = 3.0  # pixels between any two objects' centres along each axis, so that orders are defined
RELATION_GAP = 8.0  # pixels along the axis of a stated relation


@dataclass(frozen=True)
class Thing:
    """One object: names of its attributes, centre and radius in pixels, hue in degrees, and the draws that vary its looks."""

    shape: str
    color: str
    size: str
    fill: str
    x: float
    y: float
    radius: float
    hue: float
    saturation: float
    value: float
    turn: float

    def named(self, *attributes: str) -> str:
        return " ".join(getattr(self, a) for a in attributes)


@dataclass(frozen=True)
class Scene:
    """A picture before it is drawn: objects in drawing order (later ones occlude), a seed for ground and grain, the planned count question."""

    things: tuple[Thing, ...]
    ground: int
    counted: tuple[str, str]


@dataclass(frozen=True)
class Question:
    """A question in the form of VQA: `answers` are ten dicts of answer, answer_confidence and answer_id."""

    question_id: int
    question: str
    question_type: str
    answer_type: str
    answers: tuple[dict[str, str | int], ...]
    truth: str


class Dice:
    """Draws that depend on `random.Random.random()` alone."""

    def __init__(self, *seed: object) -> None:
        self._random = random.Random("/".join(map(str, seed))).random

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * self._random()

    def chance(self, p: float) -> bool:
        return self._random() < p

    def index(self, n: int) -> int:
        return int(self._random() * n)

    def pick(self, options: Sequence[T]) -> T:
        return options[self.index(len(options))]

    def shuffled(self, options: Sequence[T]) -> list[T]:
        left = list(options)
        return [left.pop(self.index(len(left))) for _ in range(len(left))]


@functools.lru_cache(maxsize=2**12)  # 40 MB
def make_scene(split: str, index: int, attempt: int = 0) -> Scene:
    """Return scene `index` of a split; other attempts are other scenes for the same index (used to keep captions unique)."""
    if split not in SPLITS:
        raise UnknownName.of("scenes split", split, SPLITS)
    dice = Dice("scenes-1", split, index, attempt)
    while True:
        counted, names = _draw_names(dice, fewest=3 if split == "retrieval" else 1)
        if _content_hash(names) % 16 not in SPLITS[split]:
            continue
        things: list[Thing] = []
        for attributes in names:
            thing = _place(dice, attributes, things)
            if thing is None:
                break
            things.append(thing)
        else:
            return Scene(tuple(things), dice.index(2**32), counted)


def _content_hash(names: list[dict[str, str]]) -> int:
    """Hash what twins share: the multiset of every attribute."""
    content = "|".join(",".join(sorted(n[a] for n in names)) for a in ATTRIBUTES)
    return int.from_bytes(hashlib.sha256(content.encode()).digest()[:8], "big")


def _draw_names(dice: Dice, fewest: int) -> tuple[tuple[str, str], list[dict[str, str]]]:
    """Draw a count question whose text cannot tell its answer, and the attributes of objects that give it that answer."""
    attribute = dice.pick(("shape", "color", "fill"))
    counted = dice.pick(ATTRIBUTES[attribute])
    answer = 1 + dice.index(MOST_THINGS)
    total = max(answer, fewest) + dice.index(MOST_THINGS + 1 - max(answer, fewest))
    others = [v for v in ATTRIBUTES[attribute] if v != counted]
    chosen = [counted] * answer + [dice.pick(others) for _ in range(total - answer)]
    names = [{a: value if a == attribute else dice.pick(v) for a, v in ATTRIBUTES.items()} for value in dice.shuffled(chosen)]
    return (attribute, counted), names


def _place(dice: Dice, names: dict[str, str], placed: list[Thing]) -> Thing | None:
    radius = dice.uniform(*RADII[names["size"]])
    place = _hue_neighbours(names["color"])
    offset = dice.uniform(-HUE_SPREAD, HUE_SPREAD)
    hue = HUES[names["color"]] + offset * (place[1] if offset > 0 else place[0])
    looks = {"hue": hue % 360, "saturation": dice.uniform(0.6, 1.0), "value": dice.uniform(0.6, 1.0), "turn": dice.uniform(-12, 12)}
    for _ in range(12):
        x, y = (dice.uniform(0.9 * radius, IMAGE_SIZE - 0.9 * radius) for _ in range(2))
        if all(abs(x - t.x) >= MIN_GAP and abs(y - t.y) >= MIN_GAP and math.hypot(x - t.x, y - t.y) >= 0.75 * (radius + t.radius) for t in placed):
            return Thing(**names, x=x, y=y, radius=radius, **looks)  # type: ignore[arg-type]
    return None


def _hue_neighbours(color: str) -> tuple[float, float]:
    """Degrees from a colour name to the name before and to the name after it."""
    i = COLORS.index(color)
    before, after = HUES[COLORS[i - 1]], HUES[COLORS[(i + 1) % len(COLORS)]]
    return (HUES[color] - before) % 360, (after - HUES[color]) % 360


def twin(scene: Scene, kind: str) -> Scene | None:
    """Return a hard negative: `mirrored` (left and right exchanged) or `swapped` (two objects exchange colours); None where no word changes."""
    if kind == "mirrored":
        across = [t.named(*ATTRIBUTES) for t in sorted(scene.things, key=lambda t: t.x)]
        if across == across[::-1]:
            return None
        return replace(scene, things=tuple(replace(t, x=IMAGE_SIZE - t.x, turn=-t.turn) for t in scene.things))
    if kind != "swapped":
        raise UnknownName.of("kind of twin", kind, ("mirrored", "swapped"))
    things = scene.things
    for i, a in enumerate(things):
        for j, b in enumerate(things[:i]):
            if a.color != b.color and a.shape != b.shape:
                looks = {i: replace(a, color=b.color, hue=b.hue), j: replace(b, color=a.color, hue=a.hue)}
                return replace(scene, things=tuple(looks.get(k, t) for k, t in enumerate(things)))
    return None


# Drawing


def draw(scene: Scene) -> Image.Image:
    """Draw a scene as an RGB image of IMAGE_SIZE pixels a side."""
    words = np.random.Philox(key=scene.ground).random_raw(16 + IMAGE_SIZE * IMAGE_SIZE // 8)
    unit = (words[:16] >> np.uint64(11)).astype(np.float64) / 2**53
    image = _ground(words, unit)
    for thing in scene.things:
        mask, corner = _mask(thing)
        image.paste(_rgb(thing.hue, thing.saturation, thing.value), corner, mask)
    grain = words[16:].view(np.uint8).reshape(IMAGE_SIZE, IMAGE_SIZE, 1).astype(np.int16) // 14 - 9  # -9 .. 9 of 255
    return Image.fromarray(np.clip(np.asarray(image, np.int16) + grain, 0, 255).astype(np.uint8))


def _ground(words: np.ndarray, unit: np.ndarray) -> Image.Image:
    """Blend two tints by blurred noise with waves across it."""
    first, second = (_rgb(360 * unit[i], 0.45 * unit[i + 1], 0.2 + 0.6 * unit[i + 2]) for i in (0, 3))
    noise = Image.fromarray(words[:8].view(np.uint8).reshape(8, 8)).resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)
    across, down = (np.arange(IMAGE_SIZE) * (0.3 + unit[7]) * turn for turn in (np.cos(7 * unit[6]), np.sin(7 * unit[6])))
    waves = np.outer(np.cos(down), np.sin(across)) + np.outer(np.sin(down), np.cos(across))  # the sine of the sum
    blend = Image.fromarray(np.clip(np.asarray(noise) + 45 * unit[8] * waves, 0, 255).astype(np.uint8))
    return Image.composite(Image.new("RGB", blend.size, first), Image.new("RGB", blend.size, second), blend)


def _rgb(hue: float, saturation: float, value: float) -> tuple[int, int, int]:
    red, green, blue = (round(255 * c) for c in colorsys.hsv_to_rgb(hue / 360, saturation, value))
    return red, green, blue


_FINE = 4  # masks are drawn this much larger and averaged down, for smooth edges


def _mask(thing: Thing) -> tuple[Image.Image, tuple[int, int]]:
    """Draw the coverage of one object; returns the mask and its corner in the image."""
    half = math.ceil(thing.radius) + 1
    left, top = math.floor(thing.x) - half, math.floor(thing.y) - half
    side = 2 * half + 1
    mask = Image.new("L", (side * _FINE, side * _FINE))
    pen = ImageDraw.Draw(mask)
    center = ((thing.x - left) * _FINE, (thing.y - top) * _FINE)
    _outline(pen, thing, center, thing.radius * _FINE, 255)
    if thing.fill == "hollow":
        _outline(pen, thing, center, thing.radius * _FINE * 0.58, 0)
    elif thing.fill == "striped":
        step = max(3.4, thing.radius * 0.42) * _FINE
        for k in range(int(mask.height / step) + 1):
            pen.rectangle((0, (k + 0.6) * step, mask.width, (k + 0.95) * step), fill=0)
    return mask.resize((side, side), Image.Resampling.BOX), (left, top)


def _outline(pen: ImageDraw.ImageDraw, thing: Thing, center: tuple[float, float], radius: float, fill: int) -> None:
    x, y = center
    if thing.shape == "circle":
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)
        return
    turn = math.radians(thing.turn)
    corners = [(r * radius, math.radians(a) + turn) for r, a in _CORNERS[thing.shape]]
    pen.polygon([(x + r * math.cos(a), y + r * math.sin(a)) for r, a in corners], fill=fill)


def _cross() -> list[tuple[float, float]]:
    arm, reach = 0.36, 1.0
    points = [(reach, -arm), (reach, arm), (arm, arm), (arm, reach), (-arm, reach), (-arm, arm)]
    points += [(-x, -y) for x, y in points]
    return [(math.hypot(x, y), math.degrees(math.atan2(y, x))) for x, y in points]


_CORNERS: dict[str, list[tuple[float, float]]] = {  # (radius, angle in degrees) of each corner
    "square": [(1.15, 45 + 90 * k) for k in range(4)],
    "triangle": [(1.2, -90 + 120 * k) for k in range(3)],
    "star": [(1.2 if k % 2 == 0 else 0.5, -90 + 36 * k) for k in range(10)],
    "cross": _cross(),
}


# Captions


def captions(scene: Scene, split: str, index: int) -> tuple[Caption, ...]:
    """Return the captions of a scene from most to least detailed; in the retrieval split only the two that are unique."""
    dice = Dice("captions-1", split, index)
    across, down = sorted(scene.things, key=lambda t: t.x), sorted(scene.things, key=lambda t: t.y)
    full = ("size", "color", "fill", "shape")
    texts = ["left to right: " + ", ".join(t.named(*full) for t in across)]
    if split == "retrieval":
        texts.append("top to bottom: " + ", ".join(t.named(*full) for t in down))
    else:
        texts += [
            order_caption(down),
            _relation_caption(dice, scene),
            count_caption(Counter(t.shape for t in scene.things)),
            f"{NUMBER_WORDS[len(scene.things)]} {plural('object', len(scene.things))}, one is {with_article(dice.pick(scene.things).named(*full))}",
        ]
    return tuple(Caption(text, "synthetic") for text in texts)


def order_caption(down: Sequence[Thing]) -> str:
    return "top to bottom: " + ", ".join(t.named("color", "shape") for t in down)


def _relation_caption(dice: Dice, scene: Scene) -> str:
    a, b = (dice.shuffled(scene.things) * 2)[:2]
    words = [word for word, gap in relations(a, b).items() if gap >= RELATION_GAP]
    link = dice.pick(words) if words else "near"
    if a is b:
        return f"{with_article(a.named('color', 'shape'))} alone"
    return relation_text(a, link, b)


def relation_text(a: Thing, link: str, b: Thing) -> str:
    return f"{with_article(a.named('color', 'shape'))} {link} {with_article(b.named('color', 'shape'))}"


def relations(a: Thing, b: Thing) -> dict[str, float]:
    """How far, in pixels, each relation of a to b holds (negative where its opposite does)."""
    return {"left of": b.x - a.x, "right of": a.x - b.x, "above": b.y - a.y, "below": a.y - b.y}


def count_caption(count_of_shape: Mapping[str, int]) -> str:
    parts = [f"{NUMBER_WORDS[n]} {plural(shape, n)}" for shape, n in sorted(count_of_shape.items(), key=lambda c: SHAPES.index(c[0]))]
    return " and ".join(parts)


LABELS = ("count", "object", *ATTRIBUTES, *(f"leftmost-{attribute}" for attribute in ATTRIBUTES))
"""What `?probe=` takes: how many objects there are, their colours with their shapes, or one attribute, of all of them or of the leftmost."""


def labels(scene: Scene, kind: str) -> tuple[str, ...]:
    """Return the labels of a scene, each once; one of them for the count and for what is leftmost."""
    if kind == "count":
        return (f"{NUMBER_WORDS[len(scene.things)]} {plural('object', len(scene.things))}",)
    things = sorted(scene.things, key=lambda t: t.x)[: 1 if kind.startswith("leftmost-") else None]
    attributes = ("color", "shape") if kind == "object" else (kind.removeprefix("leftmost-"),)
    return tuple(dict.fromkeys(thing.named(*attributes) for thing in things))


def with_article(words: str) -> str:
    return f"an {words}" if words[0] in "aeiou" else f"a {words}"


def plural(noun: str, n: int) -> str:
    return noun if n == 1 else f"{noun}es" if noun == "cross" else f"{noun}s"


# Questions


def questions(split: str, index: int, scene: Scene | None = None) -> tuple[Question, ...]:
    """Return the questions of a scene, at most one of each type; ten annotators answer, who disagree where hues overlap or by slips."""
    scene = scene or make_scene(split, index)
    dice = Dice("questions-2", split, index)
    asked = []
    for slot, (kind, ask) in enumerate(_ASK.items()):
        found = ask(dice, scene)
        if found is not None:
            text, truth, other, dissent = found
            answers = dice.shuffled([other] * dissent + [truth] * (10 - dissent))
            records: tuple[dict[str, str | int], ...] = tuple({"answer": a, "answer_confidence": "yes", "answer_id": n} for n, a in enumerate(answers, start=1))
            answer_type = "yes/no" if truth in ("yes", "no") else "number" if truth.isdigit() else "other"
            asked.append(Question(index * 10 + slot, text, kind, answer_type, records, truth))
    return tuple(asked)


_Asked = tuple[str, str, str, int]  # question, truth, what dissenting annotators say, how many of ten dissent


def _slip(dice: Dice) -> int:
    return int(dice.chance(0.15))


def _yes_no(dice: Dice, text: str, yes: bool) -> _Asked:
    return text, "yes" if yes else "no", "no" if yes else "yes", _slip(dice)


def unique(things: Sequence[Thing], *attributes: str) -> list[Thing]:
    counts = Counter(t.named(*attributes) for t in things)
    return [t for t in things if counts[t.named(*attributes)] == 1]


def _ask_exist(dice: Dice, scene: Scene) -> _Asked | None:
    """Absent pairs take the colour of one object and the shape of another, so that knowing both apart is no help."""
    present = {(t.color, t.shape) for t in scene.things}
    mixed = sorted({(a.color, b.shape) for a in scene.things for b in scene.things} - present)
    yes = dice.chance(0.5)
    if not mixed and not yes:
        mixed = [(c, s) for c in COLORS for s in SHAPES if (c, s) not in present]
    color, shape = dice.pick(sorted(present) if yes else mixed)
    return _yes_no(dice, f"is there {with_article(color)} {shape}?", yes)


def _ask_count(dice: Dice, scene: Scene) -> _Asked | None:
    attribute, value = scene.counted
    truth = sum(getattr(t, attribute) == value for t in scene.things)
    noun = plural(value, 2) if attribute == "shape" else f"{value} objects"
    other = min(max(truth + dice.pick((-1, 1)), 1), MOST_THINGS)
    return f"how many {noun} are there?", str(truth), str(other), _slip(dice)


def _ask_query(dice: Dice, scene: Scene, asked: str, given: str) -> tuple[str, Thing] | None:
    """Refer to one object by `given`, with its size or fill where that alone is not unique."""
    for extra in ((), dice.pick((("size",), ("fill",)))):
        targets = unique(scene.things, *extra, given)
        if targets:
            target = dice.pick(targets)
            noun = target.named(*extra, given) + ("" if given == "shape" else " object")
            return f"what {asked} is the {noun}?", target
    return None


def _ask_color(dice: Dice, scene: Scene) -> _Asked | None:
    found = _ask_query(dice, scene, "color", "shape")
    if found is None:
        return None
    text, target = found
    return text, *_seen_color(target)


def _seen_color(target: Thing) -> tuple[str, str, int]:
    """Return an object's colour, the name that its hue leans to, and how many of ten say that one."""
    offset = (target.hue - HUES[target.color] + 180) % 360 - 180
    gap = _hue_neighbours(target.color)[offset > 0]
    neighbour = COLORS[(COLORS.index(target.color) + (1 if offset > 0 else -1)) % len(COLORS)]
    toward = abs(offset) / gap
    return target.color, neighbour, 0 if toward < 0.35 else 1 if toward < 0.45 else 3


def _ask_shape(dice: Dice, scene: Scene) -> _Asked | None:
    found = _ask_query(dice, scene, "shape", "color")
    if found is None:
        return None
    text, target = found
    return text, target.shape, dice.pick([s for s in SHAPES if s != target.shape]), _slip(dice)


_SIDES: tuple[tuple[str, Callable[[Thing], float]], ...] = (
    ("leftmost", lambda t: t.x),
    ("rightmost", lambda t: -t.x),
    ("topmost", lambda t: t.y),
    ("bottommost", lambda t: -t.y),
)


def _ask_relation(dice: Dice, scene: Scene) -> _Asked | None:
    """Ask for the colour of the object that lies outermost to one side; another one has another."""
    for side, place in dice.shuffled(_SIDES):
        target, *others = sorted(scene.things, key=place)
        if any(t.color != target.color for t in others) and place(others[0]) - place(target) >= RELATION_GAP:
            return f"what color is the {side} object?", *_seen_color(target)
    return None


def _ask_compare(dice: Dice, scene: Scene) -> _Asked | None:
    """Compare two counts, or the sizes of two objects; the order of the two is drawn, so that either answer is as likely."""
    comparisons = []
    for attribute in ("shape", "color"):
        counts = Counter(getattr(t, attribute) for t in scene.things)
        pairs = [(a, b) for a in sorted(counts) for b in sorted(counts) if counts[a] != counts[b]]
        if pairs:
            a, b = dice.pick(pairs)
            names = [plural(v, 2) if attribute == "shape" else f"{v} objects" for v in (a, b)]
            comparisons.append((f"are there more {names[0]} than {names[1]}?", counts[a] > counts[b]))
    known = unique(scene.things, "color", "shape")
    sized = [(a, b) for a in known for b in known if a.size != b.size]
    if sized:
        x, y = dice.pick(sized)
        comparisons.append((f"is the {x.named('color', 'shape')} larger than the {y.named('color', 'shape')}?", x.size == "large"))
    return _yes_no(dice, *dice.pick(comparisons)) if comparisons else None


_ASK: dict[str, Callable[[Dice, Scene], _Asked | None]] = dict(
    zip(QUESTION_TYPES, (_ask_exist, _ask_count, _ask_color, _ask_shape, _ask_relation, _ask_compare), strict=True)
)


# The source


class Scenes:
    """The first `size` scenes of a split as a source of image-caption pairs."""

    notices: tuple[str, ...] = ()

    def __init__(self, split: str = "train", size: int | None = None, probe: str | None = None) -> None:
        if split not in SPLITS:
            raise UnknownName.of("scenes split", split, SPLITS)
        self.split = split
        self.size = DEFAULT_SIZE[split] if size is None else size
        if self.size < 1:
            raise SourceError(f"A source of scenes needs at least one scene, found {size}.", "Write scenes:N with N of 1 or more.")
        if probe is not None and probe not in LABELS:
            raise UnknownName.of("label of scenes", probe, LABELS)
        self.probe = probe
        self.spec = f"scenes/{split}:{self.size}" + (f"?{PROBE}={probe}" if probe else "")
        self._attempts = _unique_attempts(self.size) if split == "retrieval" else {}

    def __len__(self) -> int:
        return self.size

    def key(self, i: int) -> str:
        return f"scenes-1/{self.split}/{i}"

    def scene(self, i: int) -> Scene:
        return make_scene(self.split, i, self._attempts.get(i, 0))

    def captions(self, i: int) -> tuple[Caption, ...]:
        scene = self.scene(i)
        return captions(scene, self.split, i) + tuple(Caption(label, PROBE) for label in (labels(scene, self.probe) if self.probe else ()))

    def image(self, i: int) -> LoadedImage:
        pixels = _pixels(self.split, i, self._attempts.get(i, 0))
        image = Image.frombytes("RGB", (IMAGE_SIZE, IMAGE_SIZE), pixels)
        return LoadedImage(image, hashlib.sha256(pixels).hexdigest())

    def questions(self, i: int) -> tuple[Question, ...]:
        return questions(self.split, i, self.scene(i))


@functools.lru_cache(maxsize=2**14)  # 200 MB at most: every stage of a demo reads the same pictures
def _pixels(split: str, index: int, attempt: int) -> bytes:
    return draw(make_scene(split, index, attempt)).tobytes()


@functools.lru_cache(maxsize=8)
def _unique_attempts(size: int) -> dict[int, int]:
    """For the retrieval split: the attempt of each index (where not the first) at which no earlier scene has one of its captions."""
    seen: set[str] = set()
    attempts: dict[int, int] = {}
    for i in range(size):
        attempt = 0
        while seen & (texts := {c.text for c in captions(make_scene("retrieval", i, attempt), "retrieval", i)}):
            attempt += 1
        seen |= texts
        if attempt:
            attempts[i] = attempt
    return attempts

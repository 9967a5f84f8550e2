"""Augmented views of an image: explicit numbers, sampled once, from which anybody draws the same picture again.

A view is a crop, a flip and a few operations of RandAugment (Cubuk et al. 2020), all relative to the image; docs/format.md says what each number means.
They follow from the size of the image and a hash of (seed, key, view), so no batch, worker, order or generator of random numbers has a part in them.

Operations come after a resize to one side that belongs to the views (by default the teacher's), not to the model that looks. What they give goes through a
model's own preprocessing like an image from a file, so teacher and student see one picture at whatever resolution. Applied at each model's own
resolution they would not: sharpness means other widths there, and a threshold falls among other pixels. Applied to the crop as it is stored they
would cost as much as the image is large, in every epoch, and a large image would hardly show its sharpness.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageEnhance, ImageOps

from kdstore.errors import ConfigError, StoreError

METHOD = "views-1"
BOX, FLIP, OPERATIONS = slice(0, 4), 4, 5  # places in a view's numbers; an operation takes two
TRIES = 10  # at a crop of the drawn area and ratio that lies in the image
LARGEST_SIDE = 4096  # of a picture that a store may ask a reader to draw
RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}

Float32 = npt.NDArray[np.float32]
Operation = Callable[[Image.Image, float], Image.Image]


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """How augmented views are sampled, and the side and interpolation that they are drawn with."""

    side: int  # pixels
    interpolation: str
    scale: tuple[float, ...]  # share of the image's area
    ratio: tuple[float, ...]  # width to height of the crop in pixels
    flip: float  # probability
    operations: int
    strength: float  # of an operation, 1 the strongest
    seed: int

    def __post_init__(self) -> None:
        ranges = all(len(pair) == 2 and 0 < pair[0] <= pair[1] for pair in (self.scale, self.ratio)) and self.scale[1] <= 1
        shares = 0 <= self.flip <= 1 and 0 <= self.strength <= 1
        whole = type(self.side) is int and 1 <= self.side <= LARGEST_SIDE and type(self.operations) is int and 0 <= self.operations <= 16
        if not (ranges and shares and whole and self.interpolation in RESAMPLING):
            raise ConfigError(
                f"No views can be drawn with {dataclasses.asdict(self)}.",
                f"scale lies in (0, 1], ratio ascends, flip and strength lie in [0, 1], at most 16 operations, side at most {LARGEST_SIDE}.",
            )

    @property
    def size(self) -> int:
        """How many numbers describe a view."""
        return OPERATIONS + 2 * self.operations

    @property
    def identity(self) -> dict[str, Any]:
        """What a store says of its views."""
        return {"method": METHOD, **json.loads(json.dumps(dataclasses.asdict(self)))}

    @classmethod
    def of(cls, identity: dict[str, Any]) -> Augmentation:
        """Read what a store says of its views; raises StoreError for what is not known here."""
        said: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in identity.items() if name != "method"}
        try:
            if identity.get("method") != METHOD:
                raise ConfigError(f"expected the method {METHOD}, found {identity.get('method')}.")
            return cls(**said)
        except (ConfigError, TypeError) as e:
            raise StoreError(f"The store's views cannot be drawn again: {e}", "Distil from the plain ones: --set views=plain.") from e

    def parameters(self, key: str, view: int, width: int, height: int) -> Float32:
        """Return the numbers [P] of a view of the image `key` of so many pixels; those of view 0 stand for the plain one."""
        if view == 0:
            return np.array([0, 0, 1, 1, 0] + [0, 0] * self.operations, np.float32)
        drawn = _uniform(f"{self.seed}/{view}/{key}", 2 * TRIES + 3 + 2 * self.operations)
        w, h = self._crop([(next(drawn), next(drawn)) for _ in range(TRIES)], width / height)
        x, y = next(drawn) * (1 - w), next(drawn) * (1 - h)
        numbers = [x, y, min(x + w, 1.0), min(y + h, 1.0), float(next(drawn) < self.flip)]
        for _ in range(self.operations):
            number = int(next(drawn) * len(KINDS))
            numbers += [number, KINDS[number][1](self.strength, 1 if next(drawn) < 0.5 else -1)]
        return np.array(numbers, np.float32)

    def _crop(self, tries: list[tuple[float, float]], aspect: float) -> tuple[float, float]:
        """Return width and height of a crop as shares of the image's: torchvision's RandomResizedCrop, but for whole pixels."""
        for u, v in tries:
            area = self.scale[0] + u * (self.scale[1] - self.scale[0])
            ratio = self.ratio[0] * (self.ratio[1] / self.ratio[0]) ** v
            w, h = math.sqrt(area * ratio / aspect), math.sqrt(area / ratio * aspect)
            if w <= 1 and h <= 1:
                return w, h
        return min(1.0, self.ratio[1] / aspect), min(1.0, aspect / self.ratio[0])

    def draw(self, image: Image.Image, view_P: Float32) -> Image.Image:
        """Draw a view other than the plain one: an RGB picture of `side` by `side` pixels; raises StoreError for numbers that describe none."""
        _refuse_other_than_a_view(view_P)
        box = view_P[BOX].astype(np.float64) * ((image.width, image.height) * 2)
        picture = image.resize((self.side, self.side), RESAMPLING[self.interpolation], box=tuple(box.tolist()))
        if view_P[FLIP]:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        for number, magnitude in view_P[OPERATIONS:].reshape(-1, 2).tolist():
            picture = KINDS[int(number)][0](picture, magnitude)
        return picture


def _uniform(text: str, count: int) -> Iterator[float]:
    """Return `count` numbers in [0, 1), the first 53 bits of each 64 of a hash."""
    words = np.frombuffer(hashlib.shake_256(text.encode()).digest(8 * count), "<u8")
    return iter(((words >> np.uint64(11)) * 2.0**-53).tolist())


def _refuse_other_than_a_view(view_P: Float32) -> None:
    x0, y0, x1, y1 = view_P[BOX].tolist()
    numbers, magnitudes = view_P[OPERATIONS::2], view_P[OPERATIONS + 1 :: 2]
    known = np.isin(numbers, np.arange(len(KINDS))).all() and bool((np.abs(magnitudes) <= 360).all())
    if not (0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1 and view_P[FLIP] in (0, 1) and known):
        raise StoreError(f"The numbers {view_P.tolist()} describe no view.", "Distil from the plain ones: --set views=plain.")


def _affine(picture: Image.Image, a: float, b: float, c: float, d: float) -> Image.Image:
    """Show at (x, y), from the centre in sides, what was at (x + a y + b, y + c x + d); black where nothing was."""
    middle = picture.width / 2
    rows = (1, a, b * picture.width - a * middle, c, 1, d * picture.width - c * middle)
    return picture.transform(picture.size, Image.Transform.AFFINE, rows, Image.Resampling.BILINEAR)


def _enhanced(by: Callable[[Image.Image], Any]) -> Operation:
    return lambda picture, magnitude: by(picture).enhance(1 + magnitude)


def _signed(full: float) -> Callable[[float, int], float]:
    return lambda strength, sign: full * strength * sign


def _nothing(strength: float, sign: int) -> float:
    return 0.0


KINDS: tuple[tuple[Operation, Callable[[float, int], float]], ...] = (
    (lambda picture, magnitude: picture, _nothing),
    (lambda picture, slope: _affine(picture, slope, 0, 0, 0), _signed(0.3)),
    (lambda picture, slope: _affine(picture, 0, 0, slope, 0), _signed(0.3)),
    (lambda picture, share: _affine(picture, 0, -share, 0, 0), _signed(150 / 331)),
    (lambda picture, share: _affine(picture, 0, 0, 0, -share), _signed(150 / 331)),
    (lambda picture, degrees: picture.rotate(degrees, Image.Resampling.BILINEAR), _signed(30)),
    (_enhanced(ImageEnhance.Brightness), _signed(0.9)),
    (_enhanced(ImageEnhance.Color), _signed(0.9)),
    (_enhanced(ImageEnhance.Contrast), _signed(0.9)),
    (_enhanced(ImageEnhance.Sharpness), _signed(0.9)),
    (lambda picture, bits: ImageOps.posterize(picture, min(max(int(bits), 1), 8)), lambda strength, sign: 8 - round(4 * strength)),
    (lambda picture, limit: ImageOps.solarize(picture, int(limit)), lambda strength, sign: round(255 * (1 - strength))),
    (lambda picture, magnitude: ImageOps.autocontrast(picture), _nothing),
    (lambda picture, magnitude: ImageOps.equalize(picture), _nothing),
)
"""By number: the operation, and its magnitude for a strength from 0 to 1 and a sign; numbers and full strengths are torchvision's RandAugment's."""

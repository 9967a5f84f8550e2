"""What a source of image-caption pairs is: an indexed list of (key, captions, image).

Captions and keys are known without reading an image, so that a run can freeze its plan before any work. `image` raises
`UndecodableImage` for one bad image: bad data keeps its row and is counted, it does not end a run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from PIL import Image

PROBE = "probe"
"""The kind of captions that test a model: labels. They are not trained on, and are no captions in retrieval."""


@dataclass(frozen=True)
class Caption:
    """A caption and where it comes from: `human`, `synthetic` or `probe`."""

    text: str
    kind: str = "human"


@dataclass(frozen=True)
class LoadedImage:
    """A decoded RGB image, its size in pixels, and the sha256 (hex) of the bytes it was decoded from."""

    image: Image.Image
    sha256: str

    @property
    def width(self) -> int:
        return self.image.width

    @property
    def height(self) -> int:
        return self.image.height


class UndecodableImage(Exception):
    """One image that cannot be decoded: `reason` in words, `sha256` (hex) of its bytes ('' if there are none)."""

    def __init__(self, reason: str, sha256: str = "") -> None:
        super().__init__(reason, sha256)
        self.reason = reason
        self.sha256 = sha256


class Source(Protocol):
    """An indexed list of image-caption pairs."""

    @property
    def spec(self) -> str:
        """Resolved text that `open_source` takes again; stores record it."""
        ...

    @property
    def notices(self) -> tuple[str, ...]:
        """What a user should know of the data: samples left out, equal content, keys that are only positions."""
        ...

    def __len__(self) -> int: ...

    def key(self, i: int) -> str:
        """Return the unique, stable key of pair `i`."""
        ...

    def captions(self, i: int) -> tuple[Caption, ...]:
        """Return the captions of pair `i`; reads no image."""
        ...

    def image(self, i: int) -> LoadedImage:
        """Decode image `i`; raises UndecodableImage."""
        ...

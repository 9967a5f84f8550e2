"""What the student sees: views of each image, prepared once (`models.pixels`).

Beside a store there are no views but the plain one and those that it holds a target of, drawn again from its numbers: a random augmentation would be
another view than the one the target belongs to.
"""

from __future__ import annotations

from typing import Protocol

from PIL import Image

from kdstore.data.source import LoadedImage, Source, UndecodableImage
from kdstore.errors import SourceError


class Views(Protocol):
    """Views of images, `count` of each with the plain view 0."""

    @property
    def count(self) -> int: ...

    def picture(self, image: Image.Image, row: int, view: int) -> Image.Image:
        """Draw a view of the image of a target row."""
        ...


def readable_image(source: Source, row: int) -> LoadedImage:
    """Read the image of a row; raises SourceError if it cannot be decoded."""
    try:
        return source.image(row)
    except UndecodableImage as e:
        hint = "Extract a store of this data and give it as --cache: it leaves bad images out."
        raise SourceError(f"Image {source.key(row)} cannot be decoded: {e.reason}.", hint) from e

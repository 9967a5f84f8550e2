"""Pictures in memory as a source, so that a benchmark measures no disk."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from kdstore.data.images import decode_image
from kdstore.data.source import Caption, LoadedImage


class Pictures:
    """Noise of 256 x 256 pixels, or as JPEG of `side` x `side`; the same few pictures again and again, each row with a caption of its own."""

    spec, notices = "pictures", ()

    def __init__(self, count: int, side: int | None = None) -> None:
        rng = np.random.default_rng(0)
        self._pictures = [Image.fromarray(rng.integers(0, 256, (side or 256, side or 256, 3), dtype=np.uint8)) for _ in range(8)]
        self._encoded = [encoded(picture) for picture in self._pictures] if side else []
        self._count = count

    def __len__(self) -> int:
        return self._count

    def key(self, i: int) -> str:
        return str(i)

    def captions(self, i: int) -> tuple[Caption, ...]:
        return (Caption(f"picture number {i} of noise"),)

    def image(self, i: int) -> LoadedImage:
        if self._encoded:
            return decode_image(self._encoded[i % len(self._encoded)])
        return LoadedImage(self._pictures[i % len(self._pictures)], f"{i:064x}")


def encoded(picture: Image.Image) -> bytes:
    content = io.BytesIO()
    picture.save(content, "jpeg")
    return content.getvalue()

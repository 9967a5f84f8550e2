"""From the bytes of an image file to RGB pixels: one meaning for every kind of file, and a reason where there is none.

What open_clip trains on is `Image.open(...).convert("RGB")` of files that img2dataset has mostly written anew; the rules here follow it
except where its answer is an accident of the file. DECODING names the rules; they are part of what features are (docs/sources.md).

- Orientation: upright by EXIF. (open_clip and img2dataset ignore the tag; captions describe the upright picture.)
- Transparency: laid on white, as img2dataset does. (Pillow alone shows what lies beneath transparent pixels, which is arbitrary.)
- 16 bits per channel: the high byte, grey as RGB. (Pillow cuts grey values off at 255, which leaves a white picture.)
- CMYK: Pillow's plain conversion; colour profiles are not applied. Animations and stacks: the first frame.
- 32 bits per channel (TIFF): refused, their range is unknown. Beyond MAX_PIXELS or MAX_BYTES: refused before anything is decoded.
"""

from __future__ import annotations

import functools
import hashlib
import io
import re

import numpy as np
from PIL import Image, UnidentifiedImageError

from kdstore.data.source import LoadedImage, UndecodableImage

DECODING = "rgb-1"
MAX_PIXELS = 89_478_485  # from which Pillow warns of decompression bombs; 360 MB while an image with alpha is decoded
MAX_BYTES = 2**28
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")  # not EPS, which would start a program
ORIENTATION = 0x0112
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode_image(content: bytes) -> LoadedImage:
    """Decode an encoded image to RGB by the rules above; raises UndecodableImage with a reason that is the same in every run."""
    sha256 = hashlib.sha256(content).hexdigest()
    try:
        return LoadedImage(_decode(content), sha256)
    except UndecodableImage as e:
        raise UndecodableImage(e.reason, sha256) from e
    except Exception as e:  # Pillow's decoders let through struct's, zlib's and their own errors, and one image must not end a run
        raise UndecodableImage(reason_of(e), sha256) from e


def reason_of(error: Exception) -> str:
    """Say in one line why an image was not decoded; no address of memory, so that two runs write the same index."""
    if isinstance(error, MemoryError):
        raise error  # says nothing of the image
    if isinstance(error, UnidentifiedImageError):
        return "not an image of a known format"
    return re.sub(r"\s+", " ", re.sub(r" at 0x[0-9a-f]+", "", f"{type(error).__name__}: {error}"))[:200]


@functools.cache
def _formats() -> tuple[str, ...]:
    """Return those of FORMATS that this Pillow was built with."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _decode(content: bytes) -> Image.Image:
    if not content:
        raise UndecodableImage("the file is empty")
    with Image.open(io.BytesIO(content), formats=_formats()) as image:
        if image.width * image.height > MAX_PIXELS:
            raise UndecodableImage(f"{image.width} x {image.height} pixels are more than {MAX_PIXELS:,}")
        image.load()
        turn = _turn(image)
        return _rgb(image) if turn is None else _rgb(image).transpose(turn)


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        return Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise UndecodableImage(f"{image.format} of 32 bits per channel has no known range")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image.convert("RGB")


def _turn(image: Image.Image) -> Image.Transpose | None:
    """Return what makes the image upright by EXIF; a tag that cannot be read is none."""
    try:
        return UPRIGHT.get(image.getexif().get(ORIENTATION, 1))
    except Exception:  # a broken EXIF block raises whatever its parser meets, and the pixels are whole
        return None

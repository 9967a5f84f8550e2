"""Decoding: every kind of file is read with one meaning, or marked with a reason that is the same in every run."""

import importlib.util
import io
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from kdstore.data.images import MAX_PIXELS, decode_image
from kdstore.data.source import UndecodableImage

spec = importlib.util.spec_from_file_location("broken_images", Path(__file__).parents[2] / "benchmarks/broken_images.py")
kinds = importlib.util.module_from_spec(spec)
spec.loader.exec_module(kinds)


def encoded(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    sink = io.BytesIO()
    image.save(sink, form, **options)
    return sink.getvalue()


def pixels(content: bytes) -> np.ndarray:
    return np.asarray(decode_image(content).image)


@pytest.mark.parametrize("kind", sorted(kinds.READ.keys() - {"EXIF-rotated"}))
def test_every_odd_kind_of_image_is_read_as_the_picture_that_it_shows(kind):
    picture = kinds.picture(np.random.default_rng(0))
    loaded = decode_image(kinds.READ[kind](picture, np.random.default_rng(1)))
    mode = {"grey": "L", "16-bit grey": "L", "16-bit grey TIFF": "L", "grey with alpha": "L", "1-bit": "1"}.get(kind, "RGB")
    shown = np.asarray(picture.convert(mode).convert("RGB"), int)
    lossy = {"CMYK": 12, "animated GIF": 25, "palette with transparency": 60}.get(kind, 5)  # few colours, and transparency on white
    assert loaded.image.mode == "RGB"
    assert np.abs(np.asarray(loaded.image) - shown).mean() < lossy


@pytest.mark.parametrize("orientation", range(10))
def test_every_orientation_of_exif_is_turned_upright(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(kinds.picture(np.random.default_rng(0)).crop((0, 0, 64, 32)), exif=exif)
    with Image.open(io.BytesIO(content)) as image:
        assert np.array_equal(pixels(content), np.asarray(ImageOps.exif_transpose(image)))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("kind", kinds.MARKED)
def test_every_broken_kind_is_marked_with_its_reason_and_keeps_its_hash(kind):
    make, reason = kinds.MARKED[kind]
    rng = np.random.default_rng(0)
    content = make(kinds.picture(rng), rng)
    reasons = []
    for _ in range(2):
        with pytest.raises(UndecodableImage, match=reason) as e:
            decode_image(content)
        reasons.append(e.value.reason)
        assert len(e.value.sha256) == 64
    assert reasons[0] == reasons[1]
    assert not re.search("0x[0-9a-f]{6}|\n", reasons[0])


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_picture_of_too_many_pixels_is_refused_before_it_is_decoded():
    side = int(MAX_PIXELS**0.5) + 1
    with pytest.raises(UndecodableImage, match=f"{side} x {side} pixels are more than"):
        decode_image(kinds.png(side, side, 8, 2, b"\0"))


def test_transparency_lies_on_white():
    half = encoded(Image.new("RGBA", (2, 2), (200, 0, 0, 128)))
    hidden = encoded(Image.new("RGBA", (2, 2), (10, 20, 30, 0)))
    keyed = encoded(Image.new("L", (2, 2), 7), transparency=7)
    assert pixels(half)[0, 0].tolist() == [227, 127, 127]
    assert pixels(hidden).min() == 255
    assert pixels(keyed).min() == 255


def test_sixteen_bits_are_scaled_not_clipped():
    ramp = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)
    for form in ("PNG", "TIFF", "PPM"):
        assert np.array_equal(pixels(encoded(Image.fromarray(ramp), form))[..., 0], ramp >> 8), form


def test_an_animation_is_its_first_frame():
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue", "lime")]
    for form, options in (("GIF", {}), ("WEBP", {"lossless": True}), ("PNG", {}), ("TIFF", {})):
        content = encoded(frames[0], form, save_all=True, append_images=frames[1:], **options)
        assert pixels(content)[0, 0].tolist() == [255, 0, 0], form

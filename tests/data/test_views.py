"""Augmented views: sampled from seed, key and number alone, and drawn the same by whoever has the numbers."""

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageEnhance, ImageOps

from kdstore.data.views import KINDS, Augmentation
from kdstore.errors import ConfigError, StoreError

PLAIN = Augmentation(side=32, interpolation="bicubic", scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3), flip=0.5, operations=2, strength=0.3, seed=0)
augmentations = st.builds(
    Augmentation,
    side=st.integers(1, 64),
    interpolation=st.sampled_from(["bicubic", "bilinear"]),
    scale=st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)).map(sorted).map(tuple),
    ratio=st.tuples(st.floats(0.1, 9), st.floats(0.1, 9)).map(sorted).map(tuple),
    flip=st.floats(0, 1),
    operations=st.integers(0, 4),
    strength=st.floats(0, 1),
    seed=st.integers(0, 2**63),
)
sizes = st.tuples(st.integers(1, 90), st.integers(1, 90))
views = st.integers(1, 40)


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8))


def drawn(image: Image.Image, *numbers: float, side: int = 32) -> np.ndarray:
    return np.asarray(dataclasses.replace(PLAIN, side=side).draw(image, np.array(numbers, np.float32)))


@given(augmentations, st.text(max_size=9), views, sizes)
def test_numbers_follow_from_seed_key_and_view_and_draw_the_same_picture_after_any_way_that_keeps_float32(augmentation, key, view, size):
    numbers = augmentation.parameters(key, view, *size)
    augmentation.parameters(key + "x", view, *size)  # what was sampled before has no part in it
    again = Augmentation.of(json.loads(json.dumps(augmentation.identity)))
    assert again == augmentation
    assert again.parameters(key, view, *size).tobytes() == numbers.tobytes()
    assert (numbers.dtype, numbers.shape) == (np.float32, (augmentation.size,))
    picture = augmentation.draw(noise(*size), numbers)
    assert (picture.size, picture.mode) == ((augmentation.side, augmentation.side), "RGB")
    kept = np.array(json.loads(json.dumps(numbers.tolist())), np.float32)
    assert again.draw(noise(*size), kept).tobytes() == picture.tobytes()


@given(augmentations, views, sizes)
def test_a_crop_has_the_area_and_ratio_that_were_asked_for_or_is_all_that_the_image_allows(augmentation, view, size):
    x0, y0, x1, y1 = augmentation.parameters("key", view, *size)[:4].astype(np.float64).tolist()
    width, height = (x1 - x0) * size[0], (y1 - y0) * size[1]
    assert 0 <= x0 < x1 <= 1
    assert 0 <= y0 < y1 <= 1
    assert augmentation.ratio[0] * 0.999 <= width / height <= augmentation.ratio[1] * 1.001 or {round(x1 - x0, 5), round(y1 - y0, 5)} & {1.0}
    assert (x1 - x0) * (y1 - y0) <= augmentation.scale[1] * 1.001 or {round(x1 - x0, 5), round(y1 - y0, 5)} & {1.0}


def test_the_numbers_of_a_seed_and_a_key_stay_what_they_are_in_every_version():
    expected = [0.31444907, 0.18780327, 0.91507626, 0.95381629, 1.0, 0.0, 0.0, 2.0, -0.090000004]
    np.testing.assert_allclose(PLAIN.parameters("image-7", 3, 640, 480), expected, rtol=1e-6)
    assert PLAIN.parameters("image-7", 0, 640, 480).tolist() == [0, 0, 1, 1, 0, 0, 0, 0, 0]


def test_views_flips_and_operations_are_drawn_evenly():
    numbers = np.array([PLAIN.parameters("key", view, 60, 40) for view in range(1, 2801)])
    assert 0.45 < numbers[:, 4].mean() < 0.55
    for column in (5, 7):
        counts = np.bincount(numbers[:, column].astype(int), minlength=len(KINDS))
        assert counts.shape == (14,)
        assert counts.min() > 140
    rotations = numbers[numbers[:, 5] == 5, 6]
    assert set(np.round(rotations, 4).tolist()) == {-9, 9}


def test_a_drawn_view_is_what_pillow_makes_of_crop_flip_and_operations():
    image = noise(64, 48)
    half = np.asarray(image.resize((32, 32), Image.Resampling.BICUBIC, box=(16, 0, 48, 24)))
    assert (drawn(image, 0.25, 0, 0.75, 0.5, 0) == half).all()
    assert (drawn(image, 0.25, 0, 0.75, 0.5, 1) == half[:, ::-1]).all()
    picture = Image.fromarray(half)
    for number, magnitude, expected in (
        (0, 0, picture),
        (6, -0.5, ImageEnhance.Brightness(picture).enhance(0.5)),
        (7, 0.5, ImageEnhance.Color(picture).enhance(1.5)),
        (8, 0.25, ImageEnhance.Contrast(picture).enhance(1.25)),
        (9, -0.25, ImageEnhance.Sharpness(picture).enhance(0.75)),
        (10, 5, ImageOps.posterize(picture, 5)),
        (11, 179, ImageOps.solarize(picture, 179)),
        (12, 0, ImageOps.autocontrast(picture)),
        (13, 0, ImageOps.equalize(picture)),
        (5, 90, picture.rotate(90)),
    ):
        assert (drawn(image, 0.25, 0, 0.75, 0.5, 0, number, magnitude) == np.asarray(expected)).all(), number
    once = drawn(image, 0.25, 0, 0.75, 0.5, 0, 13, 0, 10, 3)
    assert (once == np.asarray(ImageOps.posterize(ImageOps.equalize(picture), 3))).all()


def test_magnitudes_of_geometry_are_shares_of_the_picture_and_move_it_as_the_page_says():
    dot = Image.new("RGB", (40, 40))
    dot.putpixel((20, 30), (255, 255, 255))
    whole = (0, 0, 1, 1, 0)

    def place(*operation: float) -> list[int]:
        return np.argwhere(drawn(dot, *whole, *operation, side=40)[..., 0] > 128)[0, ::-1].tolist()

    assert place(3, 0.25) == [30, 30]
    assert place(4, -0.5) == [20, 10]
    assert place(1, 0.2) == [18, 30]
    assert place(2, 0.2) == [20, 30]
    assert place(5, 90) == [30, 19]
    assert (drawn(Image.new("RGB", (9, 9), "white"), *whole, 3, 0.5)[:, :16] == 0).all()


def test_the_picture_of_a_view_does_not_depend_on_the_resolution_of_the_image_but_for_resampling():
    small = Image.fromarray(np.add.outer(np.arange(48), np.arange(64))[..., None].repeat(3, 2).astype(np.uint8))
    large = small.resize((256, 192), Image.Resampling.BICUBIC)
    numbers = (0.2, 0.1, 0.9, 0.8, 1, 5, 9, 6, 0.27)
    assert np.abs(drawn(small, *numbers).astype(int) - drawn(large, *numbers).astype(int)).max() <= 3


@pytest.mark.parametrize(
    "numbers",
    [
        (0.5, 0, 0.5, 1, 0),
        (0, 0, 1.5, 1, 0),
        (0, -0.1, 1, 1, 0),
        (0, 0, 1, 1, 0.5),
        (0, 0, 1, 1, 0, 14, 0),
        (0, 0, 1, 1, 0, 5.5, 0),
        (0, 0, 1, 1, 0, 5, np.inf),
        (np.nan,) * 7,
    ],
)
def test_numbers_that_describe_no_view_are_refused(numbers):
    with pytest.raises(StoreError, match="describe no view"):
        drawn(noise(8, 8), *numbers)


@pytest.mark.parametrize(
    "change", [{"scale": (0.5, 1.5)}, {"ratio": (2.0, 1.0)}, {"flip": 1.1}, {"operations": -1}, {"interpolation": "lanczos"}, {"side": 1 << 20}]
)
def test_settings_that_make_no_view_are_refused_and_so_is_a_store_that_says_them(change):
    with pytest.raises(ConfigError, match="No views can be drawn"):
        dataclasses.replace(PLAIN, **change)
    with pytest.raises(StoreError, match="cannot be drawn again"):
        Augmentation.of(PLAIN.identity | change)


def test_a_method_that_is_not_known_is_refused():
    with pytest.raises(StoreError, match="views-2"):
        Augmentation.of({**PLAIN.identity, "method": "views-2"})
    for hostile in ({}, {"method": "views-1"}, {**PLAIN.identity, "side": "32"}, {**PLAIN.identity, "scale": {}}, {**PLAIN.identity, "more": 1}):
        with pytest.raises(StoreError):
            Augmentation.of(hostile)

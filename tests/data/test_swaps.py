"""Swapped captions: false of the picture in one class of words, with nothing in the text that says so."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import sparse
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression

from kdstore.data.scenes import COLORS, NUMBER_WORDS, SHAPES, SPLITS, Scene, make_scene, plural, relations
from kdstore.data.source import PROBE
from kdstore.data.sources import open_source
from kdstore.data.swaps import SWAPS, swapped_captions
from kdstore.errors import SourceError, UnknownName

words = st.sampled_from(sorted(SWAPS))
CLASS = {"color": COLORS, "shape": SHAPES, "relation": ("left of", "right of", "above", "below"), "count": tuple(NUMBER_WORDS.values()), "binding": COLORS}
SINGULAR = {plural(shape, 2): shape for shape in SHAPES}


def in_singular(caption: str) -> str:
    return re.sub(r"\w+", lambda found: SINGULAR.get(found[0], found[0]), caption)


def is_true(caption: str, scene: Scene, word: str) -> bool:
    """Read a caption again and look at the scene."""
    if word == "count":
        said = dict(reversed(part.split()) for part in in_singular(caption).split(" and "))
        return said == {shape: NUMBER_WORDS[n] for shape, n in Counter(t.shape for t in scene.things).items()}
    if word == "relation":
        first, link, second = re.fullmatch(f"an? (.*) ({'|'.join(CLASS[word])}) an? (.*)", caption).groups()
        named = [(t.named("color", "shape"), t) for t in scene.things]
        return any(relations(a, b)[link] > 0 for name, a in named for other, b in named if a is not b and (name, other) == (first, second))
    down = sorted(scene.things, key=lambda t: t.y)
    return caption.removeprefix("top to bottom: ").split(", ") == [f"{t.color} {t.shape}" for t in down]


@given(words, st.sampled_from(sorted(SPLITS)), st.integers(0, 10**9))
def test_of_a_pair_the_first_is_true_of_the_scene_and_the_second_false(word: str, split: str, index: int) -> None:
    scene = make_scene(split, index)
    pair = swapped_captions(scene, word, split, index)
    if pair is not None:
        assert [is_true(caption, scene, word) for caption in pair] == [True, False]


@given(words, st.integers(0, 10**9))
def test_a_pair_differs_in_one_class_of_words_alone(word: str, index: int) -> None:
    pair = swapped_captions(make_scene("train", index), word, "train", index)
    if pair is None:
        return
    blanked = [re.sub(rf"\b({'|'.join(CLASS[word])})\b", "_", in_singular(caption)) for caption in pair]
    assert blanked[0] == blanked[1]
    if word == "binding":
        assert Counter(pair[0].replace(",", "").split()) == Counter(pair[1].replace(",", "").split())


@pytest.mark.parametrize("word", SWAPS)
def test_no_text_tells_which_of_a_pair_is_false(word: str) -> None:
    """A classifier of words, pairs of words and length, fitted on half of the pairs, is at chance on the others."""
    found = [pair for i in range(3000) if (pair := swapped_captions(make_scene("train", i), word, "train", i)) is not None]
    texts = [caption for pair in found for caption in pair]
    counts = CountVectorizer(ngram_range=(1, 2), token_pattern=r"\w+").fit_transform(texts)
    feature_NF = sparse.hstack([counts, np.array([[len(text)] for text in texts]) / 50]).tocsr()
    difference_NF = feature_NF[0::2] - feature_NF[1::2]
    flip_N = np.random.default_rng(0).choice([-1.0, 1.0], len(found))
    half = len(found) // 2
    flipped_NF = difference_NF.multiply(flip_N[:, None]).tocsr()
    fitted = LogisticRegression(C=0.1, fit_intercept=False).fit(flipped_NF[:half], flip_N[:half])
    right = (fitted.predict(flipped_NF[half:]) == flip_N[half:]).mean()
    assert len(found) > 1000
    assert abs(right - 0.5) < 3 * 0.5 / (len(found) - half) ** 0.5


def test_a_source_holds_both_captions_of_each_class_behind_its_own_and_its_spec_opens_it_again() -> None:
    plain, source = open_source("scenes/retrieval:20"), open_source("scenes/retrieval:20?swapped=count,color")
    again = open_source(source.spec)
    for i in range(20):
        captions = source.captions(i)
        assert captions == again.captions(i)
        assert captions[:-4] == plain.captions(i)
        assert source.key(i) == plain.key(i)
        assert {caption.kind for caption in captions[-4:]} == {PROBE}
        pair = swapped_captions(source.scenes.scene(i), "count", "retrieval", i)
        assert tuple(caption.text for caption in captions[-4:-2]) == (pair or (captions[0].text,) * 2)


def test_unknown_classes_and_labels_beside_them_are_errors() -> None:
    with pytest.raises(UnknownName, match="colour"):
        open_source("scenes:5?swapped=colour")
    with pytest.raises(SourceError, match="Labels"):
        open_source("scenes:5?swapped=color&probe=shape")

"""The built-in world: deterministic, splits apart, questions that their text does not answer."""

import hashlib
import itertools
from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdstore.data import scenes
from kdstore.data.scenes import COLORS, HUES, QUESTION_TYPES, RELATION_GAP, SHAPES, SPLITS, Scenes
from kdstore.errors import SourceError, UnknownName

splits = st.sampled_from(sorted(SPLITS))
indices = st.integers(0, 10**9)


@given(splits, indices)
def test_a_scene_depends_on_split_and_index_alone(split, index):
    first = scenes.make_scene(split, index)
    scenes.make_scene.cache_clear()
    assert scenes.make_scene(split, index) == first


def test_the_world_of_version_one_never_changes():
    """Keys say scenes-1: other pictures or captions under them would silently mix two worlds."""
    source = Scenes("train", 20)
    told = "|".join(c.text for i in range(20) for c in source.captions(i))
    assert hashlib.sha256(told.encode()).hexdigest() == WORLD_SHA256


def test_questions_of_version_two_never_change():
    asked = "|".join(f"{q.question}{q.truth}{[a['answer'] for a in q.answers]}" for i in range(20) for q in scenes.questions("train", i))
    assert hashlib.sha256(asked.encode()).hexdigest() == QUESTIONS_SHA256


WORLD_SHA256 = "b6ff85adf6642890d5768d541803bd9fa49c2a3dc466d06e8a288816a9345429"
QUESTIONS_SHA256 = "33cab699cbda0c08bd860310fb67b3725408ea0c9021b894894ed5d21e0efee1"


@given(st.integers(0, 5000), st.integers(0, 5000))
def test_scenes_of_different_splits_have_different_content(i, j):
    def content(split, index):
        return [sorted(getattr(t, a) for t in scenes.make_scene(split, index).things) for a in scenes.ATTRIBUTES]

    found = [content(split, index) for split, index in zip(("train", "val", "test", "retrieval"), (i, j, i, j), strict=True)]
    assert all(a != b for k, a in enumerate(found) for b in found[:k])


@given(splits, indices, st.sampled_from(("mirrored", "swapped")))
def test_a_twin_stays_in_its_split_and_changes_the_caption(split, index, kind):
    scene = scenes.make_scene(split, index)
    twin = scenes.twin(scene, kind)
    if twin is None:
        return
    names = [{a: getattr(t, a) for a in scenes.ATTRIBUTES} for t in twin.things]
    assert scenes._content_hash(names) % 16 in SPLITS[split]
    assert scenes.captions(scene, split, index)[0].text != scenes.captions(twin, split, index)[0].text


def test_mirroring_twice_gives_the_same_picture_order():
    scene = scenes.make_scene("train", 3)
    again = scenes.twin(scenes.twin(scene, "mirrored"), "mirrored")
    assert scenes.captions(again, "train", 3) == scenes.captions(scene, "train", 3)


def test_captions_of_the_retrieval_split_are_unique():
    source = Scenes("retrieval", 400)
    texts = [c.text for i in range(len(source)) for c in source.captions(i)]
    assert len(set(texts)) == len(texts) == 800


@given(splits, indices)
def test_questions_have_ten_answers_with_ids_and_the_truth_leads(split, index):
    asked = scenes.questions(split, index)
    assert [q.question_type for q in asked] == [k for k in QUESTION_TYPES if k in {q.question_type for q in asked}]
    for q in asked:
        assert [a["answer_id"] for a in q.answers] == list(range(1, 11))
        assert Counter(a["answer"] for a in q.answers).most_common(1)[0][0] == q.truth


@given(splits, indices)
def test_the_truth_of_every_question_follows_from_the_scene(split, index):
    scene = scenes.make_scene(split, index)
    pairs = {(t.color, t.shape) for t in scene.things}
    for q in scenes.questions(split, index, scene):
        words = q.question.rstrip("?").split()
        if q.question_type == "exist":
            assert (q.truth == "yes") == ((words[-2], words[-1]) in pairs)
        elif q.question_type == "count":
            attribute, value = scene.counted
            assert int(q.truth) == sum(getattr(t, attribute) == value for t in scene.things)
        elif q.question_type == "query color":
            assert any(t.color == q.truth and t.shape == words[-1] for t in scene.things)
        elif q.question_type == "query shape":
            assert any(t.shape == q.truth and t.color == words[-2] for t in scene.things)
        elif q.question_type == "relation":
            side = words[4]
            target = {"leftmost": min, "rightmost": max, "topmost": min, "bottommost": max}[side](scene.things, key=lambda t: t.x if side in ACROSS else t.y)
            assert q.truth == target.color
            assert any(t.color != q.truth for t in scene.things)
            places = sorted(t.x if side in ACROSS else t.y for t in scene.things)
            outer, inner = (places[0], places[1]) if side in ("leftmost", "topmost") else (places[-1], places[-2])
            assert abs(outer - inner) >= RELATION_GAP, "none that could be taken for it"


ACROSS = ("leftmost", "rightmost")


def test_no_question_text_tells_its_answer():
    """The best answer per question text, learnt on one half, is at chance on the other: symmetry of the generator, not luck."""
    halves: list[dict[str, dict[str, Counter]]] = [defaultdict(lambda: defaultdict(Counter)) for _ in range(2)]
    for i in range(6000):
        for q in scenes.questions("train", i):
            halves[i % 2][q.question_type][q.question][q.truth] += 1
    for kind in QUESTION_TYPES:
        prior = sum((c for c in halves[0][kind].values()), Counter())
        hits = total = 0
        for text, truths in halves[1][kind].items():
            seen = halves[0][kind].get(text, prior)
            hits += truths[seen.most_common(1)[0][0]]
            total += truths.total()
        chance = max(sum((c for c in halves[1][kind].values()), Counter()).values()) / total
        error = (chance * (1 - chance) / total) ** 0.5
        assert hits / total < chance + 3 * error, kind


def test_hues_of_neighbouring_names_overlap():
    hues = defaultdict(list)
    for i in range(1500):
        for t in scenes.make_scene("train", i).things:
            hues[t.color].append((t.hue - HUES[t.color] + 180) % 360 - 180)
    for color, after in itertools.pairwise(COLORS):
        assert HUES[color] + max(hues[color]) > HUES[after] + min(hues[after])


def test_pictures_are_drawn_at_their_size_and_differ():
    pictures = [np.asarray(scenes.draw(scenes.make_scene("train", i))) for i in range(8)]
    assert all(p.shape == (64, 64, 3) and p.dtype == np.uint8 for p in pictures)
    assert len({p.tobytes() for p in pictures}) == 8


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_leaves_a_mark(shape):
    thing = next(t for i in range(400) for t in scenes.make_scene("train", i).things if t.shape == shape and t.fill == "solid")
    mask, _ = scenes._mask(thing)
    assert np.asarray(mask).max() == 255


def test_wrong_names_and_sizes_are_errors_of_ours():
    with pytest.raises(UnknownName, match="train"):
        Scenes("trian")
    with pytest.raises(SourceError):
        Scenes("train", 0)
    with pytest.raises(UnknownName):
        scenes.twin(scenes.make_scene("train", 0), "rotated")

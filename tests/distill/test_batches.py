"""Which pairs make which batch, what is in it, and what the student sees."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import open_clip
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image

from kdstore.data.scenes import Scenes
from kdstore.data.source import Caption, LoadedImage, Source, UndecodableImage
from kdstore.distill.batches import BatchPlan, Maker
from kdstore.distill.config import DistillConfig
from kdstore.distill.encoded import row_tensors
from kdstore.distill.pairs import Pairs, Texts, pairs_of_source, pairs_of_stores
from kdstore.distill.targets import StoreTargets
from kdstore.distill.teachers import describe_teachers
from kdstore.errors import ConfigError, JoinError, MissingFeature, SourceError
from kdstore.models.load import Model
from kdstore.models.pixels import Kept, split_preprocess
from kdstore.store import open_store
from kdstore.store.ahead import read_ahead
from kdstore.store.order import permutation

sizes = st.integers(1, 60).flatmap(lambda b: st.tuples(st.integers(b, 300), st.just(b)))

# The plan of batches


@given(sizes, st.integers(0, 2**63 - 1), st.integers(0, 5))
def test_an_epoch_shows_each_pair_once_but_for_the_short_last_batch(size: tuple[int, int], seed: int, epoch: int) -> None:
    plan = BatchPlan(*size, seed)
    steps = range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)
    seen = np.concatenate([plan.batch(step) for step in steps])
    assert all(len(plan.batch(step)) == plan.batch_size for step in steps)
    assert len(set(seen.tolist())) == len(seen) == plan.num_pairs - plan.dropped
    assert plan.dropped < plan.batch_size
    assert seen.min() >= 0
    assert seen.max() < plan.num_pairs


@given(sizes, st.integers(0, 99), st.lists(st.integers(0, 500), min_size=1, max_size=8))
def test_a_batch_depends_on_seed_and_step_alone(size: tuple[int, int], seed: int, steps: list[int]) -> None:
    forwards = {step: BatchPlan(*size, seed).batch(step).tolist() for step in steps}
    permutation.cache_clear()
    assert {step: BatchPlan(*size, seed).batch(step).tolist() for step in reversed(steps)} == forwards


def test_too_few_pairs_for_a_batch_are_an_error_that_says_how_many_there_are() -> None:
    with pytest.raises(ConfigError, match="only 7 can be trained on"):
        BatchPlan(7, 8, 0)


# Pairs


def captioned(counts: list[int]) -> Pairs:
    offsets = np.cumsum([0, *counts]).astype(np.int64)
    rows, texts = np.arange(len(counts)), np.arange(offsets[-1])
    return Pairs(rows, (rows,), Texts(offsets, texts, (texts,)), pa.array([f"caption {t}" for t in texts], pa.large_string()))


def maker(pairs: Pairs, batch_size: int, **parts: object) -> Maker:
    unused = {"source": None, "targets": (), "needs": ("image/embedding", "text/embedding"), "keep": None, "tokenizer": None, "kept": Kept(0)}
    return Maker(BatchPlan(len(pairs), batch_size, 3), pairs, **{**unused, **parts})  # type: ignore[arg-type]


@given(st.lists(st.integers(1, 5), min_size=1, max_size=30), st.integers(0, 200))
def test_the_caption_shown_is_always_one_of_the_image(counts: list[int], step: int) -> None:
    pairs = captioned(counts)
    make = maker(pairs, 1)
    (pair,), (text,) = make.plan.batch(step), make.texts(step)
    assert pairs.texts.offsets[pair] <= text < pairs.texts.offsets[pair + 1]


def test_captions_are_drawn_uniformly_and_anew_in_every_epoch() -> None:
    make = maker(captioned([4, 4]), 2)
    counts = Counter(int(text) for step in range(2000) for text in make.texts(step))
    assert set(counts) == set(range(8))
    assert all(400 < count < 600 for count in counts.values())


def test_pairs_without_a_store_are_all_pairs_of_the_source(source: Scenes) -> None:
    pairs = pairs_of_source(source)
    assert len(pairs) == len(source)
    assert not pairs.left_out
    for i in (0, 17):
        texts = [pairs.captions[int(id)].as_py() for id in pairs.texts.ids[pairs.texts.offsets[i] : pairs.texts.offsets[i + 1]]]
        assert texts == [caption.text for caption in source.captions(i)]


def test_images_without_captions_and_probe_captions_are_left_out_and_counted(select: Callable[..., Source]) -> None:
    captions = [(), (Caption("a probe", "probe"),), (Caption("a probe", "probe"), Caption("kept"))]
    pairs = pairs_of_source(select([0, 1, 2], captions=lambda i: captions[i]))
    assert pairs.source_rows.tolist() == [2]
    assert pairs.left_out == {"without a caption": 2}
    assert pairs.captions.take(pa.array(pairs.texts.ids)).to_pylist() == ["kept"]


def test_store_and_source_are_joined_by_key_and_what_is_left_out_is_counted(
    source: Scenes, make_store: Callable[..., Path], select: Callable[..., Source]
) -> None:
    store = open_store(make_store(invalid=[5, 6]))
    rows = [30, 5, 2, 17, 9]
    pairs = pairs_of_stores([store], select(rows))
    assert {rows[i]: int(target) for i, target in zip(pairs.source_rows, pairs.target_rows[0], strict=True)} == {2: 2, 9: 9, 17: 17, 30: 30}
    assert pairs.left_out == {"not in the source": len(source) - 5, "not valid in the store": 1}


def test_equal_captions_share_one_id(source: Scenes, store: Path) -> None:
    for pairs in (pairs_of_source(source), pairs_of_stores([open_store(store)], source)):
        texts = [caption.text for i in range(len(source)) for caption in source.captions(i)]
        assert pairs.captions.take(pa.array(pairs.texts.ids)).to_pylist() == texts
        assert len(pairs.captions) == len(set(texts)) < len(texts)


# What is in a batch


def test_every_target_is_that_of_the_image_and_the_caption_shown(
    source: Scenes, make_store: Callable[..., Path], teacher: Model, select: Callable[..., Source]
) -> None:
    store = open_store(make_store(invalid=[3]))
    shuffled = select(np.random.default_rng(0).permutation(len(source)).tolist())
    pairs = pairs_of_stores([store], shuffled)
    keep, finish = split_preprocess(teacher.preprocess)
    targets = StoreTargets(store, ("image/embedding", "text/embedding"))
    make = maker(pairs, 8, source=shuffled, targets=(targets,), keep=keep, tokenizer=teacher.tokenizer, kept=Kept(2**20))
    for step in range(7):
        batch = make(step)
        with torch.inference_mode():
            image_BD = teacher.clip.encode_image(finish(batch.views_BCHW))
            text_BD = teacher.clip.encode_text(batch.tokens_BL)
        (target,) = batch.told.teachers
        torch.testing.assert_close(target.image_BD, image_BD, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(target.text_BD, text_BD, rtol=1e-4, atol=1e-5)


def test_batches_do_not_depend_on_threads_or_memory(source: Scenes, store: Path, teacher: Model) -> None:
    pairs = pairs_of_stores([open_store(store)], source)
    keep, _ = split_preprocess(teacher.preprocess)
    targets = StoreTargets(open_store(store), ("image/embedding", "text/embedding"))

    def batches(threads: int, memory: int) -> list[torch.Tensor]:
        make = maker(pairs, 8, source=source, targets=(targets,), keep=keep, tokenizer=teacher.tokenizer, kept=Kept(memory))
        return [t for batch in read_ahead(make, range(3, 12), threads) for t in row_tensors(batch)]

    assert all(torch.equal(a, b) for a, b in zip(batches(1, 0), batches(5, 2**30), strict=True))


def test_an_image_other_than_the_teachers_is_refused(source: Scenes, store: Path, teacher: Model, select: Callable[..., Source]) -> None:
    repainted = select([3, 4], image=lambda row: source.image(row + 1))
    with pytest.raises(JoinError, match="is not the one the store was extracted from"):
        maker(pairs_of_stores([open_store(store)], repainted), 2, source=repainted, tokenizer=teacher.tokenizer)(0)


def test_an_image_that_cannot_be_decoded_is_named(source: Scenes, teacher: Model, select: Callable[..., Source]) -> None:
    def cut_short(row: int) -> LoadedImage:
        raise UndecodableImage("cut short")

    damaged = select([4], image=cut_short)
    with pytest.raises(SourceError, match=f"{source.key(4)} cannot be decoded: cut short"):
        maker(pairs_of_source(damaged), 1, source=damaged, tokenizer=teacher.tokenizer)(0)


def test_a_store_that_lacks_what_the_loss_needs_is_refused(make_store: Callable[..., Path]) -> None:
    with pytest.raises(MissingFeature, match="text/embedding"):
        StoreTargets(open_store(make_store(sides=("image",))), ("image/embedding", "text/embedding"))
    unscaled = StoreTargets(open_store(make_store(logit_scale=None)), ("image/embedding", "text/embedding", "logit_scale"))
    with pytest.raises(MissingFeature, match="logit scale"):
        describe_teachers(DistillConfig(loss="crd"), (unscaled,))
    assert describe_teachers(DistillConfig(loss="crd", teacher_temperature=50.0), (unscaled,))[0].softmax_scale == 50
    assert describe_teachers(DistillConfig(loss="fd"), (unscaled,))


# Views


@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_kept_views_give_the_students_own_preprocessing_bit_by_bit(mode: str, interpolation: str) -> None:
    preprocess = image_transform_v2(PreprocessCfg(size=(40, 40), resize_mode=mode, interpolation=interpolation, fill_color=9), is_train=False)
    keep, finish = split_preprocess(preprocess)
    noise = np.random.default_rng(0).integers(0, 256, (5, 51, 67, 3), np.uint8)
    images = [Image.fromarray(pixels) for pixels in noise]
    kept = np.stack([keep(image) for image in images])
    assert kept.dtype == np.uint8
    assert kept.shape == (5, 3, 40, 40)
    assert torch.equal(finish(torch.from_numpy(kept)), torch.stack([preprocess(image) for image in images]))


def test_every_pixel_value_is_converted_exactly() -> None:
    preprocess = image_transform_v2(PreprocessCfg(size=(16, 16)), is_train=False)
    keep, finish = split_preprocess(preprocess)
    image = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2))
    assert torch.equal(finish(torch.from_numpy(keep(image))[None])[0], preprocess(image))


def test_a_preprocessing_of_another_kind_is_kept_as_its_result() -> None:
    def preprocess(image: Image.Image) -> torch.Tensor:
        return torch.from_numpy(np.array(image, np.float32).transpose(2, 0, 1) ** 0.5)

    keep, finish = split_preprocess(preprocess)
    image = Image.new("RGB", (4, 4), (1, 2, 3))
    assert torch.equal(finish(torch.from_numpy(keep(image))[None])[0], preprocess(image))


def test_the_students_of_open_clip_are_kept_as_bytes(teacher: Model) -> None:
    assert isinstance(teacher.clip, open_clip.CLIP)
    assert split_preprocess(teacher.preprocess)[0](Image.new("RGB", (70, 64))).dtype == np.uint8


@given(st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=12), max_size=8), st.integers(0, 10))
def test_kept_arrays_are_right_and_within_the_budget(requests: list[list[int]], room: int) -> None:
    kept, made = Kept(room * 8), Counter[int]()

    def make(rows: list[int]) -> list[np.ndarray]:
        made.update(rows)
        return [np.full(1, row) for row in rows]

    for rows in requests:
        assert kept.get("view", rows, make).tolist() == [[row] for row in rows]
    asked = {row for rows in requests for row in rows}
    assert sum(made[row] == 1 for row in asked) >= min(room, len(asked))
    if room == 10:
        assert all(made[row] == 1 for row in asked)

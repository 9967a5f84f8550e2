"""Extraction with augmented views: every stored embedding is that of the picture which its numbers draw."""

import numpy as np
import pytest
import torch
from PIL import Image

from kdstore.data.scenes import Scenes
from kdstore.errors import ConfigError, IdentityMismatch
from kdstore.extract.config import ExtractConfig
from kdstore.extract.estimate import estimate
from kdstore.extract.recompute import recompute
from kdstore.extract.run import extract
from kdstore.extract.views import augmentation_of
from kdstore.models.encode import encode_image
from kdstore.models.load import load_model
from kdstore.store import Encoding, StoreWriter, concat_stores, finalise_store, open_store, recode_store, store_stats, stored_views, subset_store, verify_store
from kdstore.store.derive import Part, plan_of
from kdstore.store.layout import ArraySpec

IMAGES = 24
VIEWS = {"views": 2, "view_flip": 0.5, "view_strength": 0.6}


def config(out, **changes):
    settings = {"teacher": "scenes-S", "data": f"scenes/val:{IMAGES}", "out": str(out), "unit_rows": 16, "batch": 8, "device": "cpu"}
    return ExtractConfig(**{**settings, **VIEWS, **changes})


def cosine(a, b):
    a, b = (x.reshape(-1, x.shape[-1]).astype(np.float64) for x in (a, b))
    return (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


@pytest.fixture(scope="module")
def teacher():
    return load_model("scenes-S", device="cpu")  # a trained one: random towers see hardly any difference between pictures


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    path = tmp_path_factory.mktemp("views") / "s"
    return path, extract(config(path, tokens="image")).digest


def all_of(store, name):
    return np.stack([store.gather(name, np.arange(store.num_images), view) for view in range(store.arrays[name].views)], 1)


def test_a_replayed_view_has_the_pixels_and_the_embedding_of_the_extracted_one(made, teacher):
    store, source = open_store(made[0]), Scenes("val", IMAGES)
    views, augmentation = stored_views(store), augmentation_of(config("s"), teacher)
    assert (views.count, views.augmentation) == (3, augmentation)
    seen = np.empty((IMAGES, 3, teacher.embed_dim))
    for row in range(IMAGES):
        image = source.image(row).image
        replayed = [views.picture(image, row, view) for view in range(3)]
        extracted = [augmentation.draw(image, augmentation.parameters(source.key(row), view, *image.size)) for view in (1, 2)]
        assert replayed[0] is image
        assert [picture.tobytes() for picture in replayed[1:]] == [picture.tobytes() for picture in extracted]
        assert replayed[1].size == teacher.image_size  # so the teacher's own resize leaves the pixels alone
        seen[row] = encode_image(teacher, torch.stack([teacher.preprocess(picture) for picture in replayed])).numpy()
    stored = all_of(store, "image/embedding")
    assert cosine(stored, seen).min() >= 0.9999
    assert cosine(stored[:, 1], seen[:, 2]).max() < 0.999  # or the test could not tell views apart


def test_the_plain_view_and_tokens_are_those_of_a_store_without_views_which_says_nothing_of_views(made, tmp_path):
    extract(config(tmp_path / "s", views=0, tokens="image"))
    with_views, without = open_store(made[0]), open_store(tmp_path / "s")
    assert "image/view" not in without.arrays
    assert without.identity["arrays"].keys() == {"image/embedding", "text/embedding", "image/tokens"}
    assert with_views.identity["arrays"]["image/embedding"] == {**without.identity["arrays"]["image/embedding"], "views": ["plain", "augmented", "augmented"]}
    assert with_views.arrays["image/tokens"] == without.arrays["image/tokens"]
    rows = np.arange(IMAGES)
    for name in ("image/embedding", "image/tokens"):
        assert cosine(with_views.gather(name, rows), without.gather(name, rows)).min() >= 0.9999
    assert (with_views.gather("image/view", rows) == np.array([0, 0, 1, 1, 0, 0, 0, 0, 0])).all()


def test_an_estimate_counts_all_views(made, tmp_path):
    said = estimate(config(tmp_path / "s", tokens="image"))
    store = open_store(made[0])
    assert said.arrays["image/view"] == f"[{IMAGES}, 3, 9] float32"
    assert said.bytes == sum(spec.row_bytes * spec.views * spec.shape[0] for name, spec in store.arrays.items() if not name.endswith("/valid"))
    assert said.images_encoded > 0


def test_parts_make_the_store_of_one_run(made, tmp_path):
    for part in ("2/2", "1/2"):
        extract(config(tmp_path / "s", tokens="image", part=part))
    assert finalise_store(tmp_path / "s") == made[1]


def test_a_stopped_run_goes_on_with_the_same_views_and_other_views_are_another_store(made, tmp_path):
    def stop(stage, done, total, note):
        if stage == "images" and done > 17:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        extract(config(tmp_path / "s", tokens="image"), on_progress=stop)
    for change in ({"views": 1}, {"view_seed": 1}, {"view_side": 64}, {"view_scale": (0.5, 1.0)}):
        with pytest.raises(IdentityMismatch, match="image/view"):
            extract(config(tmp_path / "s", tokens="image", **change))
    assert extract(config(tmp_path / "s", tokens="image", threads=1)).digest == made[1]


def test_an_undecodable_image_has_no_features_in_any_view_and_codes_of_views_decode(tmp_path, teacher):
    for k in range(12):
        Scenes("val", 12).image(k).image.resize((90 + k, 70)).save(tmp_path / f"{k}.png")
    (tmp_path / "2.png").write_text("no image")
    (tmp_path / "metadata.csv").write_text("file_name,caption\n" + "".join(f"{k}.png,number {k}\n" for k in range(12)))
    extract(config(tmp_path / "s", data=str(tmp_path), encode="int8", batch=2))
    store = open_store(tmp_path / "s")
    views, codec, good = stored_views(store), store.codec("image/embedding"), [k for k in range(12) if k != 2]
    assert np.isnan(all_of(store, "image/view")[2]).all()
    for view in range(3):
        found = store.features("image/embedding", np.arange(12), view)
        assert np.isnan(found).any(1).tolist() == [k == 2 for k in range(12)]
        pictures = [views.picture(Image.open(tmp_path / f"{k}.png"), k, view) for k in good]
        live = encode_image(teacher, torch.stack([teacher.preprocess(picture) for picture in pictures])).numpy()
        assert cosine(found[good], codec.decode(codec.encode(live))).min() > 0.9999
        assert cosine(found[good], live).min() > 0.9  # fitted on nine pictures
    assert recompute(tmp_path / "s", 11, device="cpu").ok


def test_the_teacher_runs_again_on_random_views_and_finds_embeddings_of_other_views(made, tmp_path):
    report = recompute(made[0], IMAGES, device="cpu")
    assert report.ok
    assert set(report.arrays) == {"image/embedding", "text/embedding", "image/tokens"}
    store = open_store(made[0])
    plan = plan_of([Part.of(store)], 16)
    with StoreWriter.open(tmp_path / "s", plan=plan, arrays=swappable(store), identity=store.identity) as writer:
        for unit in writer.pending():
            with writer.attempt(unit) as attempt:
                rows = np.arange(unit.start, unit.stop)
                if unit.side == "image":
                    attempt.append("image/embedding", all_of(store, "image/embedding")[rows][:, [0, 2, 1]])
                    attempt.append("image/view", all_of(store, "image/view")[rows])
                    attempt.index([{"sha256": sha, "valid": True, "reason": "", "width": 1, "height": 1} for sha in store.image_sha256()[rows].tolist()])
                else:
                    attempt.append("text/embedding", store.gather("text/embedding", rows))
        writer.finalise({"source": store.recorded_source})
    swapped = recompute(tmp_path / "s", IMAGES, device="cpu", seed=0)
    assert len(swapped.arrays["image/embedding"].failed) > IMAGES // 3
    assert not swapped.arrays["text/embedding"].failed


def swappable(store) -> list[ArraySpec]:
    return [store.arrays[name] for name in ("image/embedding", "image/view", "text/embedding")]


def test_views_go_through_every_operation_on_stores(made, tmp_path):
    store = open_store(made[0])
    expected = all_of(store, "image/embedding")
    for number, rows in enumerate((slice(0, 10), slice(10, None))):
        subset_store(made[0], tmp_path / f"part{number}", rows=rows, arrays=["image/embedding", "text/embedding"])
    concat_stores([tmp_path / "part0", tmp_path / "part1"], tmp_path / "whole")
    recode_store(tmp_path / "whole", tmp_path / "recoded", Encoding(codec="zstd", dtype="float32", shard_rows=8))
    for name in ("whole", "recoded"):
        again = open_store(tmp_path / name)
        assert verify_store(tmp_path / name).ok
        assert (all_of(again, "image/embedding") == expected).all()
        assert all_of(again, "image/view").tobytes() == all_of(store, "image/view").tobytes()
        assert stored_views(again).augmentation == stored_views(store).augmentation
        assert recompute(tmp_path / name, 6, device="cpu").ok
    stats = store_stats(tmp_path / "recoded")["arrays"]
    assert stats["image/embedding"]["vectors"] == stats["image/view"]["vectors"] == 3 * IMAGES
    subset_store(made[0], tmp_path / "tokens", arrays=["image/tokens"])
    assert stored_views(open_store(tmp_path / "tokens")) is None
    with pytest.raises(ConfigError, match="image/view hold no floats of features"):
        recode_store(tmp_path / "whole", tmp_path / "x", Encoding(dtype="float16"), arrays=["image/view"])


def test_a_batch_smaller_than_the_views_of_one_image_gives_the_same_features(made, tmp_path):
    extract(config(tmp_path / "s", batch=2))
    assert cosine(all_of(open_store(tmp_path / "s"), "image/embedding"), all_of(open_store(made[0]), "image/embedding")).min() >= 0.9999


@pytest.mark.parametrize(
    "changes", [{"views": -1}, {"views": 1024, "unit_rows": 16_384}, {"view_scale": (0.0, 1.0)}, {"view_ratio": (1.0,)}, {"view_side": -3}, {"view_flip": 2.0}]
)
def test_views_that_cannot_be_made_or_stored_are_refused_at_once(changes):
    with pytest.raises(ConfigError):
        config("s", **changes)

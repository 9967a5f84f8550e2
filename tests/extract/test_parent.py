"""Arrays that are added to the rows of a store: they are those that one extraction of all would have given."""

import pickle
import shutil

import numpy as np
import pytest
from PIL import Image

from kdstore.data.source import Caption
from kdstore.errors import ConfigError, IdentityMismatch, JoinError, MissingFeature, SourceError, StoreError
from kdstore.extract.config import ExtractConfig
from kdstore.extract.recompute import recompute
from kdstore.extract.run import extract
from kdstore.progress import silent
from kdstore.store import Encoding, Plan, StoreWriter, concat_stores, open_family, open_store, plan, recode_store, subset_store, verify_store, withdraw_rows

SHARED = {"teacher": "scenes-T", "untrained_seed": 0, "unit_rows": 16, "device": "cpu"}
ARRAYS = ("image/embedding", "image/tokens", "text/embedding", "text/tokens", "text/length", "image/valid", "text/valid")


def config(out, **changes):
    return ExtractConfig(**{**SHARED, "data": "scenes/val:40", "out": str(out), **changes})


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """A parent of embeddings alone, and a store of everything."""
    folder = tmp_path_factory.mktemp("stores")
    extract(config(folder / "parent"))
    extract(config(folder / "all", tokens="both"))
    return folder


def child(stores, out, on_progress=silent, **changes):
    settings = {**SHARED, "parent": str(stores / "parent"), "tokens": "both", "out": str(out), **changes}
    return extract(ExtractConfig(**settings), on_progress=on_progress)


def write_keys(path, keys):
    path.write_text("".join(f"{key}\n" for key in keys))
    return str(path)


def test_a_parent_with_its_child_is_the_store_that_has_all_at_once(stores, tmp_path):
    child(stores, tmp_path / "child", unit_rows=32)
    family, whole = open_family(stores / "parent", tmp_path / "child"), open_store(stores / "all")
    assert sorted(open_store(tmp_path / "child").arrays) == ["image/tokens", "image/valid", "text/length", "text/tokens", "text/valid"]
    assert family.arrays.keys() == whole.arrays.keys()
    assert family.fingerprint == whole.fingerprint
    for name in ARRAYS:
        rows = np.random.default_rng(0).integers(-whole.arrays[name].shape[0], whole.arrays[name].shape[0], 50)
        assert np.array_equal(family.gather(name, rows), whole.gather(name, rows)), name
        assert family.arrays[name].row_shape == whole.arrays[name].row_shape
        assert family.holds(name).all()


def test_images_that_were_withdrawn_from_the_parent_are_not_asked_of_the_data(stores, tmp_path):
    gone = open_store(stores / "parent").keys()[5]
    withdraw_rows(stores / "parent", tmp_path / "parent", keys=[gone])
    child(stores, tmp_path / "child", parent=str(tmp_path / "parent"), tokens="image", data="scenes/val:40")
    family, whole = open_family(tmp_path / "parent", tmp_path / "child"), open_store(stores / "all")
    tokens = family.gather("image/tokens", np.arange(40))
    assert np.isnan(tokens[5]).all()
    assert np.array_equal(np.delete(tokens, 5, 0), np.delete(whole.gather("image/tokens", np.arange(40)), 5, 0))
    assert open_store(tmp_path / "child").index("image", "reason").to_pylist()[5] == "withdrawn"


def test_a_child_of_chosen_keys_lies_at_the_rows_of_its_parent(stores, tmp_path):
    whole = open_store(stores / "all")
    rows = [3, 4, 17, 31, 39]
    keys = write_keys(tmp_path / "keys", reversed(whole.keys()[rows].tolist()))
    made = child(stores, tmp_path / "child", keys=keys)
    assert (made.images, verify_store(tmp_path / "child").ok) == (5, True)
    family = pickle.loads(pickle.dumps(open_family(stores / "parent", tmp_path / "child")))
    assert np.flatnonzero(family.holds("image/tokens")).tolist() == rows
    asked = np.array([39, 3, 3, -1, 17])
    assert np.array_equal(family.gather("image/tokens", asked), whole.gather("image/tokens", asked))
    assert np.array_equal(family.gather("image/embedding", np.arange(40)), whole.gather("image/embedding", np.arange(40)))
    texts = np.flatnonzero(family.holds("text/tokens"))
    assert texts.tolist() == [t for row in rows for t in range(whole.offsets[row], whole.offsets[row + 1])]
    assert np.array_equal(family.features("text/tokens", texts), whole.features("text/tokens", texts))
    with pytest.raises(MissingFeature, match="for 5 of 40 rows; row 5 is not among them"):
        family.gather("image/tokens", [3, 5])
    with pytest.raises(IndexError):
        family.gather("image/tokens", [40])


def test_codes_of_a_child_decode(stores, tmp_path):
    child(stores, tmp_path / "child", tokens="image", reduce="int8")
    family, whole = open_family(stores / "parent", tmp_path / "child"), open_store(stores / "all")
    rows = np.flatnonzero(whole.image_valid)
    assert np.abs(family.features("image/tokens", rows) - whole.features("image/tokens", rows)).max() < 0.1
    assert family.feature_shape("image/tokens") == whole.feature_shape("image/tokens")


def test_an_interrupted_child_goes_on_and_a_finished_one_is_left_alone(stores, tmp_path):
    expected = child(stores, tmp_path / "a").digest

    def stop_in_the_second_unit(stage, done, total, note=""):
        if stage == "images" and done > 16:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        child(stores, tmp_path / "b", on_progress=stop_in_the_second_unit)
    resumed = child(stores, tmp_path / "b")
    assert (resumed.digest, resumed.written_images) == (expected, 24)
    assert child(stores, tmp_path / "b").written_images == 0


def test_a_child_is_recomputed_recoded_cut_and_put_together_as_any_store(stores, tmp_path):
    child(stores, tmp_path / "child")
    assert recompute(tmp_path / "child", 4, device="cpu", seed=1).arrays.keys() == {"image/tokens", "text/tokens"}
    parent, whole = open_store(stores / "parent"), open_store(stores / "all")
    for part, rows in (("first", slice(0, 20)), ("second", slice(20, 40))):
        subset_store(tmp_path / "child", tmp_path / part, rows=rows)
    assert open_family(stores / "parent", tmp_path / "first").holds("image/tokens").sum() == 20
    concat_stores([tmp_path / "first", tmp_path / "second"], tmp_path / "both")
    assert "parent" not in open_store(tmp_path / "both").identity
    recode_store(tmp_path / "child", tmp_path / "recoded", Encoding(codec="zstd"))
    assert open_store(tmp_path / "recoded").identity["parent"] == {"digest": parent.digest}
    assert np.array_equal(open_family(stores / "parent", tmp_path / "recoded").gather("image/tokens", [7]), whole.gather("image/tokens", [7]))


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"untrained_seed": 1}, IdentityMismatch, "teacher.weights_sha256"),
        ({"data": "scenes/val:39"}, JoinError, "lacks 1 of 40 images"),
        ({"data": "scenes/train:40"}, JoinError, "No key of"),
        ({"tokens": "none"}, ConfigError, "needs arrays"),
        ({"parent": None, "keys": "k"}, ConfigError, "Keys choose rows of a parent"),
        ({"keys": "no-such-file"}, ConfigError, "Cannot read the keys"),
    ],
)
def test_what_would_not_be_the_same_rows_of_the_same_teacher_is_refused(stores, tmp_path, changes, error, said):
    with pytest.raises(error, match=said):
        child(stores, tmp_path / "child", **changes)
    assert not (tmp_path / "child").exists()


def test_arrays_that_the_parent_has_and_keys_that_it_lacks_are_refused(stores, tmp_path):
    with pytest.raises(ConfigError, match="holds image/tokens and text/tokens already"):
        child(stores, tmp_path / "child", parent=str(stores / "all"))
    with pytest.raises(JoinError, match="holds no nobody: 1 of 2 keys"):
        child(stores, tmp_path / "child", keys=write_keys(tmp_path / "keys", [open_store(stores / "parent").keys()[0], "nobody"]))


def test_a_store_is_the_child_of_one_parent_only(stores, tmp_path):
    child(stores, tmp_path / "child")
    with pytest.raises(IdentityMismatch, match="is no child of"):
        open_family(stores / "all", tmp_path / "child")
    with pytest.raises(IdentityMismatch, match="is no child of"):
        open_family(stores / "parent", stores / "all")


@pytest.fixture
def photos(tmp_path):
    """A folder of six images, of which `parent` is extracted."""
    photos = tmp_path / "photos"
    photos.mkdir()
    for k in range(6):
        Image.new("RGB", (64, 64), (40 * k, 9, 9)).save(photos / f"{k}.png")
    (photos / "metadata.csv").write_text("file_name,caption\n" + "".join(f"{k}.png,number {k}\n" for k in range(6)))
    extract(config(tmp_path / "parent", data=str(photos)))
    return photos


def test_an_image_that_changed_since_is_an_error_and_no_feature(photos, tmp_path):
    Image.new("RGB", (64, 64), (1, 2, 3)).save(photos / "4.png")
    with pytest.raises(JoinError, match=r"the image '.*4\.png' is not the one that"):
        child(tmp_path, tmp_path / "child", tokens="image")
    (tmp_path / "keys").write_text("".join(f"{key}\n" for key in open_store(tmp_path / "parent").keys()[:4]))
    assert child(tmp_path, tmp_path / "child", tokens="image", keys=str(tmp_path / "keys")).images == 4
    shutil.copytree(tmp_path / "parent", tmp_path / "moved")
    (tmp_path / "moved" / "run.json").unlink()
    with pytest.raises(SourceError, match="does not say which data"):
        child(tmp_path, tmp_path / "other", parent=str(tmp_path / "moved"), tokens="image")


def test_text_tokens_need_no_image(photos, tmp_path):
    for k in range(6):
        (photos / f"{k}.png").write_bytes(b"changed")
    stages = []
    made = child(tmp_path, tmp_path / "child", tokens="text", on_progress=lambda stage, *_: stages.append(stage))
    assert (made.written_images, made.written_texts) == (0, 6)
    assert made.rates.bottleneck != "reading"
    assert "images" not in stages
    family, parent = open_family(tmp_path / "parent", tmp_path / "child"), open_store(tmp_path / "parent")
    assert family.features("text/tokens", [5]).shape[0] == 1
    assert open_store(tmp_path / "child").index("image", "sha256") == parent.index("image", "sha256")


def test_image_tokens_of_images_without_captions_are_added(stores, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"path": "a.png", "captions": ["one"]}\n{"path": "b.png", "captions": []}\n')
    for name, color in (("a", 9), ("b", 99)):
        Image.new("RGB", (64, 64), (color, 9, 9)).save(tmp_path / f"{name}.png")
    extract(config(tmp_path / "parent", data=str(tmp_path / "rows.jsonl")))
    keys = write_keys(tmp_path / "keys", open_store(tmp_path / "parent").keys()[1:])
    assert child(tmp_path, tmp_path / "child", tokens="image", keys=keys).images == 1
    with pytest.raises(ConfigError, match="There is no key"):
        child(tmp_path, tmp_path / "other", tokens="image", keys=write_keys(tmp_path / "none", []))
    with pytest.raises(ConfigError, match="embeddings are the parent's"):
        child(tmp_path, tmp_path / "other", encode="int8")


def test_a_store_is_never_written_into_another(stores, tmp_path):
    shutil.copytree(stores / "parent", tmp_path / "parent")
    with pytest.raises(StoreError, match="lies in the store"):
        child(tmp_path, tmp_path / "parent" / "child")
    assert verify_store(tmp_path / "parent").ok


def test_two_children_with_the_same_array_and_rows_in_another_order_are_refused(stores, tmp_path):
    for name in ("a", "b"):
        child(stores, tmp_path / name, tokens="text", keys=write_keys(tmp_path / "keys", open_store(stores / "parent").keys()[:3]))
    with pytest.raises(IdentityMismatch, match="as another of these stores does"):
        open_family(stores / "parent", tmp_path / "a", tmp_path / "b")
    parent, made = open_store(stores / "parent"), open_store(tmp_path / "a")
    shuffled = Plan.freeze([(key, (Caption(f"other {key}"),) * 5) for key in parent.keys()[[2, 0, 1]].tolist()])
    with StoreWriter.open(tmp_path / "shuffled", plan=shuffled, arrays=[], identity=made.identity) as writer:
        for unit in writer.pending():
            with writer.attempt(unit) as attempt:
                if unit.side == "image":
                    attempt.index([{"sha256": "", "valid": True, "reason": "", "width": 1, "height": 1}] * 3)
        writer.finalise({})
    with pytest.raises(IdentityMismatch, match="in their order"):
        open_family(stores / "parent", tmp_path / "shuffled")


def test_rows_that_are_no_row_numbers_are_refused_as_those_of_any_store(stores, tmp_path):
    child(stores, tmp_path / "child", keys=write_keys(tmp_path / "keys", open_store(stores / "parent").keys()[:3]))
    family = open_family(stores / "parent", tmp_path / "child")
    for rows in ([True, False], [1.9]):
        with pytest.raises(IndexError):
            family.gather("image/tokens", rows)


def test_a_child_of_many_rows_in_small_units_gets_larger_ones(stores, tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "MAX_SHARDS", 4)
    child(stores, tmp_path / "child", tokens="text", unit_rows=1)
    assert open_store(tmp_path / "child").unit_rows == 64


def test_views_are_added_to_rows_of_a_store(stores, tmp_path):
    extract(config(tmp_path / "whole", views=2))
    whole = open_store(tmp_path / "whole")
    rows = [2, 5, 30]
    assert child(stores, tmp_path / "all", tokens="none", views=2).written_texts == 0
    child(stores, tmp_path / "some", tokens="image", views=2, keys=write_keys(tmp_path / "keys", whole.keys()[rows]))
    for path in ("all", "some"):
        family = open_family(stores / "parent", tmp_path / path)
        arrays = {"image/embedding", "image/valid", "image/view", "text/valid"} | ({"image/tokens"} if path == "some" else set())
        assert open_store(tmp_path / path).arrays.keys() == arrays
        for view in range(3):
            a, b = (store.gather("image/embedding", rows, view).astype(np.float32) for store in (family, whole))
            np.testing.assert_allclose(a, b, atol=2e-3)
            assert np.array_equal(family.gather("image/view", rows, view), whole.gather("image/view", rows, view))
        assert np.array_equal(family.gather("text/embedding", [7]), whole.gather("text/embedding", [7]))
    with pytest.raises(MissingFeature, match="for 3 of 40 rows"):
        family.gather("image/embedding", [0])
    with pytest.raises(ConfigError, match="holds image/embedding already"):
        extract(ExtractConfig(**SHARED, parent=str(tmp_path / "whole"), views=1, out=str(tmp_path / "more")))

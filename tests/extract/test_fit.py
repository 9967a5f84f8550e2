"""Codecs in an extraction: fitted before the first unit, measured on rows held out, the same after a resume."""

import numpy as np
import pytest
import torch
from PIL import Image

from kdstore.data.scenes import Scenes
from kdstore.distill.targets import StoreTargets
from kdstore.errors import ConfigError, IdentityMismatch, ModelError, SourceError
from kdstore.extract.config import ExtractConfig
from kdstore.extract.fit import encoded
from kdstore.extract.job import prepare
from kdstore.extract.recompute import recompute
from kdstore.extract.run import extract
from kdstore.extract.units import BAD_VALUES
from kdstore.jsonfile import read_json
from kdstore.models.encode import encode_image, encode_image_tokens, encode_text_tokens
from kdstore.models.load import load_model
from kdstore.store import diff_stores, open_store, store_stats, verify_store

CODECS = {"tokens": "both", "encode": "int8", "reduce": "pool3+pca24+int8"}


def config(out, **changes):
    return ExtractConfig(**{"teacher": "scenes-T", "untrained_seed": 0, "data": "scenes/val:70", "out": str(out), "unit_rows": 32, "device": "cpu", **changes})


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "s"
    return path, extract(config(path, **CODECS))


def test_decoded_features_are_those_of_the_teacher_within_the_stated_error(whole):
    path = whole[0]
    store, model, source = open_store(path), load_model("scenes-T", untrained=True, device="cpu"), Scenes("val", 70)
    assert verify_store(path).ok
    assert {name: str(codec.chain) for name, codec in store.codecs.items()} == {
        "image/embedding": "int8",
        "text/embedding": "int8",
        "image/tokens": "pool3+pca24+int8",
        "text/tokens": "pca24+int8",
    }
    rows = np.arange(70)
    embedding, tokens = encode_image_tokens(model, torch.stack([model.preprocess(source.image(i).image) for i in rows]))
    run = read_json(path / "run.json")["codecs"]
    for name, live in (("image/embedding", embedding.numpy()), ("image/tokens", store.codec("image/tokens").chain.pooled(tokens.numpy()))):
        found = store.features(name, rows)
        assert found.shape == live.shape
        cosine = (found * live).sum(-1) / np.linalg.norm(found, axis=-1) / np.linalg.norm(live, axis=-1)
        stated = store.codecs[name].record["held_out"]
        assert stated == run[name]["held_out"]
        assert cosine.mean() == pytest.approx(stated["cosine"]["mean"], abs=0.02)
    held_out = run["image/embedding"]["held_out"]
    assert held_out["cosine"]["min"] > 0.999
    assert held_out["logit_error_max"] < 0.05 * model.logit_scale
    assert held_out["top1_agreement_image_to_text"] > 0.8
    assert 0 < run["image/tokens"]["held_out"]["explained_variance"] <= 1
    assert run["image/tokens"]["held_out"]["token_to_cell_cosine"]["mean"] <= 1
    texts = store.captions()[:9]
    hidden, lengths = encode_text_tokens(model, texts)
    decoded = store.features("text/tokens", np.arange(9))
    beyond = np.arange(hidden.shape[1]) >= lengths.numpy()[:, None]
    assert (decoded[beyond] == 0).all()
    assert (store.gather("text/tokens", np.arange(9))[beyond] == 0).all()
    assert np.abs(decoded[~beyond]).sum() > 0


def test_a_student_is_given_decoded_embeddings(whole):
    store = open_store(whole[0])
    targets = StoreTargets(store, ("image/embedding", "text/embedding"))
    np.testing.assert_array_equal(targets.image("image/embedding", np.array([3, 1]), np.array([0, 0])), store.features("image/embedding", [3, 1]))
    assert targets.text("text/embedding", np.array([0])).dtype == np.float32
    assert targets.shape("image/embedding") == store.features("image/embedding", [0]).shape[1:]


def test_a_run_that_stopped_takes_its_codecs_from_the_build_folder(whole, tmp_path, monkeypatch):
    def stop(stage, done, total, note):
        if stage == "images" and done > 40:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        extract(config(tmp_path / "s", **CODECS), on_progress=stop)
    monkeypatch.setattr("kdstore.extract.job.fit_codecs", None)  # nothing is fitted again
    with pytest.raises(IdentityMismatch):
        extract(config(tmp_path / "s", **{**CODECS, "precision": "bf16"}))
    assert extract(config(tmp_path / "s", **CODECS)).digest == whole[1].digest
    assert extract(config(tmp_path / "s", **CODECS)).written_images == 0


def test_the_teacher_runs_again_on_coded_features(whole, tmp_path):
    report = recompute(whole[0], 12, device="cpu")
    assert report.ok
    assert report.skipped == ()
    assert set(report.arrays) == {"image/embedding", "text/embedding", "image/tokens", "text/tokens"}
    other = load_model("scenes-T", untrained=True, seed=1, device="cpu")
    torch.save(other.clip.state_dict(), tmp_path / "other.pt")
    wrong = recompute(whole[0], 12, teacher="scenes-T", pretrained=str(tmp_path / "other.pt"), device="cpu")
    assert all(compared.failed for compared in wrong.arrays.values())


def test_an_undecodable_image_has_code_0_and_no_features(tmp_path):
    for k in range(12):
        Image.new("RGB", (70, 64), (20 * k, 9, 250 - 20 * k)).save(tmp_path / f"{k}.png")
    (tmp_path / "2.png").write_text("no image")
    (tmp_path / "metadata.csv").write_text("file_name,caption\n" + "".join(f"{k}.png,number {k}\n" for k in range(12)))
    extract(config(tmp_path / "s", data=str(tmp_path), tokens="image", encode="int8", reduce="pca4"))
    store = open_store(tmp_path / "s")
    assert (store.gather("image/embedding", [2]) == 0).all()
    assert np.isnan(store.gather("image/tokens", [2])).all()
    for name in ("image/embedding", "image/tokens"):
        invalid = np.isnan(store.features(name, np.arange(12))).reshape(12, -1)
        assert invalid.all(1).tolist() == [k == 2 for k in range(12)]
        assert not invalid[[k for k in range(12) if k != 2]].any()


@pytest.mark.parametrize(("changes", "said"), [({"encode": "pool2"}, "square grid"), ({"encode": "pca65"}, "pca64|channels"), ({"encode": "pq64"}, "256")])
def test_a_codec_that_does_not_fit_is_refused_before_anything_is_written(changes, said, tmp_path):
    with pytest.raises(ConfigError, match=said):
        extract(config(tmp_path / "s", **changes))
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("changes", [{"encode": "int9"}, {"reduce": "int8+pca4"}, {"codec_sample": 0}])
def test_a_codec_that_is_none_is_refused_with_the_settings(changes):
    with pytest.raises(ConfigError):
        config("s", **changes)


def test_values_that_are_not_finite_are_counted_and_refused():
    rows = np.ones((4, 3), np.float32)
    rows[1, 0], rows[2, :2] = np.nan, np.inf
    with pytest.raises(ModelError, match="4 rows hold 1 NaN, 2 infinite values and 0 beyond"):
        encoded("image/embedding", rows, None, "float32")
    rows[1:3] = 7e4
    with pytest.raises(ModelError, match="0 NaN, 0 infinite values and 6 beyond float16"):
        encoded("image/embedding", rows, None, "float16")
    codes, good = encoded("image/embedding", rows, None, "float32")
    assert codes.tolist() == rows.tolist()
    assert good.all()
    codes, good = encoded("image/embedding", rows, None, "float16", refuse=False)
    assert good.tolist() == [True, False, False, True]


def test_stores_whose_codes_mean_other_values_are_compared_by_their_features(tmp_path):
    extract(config(tmp_path / "float"))
    extract(config(tmp_path / "int8", encode="int8"))
    found = diff_stores(tmp_path / "float", tmp_path / "int8")
    assert not found.same
    assert found.arrays["image/embedding"].cosine_min > 0.999
    same = diff_stores(tmp_path / "int8", tmp_path / "int8")
    assert same.same
    assert same.arrays["image/embedding"].rows == 70


def test_statistics_of_codes_are_those_of_the_features_that_they_stand_for(tmp_path):
    extract(config(tmp_path / "float", tokens="image"))
    extract(config(tmp_path / "int8", encode="int8", tokens="image", reduce="pool2+int8"))
    stored, coded = (store_stats(tmp_path / name)["arrays"] for name in ("float", "int8"))
    assert stored.keys() == coded.keys()
    np.testing.assert_allclose(coded["image/embedding"]["mean"], stored["image/embedding"]["mean"], atol=0.02)
    assert (coded["image/tokens"]["vectors"], coded["image/tokens"]["rows"]) == (280, 70)
    assert (coded["image/tokens"]["codec"], "at_limit" in coded["image/tokens"], "at_limit" in stored["image/tokens"]) == ("pool2+int8", False, True)
    assert open_store(tmp_path / "int8").summary()["codecs"]["image/tokens"]["held_out"]["cosine"]["mean"] > 0.99


@pytest.mark.parametrize("views", [0, 1])
def test_rows_with_values_that_cannot_be_stored_are_marked_if_the_user_wants_it(views, tmp_path):
    model, source = load_model("scenes-S", device="cpu"), Scenes("val", 40)
    plain = np.abs(encode_image(model, torch.stack([model.preprocess(source.image(i).image) for i in range(40)])).numpy()).max(axis=1)
    weights = model.clip.state_dict()
    weights["visual.attnpool.c_proj.weight"] *= 65504 / np.median(plain)  # half of the images overflow
    torch.save(weights, tmp_path / "hot.pt")
    settings = {"teacher": "scenes-S", "pretrained": str(tmp_path / "hot.pt"), "untrained_seed": None, "data": "scenes/val:40", "views": views}
    with pytest.raises(ModelError, match="bad_values"):
        extract(config(tmp_path / "s", **settings))
    said = []
    result = extract(config(tmp_path / "s", **settings, bad_values="invalid", max_invalid=0.95), on_progress=lambda *report: said.append(report[3]))
    store = open_store(tmp_path / "s")
    bad = ~store.image_valid
    assert 0 < bad.sum() == result.invalid_images < 40
    assert any(f"{bad.sum()} of 40 images are not valid" in note for note in said)
    assert {store.index("image", "reason")[row].as_py() for row in np.flatnonzero(bad)} == {BAD_VALUES}
    for view in range(1 + views):
        finite = np.isfinite(store.gather("image/embedding", np.arange(40), [view] * 40))
        assert finite.all(axis=1).tolist() == store.image_valid.tolist()
    assert verify_store(tmp_path / "s").ok


def test_texts_that_have_no_features_end_a_run_as_images_do(tmp_path):
    model = load_model("scenes-T", untrained=True, device="cpu")
    with torch.no_grad():
        model.clip.text_projection.fill_(float("nan"))
    torch.save(model.clip.state_dict(), tmp_path / "nan.pt")
    settings = {"pretrained": str(tmp_path / "nan.pt"), "untrained_seed": None, "bad_values": "invalid"}
    for changes in ({"workers": 1}, {}, {"max_invalid": 1.0}, {"part": "1/1"}):
        with pytest.raises(SourceError, match=r"of the first [0-9]+ texts are not valid"):
            extract(config(tmp_path / "s", **settings, **changes))
        assert "max_invalid" in changes or "part" in changes or not list((tmp_path / "s" / "_build" / "units").glob("text*"))


def test_texts_that_were_not_valid_in_an_earlier_run_count_in_the_next(tmp_path):
    job = prepare(config(tmp_path / "s"), lambda notice: None)
    with job.open_writer() as writer:
        unit = next(unit for unit in writer.pending() if unit.side == "text")
        with writer.attempt(unit) as attempt:
            spec = next(spec for spec in job.arrays if spec.name == "text/embedding")
            attempt.append(spec.name, np.full((len(unit), *spec.shape[1:]), np.nan, spec.dtype))
            attempt.index([{"valid": 0}] * len(unit))
        assert writer.recorded("text") == (len(unit), len(unit))
    with pytest.raises(SourceError, match="32 of the first 64 texts are not valid"):
        extract(config(tmp_path / "s"))


def test_equal_captions_are_on_one_side_of_what_a_codec_is_fitted_and_measured_on(tmp_path):
    captions = ["one star"] * 5 + ["two stars"] * 4 + ["a red cross"] * 3 + ["a blue circle"] * 2
    for k in range(len(captions)):
        Image.new("RGB", (64, 64), (15 * k, 9, 9)).save(tmp_path / f"{k}.png")
    (tmp_path / "rows.csv").write_text("path,caption\n" + "".join(f"{k}.png,{text}\n" for k, text in enumerate(captions)))
    extract(config(tmp_path / "s", data=str(tmp_path / "rows.csv"), encode="int8"))
    record = open_store(tmp_path / "s").codecs["text/embedding"].record
    assert (record["fit"]["rows"], record["held_out"]["rows"]) == (12, 2)

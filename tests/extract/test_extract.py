"""Extraction: what the store holds is what the teacher says, however often the run was stopped."""

import os

import numpy as np
import pytest
import torch
from PIL import Image

from kdstore.data.images import DECODING
from kdstore.data.scenes import Scenes
from kdstore.data.sources import open_source
from kdstore.errors import DiskFull, IdentityMismatch, KdstoreError, ModelError, SourceError
from kdstore.extract.config import ExtractConfig
from kdstore.extract.job import prepare
from kdstore.extract.run import extract
from kdstore.extract.units import Tally
from kdstore.jsonfile import read_json
from kdstore.models.encode import encode_image_tokens, encode_text, encode_text_and_tokens, encode_text_tokens
from kdstore.models.load import load_model
from kdstore.store import Plan, open_store, verify_store


def config(out, **changes):
    return ExtractConfig(**{"teacher": "scenes-T", "untrained_seed": 0, "data": "scenes/val:70", "out": str(out), "unit_rows": 32, "device": "cpu", **changes})


def cosine(a, b):
    a, b = (x.reshape(-1, x.shape[-1]).astype(np.float64) for x in (a, b))
    return (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


def test_cached_features_equal_live_ones(tmp_path):
    extract(config(tmp_path / "s", teacher="scenes-S", untrained_seed=None, tokens="both"))  # untrained, all pictures have nearly one embedding
    store, model, source = open_store(tmp_path / "s"), load_model("scenes-S", device="cpu"), Scenes("val", 70)
    rows = [69, 0, 33, 5]
    embedding, tokens = encode_image_tokens(model, torch.stack([model.preprocess(source.image(i).image) for i in rows]))
    assert cosine(store.gather("image/embedding", rows), embedding.numpy()).min() >= 0.9999
    assert cosine(store.gather("image/embedding", rows[::-1]), embedding.numpy()).max() < 0.99
    assert cosine(store.gather("image/tokens", rows), tokens.numpy()).min() >= 0.9999
    texts = [c.text for i in range(70) for c in source.captions(i)]
    assert store.captions() == texts
    assert cosine(store.gather("text/embedding", np.arange(len(texts))), encode_text(model, texts).numpy()).min() >= 0.9999
    hidden, lengths = encode_text_tokens(model, texts[:9])
    assert np.abs(store.gather("text/tokens", np.arange(9)) - hidden.numpy()).max() < 2e-3
    assert store.gather("text/length", np.arange(9)).tolist() == lengths.tolist()


@pytest.mark.parametrize("kept", [1 << 30, 20_000])
def test_equal_captions_go_through_the_text_tower_once(kept, tmp_path, monkeypatch):
    """In the whole unit, or among as many as may be kept: 20,000 bytes are two captions of 32 x 64 float32."""
    monkeypatch.setattr("kdstore.extract.units.DISTINCT_BYTES", kept)
    captions = [f"a {colour} {shape}" for colour in ("red", "blue", "green") for shape in ("star", "circle", "cross")] * 3 + ["the last"]
    for k in range(len(captions)):
        Image.new("RGB", (64, 64), (k, 9, 9)).save(tmp_path / f"{k}.png")
    (tmp_path / "rows.csv").write_text("path,caption\n" + "".join(f"{k}.png,{text}\n" for k, text in enumerate(captions)))
    job, seen = prepare(config(tmp_path / "s", data=str(tmp_path / "rows.csv"), tokens="both", views=1, batch=1), str), []
    job.extractor.model.clip.token_embedding.register_forward_hook(lambda _module, inputs, _output: seen.append(len(inputs[0])))
    done = Tally()
    with job.open_writer() as writer:
        for unit in writer.pending():
            with writer.attempt(unit) as attempt:
                done += job.extractor.write(attempt, unit, lambda tally: None)
        writer.finalise({})
    job.extractor.close()
    assert (sum(seen) == 10) == (kept == 1 << 30)
    assert (done.texts, done.encoded) == (28, 2 * 28 + sum(seen))  # a picture for each view
    store = open_store(tmp_path / "s")
    found = encode_text_and_tokens(job.extractor.model, captions)
    for name, live in zip(("text/embedding", "text/tokens", "text/length"), found, strict=True):
        np.testing.assert_allclose(store.gather(name, np.arange(28)), live.numpy(), atol=2e-3)


def test_batch_size_and_threads_do_not_enter_the_identity(tmp_path):
    first = extract(config(tmp_path / "s"))
    again = extract(config(tmp_path / "s", batch=16, threads=1))
    assert again.digest == first.digest
    assert again.written_images == 0


def test_as_many_threads_decode_as_there_are_cores_for_each_process_and_at_most_sixteen():
    cores = len(os.sched_getaffinity(0))
    assert config("s").decoders == min(16, cores)
    assert config("s", workers=100 * cores).decoders == 1
    assert config("s", workers=2, threads=3).decoders == 3


def test_what_a_source_has_to_say_and_equal_content_are_said(tmp_path):
    for k in range(40):
        Image.new("RGB", (64, 64), (k % 38, 9, 9)).save(tmp_path / f"{k}.png")
    (tmp_path / "metadata.csv").write_text("file_name,caption\n" + "".join(f"{k}.png,number {k}\n" for k in range(40)))
    result = extract(config(tmp_path / "s", data=str(tmp_path)))
    assert result.notices == ("2 of 40 images have the content of another under another key.",)
    joined = extract(config(tmp_path / "t", data=f"{tmp_path}?key=sha256"))
    assert joined.images == 38
    assert joined.notices == ("2 of 40 images have the content of another; their captions are joined.",)
    assert open_store(tmp_path / "t").identity["decoding"] == DECODING


def test_an_undecodable_image_keeps_its_row_and_is_counted(tmp_path):
    for k in range(5):
        Image.new("RGB", (70, 64), (50 * k, 9, 9)).save(tmp_path / f"{k}.png")
    (tmp_path / "2.png").write_text("no image")
    (tmp_path / "metadata.csv").write_text("file_name,caption\n" + "".join(f"{k}.png,number {k}\n" for k in range(5)))
    said = []
    changes = {"data": str(tmp_path), "tokens": "image", "max_invalid": 0.2}
    result = extract(config(tmp_path / "s", **changes), on_progress=lambda *report: said.append(report))
    assert any(stage == "warning" and "1 of 5 images" in note for stage, _, _, note in said)
    assert {("load", 1, 1), ("plan", 5, 5)} <= {report[:3] for report in said}
    store = open_store(tmp_path / "s")
    assert result.invalid_images == 1
    assert store.image_valid.tolist() == [True, True, False, True, True]
    assert np.isnan(store.gather("image/embedding", [2])).all()
    assert np.isnan(store.gather("image/tokens", [2])).all()
    assert np.isfinite(store.gather("image/embedding", [0, 1, 3, 4])).all()
    assert store.index("image", "reason")[2].as_py() == "not an image of a known format"
    assert store.gather("text/embedding", np.arange(5)).shape == (5, 64)


def test_too_many_undecodable_images_end_the_run(tmp_path):
    (tmp_path / "rows.csv").write_text("path,caption\n" + "".join(f"{k}.png,c {k}\n" for k in range(40)))
    with pytest.raises(SourceError, match="32 of the first 32 images"):
        extract(config(tmp_path / "s", data=str(tmp_path / "rows.csv")))


@pytest.mark.parametrize(("bad", "max_invalid"), [(2, 0.2), (5, 1.0)])
def test_a_small_source_is_refused_for_its_share_of_undecodable_images_and_for_having_no_other(tmp_path, bad, max_invalid):
    for k in range(5):
        Image.new("RGB", (70, 64)).save(tmp_path / f"{k}.png")
    for k in range(bad):
        (tmp_path / f"{k}.png").write_text("no image")
    (tmp_path / "rows.csv").write_text("path,caption\n" + "".join(f"{k}.png,c {k}\n" for k in range(5)))
    with pytest.raises(SourceError, match=f"{bad} of the first 5 images"):
        extract(config(tmp_path / "s", data=str(tmp_path / "rows.csv"), max_invalid=max_invalid))
    assert not (tmp_path / "s").exists()


def test_another_teacher_or_other_data_is_refused_and_the_store_stays(tmp_path):
    digest = extract(config(tmp_path / "s")).digest
    for change in ({"untrained_seed": 1}, {"data": "scenes/val:71"}, {"tokens": "image"}):
        with pytest.raises(IdentityMismatch):
            extract(config(tmp_path / "s", **change))
    assert open_store(tmp_path / "s").digest == digest
    assert not verify_store(tmp_path / "s").damaged


def stop_in_the_second_unit(stage, done, total, note=""):
    if stage == "images" and done > 32:
        raise KeyboardInterrupt


def test_the_account_of_a_resumed_run_counts_all_images_and_what_its_last_process_did(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        extract(config(tmp_path / "s"), on_progress=stop_in_the_second_unit)
    assert extract(config(tmp_path / "s")).written_images == 38
    account = read_json(tmp_path / "s" / "run.json")
    assert (account["images"], account["invalid_images"], account["last_process"]["images"]) == (70, 0, 38)


def test_a_run_that_cannot_fit_is_refused_before_the_first_byte(tmp_path, monkeypatch):
    monkeypatch.setattr("kdstore.extract.job.shutil.disk_usage", lambda path: type("Usage", (), {"free": 10_000})())
    with pytest.raises(DiskFull, match="GB are free"):
        extract(config(tmp_path / "s"))
    assert not (tmp_path / "s").exists()


def test_values_beyond_float16_are_refused_and_float32_is_offered(tmp_path):
    model = load_model("scenes-T", untrained=True, device="cpu")
    with torch.no_grad():
        model.clip.visual.attnpool.c_proj.weight.mul_(1e7)
    torch.save(model.clip.state_dict(), tmp_path / "large.pt")
    changes = {"pretrained": str(tmp_path / "large.pt"), "untrained_seed": None}
    with pytest.raises(ModelError, match="dtype=float32"):
        extract(config(tmp_path / "s", **changes))
    assert not (tmp_path / "s").exists()
    assert extract(config(tmp_path / "s", dtype="float32", **changes)).images == 70


def test_a_long_run_checks_the_teacher_first_and_warns_at_chance(tmp_path):
    said = []
    extract(config(tmp_path / "s", data="scenes/val:512", unit_rows=512), on_progress=lambda stage, done, total, note: said.append((stage, note)))
    assert any(stage == "warning" and "Sanity check" in note for stage, note in said)
    assert {"load", "plan", "images", "texts"} <= {stage for stage, _ in said}


def test_the_weights_that_a_bare_name_means_are_told_before_they_are_fetched(tmp_path):
    said = []
    with pytest.raises(ModelError, match="Cannot load MobileCLIP2-S0:dfndr2b"):  # there is no network
        extract(config(tmp_path / "s", teacher="MobileCLIP2-S0", untrained_seed=None), on_progress=lambda *report: said.append(report))
    assert said[0] == ("notice", 0, 0, "MobileCLIP2-S0 without a tag: using MobileCLIP2-S0:dfndr2b.")


def test_the_fingerprint_is_that_of_the_source(tmp_path):
    extract(config(tmp_path / "s"))
    source = open_source("scenes/val:70")
    plan = Plan.freeze((source.key(i), source.captions(i)) for i in range(70))
    assert open_store(tmp_path / "s").identity["source"]["fingerprint"] == plan.fingerprint


@pytest.mark.parametrize("change", [{"tokens": "images"}, {"dtype": "bf16"}, {"unit_rows": 0}, {"unit_rows": 1000}, {"batch": 0}, {"max_invalid": 2.0}])
def test_a_wrong_setting_is_refused_at_once(change):
    with pytest.raises(KdstoreError):
        config("s", **change)

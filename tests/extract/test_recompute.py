"""Running the teacher again finds what no hash does: features of another checkpoint in a store that looks right."""

import dataclasses
import json
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from kdstore.cli import main
from kdstore.data.sources import open_source
from kdstore.errors import JoinError, ModelError, SourceError
from kdstore.extract.config import ExtractConfig
from kdstore.extract.recompute import _least_cosine, recompute
from kdstore.extract.run import extract
from kdstore.jsonfile import digest_of, write_json
from kdstore.models.load import load_model
from kdstore.store import Plan, StoreWriter, open_store, token_array, verify_store


def checkpoint(path, seed):
    torch.save(load_model("scenes-T", untrained=True, seed=seed, device="cpu").clip.state_dict(), path)
    return str(path)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two checkpoints, a store of each with tokens, and a store that says it is the first's and holds features of the second."""
    folder = tmp_path_factory.mktemp("made")
    for seed, name in enumerate(("right", "wrong")):
        weights = checkpoint(folder / f"{name}.pt", seed)
        store = str(folder / name)
        extract(ExtractConfig(teacher="scenes-T", pretrained=weights, data="scenes/val:24", out=store, unit_rows=16, tokens="both", device="cpu"))
    shutil.copytree(folder / "wrong", folder / "forged")
    manifest = json.loads((folder / "forged" / "manifest.json").read_text())
    manifest["identity"] = open_store(folder / "right").identity
    manifest["identity_digest"] = digest_of(manifest["identity"])
    write_json(folder / "forged" / "manifest.json", manifest)
    return folder


def again(made, store, weights, rows=9, **options):
    return recompute(made / store, rows, teacher="scenes-T", pretrained=str(made / f"{weights}.pt"), device="cpu", **options)


def test_the_right_teacher_agrees_on_images_texts_and_tokens(made):
    said = []
    report = again(made, "right", "right", seed=3, on_progress=lambda *args: said.append(args[:3]))
    assert report.ok
    assert set(report.arrays) == {"image/embedding", "image/tokens", "text/embedding", "text/tokens"}
    assert all(compared.rows == 9 and 0.9999 <= compared.worst <= 1 + 1e-9 for compared in report.arrays.values())
    assert (report.source, report.seed) == ("scenes/val:24", 3)
    assert said == [("images", 9, 9), ("texts", 9, 9)]
    assert again(made, "right", "right", rows=1000).arrays["image/embedding"].rows == 24


def test_a_wrong_checkpoint_behind_a_right_looking_store_is_found(made):
    assert verify_store(made / "forged").ok
    report = again(made, "forged", "right")
    assert not report.differs  # the store says the right weights
    assert not report.ok
    for compared in report.arrays.values():
        assert len(compared.failed) == 9
        assert compared.worst < 0.9999
        assert compared.worst_row in compared.failed
    told = again(made, "right", "wrong").differs
    assert told.keys() == {"teacher.weights_sha256"}
    assert told["teacher.weights_sha256"][0] == open_store(made / "right").identity["teacher"]["weights_sha256"]


def test_features_that_agree_under_another_name_are_not_passed_in_silence(made):
    report = again(made, "forged", "wrong")
    assert not any(compared.failed for compared in report.arrays.values())
    assert "teacher.weights_sha256" in report.differs
    assert not report.ok


@pytest.mark.parametrize("dtype", ["int8", "float16"])
def test_tokens_that_are_codes_or_reduced_are_not_compared_and_that_is_said(made, tmp_path, dtype):
    whole, source = open_store(made / "right"), open_source("scenes/val:24")
    plan = Plan.freeze(((source.key(i), source.captions(i)) for i in range(24)), unit_rows=32)
    arrays = [token_array(plan, "image", 4, 8, dtype=dtype), dataclasses.replace(whole.arrays["text/embedding"], shard=(32, 64))]
    with StoreWriter.open(tmp_path / "s", plan=plan, arrays=arrays, identity=whole.identity) as writer:
        for unit in writer.pending():
            with writer.attempt(unit) as attempt:
                if unit.side == "text":
                    attempt.append("text/embedding", whole.gather("text/embedding", np.arange(unit.start, unit.stop)))
                else:
                    attempt.append("image/tokens", np.ones((24, 1, 4, 8), dtype))
                    hashes = whole.image_sha256().tolist()
                    attempt.index([{"sha256": sha256, "valid": True, "reason": "", "width": 1, "height": 1} for sha256 in hashes])
        writer.finalise({"source": "scenes/val:24"})
    report = recompute(tmp_path / "s", 3, teacher="scenes-T", pretrained=str(made / "right.pt"), device="cpu")
    assert report.ok
    assert (report.skipped, set(report.arrays)) == (("image/tokens",), {"text/embedding"})


def test_a_teacher_of_another_width_agrees_nowhere():
    cosine = _least_cosine(np.ones((2, 3), np.float16), np.ones((2, 4), np.float32))
    assert cosine.tolist() == [-1, -1]
    stored = np.array([[[1, 0], [0, 0]], [[1, 0], [0, 1]], [[np.nan, 0], [0, 1]], [[0, 0], [0, 1]]], np.float16)
    live = np.array([[[2, 0], [0, 0]], [[1, 0], [1, 0]], [[1, 0], [0, 1]], [[1, 0], [0, 1]]], np.float32)
    assert _least_cosine(stored, live).tolist() == [1, 0, -1, 0]


def test_an_untrained_teacher_and_the_source_are_found_by_what_the_store_says(tmp_path):
    extract(ExtractConfig(teacher="scenes-T", untrained_seed=4, data="scenes/val:20", out=str(tmp_path / "s"), device="cpu"))
    assert recompute(tmp_path / "s", 3, device="cpu").ok
    (tmp_path / "s" / "run.json").unlink()
    with pytest.raises(SourceError, match="does not say which data"):
        recompute(tmp_path / "s", 3, device="cpu")
    assert recompute(tmp_path / "s", 3, data="scenes/val:20", device="cpu").ok
    with pytest.raises(JoinError, match="has no image"):
        recompute(tmp_path / "s", 3, data="scenes/train:20", device="cpu")


def test_rows_are_found_by_key_and_other_content_is_refused(tmp_path):
    """Undecodable rows are left out, a source in another order is the same source, and changed images or captions are not."""

    def table(order, caption="number"):
        (tmp_path / "rows.csv").write_text("path,caption\n" + "".join(f"{k}.png,{caption} {k}\n" for k in order))

    for k in range(6):
        Image.new("RGB", (70, 64), (40 * k, 9, 9)).save(tmp_path / f"{k}.png")
    (tmp_path / "2.png").write_text("no image")
    table(range(6))
    options = {"teacher": "scenes-T", "untrained_seed": 0, "data": str(tmp_path / "rows.csv"), "device": "cpu", "max_invalid": 0.5}
    extract(ExtractConfig(**options, out=str(tmp_path / "s")))
    report = recompute(tmp_path / "s", 6, device="cpu")
    assert report.ok
    assert (report.arrays["image/embedding"].rows, report.arrays["text/embedding"].rows) == (5, 6)
    table(reversed(range(6)))
    assert recompute(tmp_path / "s", 6, device="cpu").ok
    table(range(6), "another")
    with pytest.raises(JoinError, match="has another caption in text row 0"):
        recompute(tmp_path / "s", 6, device="cpu")
    table(range(6))
    Image.new("RGB", (70, 64), (1, 2, 3)).save(tmp_path / "3.png")
    with pytest.raises(JoinError, match="is not the one that was encoded"):
        recompute(tmp_path / "s", 6, device="cpu")
    (tmp_path / "3.png").unlink()
    with pytest.raises(JoinError, match="cannot be decoded any more"):
        recompute(tmp_path / "s", 6, device="cpu")


def test_a_teacher_from_a_file_must_be_named(made):
    with pytest.raises(ModelError, match="came from a file or folder"):
        recompute(made / "right", 2)


def test_the_command_exits_with_one_for_other_features_and_with_two_for_what_cannot_be_opened(made, capsys, monkeypatch):
    def verify(store, *args):
        monkeypatch.setattr(sys, "argv", ["kdstore", "store", "verify", str(made / store), "--recompute", "4", "--device", "cpu", *args])
        with pytest.raises(SystemExit) as stopped:
            main()
        return stopped.value.code or 0, *capsys.readouterr()

    teacher = ("--teacher", "scenes-T", "--pretrained", str(made / "right.pt"))
    code, out, _ = verify("right", *teacher, "--json")
    assert code == 0
    assert json.loads(out)["recompute"]["arrays"]["text/embedding"]["failed"] == []
    code, out, err = verify("forged", *teacher)
    assert code == 1
    assert "image/embedding: 4 of 4 rows differ from what scenes-T" in err
    code, _, err = verify("right")
    assert code == 2
    assert "Name it with --teacher and --pretrained" in err
    assert verify("right", *teacher, "--data", "nowhere.csv")[0] == 2
    code, _, err = verify("right", "--teacher", "scenes-T", "--pretrained", str(made / "wrong.pt"))
    assert code == 1
    assert "teacher.weights_sha256" in err

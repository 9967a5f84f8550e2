"""Zero-shot, retrieval, probes and agreement of the demo teacher on scenes: live and from its store, against plain computations and scikit-learn."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score
from sklearn.neighbors import KNeighborsClassifier

from kdstore.data.sources import open_source
from kdstore.errors import ConfigError, EvaluationError, IdentityMismatch, UnknownName
from kdstore.evaluate.agreement import evaluate_agreement
from kdstore.evaluate.classes import filled, number_labels, templates
from kdstore.evaluate.gallery import gallery_of_source, usable_images
from kdstore.evaluate.outcomes import read_outcomes
from kdstore.evaluate.probe import evaluate_probe
from kdstore.evaluate.protocol import AgreementConfig, ProbeConfig, RetrievalConfig, ZeroshotConfig
from kdstore.evaluate.results import read_result
from kdstore.evaluate.retrieval import evaluate_retrieval
from kdstore.evaluate.zeroshot import evaluate_zeroshot
from kdstore.extract.config import ExtractConfig
from kdstore.extract.run import extract
from kdstore.models.encode import encode_image, encode_text
from kdstore.models.load import load_model
from kdstore.progress import silent
from kdstore.store import open_store
from kdstore.store.importing import ImportConfig, import_store

TRAIN, TEST = "scenes/train:160?probe=leftmost-color", "scenes/test:80?probe=leftmost-color"
TWO = ("a scene with a {}", "{c} things")


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("stores")
    paths = {"train": TRAIN, "test": TEST}
    for name, data in paths.items():
        extract(ExtractConfig(teacher="scenes-S", data=data, out=str(folder / name), device="cpu", precision="fp32"))
    return {name: str(folder / name) for name in paths}


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def live(data: str) -> tuple[np.ndarray, list[list[str]]]:
    """Unit embeddings float64 of all images by the model itself, and their labels."""
    source, model = open_source(data), load_model("scenes-S", device="cpu")
    pixels = torch.stack([model.preprocess(source.image(i).image) for i in range(len(source))])
    labels = [[c.text for c in source.captions(i) if c.kind == "probe"] for i in range(len(source))]
    return unit(encode_image(model, pixels).double().numpy()), labels


def ensemble(names: list[str]) -> np.ndarray:
    model = load_model("scenes-S", device="cpu")
    parts = [unit(encode_text(model, [filled(t, name) for t in TWO]).double().numpy()).mean(0) for name in names]
    return unit(np.stack(parts))


def test_zero_shot_is_the_nearest_class_live_and_from_the_store(stores: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "templates.txt").write_text("\n".join(TWO) + "\n\n")
    out = tmp_path / "zeroshot.json"
    config = ZeroshotConfig(model="scenes-S", data=TEST, templates=str(tmp_path / "templates.txt"), device="cpu", encode_batch=64, out=str(out))
    result = evaluate_zeroshot(config)
    image, labels = live(TEST)
    names = sorted({label for of_image in labels for label in of_image})
    order = np.argsort(-image @ ensemble(names).T, axis=1)
    truth = np.array([names.index(of_image[0]) for of_image in labels])
    assert result.scores["acc1"] == pytest.approx(100 * (order[:, 0] == truth).mean())
    assert result.scores["acc5"] == pytest.approx(100 * (order[:, :5] == truth[:, None]).any(1).mean())
    assert result.scores["acc1"] > 30  # of eight colours
    content = read_result(out)
    assert content["classes"]["number"] == 8
    outcomes = read_outcomes(out, content["outcomes"])
    kinds = np.array(outcomes.kind_N)
    for kind in ("acc1", "acc5"):
        assert outcomes.runs[0].score_N[kinds == kind].mean() == pytest.approx(result.scores[kind])
    stored = evaluate_zeroshot(replace(config, cache=stores["test"], data=None, out=None))
    assert stored.scores == pytest.approx(result.scores, abs=1.3)  # float16 may turn a near tie
    relabelled = evaluate_zeroshot(replace(config, cache=stores["test"], data="scenes/test:50?probe=leftmost-color", out=None))
    assert relabelled.content["data"]["evaluated"]["left_out"] == {"not in the source": 30}
    alone = evaluate_zeroshot(ZeroshotConfig(cache=stores["test"], templates="plain"))
    assert alone.scores == pytest.approx(evaluate_zeroshot(replace(config, templates="plain", out=None)).scores, abs=1.3)
    with pytest.raises(EvaluationError, match=r"no embedding of the text 'a photo of a blue.'"):
        evaluate_zeroshot(ZeroshotConfig(cache=stores["test"]))
    with pytest.raises(IdentityMismatch, match="scenes-L is not the teacher of"):
        evaluate_zeroshot(ZeroshotConfig(model="scenes-L", cache=stores["test"]))


def test_several_labels_give_the_mean_average_precision(tmp_path: Path) -> None:
    (tmp_path / "templates.txt").write_text("\n".join(TWO))
    data = "scenes/test:40?probe=shape"
    found = evaluate_zeroshot(ZeroshotConfig(model="scenes-S", data=data, templates=str(tmp_path / "templates.txt"), device="cpu"))
    image, labels = live(data)
    names = sorted({label for of_image in labels for label in of_image})
    scores = image @ ensemble(names).T
    expected = [average_precision_score([name in of_image for of_image in labels], scores[:, c]) for c, name in enumerate(names)]
    assert found.scores == {"mean_average_precision": pytest.approx(100 * float(np.mean(expected)), abs=0.5)}


def test_labels_are_names_numbers_or_stand_for_the_names_in_order() -> None:
    names = ["tabby cat", "great dane", "red fox"]
    assert number_labels([("Tabby_Cat",), ("red fox", "great dane")], names).of_image == [{0}, {1, 2}]
    assert number_labels([("2",), ("0",)], names).of_image == [{2}, {0}]
    by_id = number_labels([("n03",), ("n01",), ("n02",)], names)
    assert by_id.of_image == [{2}, {0}, {1}]
    assert "taken for them (tabby cat" in by_id.notice
    assert number_labels([("b_c",), ("a",)], None).names == ("a", "b c")
    for texts, given, said in (
        ([("1",), ("0",)], None, "without names"),
        ([("red fox",), ("wolf",)], names, "1 of 2 labels are none of the 3 class names: wolf"),
        ([("3",), ("0",)], names, "none of the 3 class names: 3"),
        ([("a",), ("a",)], None, "one class, 'a'"),
        ([("crane",), ("b",)], ["crane", "b", "Crane"], "stands twice"),
    ):
        with pytest.raises(EvaluationError, match=said):
            number_labels(texts, given)


def test_templates_take_names_as_they_are_and_say_what_is_wrong(tmp_path: Path) -> None:
    assert filled("{c} and {}", r"\1 {x}") == r"\1 {x} and \1 {x}"
    assert (len(templates("imagenet")), len(templates("imagenet-simple"))) == (80, 7)
    assert all(filled(template, "@").count("@") == 1 for name in ("photos", "imagenet", "digits") for template in templates(name))
    (tmp_path / "wrong").write_text("a photo\n")
    (tmp_path / "empty").touch()
    (tmp_path / "binary").write_bytes(b"\xff\xfe{}")
    for name, said in (("wrong", "'a photo' has no place"), ("empty", "is empty"), ("binary", "no UTF-8")):
        with pytest.raises(ConfigError, match=said):
            templates(str(tmp_path / name))
    with pytest.raises(UnknownName, match="imagenet"):
        templates("imagnet")


def test_class_folders_are_scored_and_data_without_labels_is_refused(tmp_path: Path) -> None:
    for n, color in enumerate(("red", "blue")):
        (tmp_path / color).mkdir()
        Image.new("RGB", (64, 64), (250 * (1 - n), 20, 250 * n)).save(tmp_path / color / "a.png")
    (tmp_path / "red" / "bad.png").write_bytes(b"no image")
    result = evaluate_zeroshot(ZeroshotConfig(model="scenes-S", data=str(tmp_path), templates="plain", device="cpu"))
    assert result.content["data"]["evaluated"]["left_out"] == {"undecodable": 1}
    assert result.content["data"]["evaluated"]["num_images"] == 2
    with pytest.raises(EvaluationError, match="No image of scenes/test:5 has a label"):
        evaluate_zeroshot(ZeroshotConfig(model="scenes-S", data="scenes/test:5", device="cpu"))
    with pytest.raises(ConfigError, match="--model or --cache is needed"):
        ZeroshotConfig(data=str(tmp_path))


def test_features_that_are_not_finite_end_a_run() -> None:
    model = load_model("scenes-T", untrained=True, device="cpu")
    torch.nn.init.constant_(model.clip.visual.conv1.weight, torch.nan)
    gallery = gallery_of_source(model, open_source("scenes/test:3"), 2, silent)
    with pytest.raises(EvaluationError, match="scenes-T gives 2 of 2 images an embedding that is not finite"):
        usable_images(gallery, lambda _: True, "caption")


def test_probes_equal_scikit_learn_on_the_stores_features(stores: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "probe.json"
    config = ProbeConfig(train_cache=stores["train"], cache=stores["test"], out=str(out))
    result = evaluate_probe(config)
    parts = {}
    for name, data in (("train", TRAIN), ("test", TEST)):
        store, source = open_store(stores[name]), open_source(data)
        parts[name] = unit(store.features("image/embedding", np.arange(store.num_images))), [source.captions(i)[-1].text for i in range(len(source))]
    (train, label), (test, truth) = parts["train"], parts["test"]
    knn = KNeighborsClassifier(20, metric="cosine", algorithm="brute", weights=lambda distance: np.exp((1 - distance) / 0.07)).fit(train, label)
    assert result.scores["knn_acc1"] == pytest.approx(100 * knn.score(test, truth))
    linear = LogisticRegression(C=result.c, max_iter=1000).fit(train.astype(np.float64), label)
    assert result.scores["lp_acc1"] == pytest.approx(100 * linear.score(test.astype(np.float64), truth), abs=1.3)
    assert result.scores["lp_acc1"] > 2 * 100 / 8
    searched = result.content["probe"]["searched"]
    assert len(searched) == 7 + 2 * 4
    assert result.content["probe"]["val_acc1"] == max(searched.values())
    content = read_result(out)
    outcomes = read_outcomes(out, content["outcomes"])
    for kind in ("lp_acc1", "knn_acc5"):
        assert outcomes.runs[0].score_N[np.array(outcomes.kind_N) == kind].mean() == pytest.approx(result.scores[kind])


def test_probes_refuse_what_would_leak_or_cannot_be_told_apart(stores: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="160 of the scored images are trained on"):
        evaluate_probe(ProbeConfig(train_cache=stores["train"], cache=stores["train"]))
    with pytest.raises(EvaluationError, match="161 neighbours were asked for among 160"):
        evaluate_probe(ProbeConfig(train_cache=stores["train"], cache=stores["test"], neighbours=161))
    with pytest.raises(EvaluationError, match="several labels"):
        evaluate_probe(ProbeConfig(model="scenes-S", train_data="scenes/train:30?probe=shape", data="scenes/test:9?probe=shape", device="cpu"))
    with pytest.raises(EvaluationError, match="No training image has the labels"):
        evaluate_probe(ProbeConfig(model="scenes-S", train_data="scenes/train:3?probe=leftmost-color", data=TEST, device="cpu"))
    with pytest.raises(EvaluationError, match=r"chosen on 2 of 160 training images, and each part needs one of each of \d+ classes"):
        evaluate_probe(ProbeConfig(train_cache=stores["train"], cache=stores["test"], val_share=0.01))
    with pytest.raises(ConfigError, match=r"'seed' must be a number from 0 to 2\^32 - 1, found -1"):
        ProbeConfig(train_cache=stores["train"], cache=stores["test"], seed=-1)
    with pytest.raises(ConfigError, match="--train-cache and --cache go together"):
        ProbeConfig(cache=stores["test"])


def test_a_model_agrees_with_its_own_store_and_less_with_another(stores: dict[str, str], tmp_path: Path) -> None:
    own = evaluate_agreement(AgreementConfig(model=("scenes-S",), cache=(stores["test"],), samples=70, device="cpu", out=str(tmp_path / "own.json")))
    for side in ("image", "text"):
        assert own.rows[side]["cosine"] == pytest.approx(1, abs=1e-4)
        assert own.rows[side]["debiased_cka"] == pytest.approx(1, abs=1e-4)
        assert own.rows[side]["mutual_neighbours@10"] > 98
    assert own.rows["image"]["top1_text_agreement"] > 98
    assert own.rows["student"] == pytest.approx(own.rows["teacher"], abs=0.05)
    assert read_result(tmp_path / "own.json")["data"]["evaluated"]["num_images"] == 70
    again = evaluate_agreement(AgreementConfig(cache=(stores["test"], stores["test"]), samples=70, seed=1))
    assert again.content["data"] != own.content["data"]
    other = evaluate_agreement(AgreementConfig(model=("scenes-L", "scenes-S"), data="scenes/test:40", samples=40, device="cpu"))
    assert 0 < other.rows["image"]["debiased_cka"] < 0.99
    assert other.rows["image"]["mutual_neighbours@10"] < 90
    with pytest.raises(EvaluationError, match=r"80 images with a caption are in both .* and 81 were asked for"):
        evaluate_agreement(AgreementConfig(cache=(stores["test"], stores["test"]), samples=81))
    with pytest.raises(ConfigError, match="found 1 of --model and 0 of --cache"):
        AgreementConfig(model=("scenes-S",))


def test_retrieval_from_the_store_is_that_of_its_teacher(stores: dict[str, str]) -> None:
    stored = evaluate_retrieval(RetrievalConfig(cache=stores["test"]))
    model = evaluate_retrieval(RetrievalConfig(model="scenes-S", data="scenes/test:80", device="cpu"))
    assert (stored.num_images, stored.num_texts, stored.ceiling) == (80, model.num_texts, model.ceiling)  # labels are no captions
    assert stored.recall == pytest.approx(model.recall, abs=1)
    assert stored.content["data"]["evaluated"]["digest"] == model.content["data"]["evaluated"]["digest"]
    assert stored.content["config_digest"] == model.content["config_digest"]
    lists = evaluate_retrieval(RetrievalConfig(cache=stores["test"], index="lists", probes=10**6))
    assert lists.recall == pytest.approx(stored.recall)
    assert lists.content["index"]["image_nearest_10_found"] == pytest.approx(100)
    few = evaluate_retrieval(RetrievalConfig(cache=stores["test"], index="lists", probes=1))
    assert few.content["index"]["text_nearest_10_found"] < 95


def test_imported_features_are_scored_without_what_is_not_known_of_their_teacher(stores: dict[str, str], tmp_path: Path) -> None:
    store = open_store(stores["test"])
    texts, bounds = store.captions(), store.offsets.tolist()
    (tmp_path / "npy").mkdir()
    (tmp_path / "npy" / "keys.txt").write_text("\n".join(store.keys().tolist()))
    (tmp_path / "npy" / "captions.jsonl").write_text("\n".join(json.dumps(texts[a:b]) for a, b in pairwise(bounds)))
    for side, rows in (("image", store.num_images), ("text", store.num_texts)):
        np.save(tmp_path / "npy" / f"{side}.npy", store.features(f"{side}/embedding", np.arange(rows)))
    import_store(tmp_path / "npy", tmp_path / "imported", ImportConfig(format="npy", dtype="float32"))
    imported = evaluate_retrieval(RetrievalConfig(cache=str(tmp_path / "imported")))
    assert imported.content["model"]["name"] == "imported"
    both = evaluate_agreement(AgreementConfig(cache=(stores["test"], str(tmp_path / "imported")), samples=80))
    assert both.rows["image"]["debiased_cka"] == pytest.approx(1)
    assert "image_target_entropy" in both.rows["student"]
    assert "image_target_entropy" not in both.rows["teacher"]

"""Retrieval of a small random model on scenes and on a folder with a bad image."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from kdstore.data.sources import open_source
from kdstore.errors import ConfigError
from kdstore.evaluate.outcomes import read_outcomes
from kdstore.evaluate.protocol import RetrievalConfig
from kdstore.evaluate.results import read_result
from kdstore.evaluate.retrieval import evaluate_retrieval
from kdstore.evaluate.tables import markdown_table
from kdstore.metrics.retrieval import retrieval_recall
from kdstore.models.encode import encode_image, encode_text
from kdstore.models.load import load_model


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "random"
    folder.mkdir()
    model = load_model("scenes-T", untrained=True, seed=3, device="cpu")
    save_file({name: t.contiguous() for name, t in model.clip.state_dict().items()}, folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps(model.config))
    return folder


def test_recall_is_that_of_the_models_embeddings_and_is_written(model_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "retrieval.json"
    name = f"local-dir:{model_folder}"
    result = evaluate_retrieval(RetrievalConfig(model=name, data="scenes/retrieval:30", encode_batch=7, device="cpu", out=str(out)))
    source, model = open_source("scenes/retrieval:30"), load_model(name, device="cpu")
    texts = [[c.text for c in source.captions(i)] for i in range(30)]
    image = encode_image(model, torch.stack([model.preprocess(source.image(i).image) for i in range(30)])).numpy()
    text = encode_text(model, [t for of_image in texts for t in of_image]).numpy()
    expected = retrieval_recall(image, text, np.repeat(np.arange(30), [len(t) for t in texts]))
    assert result.recall == pytest.approx(expected, abs=3.5)  # batches of another size may turn a near tie
    assert set(result.ceiling.values()) == {100}
    assert (result.num_images, result.num_texts) == (30, len(text))
    content = read_result(out)
    assert content == result.content
    assert content["rows"] == [{"row": "model", "scores": result.recall}, {"row": "ceiling", "scores": result.ceiling}]
    assert content["model"]["run"] is None
    outcomes = read_outcomes(out, content["outcomes"])
    kind_N = np.array(outcomes.kind_N)
    assert {kind: outcomes.runs[0].score_N[kind_N == kind].mean() for kind in result.recall} == pytest.approx(result.recall)
    assert set(outcomes.group_N) == {source.key(i) for i in range(30)}
    assert "image_retrieval_recall@1" in markdown_table([content])


def test_repeated_captions_lower_the_ceiling_and_bad_images_are_counted(model_folder: Path, tmp_path: Path) -> None:
    captions = {"a.png": "red", "b.png": "red", "c.png": "blue", "bad.png": "green"}
    for i, name in enumerate(captions):
        Image.new("RGB", (16, 16), (80 * i, 0, 0)).save(tmp_path / name)
    (tmp_path / "bad.png").write_bytes(b"no image")
    (tmp_path / "metadata.csv").write_text("file_name,caption\n" + "".join(f"{n},{c}\n" for n, c in captions.items()))
    result = evaluate_retrieval(RetrievalConfig(model=f"local-dir:{model_folder}", data=str(tmp_path), device="cpu"))
    assert (result.num_images, result.num_texts) == (3, 3)
    assert result.content["data"]["evaluated"]["left_out"] == {"undecodable": 1}
    assert result.ceiling["image_retrieval_recall@1"] == pytest.approx(200 / 3)
    assert result.ceiling["text_retrieval_recall@5"] == 100


def test_wrong_settings_get_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="encode_batch"):
        RetrievalConfig(model="x", encode_batch=0)
    with pytest.raises(ConfigError, match="is a folder"):
        evaluate_retrieval(RetrievalConfig(model="x", out=str(tmp_path)))
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="file is not a folder that can be written to"):
        evaluate_retrieval(RetrievalConfig(model="x", out=str(tmp_path / "file" / "new" / "result.json")))

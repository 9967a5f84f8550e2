"""A small world for distillation tests: scenes, an untrained teacher with its features, stores of them, and a tiny student."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kdstore.data.scenes import Scenes
from kdstore.data.source import Caption, LoadedImage, Source
from kdstore.distill.tokens import Standard
from kdstore.extract.config import ExtractConfig
from kdstore.extract.run import extract
from kdstore.models.encode import encode_image, encode_text
from kdstore.models.load import Model, load_model
from kdstore.store import Plan, StoreWriter, embedding_array, store_stats, subset_store

NUM_IMAGES = 40
SIGMOID_BIAS = -6.0


@dataclass
class Selected:
    """Chosen rows of a source in any order: the same keys at other places, and other captions, images or keys where given."""

    source: Source
    rows: list[int]
    image_of: Callable[[int], LoadedImage]
    captions_of: Callable[[int], tuple[Caption, ...]]
    spec: str = "selected"
    prefix: str = ""  # of keys
    notices: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.rows)

    def key(self, i: int) -> str:
        return self.prefix + self.source.key(self.rows[i])

    def captions(self, i: int) -> tuple[Caption, ...]:
        return self.captions_of(self.rows[i])

    def image(self, i: int) -> LoadedImage:
        return self.image_of(self.rows[i])


@dataclass(frozen=True)
class Features:
    """A teacher's embeddings of a source: images [N, D], texts [M, D], float32, before normalisation."""

    image: np.ndarray
    text: np.ndarray


@dataclass
class LiveTeacher:
    """Targets that run the teacher on every batch."""

    model: Model
    source: Source
    dtype: type = np.float32
    logit_bias: float | None = None

    def __post_init__(self) -> None:
        self.name = "live"
        self.logit_scale = self.model.logit_scale
        self.texts = [caption.text for i in range(len(self.source)) for caption in self.source.captions(i)]

    def shape(self, array: str) -> tuple[int, ...]:
        return (self.model.embed_dim,)

    def image(self, array: str, rows: np.ndarray, views: np.ndarray) -> np.ndarray:
        assert array == "image/embedding"
        assert not views.any()
        images = torch.stack([self.model.preprocess(self.source.image(int(row)).image) for row in rows])
        return encode_image(self.model, images).numpy().astype(self.dtype)

    def text(self, array: str, rows: np.ndarray) -> np.ndarray:
        return encode_text(self.model, [self.texts[row] for row in rows]).numpy().astype(self.dtype)

    def standard(self, array: str, kind: str) -> Standard:
        raise NotImplementedError("tokens are not compared with a live teacher")


@pytest.fixture(scope="session")
def source() -> Scenes:
    return Scenes("train", NUM_IMAGES)


@pytest.fixture(scope="session")
def select(source: Scenes) -> Callable[..., Source]:
    """Choose rows of the session's source; `image` and `captions` replace what it gives for a row."""
    return lambda rows, image=source.image, captions=source.captions: Selected(source, rows, image, captions)


@pytest.fixture(scope="session")
def teacher() -> Model:
    return load_model("scenes-T", untrained=True, seed=7, device="cpu")


@pytest.fixture(scope="session")
def live_teacher(teacher: Model, source: Scenes) -> Callable[..., LiveTeacher]:
    """The session's teacher as targets that run on every batch."""
    return lambda dtype=np.float32, logit_bias=None: LiveTeacher(teacher, source, dtype, logit_bias)


@pytest.fixture(scope="session")
def features(source: Scenes, live_teacher: Callable[..., LiveTeacher]) -> Features:
    live = live_teacher()
    image_ND = live.image("image/embedding", np.arange(len(source)), np.zeros(len(source)))
    return Features(image_ND, live.text("text/embedding", np.arange(len(live.texts))))


@pytest.fixture(scope="session")
def make_store(source: Scenes, teacher: Model, features: Features, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Write a store of the session's source; `invalid` images have no features, `sides` says which embeddings it holds."""

    def make(
        dtype: str = "float32",
        invalid: Iterable[int] = (),
        sides: tuple[str, ...] = ("image", "text"),
        logit_scale: float | None = teacher.logit_scale,
        logit_bias: float | None = None,
        name: str = "scenes-T",
    ) -> Path:
        path = tmp_path_factory.mktemp("store") / name
        plan = Plan.freeze(((source.key(i), source.captions(i)) for i in range(len(source))), unit_rows=16)
        dim = teacher.embed_dim
        arrays = [embedding_array(plan, side, dim, dtype=dtype) for side in ("image", "text") if side in sides]
        known = {name: teacher.identity["teacher"][name] for name in ("config", "weights_sha256")}
        identity = {
            "format": 1,
            "teacher": {"name": "scenes-T", "embed_dim": dim, "logit_scale": logit_scale, "logit_bias": logit_bias, **known},
            "source": {"fingerprint": plan.fingerprint},
        }
        image = features.image.copy()
        image[list(invalid)] = np.nan
        with StoreWriter.open(path, plan=plan, arrays=arrays, identity=identity) as writer:
            for unit in writer.pending():
                rows = slice(unit.start, unit.stop)
                with writer.attempt(unit) as attempt:
                    if unit.side in sides:
                        block = image[rows, None] if unit.side == "image" else features.text[rows]
                        attempt.append(f"{unit.side}/embedding", block.astype(dtype))
                    if unit.side == "image":
                        attempt.index([image_row(source, i, i not in set(invalid)) for i in range(unit.start, unit.stop)])
            writer.finalise({"source": source.spec})
        return path

    return make


def image_row(source: Source, i: int, valid: bool) -> dict[str, object]:
    loaded = source.image(i)
    return {"sha256": loaded.sha256, "valid": valid, "reason": "" if valid else "damaged", "width": loaded.width, "height": loaded.height}


@pytest.fixture(scope="session")
def store(make_store: Callable[..., Path]) -> Path:
    return make_store()


@pytest.fixture(scope="session")
def sigmoid_store(make_store: Callable[..., Path]) -> Path:
    """A store whose teacher says that it was trained with a sigmoid."""
    return make_store(logit_bias=SIGMOID_BIAS, name="sigmoid")


@pytest.fixture(scope="session")
def student(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A student of another width than the teacher, whose training draws random numbers (patch dropout)."""
    folder = tmp_path_factory.mktemp("student")
    vision = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8, "patch_dropout": 0.25}
    text = {"context_length": 32, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    preprocess = {"size": [32, 32], "interpolation": "bicubic", "resize_mode": "shortest"}
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": {"embed_dim": 24, "vision_cfg": vision, "text_cfg": text}, "preprocess_cfg": preprocess})
    )
    return f"local-dir:{folder}"


@pytest.fixture(scope="session")
def other(source: Scenes, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A second teacher of another width, with tokens in a child store."""
    path = tmp_path_factory.mktemp("other")
    said: dict[str, Any] = {"teacher": "scenes-S", "unit_rows": 16, "device": "cpu"}
    extract(ExtractConfig(data=source.spec, out=str(path / "s"), **said))
    extract(ExtractConfig(parent=str(path / "s"), out=str(path / "tokens"), tokens="image", **said))
    for name in ("s", "tokens"):
        store_stats(path / name)
    return path / "s"


@pytest.fixture(scope="session")
def part(other: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows 10 to 39 of the second teacher's store, in their order."""
    path = tmp_path_factory.mktemp("part") / "part"
    subset_store(other, path, rows=slice(10, 40))
    return path


@pytest.fixture(scope="session")
def gridded(student: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The session's student without patch dropout, whose 16 tokens lie on a grid."""
    settings = json.loads((Path(student.removeprefix("local-dir:")) / "open_clip_config.json").read_text())
    settings["model_cfg"]["vision_cfg"]["patch_dropout"] = 0.0
    folder = tmp_path_factory.mktemp("gridded")
    (folder / "open_clip_config.json").write_text(json.dumps(settings))
    return f"local-dir:{folder}"

"""Where a head's images come from: features of a model encoded now, features of stores, or the image tower itself where it is trained."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from kdstore.evaluate.features import Images, image_features, kept_images
from kdstore.evaluate.protocol import READS, VqaConfig
from kdstore.evaluate.results import augmented_notice, model_record, store_record
from kdstore.evaluate.stored import open_stores, stored_images
from kdstore.evaluate.task import VqaTask
from kdstore.evaluate.tower import ImageTower, tuned_images
from kdstore.models.load import Model, load_model, pick_device
from kdstore.models.names import architecture_of, resolve
from kdstore.progress import OnProgress
from kdstore.store import Store


@dataclass(frozen=True, eq=False)
class Subject:
    """Whose features are evaluated: a `model`, or what `stores` hold of one. `identity` says what they are made by, `record` what a result says of it."""

    identity: dict[str, Any]
    record: dict[str, Any]
    device: torch.device
    model: Model | None
    stores: tuple[Store, ...] = ()

    def untrained(self, seed: int) -> dict[str, Any]:
        """Say what the features of the same architecture with random weights are made by."""
        return {"untrained": seed, "architecture": self.identity["config"], "preprocessing": self.identity["preprocessing"]}


@dataclass(frozen=True, eq=False)
class Sight:
    """The images of both splits as a head sees them; the model (None: it is not here), and its tower where that is trained."""

    train: Images
    evaluated: Images
    model: Model | None
    tower: ImageTower | None = None


def check_names(config: VqaConfig) -> None:
    """Raise what a wrong name of a model, a store or a device raises, before questions are read and weights loaded."""
    pick_device(config.device)
    if config.model is None:
        open_stores(config.stores, _array(config))
    else:
        resolve(config.model, config.pretrained)


def open_subject(config: VqaConfig, on_progress: OnProgress) -> Subject:
    """Load the model or open the stores; raises what `load_model` and `open_stores` raise."""
    if config.stores:
        stores = open_stores(config.stores, _array(config))
        if notice := augmented_notice(stores[0], _array(config)):
            on_progress("notice", 0, 0, notice)
        record = store_record(stores, _array(config))
        said = record["identity"]
        identity = {"stores": record["stores"], "config": said["teacher"].get("config"), "preprocessing": said["preprocessing"]}
        return Subject(identity, record, pick_device(config.device), None, stores)
    model = _load(config)
    if model.name.notice:
        on_progress("notice", 0, 0, model.name.notice)
    made = model.identity
    identity = {"teacher": made["teacher"]["digest"], "config": made["teacher"]["config"], **{k: made[k] for k in ("preprocessing", "tokenizer")}}
    return Subject(identity, model_record(model), model.device, model)


def frozen_sights(config: VqaConfig, task: VqaTask, subject: Subject, needed: Sequence[int | None], on_progress: OnProgress) -> dict[int | None, Sight]:
    """Return what heads see of the subject (None) and of its untrained twins by seed; images are decoded once for all of them."""
    splits = (task.train, task.evaluated)
    sights: dict[int | None, Sight] = {}
    models = {seed: subject.model if seed is None else _untrained(config, subject, seed) for seed in needed}
    if subject.stores and None in models:
        del models[None]
        train, evaluated = (stored_images(subject.stores, _array(config), split, config.grid, on_progress=on_progress) for split in splits)
        sights[None] = Sight(train, evaluated, None)
    live = {seed: model for seed, model in models.items() if model is not None}
    options: dict[str, Any] = {"reads": READS[config.head], "batch": config.encode_batch, "grid": config.grid, "on_progress": on_progress}
    if live:
        encoded = [image_features(list(live.values()), split.image, split.num_images, stage=f"encode {split.name}", **options) for split in splits]
        for (seed, model), train_NTW, evaluated_NTW in zip(live.items(), *encoded, strict=True):
            sights[seed] = Sight(kept_images(train_NTW), kept_images(evaluated_NTW), model)
    return sights


def tuned_sight(config: VqaConfig, task: VqaTask, subject: Subject, seed: int | None) -> Sight:
    """Return what a head sees through a tower of its own, to be trained with it: the model's (None), or that of an untrained twin."""
    model = _load(config) if seed is None else _untrained(config, subject, seed)
    tower = ImageTower(model, config.blocks, READS[config.head], config.grid)
    train, evaluated = (tuned_images(tower, split, config.pixels_gib / 2) for split in (task.train, task.evaluated))
    return Sight(train, evaluated, model, tower)


def _array(config: VqaConfig) -> str:
    return "image/tokens" if READS[config.head] == "tokens" else "image/embedding"


def _load(config: VqaConfig) -> Model:
    assert config.model is not None
    return load_model(config.model, config.pretrained, device=config.device, precision=config.precision, image_size=config.image_size)


def _untrained(config: VqaConfig, subject: Subject, seed: int) -> Model:
    """Draw the subject's architecture from a seed; for stores it is built from the configuration that they carry.

    It reads images as the subject does: preprocessing comes with weights (SigLIP, MobileCLIP), and an architecture alone has open_clip's default.
    """
    options: dict[str, Any] = {"device": config.device, "precision": config.precision, "untrained": True, "seed": seed}
    if config.model is not None and subject.model is not None:
        drawn = load_model(architecture_of(config.model), image_size=config.image_size, **options)
        return replace(drawn, preprocess=subject.model.preprocess)
    preprocessing = {name: value for name, value in subject.identity["preprocessing"].items() if name != "digest"}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "open_clip_config.json").write_text(json.dumps({"model_cfg": subject.identity["config"], "preprocess_cfg": preprocessing}))
        return load_model(f"local-dir:{folder}", **options)

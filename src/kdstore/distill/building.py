"""The student before its first step and after its last: architecture, first weights, and the one open_clip model that it becomes.

Three text towers: its own; a copy of the teacher's, which is trained on; or the teacher's frozen one. The frozen one never runs and is not even in memory:
the store's text embeddings stand for it, the image tower is built to end in the teacher's width, and the teacher's weights join it at the export.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from open_clip.transformer import QuickGELU
from torch import Tensor, nn

from kdstore.distill.config import DistillConfig
from kdstore.distill.fitting import config_for
from kdstore.distill.losses import parse_loss, parts_of
from kdstore.errors import ConfigError, KdstoreError, MissingFeature, ModelError
from kdstore.models.encode import encode_text
from kdstore.models.load import Model, load_model
from kdstore.models.names import resolve
from kdstore.models.transplant import Side, inherit, put_tower, tower_of, tower_weights
from kdstore.store import Store

PROBES = ["a photo of two dogs", "", "three hollow stars, a blue square and an owl"]
GIVE_WEIGHTS = "Give the teacher's own weights: --set teacher_weights=ARCH:FILE, or a model folder."
CARRIED = 1e-4  # how far a text embedding may be from the teacher's when its tower stands in another model; far above rounding


@dataclass(frozen=True)
class Student:
    """A student, and by tower where its first weights are from (nothing for those that were drawn)."""

    model: Model
    started_from: dict[str, dict[str, str]]


class CachedText(nn.Module):
    """A student without a text tower: the teacher's embedding [B, D] of a text stands where another student has the text's token ids [B, L]."""

    def __init__(self, clip: Any) -> None:
        super().__init__()
        self.visual = clip.visual
        self.logit_scale = clip.logit_scale
        self.logit_bias = getattr(clip, "logit_bias", None)

    def encode_image(self, image_BCHW: Tensor, normalize: bool = False) -> Tensor:
        image_BD = self.visual(image_BCHW)
        return nn.functional.normalize(image_BD, dim=-1) if normalize else image_BD

    def encode_text(self, text_BD: Tensor, normalize: bool = False) -> Tensor:
        return nn.functional.normalize(text_BD, dim=-1) if normalize else text_BD

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.visual.set_grad_checkpointing(enable)


def build_student(config: DistillConfig, store: Store | None, device: torch.device) -> Student:
    """Build the student that a run starts with.

    Raises UnknownName, ModelError, ConfigError and MissingFeature for whatever does not fit, before a step is taken.
    """
    model = load_model(config.student, untrained=True, seed=config.seed, device=str(device), changed=_changed(config, store))
    origins: dict[str, dict[str, str]] = {}
    if config.init != "scratch":
        sides: tuple[Side, ...] = ("image", "text") if config.text_tower == "own" else ("image",)
        source = _source(config, store)
        origins = dict.fromkeys(sides, _origin(source))
        _start_from(model, source, sides, config)
    if config.text_tower == "copied":
        teacher = load_teacher(config, store)
        origins["text"] = _origin(teacher)
        carry_text(model, teacher)
    if config.text_tower == "frozen":
        model.clip = CachedText(model.clip)
    return Student(model, origins)


def whole_student(student: Student, config: DistillConfig, store: Store | None) -> Student:
    """Return the trained student as one model of open_clip, with the teacher's text tower where its own was never there.

    Raises ModelError if the teacher's weights cannot be had or are not those that the store was extracted with.
    """
    if config.text_tower != "frozen":
        return student
    model = student.model
    try:
        teacher = load_teacher(config, store)
    except KdstoreError as e:
        found = f"The run is trained and kept, and needs the teacher's text tower now. {e.message}"
        raise ModelError(found, f"{GIVE_WEIGHTS} Then add --resume.") from e
    changed = config_for(parts_of(parse_loss(config.loss))) | config_with_text_of(teacher.config["model_cfg"])
    whole = load_model(config.student, untrained=True, device="cpu", changed=changed)
    with torch.no_grad():
        put_tower(whole.clip, "image", tower_weights(model.clip, "image"), "the run")
        _copy_scale(whole.clip, model.clip)
    carry_text(whole, teacher)
    return Student(whole, {**student.started_from, "text": _origin(teacher)})


def load_teacher(config: DistillConfig, store: Store | None) -> Model:
    """Load the teacher that the store's features come from, on the CPU; raises ModelError if its weights are others than those."""
    said = _teacher(store)
    name = config.teacher_weights or said["name"]
    try:
        teacher = load_model(name, device="cpu")
    except KdstoreError as e:
        raise ModelError(f"The teacher's weights cannot be loaded: {e.message}", GIVE_WEIGHTS) from e
    if teacher.identity["teacher"]["weights_sha256"] != said["weights_sha256"]:
        found = teacher.identity["teacher"]["weights_sha256"][:12]
        raise ModelError(
            f"{name} has not the weights of the store's teacher {said['name']}: expected {said['weights_sha256'][:12]}, found {found}.", GIVE_WEIGHTS
        )
    return teacher


def _teacher(store: Store | None) -> dict[str, Any]:
    """Return what the store says of its teacher; raises ConfigError and MissingFeature."""
    if store is None:
        raise ConfigError("init=inherit takes the teacher of a store, and there is none.", "Give --cache STORE, or name a model: init=inherit:MODEL.")
    said: dict[str, Any] = store.identity["teacher"]
    if not {"config", "weights_sha256"} <= said.keys():
        raise MissingFeature(f"{store.path} does not say which architecture and weights its teacher has.", "Use text_tower=own, or extract it again.")
    return said


def _changed(config: DistillConfig, store: Store | None) -> dict[str, Any]:
    """Return the entries of the student's config that its loss and its text tower decide."""
    of_loss = config_for(parts_of(parse_loss(config.loss)))
    if config.text_tower == "own":
        return of_loss
    changed = config_with_text_of(_teacher(store)["config"])
    return of_loss | (changed if config.text_tower == "copied" else {name: changed[name] for name in ("embed_dim", "quick_gelu")})


def config_with_text_of(teacher: dict[str, Any]) -> dict[str, Any]:
    """Return the entries of a model's config that give it the teacher's text tower: the width and the activation are the whole model's."""
    text = dict(teacher["text_cfg"])
    if "hf_model_name" in text:
        text["hf_model_pretrained"] = False
    if "multimodal_cfg" in teacher:
        text["output_tokens"] = False  # which CoCa's decoder reads, and a student has none
    custom = {"custom_text": True} if teacher.get("custom_text") or {"hf_model_name", "output_tokens"} & text.keys() else {}
    return {"embed_dim": teacher["embed_dim"], "quick_gelu": teacher.get("quick_gelu", False), "text_cfg": text, **custom}


def _source(config: DistillConfig, store: Store | None) -> Model:
    """Load the model that `init` names: a model to inherit from, a model of its own name, or a file or tag of the student's architecture."""
    kind, _, named = config.init.partition(":")
    if kind == "inherit":
        return load_model(named, device="cpu") if named else load_teacher(config, store)
    path = Path(config.init)
    if path.is_dir() or (":" in config.init and not path.is_file()):
        return load_model(config.init, device="cpu")
    if resolve(config.student, untrained=True).has_folder:
        found = f"init={config.init} is a file or a tag, and the student {config.student} is a folder and no architecture."
        raise ConfigError(found, "Give a model folder as init.")
    return load_model(config.student, config.init, device="cpu")


def _start_from(model: Model, source: Model, sides: tuple[Side, ...], config: DistillConfig) -> None:
    """Copy or inherit towers; the temperature goes with them where both do, since it belongs to the space that they share."""
    origin = source.name.name
    with torch.no_grad():
        for side in sides:
            here, there = _activation(tower_of(model.clip, side)), _activation(tower_of(source.clip, side))
            if here != there:
                raise ModelError(f"The {side} tower of {origin} has {there}, and the student {here}.", "Name the student's twin: with -quickgelu, or without.")
            if config.init.partition(":")[0] == "inherit":
                inherit(model.clip, side, source.clip, origin, config.inherit_layers)
            else:
                put_tower(model.clip, side, tower_weights(source.clip, side), origin)
        if "text" in sides:
            _copy_scale(model.clip, source.clip)


def carry_text(model: Model, teacher: Model) -> None:
    """Put the teacher's text tower and tokenizer into a model; raises ModelError if texts then have other embeddings."""
    with torch.no_grad():
        put_tower(model.clip, "text", tower_weights(teacher.clip, "text"), teacher.name.name)
    model.tokenizer = teacher.tokenizer
    expected, found = encode_text(teacher, PROBES), encode_text(model, PROBES).cpu()
    if not torch.allclose(found, expected, rtol=CARRIED, atol=CARRIED * float(expected.abs().max())):
        raise ModelError(f"The text tower of {teacher.name.name} gives other embeddings in a student of another class.", "Use text_tower=own.")


def _copy_scale(clip: Any, source: Any) -> None:
    for name in ("logit_scale", "logit_bias"):
        if getattr(clip, name, None) is not None and getattr(source, name, None) is not None:
            getattr(clip, name).copy_(getattr(source, name))


def _activation(tower: nn.Module) -> str:
    return "QuickGELU" if any(isinstance(module, QuickGELU) for module in tower.modules()) else "GELU"


def _origin(model: Model) -> dict[str, str]:
    teacher = model.identity["teacher"]
    return {"name": teacher["name"], "weights_sha256": teacher["weights_sha256"]}

"""Load an open_clip model and say exactly which one it is.

Weights are always loaded in float32 on the CPU, hashed, and only then moved: the hash names the tensors, not the file or the precision.
Half precision is autocast at encoding, so one identity serves every device.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import textwrap
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch

from kdstore.errors import ConfigError, KdstoreError, ModelError
from kdstore.jsonfile import digest_of
from kdstore.models.names import ModelName, resolve

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Model:
    """An open_clip model in eval mode with its own preprocessing and tokenizer.

    `config` is open_clip's `{"model_cfg", "preprocess_cfg"}`; `identity` has the sub-digests `teacher`, `preprocessing`, `tokenizer`.
    """

    clip: Any  # CLIP, CustomTextCLIP or CoCa of open_clip
    name: ModelName
    config: dict[str, Any]
    preprocess: Callable[[Any], torch.Tensor]
    tokenizer: Callable[[list[str]], torch.Tensor]
    device: torch.device
    precision: str
    identity: dict[str, Any]
    compile: bool = False
    channels_last: bool = False

    @property
    def embed_dim(self) -> int:
        return int(self.config["model_cfg"]["embed_dim"])

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the images it reads, in pixels."""
        size = self.clip.visual.image_size
        return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))

    @property
    def logit_scale(self) -> float:
        """The scale that logits are multiplied by (stored as its logarithm)."""
        return float(self.clip.logit_scale.detach().exp().item())

    @property
    def logit_bias(self) -> float | None:
        bias = getattr(self.clip, "logit_bias", None)
        return None if bias is None else float(bias.detach().item())

    @property
    def pad_id(self) -> int:
        """The token id that fills texts up: a Hugging Face tokenizer's own, 0 in open_clip's."""
        return self._special_id("pad_token_id", 0)

    @property
    def end_id(self) -> int:
        """The token id that ends a text (of a Hugging Face tokenizer; -1 where padding cannot be taken for it)."""
        return self._special_id("eos_token_id", -1)

    def _special_id(self, name: str, default: int) -> int:
        found = getattr(getattr(self.tokenizer, "tokenizer", None), name, None)
        return default if found is None else int(found)


def load_model(
    name: str,
    pretrained: str | None = None,
    *,
    device: str = "auto",
    precision: str = "fp32",
    untrained: bool = False,
    seed: int = 0,
    compile: bool = False,
    channels_last: bool = False,
    changed: dict[str, Any] | None = None,
    image_size: int | None = None,
) -> Model:
    """Load a model by name (see `names.resolve`); `untrained` draws random weights from `seed` instead, and then no weights may be named.

    `changed` replaces entries of an untrained model's config, such as `embed_dim`; its tokenizer stays that of the name.
    `image_size` makes it read images of other pixels than it was trained on, its positions interpolated.
    `compile` compiles its towers at the first batch; `channels_last` lays images and convolutions out so. Both are a matter of speed.

    Raises UnknownName and ModelError as `resolve` does, and ModelError where weights cannot be found or do not fit, or the architecture has one image size.
    """
    resolved = resolve(name, pretrained, untrained=untrained)
    target = pick_device(device)
    if precision not in DTYPES:
        raise ConfigError(f"Unknown precision '{precision}'.", f"Known: {', '.join(DTYPES)}.")
    clip, config, tokenizer = _build(resolved, untrained, seed, changed or {}, image_size)
    # Built from the config alone, so that what was hashed is what runs.
    preprocess = open_clip.transform.image_transform_v2(open_clip.transform.PreprocessCfg(**config["preprocess_cfg"]), is_train=False)
    clip.eval()
    model = Model(clip, resolved, config, preprocess, tokenizer, target, precision, {}, compile, channels_last)
    model.identity = _identity(model, untrained, seed)
    clip.to(target)
    if channels_last:
        clip.to(memory_format=torch.channels_last)
    return model


def pick_device(device: str) -> torch.device:
    """Return the device asked for; `auto` takes a GPU where there is one."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as e:
        raise ConfigError(f"The device '{device}' cannot be used: {str(e).splitlines()[0]}.", "Use --device cpu.") from e
    return chosen


def _build(
    resolved: ModelName, untrained: bool, seed: int, changed: dict[str, Any], image_size: int | None
) -> tuple[torch.nn.Module, dict[str, Any], Callable[[list[str]], torch.Tensor]]:
    if untrained:
        torch.manual_seed(seed)
    options: dict[str, Any] = {"load_weights": False, "pretrained_text": False} if untrained else {"require_pretrained": True}
    custom_text = bool(changed.get("custom_text"))  # open_clip takes it out of the config before it lets entries be replaced
    replaced = {name: value for name, value in changed.items() if name != "custom_text"}
    if image_size is not None:
        options["force_image_size"] = image_size
    try:
        with quiet():
            model_config = open_clip.get_model_config(resolved.open_clip_name)
            _refuse_ragged(model_config, resolved)
            tokenizer = open_clip.get_tokenizer(resolved.open_clip_name)
            clip = open_clip.create_model(resolved.open_clip_name, pretrained=resolved.pretrained, force_custom_text=custom_text, **options, **replaced)
            if image_size is not None:
                model_config = {**model_config, "vision_cfg": {**model_config["vision_cfg"], "image_size": image_size}}
                with torch.inference_mode():  # only a forward pass tells of all families whether their positions fit
                    clip.eval().visual(torch.zeros(1, 3, image_size, image_size))
    except KdstoreError:
        raise
    except ModuleNotFoundError as e:
        raise ModelError(f"{resolved.name} needs the package {e.name}.", "Install it: pip install 'kdstore[hf]'.") from e
    except Exception as e:  # open_clip lets through whatever the hub client, torch, safetensors or its own checks raise
        if image_size is not None:
            raise ModelError(f"Cannot load {resolved.name} for images of {image_size} pixels: {_first_line(e)}", "Leave --image-size out.") from e
        raise ModelError(f"Cannot load {resolved.name}: {_first_line(e)}", _loading_hint(resolved)) from e
    return clip, {"model_cfg": {**model_config, **changed}, "preprocess_cfg": dict(clip.visual.preprocess_cfg)}, tokenizer


def _refuse_ragged(model_config: dict[str, Any], resolved: ModelName) -> None:
    trunk = model_config["vision_cfg"].get("timm_model_name") or ""
    if "naflex" in trunk:
        found = f"{resolved.name} has a NaFlex image tower ({trunk}): as many tokens as an image asks for, and rows of a store are of one size."
        raise ModelError(found, "Take a model of one image size, such as ViT-B-16-SigLIP2.")


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return textwrap.shorten(" ".join(lines[:2]), 300, placeholder=" ...")


def _loading_hint(resolved: ModelName) -> str:
    if resolved.pretrained and not Path(resolved.pretrained).is_file():
        return "Check the network, or download the weights elsewhere and give the file with --pretrained FILE."
    return "Check that the weights belong to this architecture."


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence open_clip's warnings for the cases that are errors of ours or that were asked for."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        root.setLevel(level)


def _identity(model: Model, untrained: bool, seed: int) -> dict[str, Any]:
    """Sub-digests of what decides a feature: architecture with its activation, tensors, scale and bias; preprocessing; tokenizer."""
    activation = "quick_gelu" if any(type(m).__name__ == "QuickGELU" for m in model.clip.modules()) else "gelu"
    weights = weights_sha256(model.clip)
    teacher = {
        "name": model.name.label or f"{model.name.short}@{weights[:8]}",
        "config": model.config["model_cfg"],
        "activation": activation,
        "weights_sha256": weights,
        "untrained_seed": seed if untrained else None,
        "embed_dim": model.embed_dim,
        "logit_scale": model.logit_scale,
        "logit_bias": model.logit_bias,
    }
    preprocessing = json.loads(json.dumps(model.config["preprocess_cfg"]))
    return {
        "teacher": {**teacher, "digest": digest_of({k: v for k, v in teacher.items() if k != "name"})},
        "preprocessing": {**preprocessing, "digest": digest_of(preprocessing)},
        "tokenizer": _tokenizer_identity(model),
    }


def _tokenizer_identity(model: Model) -> dict[str, Any]:
    """Name the tokenizer by class and by what it makes of a fixed text: robust to where its files lie."""
    probe = ["a photo of two dogs, 3 cats & an owl -- 'naive' cafe"]
    tokens = model.tokenizer(probe)
    identity = {"class": type(model.tokenizer).__name__, "context_length": int(tokens.shape[1]), "probe": tokens[0].tolist()}
    return {**identity, "digest": digest_of(identity)}


def weights_sha256(module: torch.nn.Module) -> str:
    """Hash a module's tensors in name order: name, dtype, shape and bytes of each (hex)."""
    h = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        value = tensor.detach().cpu().contiguous()
        h.update(f"{name}|{value.dtype}|{tuple(value.shape)}|".encode())
        h.update(value.view(-1).view(torch.uint8).numpy().data if value.numel() else b"")
    return h.hexdigest()


def parameter_counts(clip: torch.nn.Module) -> dict[str, int]:
    """Count parameters, in all and without the token embedding (most of a small CLIP)."""
    total = sum(p.numel() for p in clip.parameters())
    embedding = sum(p.numel() for n, p in clip.named_parameters() if n.endswith(("token_embedding.weight", "word_embeddings.weight")))
    return {"total": total, "without_token_embedding": total - embedding}

"""What a user may call a model, and what that resolves to; decides nothing about weights.

A name is an open_clip architecture (with a tag or a checkpoint file), one of our configs, the path of a config (`small.json`, then called
`small`), `hf-hub:ORG/NAME`, `local-dir:PATH`, a run folder, or a built-in demo teacher. An architecture without a tag gets its only tag, or
the default of the table below.
"""

from __future__ import annotations

import functools
import json
import re
from dataclasses import dataclass
from pathlib import Path

from kdstore.errors import ModelError, UnknownName

CONFIGS = Path(__file__).parent / "configs"
DEMO_TEACHERS = Path(__file__).parents[1] / "demo" / "teachers"

CONFIG_PARTS = ("embed_dim", "vision_cfg", "text_cfg")

# The weights a paper most likely means by the bare architecture.
DEFAULT_TAGS = {
    "RN50-quickgelu": "openai",
    "ViT-B-32": "laion2b_s34b_b79k",
    "ViT-B-16": "datacomp_xl_s13b_b90k",
    "ViT-L-14": "datacomp_xl_s13b_b90k",
    "ViT-H-14": "laion2b_s32b_b79k",
    "ViT-H-14-quickgelu": "dfn5b",
    "ViT-H-14-378-quickgelu": "dfn5b",
    "ViT-g-14": "laion2b_s34b_b88k",
    "ViT-bigG-14": "laion2b_s39b_b160k",
    "EVA02-B-16": "merged2b_s8b_b131k",
    "EVA02-L-14": "merged2b_s4b_b131k",
    "MobileCLIP2-S0": "dfndr2b",
    "MobileCLIP2-S2": "dfndr2b",
    "coca_ViT-L-14": "laion2b_s13b_b90k",
}


@dataclass(frozen=True)
class ModelName:
    """A resolved name: what to show, what open_clip is asked for, and the short form that paths are made of.

    `label` is the name that means the same weights everywhere; files and folders have none and go by their hash instead.
    """

    name: str
    open_clip_name: str
    pretrained: str | None
    short: str
    label: str = ""
    notice: str = ""

    @property
    def has_folder(self) -> bool:
        """Whether config and weights come from one place (a folder or the hub) rather than from architecture + tag."""
        return ":" in self.open_clip_name


@functools.cache
def _register_configs() -> None:
    import open_clip

    open_clip.add_model_config(CONFIGS)


def _register_file(path: Path) -> str:
    """Make an architecture of the config in a JSON file, called by its stem; raises ModelError for what is no config, and for a name that means another."""
    import open_clip

    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as e:
        raise ModelError(f"Cannot read the model config {path}: {e}.", "Give a JSON file with embed_dim, vision_cfg and text_cfg.") from e
    missing = [part for part in CONFIG_PARTS if not isinstance(config, dict) or part not in config]
    if missing:
        raise ModelError(f"{path} is no model config: it has no {', '.join(missing)}.", "A folder with an open_clip_config.json is named by its path instead.")
    known = open_clip.get_model_config(path.stem)
    if known is None:
        open_clip.add_model_config(path)
    elif known != config:
        raise ModelError(f"{path} describes another model than the {path.stem} that is known already.", "Rename the file: its name becomes the model's.")
    return path.stem


def architectures() -> list[str]:
    """List all architectures: open_clip's and ours."""
    import open_clip

    _register_configs()
    return list(open_clip.list_models())


def demo_teachers() -> dict[str, Path]:
    """Name the built-in teachers and their folders."""
    return {p.parent.name: p.parent for p in sorted(DEMO_TEACHERS.glob("*/open_clip_config.json"))}


def resolve(name: str, pretrained: str | None = None, *, untrained: bool = False) -> ModelName:
    """Resolve a model's name; `untrained` asks for the architecture alone.

    Raises UnknownName for an unknown architecture or tag, ModelError where a tag is needed, misplaced (with `untrained` too), or wants another activation.
    """
    import open_clip

    _register_configs()
    folder = Path(name.removeprefix("local-dir:"))
    if name in demo_teachers() and not pretrained and (not untrained or name not in architectures()):
        return ModelName(name, f"local-dir:{demo_teachers()[name]}", None, name, label=f"{name} (untrained)" if untrained else name)
    if name.startswith("hf-hub:"):
        _refuse_tag(name, pretrained)
        return ModelName(name, name, None, _path_safe(name.removeprefix("hf-hub:")), label=name)
    if name.startswith("local-dir:") or (folder.is_dir() and name not in architectures()):
        _refuse_tag(name, pretrained)
        _check_folder(folder, name, untrained)
        return ModelName(name, f"local-dir:{folder}", None, _path_safe(folder.resolve().name))
    typed, _, tag = name.partition(":")
    arch = _register_file(Path(typed)) if typed.endswith(".json") else typed.replace("/", "-")
    if arch not in architectures():
        hint = "'kdstore list teachers' shows them all; a folder needs an open_clip_config.json."
        raise UnknownName.of("model", typed, [*architectures(), *demo_teachers()], hint)
    chosen = pretrained or tag
    if untrained and chosen:
        raise ModelError(
            f"{typed} is to start untrained, but the weights {chosen} were named.", f"Write {typed} alone; a student takes them with --init {chosen}."
        )
    if untrained:
        return ModelName(arch, arch, None, short_name(arch), label=f"{arch} (untrained)")
    notice = ""
    if not chosen:
        chosen = _default_tag(arch)
        notice = f"{arch} without a tag: using {arch}:{chosen}."
    if Path(chosen).is_file():
        return ModelName(f"{arch}:{Path(chosen).name}", arch, chosen, short_name(arch), notice=_doubt_activation(arch, Path(chosen).name))
    tags = open_clip.list_pretrained_tags_by_model(arch)
    if chosen not in tags:
        raise UnknownName.of(f"tag or checkpoint file for {arch}", chosen, tags)
    _check_activation(arch, chosen)
    return ModelName(f"{arch}:{chosen}", arch, chosen, short_name(arch), f"{arch}:{chosen}", notice)


def local_config(name: str) -> dict | None:
    """Return the config of a model that is named by a folder or a JSON file, and so may change under its name; None for any other, or if it is none."""
    folder = Path(name.removeprefix("local-dir:"))
    path = folder / "open_clip_config.json" if folder.is_dir() else Path(name)
    try:
        return json.loads(path.read_text()) if path.suffix == ".json" and path.is_file() else None
    except ValueError:
        return None  # `resolve` says so


def architecture_of(name: str) -> str:
    """Return the name without its tag: what the untrained control of a model is called."""
    return name if name.startswith(("hf-hub:", "local-dir:")) or Path(name).is_dir() else name.partition(":")[0]


def short_name(arch: str) -> str:
    """Shorten an architecture for paths: without a leading `ViT-` and a trailing `-14` (`ViT-bigG-14` -> `bigG`)."""
    return _path_safe(arch.removeprefix("ViT-").removesuffix("-14"))


def _path_safe(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip(".-") or "model"


def _refuse_tag(name: str, pretrained: str | None) -> None:
    if pretrained:
        raise ModelError(f"{name} brings its own weights, but --pretrained {pretrained} was given.", "Leave --pretrained out.")


def _check_folder(folder: Path, name: str, untrained: bool) -> None:
    config = folder / "open_clip_config.json"
    if not config.is_file() and any((folder / part).is_file() for part in ("config.json", "checkpoint.pt")):
        raise ModelError(f"{name} holds no model but an unfinished run.", "Finish it with kdstore distill --resume.")
    try:
        found = json.loads(config.read_text())
        if "model_cfg" not in found:
            raise ValueError("it has no 'model_cfg'")
    except (OSError, ValueError) as e:
        raise ModelError(f"{name} is not a model folder: cannot read {config.name} ({e}).", "Give a folder in open_clip's local-dir layout.") from e
    if not untrained and not any(p.suffix in (".safetensors", ".bin", ".pt", ".pth", ".npz") for p in folder.iterdir()):
        raise ModelError(f"{name} holds no weights (open_clip_model.safetensors).", "A run that has not ended has none: finish it with --resume.")


def _default_tag(arch: str) -> str:
    import open_clip

    tags = open_clip.list_pretrained_tags_by_model(arch)
    if len(tags) == 1:
        return str(tags[0])
    if DEFAULT_TAGS.get(arch) in tags:
        return DEFAULT_TAGS[arch]
    if not tags:
        raise ModelError(f"{arch} has no published weights.", "Give a checkpoint file with --pretrained FILE.")
    raise ModelError(f"{arch} has {len(tags)} tags and none was chosen: {', '.join(tags)}.", f"Write {arch}:TAG or --pretrained TAG.")


def _activation_twin(arch: str) -> str | None:
    """Return the architecture that differs by its GELU alone, if there is one."""
    twin = arch.removesuffix("-quickgelu") if arch.endswith("-quickgelu") else f"{arch}-quickgelu"
    return twin if twin in architectures() else None


def _doubt_activation(arch: str, file: str) -> str:
    """Say that a checkpoint file fits two architectures and does not tell which; empty where there is one alone."""
    twin = _activation_twin(arch)
    if twin is None:
        return ""
    built, other = ("QuickGELU", "GELU") if arch.endswith("-quickgelu") else ("GELU", "QuickGELU")
    return f"{arch} is built with {built}, and {file} does not say what it was trained with: if that was {other}, take {twin}, or the features are wrong."


def _check_activation(arch: str, tag: str) -> None:
    """Refuse weights trained with the other GELU: open_clip only warns, and the features would be silently wrong."""
    import open_clip

    def wants_quick(config: dict | None) -> bool:
        return bool((config or {}).get("quick_gelu", False))

    wanted = wants_quick(open_clip.get_pretrained_cfg(arch, tag))
    built = wants_quick(open_clip.get_model_config(arch))
    if wanted == built:
        return
    twin = _activation_twin(arch)
    names = {True: "QuickGELU", False: "GELU"}
    hint = f"Use {twin}:{tag}." if twin else "Use an architecture with that activation."
    raise ModelError(f"The weights {tag} need {names[wanted]}, but {arch} is built with {names[built]}.", hint)

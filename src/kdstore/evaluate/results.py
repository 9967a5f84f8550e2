"""The one form of a result: a JSON file that proves itself and says where it comes from.

Fields: `stage`, `model` (name, identity, parameters, run), `data`, `config`, `config_digest`, `rows` (a name and `scores` each), `summary` (each
row over its seeds, with intervals), `outcomes` (what lies beside it of every question), what the stage adds, and `made` (versions, device, seconds),
the only part in which two runs of one seed on one machine differ.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import kdstore
from kdstore.errors import ConfigError, EvaluationError, RunError
from kdstore.evaluate.outcomes import Outcomes, encode_outcomes, write_outcomes
from kdstore.evaluate.summary import summarise
from kdstore.jsonfile import disk_error, read_json, write_json

if TYPE_CHECKING:  # scoring predictions, tables and comparisons need none of these
    import torch

    from kdstore.models.load import Model
    from kdstore.store import Store

STAGES = ("evaluate vqa", "evaluate score", "evaluate zeroshot", "evaluate retrieval", "evaluate probe", "evaluate agreement")


def model_record(model: Model) -> dict[str, Any]:
    """Say which model was evaluated: identity with the hash of its weights, parameters and, for a run folder, the run and its store."""
    from kdstore.models.load import parameter_counts

    return {
        "name": model.name.name,
        "identity": model.identity,
        "parameters": parameter_counts(model.clip),
        "run": _run_record(model),
    }


def store_record(stores: Sequence[Store], *arrays: str) -> dict[str, Any]:
    """Say whose stored features were evaluated, and of each array the layer, views and codec that it holds; all stores are of one model."""
    said = stores[0].identity
    return {
        "name": said["teacher"]["name"] or stores[0].path.name,
        "identity": {name: said.get(name) for name in ("teacher", "preprocessing", "tokenizer")},  # imported stores lack some
        "parameters": None,
        "run": None,
        "stores": [store.digest for store in stores],
        "arrays": {name: encoding for name, encoding in said.get("arrays", {}).items() if name in arrays},
    }


def augmented_notice(store: Store, array: str) -> str:
    """Say that an imported store holds features of augmented views, where scores are expected to be of the images as they are; '' if it does not."""
    encoding = store.identity.get("arrays", {}).get(array, {})
    if encoding.get("views") != ["augmented"]:
        return ""
    return f"{array} of {store.path} is of augmented views ({encoding.get('augmentation')}): its scores do not compare with those of the plain view."


def made_record(device: torch.device | None, seconds: float) -> dict[str, Any]:
    """Say with what and in which time a result was made; None: no model ran."""
    import torch

    packages = ("torch", "open_clip_torch", "numpy", "faiss-cpu", "scikit-learn", "pillow")
    return {
        "seconds": round(seconds, 1),
        "device": str(device or "cpu"),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "versions": {"kdstore": kdstore.__version__, "python": platform.python_version(), **{name: version(name) for name in packages}},
    }


def check_out(out: str | None) -> None:
    """Refuse a result file that cannot be written, before any work is done."""
    if out is None:
        return
    path = Path(out).absolute()
    if path.is_dir():
        raise ConfigError(f"The result file {out} is a folder.", "Give the path of a file.")
    nearest = next(parent for parent in path.parents if parent.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise ConfigError(f"The result file {out} cannot be written: {nearest} is not a folder that can be written to.", "Give another path.")


def write_result(out: str | None, content: dict[str, Any], outcomes: Outcomes | None = None) -> dict[str, Any]:
    """Write a result where a path is given, after the outcomes behind it; returns it with what it records of these, its summary and, if written, its digest."""
    content = {**content, "summary": summarise(content["rows"], outcomes)}
    if out is None:
        return content if outcomes is None else {**content, "outcomes": encode_outcomes(outcomes)[1]}
    path = Path(out)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise disk_error(e, path) from e
    if outcomes is not None:
        content = {**content, "outcomes": write_outcomes(path, outcomes)}
    return {**content, "digest": write_json(path, content)}


def read_result(path: str | Path) -> dict[str, Any]:
    """Read a result; raises EvaluationError if there is none or it is not as it was written."""
    if not Path(path).is_file():
        raise EvaluationError(f"No result file {path}.", "Write one with kdstore evaluate ... --out FILE.")
    content = read_json(Path(path), EvaluationError)
    if content.get("stage") not in STAGES:
        raise EvaluationError(f"{path} is no result of an evaluation: its stage is {content.get('stage')!r}.", "Give a file that kdstore evaluate wrote.")
    return content


def _run_record(model: Model) -> dict[str, Any] | None:
    path = Path(model.name.open_clip_name.removeprefix("local-dir:")) / "run.json"
    if not model.name.has_folder or not path.is_file():
        return None
    run = read_json(path, RunError)
    return {"digest": run["digest"], "settings_digest": run.get("settings_digest"), "store": run.get("store")}

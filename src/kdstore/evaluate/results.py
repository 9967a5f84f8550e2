"""The one form of a result: a JSON file that proves itself and says where it comes from.

Fields: `stage`, `model` (name, identity, parameters, run), `data`, `config`, `config_digest`, `rows` (a name and `scores` each), `summary` (each
row over its seeds, with intervals), `outcomes` (what lies beside it of every question), what the stage adds, and `made` (versions, device, seconds),
the only part in which two runs of one seed on one machine differ.
"""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import kdstore
from kdstore.errors import ConfigError, EvaluationError, RunError
from kdstore.evaluate.outcomes import Outcomes, encode_outcomes, write_outcomes
from kdstore.evaluate.summary import summarise
from kdstore.jsonfile import disk_error, read_json, write_json
from kdstore.models.load import Model, parameter_counts

STAGES = ("evaluate vqa", "evaluate score", "evaluate zeroshot", "evaluate retrieval", "evaluate probe", "evaluate agreement")


def model_record(model: Model) -> dict[str, Any]:
    """Say which model was evaluated: identity with the hash of its weights, parameters and, for a run folder, the run and its store."""
    return {
        "name": model.name.name,
        "identity": model.identity,
        "parameters": parameter_counts(model.clip),
        "run": _run_record(model),
    }


def made_record(device: torch.device, seconds: float) -> dict[str, Any]:
    """Say with what and in which time a result was made."""
    packages = ("torch", "open_clip_torch", "numpy", "faiss-cpu", "scikit-learn", "pillow")
    return {
        "seconds": round(seconds, 1),
        "device": str(device),
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
        raise ConfigError(f"The result file {out} is a folder.", "Give --out the path of a JSON file.")
    nearest = next(parent for parent in path.parents if parent.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise ConfigError(f"The result file {out} cannot be written: {nearest} is not a folder that can be written to.", "Give --out another path.")


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

"""What training leaves: checkpoints, which say of which settings they are and run no code when they are read, and models as folders."""

from __future__ import annotations

import io
import json
import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import nn

from kdstore.errors import RunError
from kdstore.jsonfile import write_bytes


def checkpoint_bytes(state: dict[str, Any]) -> bytes:
    """Return what a checkpoint file holds; `state` has the digest of the settings as `settings`."""
    content = io.BytesIO()
    torch.save(state, content)
    return content.getvalue()


def parse_checkpoint(content: bytes, path: Path, settings: str, device: torch.device) -> dict[str, Any]:
    """Understand a checkpoint that was read from `path`; raises RunError if it is damaged or of other settings than those of this digest."""
    try:
        state: dict[str, Any] = torch.load(io.BytesIO(content), map_location=device, weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as e:
        reason = f"{type(e).__name__}: {e}".splitlines()[0][:120]
        raise RunError(f"{path} cannot be read ({reason}).", "Remove it to start this run again.") from e
    if state.get("settings") != settings:
        raise RunError(f"{path} belongs to another run.", "Remove it to start this run again.")
    return state


def export_model(path: Path, clip: nn.Module, config: dict[str, Any], tokenizer: Any = None) -> None:
    """Write a model so that `open_clip.create_model("local-dir:PATH")` loads it; `config` is open_clip's, with `model_cfg` and `preprocess_cfg`.

    A tokenizer that has files of its own (Hugging Face's) goes with it, because open_clip looks for them in the same folder.
    """
    path.mkdir(exist_ok=True)
    write_tensors(path / "open_clip_model.safetensors", clip)
    if hasattr(tokenizer, "save_pretrained"):
        tokenizer.save_pretrained(path)
    write_bytes(path / "open_clip_config.json", json.dumps(config, indent=1).encode() + b"\n")


def write_tensors(path: Path, module: nn.Module) -> None:
    """Write a module's tensors as a safetensors file, atomically."""
    write_bytes(path, save({name: tensor.detach().cpu().contiguous().clone() for name, tensor in module.state_dict().items()}))

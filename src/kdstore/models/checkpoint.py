"""Checkpoints of training: one file of tensors and plain values, which says of which settings it is and runs no code when it is read."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import torch

from kdstore.errors import RunError


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

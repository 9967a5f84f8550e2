"""Tensors out of a file of torch.save that a stranger wrote: no object is unpickled, and nothing is allocated beyond what the file may declare."""

from __future__ import annotations

import io
import pickle
import zipfile
from typing import Any

import numpy.typing as npt
import torch

from kdstore.store.importing.foreign import refuse_large


def read_tensors(content: bytes) -> dict[str, npt.NDArray[Any]]:
    """Return the floating tensors of a saved dict, as float32; raises ValueError for what is none, or larger than the features of an image."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            refuse_large(sum(member.file_size for member in archive.infolist()))
        found = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except (zipfile.BadZipFile, pickle.UnpicklingError, RuntimeError, EOFError, LookupError, TypeError, OSError) as e:
        raise ValueError(f"{type(e).__name__}: {str(e).splitlines()[0][:200] if str(e) else ''}") from e
    if not isinstance(found, dict):
        raise ValueError(f"it holds a {type(found).__name__}, not a dict of tensors")
    tensors = {str(name): value for name, value in found.items() if isinstance(value, torch.Tensor) and value.is_floating_point()}
    refuse_large(sum(4 * value.numel() for value in tensors.values()))  # a view may be larger than what it is a view of
    return {name: value.float().numpy() for name, value in tensors.items()}

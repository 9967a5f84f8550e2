"""Encode a batch in parts that fit: when memory runs out, parts are halved, for good.

The size that fits is kept per kind of input, so that one failure is paid once and not in every batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

OUT_OF_MEMORY = ("DefaultCPUAllocator", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""How errors that are no OutOfMemoryError tell it: two of the CPU's allocators, and cuBLAS, which allocates on its own."""


@dataclass
class Fitting:
    """The largest parts that fit so far, per kind of input; `on_halved` is told in one sentence when one shrinks."""

    on_halved: Callable[[str], None]
    sizes: dict[str, int] = field(default_factory=dict)

    def run(self, kind: str, encode: Callable[[Any], Sequence[torch.Tensor]], batch: Any) -> tuple[torch.Tensor, ...]:
        """Apply `encode` to a batch (tensor or list) in parts that fit and join what it gives; raises what it raises for a single sample."""
        start, parts = 0, []
        while start < len(batch):
            part = batch[start : start + self.sizes.get(kind, len(batch))]
            try:
                parts.append(encode(part))
                start += len(part)
                continue
            except RuntimeError as e:
                if not is_out_of_memory(e) or len(part) == 1:
                    raise
            self._halve(kind, len(part))  # outside the handler, whose traceback holds what was allocated
        return tuple(torch.cat(column) for column in zip(*parts, strict=True)) if len(parts) > 1 else tuple(parts[0])

    def _halve(self, kind: str, size: int) -> None:
        self.sizes[kind] = size // 2
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.on_halved(f"Out of memory with {size} {kind}s at once; going on with {size // 2}.")


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an error says that memory ran out, on a GPU or the CPU."""
    return isinstance(error, torch.cuda.OutOfMemoryError) or any(text in str(error) for text in OUT_OF_MEMORY)

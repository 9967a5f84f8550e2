"""Copying rows from memory addresses into a batch, compiled with numba where it is there.

The rows of a batch lie scattered over mapped shards; NumPy can only index one shard at a time. The compiled loop takes absolute
addresses, releases the GIL, and has an explicit signature, so it is compiled once per installation (and cached), never per batch.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import numpy.typing as npt


def copy_rows_with_ctypes(addresses: npt.NDArray[np.uint64], out: npt.NDArray[np.uint8]) -> None:
    """Copy `out.shape[1]` bytes from each address [B] into the rows of `out` [B, bytes]."""
    size = out.shape[1]
    first = out.ctypes.data
    for i, address in enumerate(addresses.tolist()):
        ctypes.memmove(first + i * size, address, size)


copy_rows = copy_rows_with_ctypes
try:
    import numba
    from numba.core import cgutils, types
    from numba.extending import intrinsic
except ImportError:
    pass
else:

    @intrinsic
    def _memcpy(typingctx: Any, target: Any, source: Any, size: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            pointers = [builder.inttoptr(address, cgutils.voidptr_t) for address in args[:2]]
            cgutils.raw_memcpy(builder, pointers[0], pointers[1], args[2], 1)
            return context.get_dummy_value()

        return types.void(types.uint64, types.uint64, types.int64), codegen

    def _copy_rows(addresses, out):
        first = np.uint64(out.ctypes.data)
        size = out.shape[1]
        for i in range(out.shape[0]):
            _memcpy(first + np.uint64(i * size), addresses[i], size)

    def _compiled(cache: bool) -> Any:
        return numba.njit("void(uint64[::1], uint8[:, ::1])", nogil=True, cache=cache)(_copy_rows)

    try:
        copy_rows = _compiled(cache=True)
    except RuntimeError:  # no folder to cache in (a read-only installation without a home): compile once per process
        copy_rows = _compiled(cache=False)

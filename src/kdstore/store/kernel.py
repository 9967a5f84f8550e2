"""Copying rows of a batch from mapped chunks, compiled with numba where it is there.

The rows of a batch lie scattered over mapped shards, and NumPy can only index one shard at a time. The compiled loop takes the
absolute addresses of chunks and releases the GIL; its signature is explicit, so it is compiled once per installation and cached.
Both forms also do the index arithmetic and stop at what needs a slow look: an index out of bounds, a chunk not yet checked.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import numpy.typing as npt

Int64 = npt.NDArray[np.int64]


def copy_rows_portable(
    rows_B: Int64, views_B: Int64, addresses: npt.NDArray[np.uint64], num_rows: int, num_views: int, chunk_rows: int, out: npt.NDArray[np.uint8]
) -> bool:
    """Copy row `rows_B[i]` of view `views_B[i]` into `out[i]`, for all i; False if an index is out of bounds or a chunk has address 0.

    `addresses` [chunks] says where chunk `row // chunk_rows * num_views + view` begins; `out` is uint8 [B, bytes of a row].
    """
    rows_B, views_B = np.where(rows_B < 0, rows_B + num_rows, rows_B), np.where(views_B < 0, views_B + num_views, views_B)
    if ((rows_B < 0) | (rows_B >= num_rows) | (views_B < 0) | (views_B >= num_views)).any():
        return False
    begins_B = addresses[rows_B // chunk_rows * num_views + views_B]
    if not begins_B.all():
        return False
    size, target = out.shape[1], out.ctypes.data
    for i, source in enumerate((begins_B + (rows_B % chunk_rows * size).astype(np.uint64)).tolist()):
        ctypes.memmove(target + i * size, source, size)
    return True


copy_rows = copy_rows_portable
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

    def _copy_rows(rows_B: Any, views_B: Any, addresses: Any, num_rows: Any, num_views: Any, chunk_rows: Any, out: Any) -> Any:
        target, size = np.uint64(out.ctypes.data), out.shape[1]
        for i in range(len(rows_B)):
            row = rows_B[i] + num_rows if rows_B[i] < 0 else rows_B[i]
            view = views_B[i] + num_views if views_B[i] < 0 else views_B[i]
            if row < 0 or row >= num_rows or view < 0 or view >= num_views:
                return False
            chunk = row // chunk_rows
            begin = addresses[chunk * num_views + view]
            if begin == 0:
                return False
            _memcpy(target + np.uint64(i * size), begin + np.uint64((row - chunk * chunk_rows) * size), size)
        return True

    def _compiled(cache: bool) -> Any:
        signature = "boolean(int64[::1], int64[::1], uint64[::1], int64, int64, int64, uint8[:, ::1])"
        return numba.njit(signature, nogil=True, cache=cache)(_copy_rows)

    try:
        copy_rows = _compiled(cache=True)
    except RuntimeError:  # no folder to cache in (a read-only installation without a home): compile once per process
        copy_rows = _compiled(cache=False)

"""What must run without Python, compiled with numba where it is there: the copying of a batch, and the answer to a page that is gone.

The rows of a batch lie scattered over mapped shards, and NumPy can only index one shard at a time. The compiled loop takes the
absolute addresses of chunks and releases the GIL; it also does the index arithmetic and stops at what needs a slow look.
Signatures are explicit, so that both functions are compiled once per installation and cached.
"""

from __future__ import annotations

import mmap
import signal
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

Int64 = npt.NDArray[np.int64]

COPIED = -1
UNKNOWN = -2  # an index is out of bounds or a chunk was not yet checked
ROWS_AHEAD, LINES_AHEAD = 8, 4  # what the copy asks the processor to load before it is there
RANGES = 1 << 16  # mapped files of a process; Linux allows 65,530 by default
RANGES_SYMBOL, PREVIOUS_SYMBOL = "kdstore_mapped_ranges", "kdstore_previous_action"  # how the handler finds its tables, whatever their address

try:
    import llvmlite.binding
    import llvmlite.ir
    import numba
    from numba.core import cgutils
    from numba.core import types as _types
    from numba.extending import intrinsic
except ImportError:
    COMPILED = False
else:
    COMPILED = True
    types: Any = _types  # its types are called as functions to make signatures, which their stubs do not say

    @intrinsic
    def _memcpy(typingctx: Any, target: Any, source: Any, size: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            pointers = [builder.inttoptr(address, cgutils.voidptr_t) for address in args[:2]]
            cgutils.raw_memcpy(builder, pointers[0], pointers[1], args[2], 1)
            return context.get_dummy_value()

        return types.void(types.uint64, types.uint64, types.int64), codegen

    @intrinsic
    def _prefetch(typingctx: Any, address: Any) -> Any:
        """Start to load the cache line of an address, which need not be there."""

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            number = llvmlite.ir.IntType(32)
            declared = llvmlite.ir.FunctionType(llvmlite.ir.VoidType(), [cgutils.voidptr_t, number, number, number])
            prefetch = builder.module.declare_intrinsic("llvm.prefetch", (cgutils.voidptr_t,), declared)
            builder.call(prefetch, [builder.inttoptr(args[0], cgutils.voidptr_t), number(0), number(3), number(1)])  # for reading, to stay, of data
            return context.get_dummy_value()

        return types.void(types.uint64), codegen

    def _loads(bits: int) -> Any:
        """Make an unaligned load of an unsigned integer at an address."""

        @intrinsic
        def load(typingctx: Any, address: Any) -> Any:
            def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
                return builder.load(builder.inttoptr(args[0], llvmlite.ir.IntType(bits).as_pointer()), align=1)

            return getattr(types, f"uint{bits}")(types.uint64), codegen

        return load

    _load_32, _load_64 = _loads(32), _loads(64)

    @intrinsic
    def _acquire(typingctx: Any) -> Any:
        """Let no load that follows come before one that precedes."""

        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            builder.fence("acquire")
            return context.get_dummy_value()

        return types.void(), codegen

    def _address_of(symbol: str) -> Any:
        @intrinsic
        def address(typingctx: Any) -> Any:
            def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
                return builder.ptrtoint(context.get_c_value(builder, llvmlite.ir.IntType(64), symbol), llvmlite.ir.IntType(64))

            return types.uint64(), codegen

        return address

    _ranges, _previous = _address_of(RANGES_SYMBOL), _address_of(PREVIOUS_SYMBOL)

    @intrinsic
    def _clear(typingctx: Any, address: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            builder.store(llvmlite.ir.Constant(llvmlite.ir.IntType(64), 0), builder.inttoptr(args[0], llvmlite.ir.IntType(64).as_pointer()))
            return context.get_dummy_value()

        return types.void(types.uint64), codegen

    def _copy_rows(
        rows_B: Any, views_B: Any, addresses: Any, ends: Any, seals: Any, num_rows: Any, num_views: Any, chunk_shift: Any, shard_shift: Any, out: Any
    ) -> Any:
        sources = np.empty(len(rows_B), np.uint64)
        target, size = np.uint64(out.ctypes.data), out.shape[1]
        for i in range(len(rows_B)):
            row = rows_B[i] + num_rows if rows_B[i] < 0 else rows_B[i]
            view = views_B[i] + num_views if views_B[i] < 0 else views_B[i]
            if row < 0 or row >= num_rows or view < 0 or view >= num_views:
                return UNKNOWN
            chunk = row >> chunk_shift
            begin = addresses[chunk * num_views + view]
            if begin == 0:
                return UNKNOWN
            sources[i] = begin + np.uint64((row - (chunk << chunk_shift)) * size)
        for i in range(len(rows_B)):
            if i + ROWS_AHEAD < len(rows_B):  # the processor foresees the rest of a row, but not where the next one begins
                for line in range(LINES_AHEAD):
                    _prefetch(sources[i + ROWS_AHEAD] + np.uint64(64 * line))
            _memcpy(target + np.uint64(i * size), sources[i], size)
        _acquire()
        for i in range(len(rows_B)):  # only now: what is cut off before a row is copied is gone from the end of its file too
            shard = (rows_B[i] + num_rows if rows_B[i] < 0 else rows_B[i]) >> shard_shift
            if _load_32(ends[shard]) != seals[shard]:
                return shard
        return COPIED

    _SIGBUS, _PROT_READ = int(signal.SIGBUS), mmap.PROT_READ
    _FLAGS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x10  # MAP_FIXED, which the module does not name
    _c_mmap = types.ExternalFunction("mmap", types.uint64(types.uint64, types.uint64, types.int32, types.int32, types.int32, types.int64))
    _c_sigaction = types.ExternalFunction("sigaction", types.int32(types.int32, types.uint64, types.uint64))
    _c_raise = types.ExternalFunction("raise", types.int32(types.int32))

    def _on_sigbus(number: Any, info: Any, context: Any) -> None:
        sent = np.int32(_load_32(info + np.uint64(8))) <= 0  # si_code: by a process, not by a page
        address = _load_64(info + np.uint64(16))  # si_addr
        if not sent:
            for i in range(RANGES):
                entry = _ranges() + np.uint64(16 * i)
                start, end = _load_64(entry), _load_64(entry + np.uint64(8))
                if start != 0 and start <= address and address < end and _c_mmap(start, end - start, _PROT_READ, _FLAGS, -1, 0) == start:
                    return
        # Not ours: the action before us takes it, when the instruction is tried again; should that come back here, the default does.
        _c_sigaction(_SIGBUS, _previous(), np.uint64(0))
        _clear(_previous())
        if sent:
            _c_raise(_SIGBUS)

    def _cached(decorate: Callable[..., Any], signature: str, function: Any, **options: Any) -> Any:
        try:
            return decorate(signature, cache=True, **options)(function)
        except RuntimeError:  # no folder to cache in (a read-only installation without a home): compile once per process
            return decorate(signature, cache=False, **options)(function)

    _SIGNATURE = "int64(int64[::1], int64[::1], uint64[::1], uint64[::1], uint64[::1], int64, int64, int64, int64, uint8[:, ::1])"
    _compiled_copy = _cached(numba.njit, _SIGNATURE, _copy_rows, nogil=True)


def copy_rows(
    rows_B: Int64,
    views_B: Int64,
    addresses: npt.NDArray[np.uint64],
    ends: npt.NDArray[np.uint64],
    seals: npt.NDArray[np.uint64],
    num_rows: int,
    num_views: int,
    chunk_shift: int,
    shard_shift: int,
    out: npt.NDArray[np.uint8],
) -> int:
    """Copy row `rows_B[i]` of view `views_B[i]` into `out[i]` [B, bytes of a row], for all i.

    Returns COPIED, UNKNOWN, or the number of a shard that no longer ends as it did, whose rows must not be used.
    `addresses` [chunks] says where chunk `(row >> chunk_shift) * num_views + view` begins, 0 if it was not checked. `ends` [shards] is the
    address of the last four bytes of shard `row >> shard_shift`, and `seals` [shards] what they must be.
    """
    return int(_compiled_copy(rows_B, views_B, addresses, ends, seals, num_rows, num_views, chunk_shift, shard_shift, out))


def sigbus_handler(ranges: int, previous: int) -> int:
    """Return the address of a handler of SIGBUS (`void (int, siginfo_t *, void *)`) for Linux on 64 bits.

    `ranges` is the address of RANGES pairs of uint64 (start, end). A fault in one replaces all of it by zeros; any other goes to the
    `struct sigaction` at `previous`.
    """
    llvmlite.binding.add_symbol(RANGES_SYMBOL, ranges)
    llvmlite.binding.add_symbol(PREVIOUS_SYMBOL, previous)
    handler = _cached(numba.cfunc, "void(int32, uint64, uint64)", _on_sigbus)
    _keep.append(handler)
    return int(handler.address)


_keep: list[Any] = []  # compiled code lives as long as its object

"""Files mapped so that a cut file is an error and not the end of the process.

A mapped page that its file no longer has raises SIGBUS in the middle of a copy, and Python cannot answer there. So a compiled
handler replaces the whole mapping by zeros, and the copy goes on. That is safe because nobody trusts a copy before the last bytes
of the file, its seal, were seen again afterwards: zeros are no seal, and a mapping once replaced stays so. The same look
finds what raises no signal, the end of a page behind a cut and a file that was cut and grew again.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import signal
import sys
import weakref
from typing import Any

import numpy as np
import numpy.typing as npt

from kdstore.errors import StoreError
from kdstore.store.kernel import COMPILED, RANGES, sigbus_handler

CAN_MAP = COMPILED and sys.platform == "linux" and platform.machine() in ("x86_64", "aarch64")

_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mmap.restype = ctypes.c_size_t
_LIBC.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
_LIBC.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_LIBC.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_FAILED = ctypes.c_size_t(-1).value
_SA_SIGINFO, _SA_ONSTACK, _SA_RESTART = 4, 0x08000000, 0x10000000


class _Action(ctypes.Structure):
    """`struct sigaction` of Linux on 64 bits."""

    _fields_ = (("handler", ctypes.c_void_p), ("mask", ctypes.c_ulong * 16), ("flags", ctypes.c_int), ("restorer", ctypes.c_void_p))


_ranges = np.zeros((RANGES, 2), np.uint64)
_fresh = iter(range(RANGES))
_freed: list[int] = []
_previous = _Action()
_handler = 0
_guarded = False


def guard() -> None:
    """Put the handler in front of SIGBUS in a process that was forked since: its libraries may have put theirs there (PyTorch's workers do)."""
    if not _guarded:
        _take_sigbus()


def _take_sigbus() -> None:
    global _guarded, _handler
    if not _handler:
        _handler = sigbus_handler(_ranges.ctypes.data, ctypes.addressof(_previous))
    found = _Action()
    _LIBC.sigaction(signal.SIGBUS, None, ctypes.byref(found))
    if found.handler != _handler:
        ctypes.pointer(_previous)[0] = found
        _LIBC.sigaction(signal.SIGBUS, ctypes.byref(_Action(handler=_handler, flags=_SA_SIGINFO | _SA_ONSTACK | _SA_RESTART)), None)
    _guarded = True


def map_file(owner: Any, fd: int, size: int) -> npt.NDArray[np.uint8]:
    """Map the first `size` bytes of a file; unmapped with `owner`. Keeps no descriptor (Python's mmap keeps one, and a store may have 8,192 shards)."""
    _take_sigbus()
    slot = _freed.pop() if _freed else next(_fresh, RANGES)
    address = _LIBC.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, fd, 0) if slot < RANGES else _FAILED
    if address == _FAILED:
        _freed.extend([slot] if slot < RANGES else [])
        reason = os.strerror(ctypes.get_errno()) if slot < RANGES else f"{RANGES} are mapped"
        raise StoreError(f"Cannot map one more shard ({reason}).", "Open fewer stores at once, or raise vm.max_map_count.")
    _ranges[slot, 1] = address + -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    _ranges[slot, 0] = address  # from here on the handler sees the range
    weakref.finalize(owner, _unmap, slot, size).atexit = False
    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))


def will_need(part: npt.NDArray[np.uint8]) -> None:
    """Let the kernel begin to read the pages of a part of a mapped file, so that those of many parts come at once and not one fault after the other."""
    start = part.ctypes.data // mmap.PAGESIZE * mmap.PAGESIZE
    _LIBC.madvise(start, part.ctypes.data + len(part) - start, mmap.MADV_WILLNEED)


def _unmap(slot: int, size: int) -> None:
    address = int(_ranges[slot, 0])
    _ranges[slot, 0] = 0
    _LIBC.munmap(address, size)
    _freed.append(slot)


def _after_fork() -> None:
    global _guarded
    _guarded = False


os.register_at_fork(after_in_child=_after_fork)

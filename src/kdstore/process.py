"""What a process that trains or encodes asks of the system before it begins."""

from __future__ import annotations

import contextlib
import ctypes


def keep_freed_memory() -> None:
    """Let glibc keep what large tensors free: they come back every step, and fresh pages made a small student's step 1.4 times as long."""
    mmap_threshold, trim_threshold = -3, -1  # M_MMAP_THRESHOLD and M_TRIM_THRESHOLD of malloc.h
    with contextlib.suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL(None)
        libc.mallopt(mmap_threshold, 1 << 30)
        libc.mallopt(trim_threshold, (1 << 31) - 1)

"""The C library's allocator, told to keep what a step has freed for the next one."""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # malloc.h
_MIB = 1 << 20


def keep_freed_memory() -> bool:
    """Have glibc reuse freed blocks of up to 32 MiB (its own limit) and give none back. Whether it could be told.

    By default each large activation is new memory from the kernel, zeroed page by page and given back when freed: on a
    CPU that was a fifth of the laptop run's step. Peak memory stays what it was, memory between peaks is not returned.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = ((_MMAP_THRESHOLD, 32 * _MIB), (_TRIM_THRESHOLD, 2048 * _MIB - 1), (_TOP_PAD, 64 * _MIB))
    told = [mallopt(name, value) == 1 for name, value in settings]
    return all(told)

"""Keeps freed host memory for reuse, as CUDA's caching allocator keeps the device's.

By default glibc gives the top of its heap back to the system as soon as it is free, and takes large blocks from the
system one by one. Whether a training step has to page its buffers in anew, every time, then depends on where in the
heap they happen to lie, which differs from model to model. With this, all rows and the calibrator are timed on memory
they already have. `lmd-bench profile --no-keep-memory` measures the difference (reports/README.md has one such run).
"""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
_LARGEST_MMAP_THRESHOLD = 32 * 2**20  # glibc refuses more
_TOP_PAD = 64 * 2**20
_NEVER = 2**31 - 1


def keep_freed_memory() -> str:
    """Switch it on for this process, where it runs on glibc. Returns what is so now, for the record."""
    glibc = _glibc()
    if glibc is None:
        return "the system's default"
    settings = (_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD), (_M_TRIM_THRESHOLD, _NEVER), (_M_TOP_PAD, _TOP_PAD)
    done = [glibc.mallopt(name, value) for name, value in settings]
    return "glibc, keeping freed memory" if all(done) else "glibc's default"


def give_back_freed_memory() -> None:
    """Return what is free to the system, so that one row's peak does not count for the next."""
    glibc = _glibc()
    if glibc is not None:
        glibc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    if not sys.platform.startswith("linux"):
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "mallopt") and hasattr(library, "malloc_trim") else None

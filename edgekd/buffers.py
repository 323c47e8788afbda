"""Large buffers, kept by the C library from one step to the next."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["buffers_kept"]

# Of malloc.h: https://www.gnu.org/software/libc/manual/html_node/Malloc-Tunable-Parameters.html
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
_KEPT = {_MMAP_MAX: 0, _TRIM_THRESHOLD: 2**31 - 1}
# What they come to by themselves in a process that has large buffers, and stay at.
_USUAL = {_MMAP_MAX: 65_536, _MMAP_THRESHOLD: 32 << 20, _TRIM_THRESHOLD: 64 << 20}


@contextmanager
def buffers_kept() -> Iterator[None]:
    """Have glibc keep the memory that is freed within, for the buffers of the next step.

    By default it maps a buffer of 32 MB or more anew and unmaps it afterwards, and the kernel clears each page of it
    every time: a third of a training step on a CPU (a language model of 15 M parameters, convolutions on images of
    128 × 128), a fifth where buffers are smaller, and of what a teacher takes. Kept, they need more memory at the peak:
    1 to 25 % more in most cases, half as much again for a language model with buffers of 200 MB. All goes back to the
    system at the end. Other C libraries are left as they are.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if libc is None or not hasattr(libc, "gnu_get_libc_version"):
        yield
        return
    for parameter, value in _KEPT.items():
        libc.mallopt(parameter, value)
    try:
        yield
    finally:
        for parameter, value in _USUAL.items():
            libc.mallopt(parameter, value)
        libc.malloc_trim(0)

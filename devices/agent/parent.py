"""A process that ends when the one that started it does, however that ends: nobody would read its result."""

from __future__ import annotations

import os
import signal
import sys

__all__ = ["die_with_parent", "told_parent"]

NAME = "EDGEKD_PARENT"


def told_parent() -> dict[str, str]:
    """The environment of a process that this one starts: it tells who its parent is."""
    return {**os.environ, NAME: str(os.getpid())}


def die_with_parent() -> None:
    """Linux: be killed when the parent ends, also when that was before this was called.

    The kernel sends no signal for a parent that is gone already (man 2 PR_SET_PDEATHSIG), and on a busy machine a
    process takes seconds to come here. One that was told no parent (a board's agent) is ended by others.
    """
    if sys.platform != "linux":
        return
    import ctypes

    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # 1 is PR_SET_PDEATHSIG
    if os.getppid() != int(os.environ.get(NAME, os.getppid())):
        os.kill(os.getpid(), signal.SIGKILL)

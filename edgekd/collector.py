"""Python's garbage collector, paused where a toolchain builds graphs."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["collector_paused"]


@contextmanager
def collector_paused() -> Iterator[None]:
    """Look for no cycles of dead objects within.

    A converter makes a million small objects, nearly all of which live until it is done, and each full collection walks
    through those of every toolchain besides: a sixth of an export of MiniLM to ONNX or Core ML, and of a trace of
    MobileNetV2. Peak memory is the same without.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()

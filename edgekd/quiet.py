"""Toolchains talk of themselves: that a release is untested, that a kernel for another processor is missing.

None of it is the user's to mend, and it would drown the one line that is. Errors are exceptions and pass through.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["quiet"]


@contextmanager
def quiet(level: int = logging.WARNING) -> Iterator[None]:
    """Keep Python's warnings, and log records up to ``level``, to themselves."""
    root = logging.getLogger()
    silent, disabled = logging.NullHandler(), root.manager.disable
    # Without any handler, logging.warning() would install one for good and so change the caller's logging.
    root.addHandler(silent)
    logging.disable(level)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        root.removeHandler(silent)

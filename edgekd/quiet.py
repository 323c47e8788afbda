"""Toolchains talk of themselves: that a release is untested, that a kernel for another processor is missing.

It would drown the one line that is the user's to mend, so none of it reaches the terminal. What is said while a file is
written is collected for its manifest. Errors are exceptions and pass through.
"""

from __future__ import annotations

import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

__all__ = ["collected", "quiet", "quiet_native"]

_LONGEST = 300  # characters of a complaint that are kept

_listener: ContextVar[list[str] | None] = ContextVar("listener", default=None)


@contextmanager
def collected() -> Iterator[list[str]]:
    """The complaints of every :func:`quiet` inside, one line each, each once, in the order of their first time."""
    complaints: list[str] = []
    token = _listener.set(complaints)
    try:
        yield complaints
    finally:
        _listener.reset(token)


@contextmanager
def quiet() -> Iterator[list[str]]:
    """Keep Python's warnings and all log records off the terminal; yields what was said at ``WARNING`` or above."""
    said: list[str] = []

    def keep(_: logging.Logger, record: logging.LogRecord) -> None:
        if record.levelno >= logging.WARNING:
            said.append(record.getMessage())

    def show(message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
        said.append(f"{category.__name__}: {message}")

    # A handler would not do: libraries have handlers of their own, and loggers that do not propagate.
    handled = logging.Logger.callHandlers
    logging.Logger.callHandlers = keep  # type: ignore[assignment, method-assign]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = show
            yield said
    finally:
        logging.Logger.callHandlers = handled  # type: ignore[method-assign]
        listener = _listener.get()
        if listener is not None:
            lines = (" ".join(text.split())[:_LONGEST] for text in said)
            listener += [line for line in dict.fromkeys(lines) if line and line not in listener]


@contextmanager
def quiet_native() -> Iterator[Callable[[], str]]:
    """Keep what is written to the file descriptors 1 and 2, by C++ code too; yields a function that returns it."""
    sys.stdout.flush()
    sys.stderr.flush()
    with tempfile.TemporaryFile() as caught:
        saved = os.dup(1), os.dup(2)
        try:
            os.dup2(caught.fileno(), 1)
            os.dup2(caught.fileno(), 2)

            def said() -> str:
                caught.seek(0)
                return caught.read().decode(errors="replace")

            yield said
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for number, copy in enumerate(saved, 1):
                os.dup2(copy, number)
                os.close(copy)

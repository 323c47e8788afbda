"""The command line run in this process, where the process is not what is tested: it has imported torch already."""

import contextlib
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from edgekd.cli.app import main


def edgekd(*words: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """``edgekd words`` in a folder: how it ends, and all that reaches the two streams, from C++ code too."""
    with (
        mock.patch.object(sys, "argv", ["edgekd", *words]),
        mock.patch.object(sys.modules["__main__"], "__package__", None),  # else help calls the program pytest
        mock.patch.dict(os.environ, environment),
        contextlib.chdir(cwd),
        _caught() as caught,
    ):
        try:
            main()
            code = 0
        except SystemExit as ended:
            code = int(ended.code or 0)
        out, err = caught()
    return subprocess.CompletedProcess(words, code, out, err)


def in_a_process(*words: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """The same, as users have it."""
    command = [sys.executable, "-m", "edgekd.cli.app", *words]
    return subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, env={**os.environ, **environment}, timeout=300
    )


def _show(message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: Any, **__: Any) -> None:
    sys.stderr.write(warnings.formatwarning(message, category, filename, lineno))


@contextlib.contextmanager
def _caught() -> Iterator[Callable[[], list[str]]]:
    """What goes to the file descriptors 1 and 2; with the warnings that Python shows, which pytest else keeps."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err, warnings.catch_warnings():
        warnings.simplefilter("default")
        for hidden in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
            warnings.simplefilter("ignore", hidden)
        warnings.showwarning = _show
        sys.stdout.flush()
        sys.stderr.flush()
        saved = os.dup(1), os.dup(2)
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        try:
            with (
                open(1, "w", encoding="utf-8", closefd=False) as stdout,
                open(2, "w", encoding="utf-8", closefd=False) as stderr,
                contextlib.redirect_stdout(stdout),
                contextlib.redirect_stderr(stderr),
            ):

                def caught() -> list[str]:
                    stdout.flush()
                    stderr.flush()
                    found = []
                    for file in (out, err):
                        file.seek(0)
                        found.append(file.read().decode())
                    return found

                yield caught
        finally:
            for number, copy in enumerate(saved, 1):
                os.dup2(copy, number)
                os.close(copy)

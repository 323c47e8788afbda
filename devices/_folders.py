"""Folders of one sitting, here and on devices: named after the process that owns them, so that none is left for good.

Whoever ends well, badly or by Ctrl-C removes its own. One that was killed cannot; this machine's next sitting does.
"""

from __future__ import annotations

import contextlib
import hashlib
import platform
import re
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import psutil

__all__ = ["made", "new_name", "own_folder", "remove", "stale"]

NAME = re.compile(r"-([0-9a-f]{8})\.(\d+)\.[0-9a-f]{8}$")


def new_name(prefix: str) -> str:
    """A name that tells its owner: ``edgekd-host-3f2a91c4.12345.9b1e77d0``, of machine, process and chance."""
    return f"{prefix}-{_machine()}.{psutil.Process().pid}.{secrets.token_hex(4)}"


def stale(names: Iterable[str], prefix: str) -> list[str]:
    """Those whose owner was a process of this machine that no longer runs.

    Of processes of another machine, or of another container, nothing is known: theirs are left alone.
    """
    found = []
    for name in names:
        told = NAME.search(name)
        if told and name[: told.start()] == prefix and told[1] == _machine() and not _runs(int(told[2])):
            found.append(name)
    return found


def remove(folder: Path) -> None:
    """All that is in it, and itself; no error when it is gone."""
    shutil.rmtree(folder, ignore_errors=True)


def made(prefix: str, base: Path | None = None, remove: Callable[[Path], object] = remove) -> Path:
    """A new folder, by default among the temporary files; those that killed processes left there are removed.

    Args:
        remove: How.
    """
    base = base or Path(tempfile.gettempdir())
    for name in stale((path.name for path in base.glob(f"{prefix}-*")), prefix):
        remove(base / name)
    folder = base / new_name(prefix)
    folder.mkdir(mode=0o700)
    return folder


@contextlib.contextmanager
def own_folder(prefix: str) -> Iterator[Path]:
    """A folder as by ``made`` that is removed when the work in it has ended, however it does."""
    folder = made(prefix)
    try:
        yield folder
    finally:
        remove(folder)


def _runs(number: int) -> bool:
    """Whether a process runs; one that ended and was not asked for its exit code does not."""
    try:
        return bool(psutil.Process(number).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return True


def _machine() -> str:
    """This machine; in a container that container, where the same numbers mean other processes."""
    space = ""
    with contextlib.suppress(OSError):
        space = str(Path("/proc/self/ns/pid").readlink())
    return hashlib.sha256(f"{platform.node()} {space}".encode()).hexdigest()[:8]

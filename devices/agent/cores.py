"""Which processors a process runs on."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from pathlib import Path

from .errors import AgentError

PROCESSORS = Path("/sys/devices/system/cpu")


def pin_cores(cores: Sequence[int]) -> None:
    """Keep this process, and those that it starts, on these processors; where none are named, where it was.

    Raises:
        AgentError: There are no such processors, or this system cannot.
    """
    if not cores:
        return
    if not hasattr(os, "sched_setaffinity"):
        raise AgentError(f"cores {list(cores)} were asked for; only Linux keeps a process on cores")
    try:
        os.sched_setaffinity(0, cores)
    except OSError as error:
        there = sorted(os.sched_getaffinity(0))
        raise AgentError(f"cores {list(cores)} were asked for; this process may use {there} ({error})") from None


def pinned_cores() -> str:
    """The processors of this process, if they are not all that the machine has; else empty."""
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set[int]()
    return ",".join(map(str, sorted(cores))) if len(cores) < (os.cpu_count() or 0) else ""


def draw_cores(count: int, drawn: random.Random, folder: Path = PROCESSORS) -> list[int]:
    """So many of the fastest processors that this process may use.

    Returns:
        None at all where there are not so many, or where a process cannot be kept on them.
    """
    if not hasattr(os, "sched_getaffinity"):
        return []
    speeds = {core: _speed(folder / f"cpu{core}") for core in sorted(os.sched_getaffinity(0))}
    fastest = [core for core, speed in speeds.items() if speed == max(speeds.values())]
    return drawn.sample(fastest, count) if count <= len(fastest) else []


def _speed(folder: Path) -> int:
    """Relative capacity (big and little cores of Arm), else the highest clock in kHz; 0 where neither is told."""
    for name in ("cpu_capacity", "cpufreq/cpuinfo_max_freq"):
        try:
            return int((folder / name).read_text())
        except (OSError, ValueError):
            continue
    return 0

"""What the tests of devices share: waiting, something that happens during a run, a cable to another network."""

import contextlib
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from edgekd.errors import DeviceError
from edgekd.measurement import Plan
from edgekd.protocols import Device
from edgekd.types import Artifact

ENDLESS = Plan(blocks=1, warmup_runs=3, warmup_s=0.0, min_runs=10, min_s=60.0, max_s=60.0)


def wait_for(condition: Callable[[], object], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


def name_of_a_killed_ones(prefix: str) -> str:
    """The name of a folder that a process which no longer runs would have made."""
    told = f"from edgekd.devices._folders import new_name; print(new_name({prefix!r}))"
    return subprocess.run([sys.executable, "-c", told], capture_output=True, text=True, check=True).stdout.strip()


def said_during_a_run(
    device: Device,
    file: tuple[Artifact, Path],
    images: np.ndarray,
    measuring: Callable[[], object],
    happens: Callable[[], object],
) -> str:
    """What is said when something happens while the device measures; the device is closed afterwards."""

    def meanwhile() -> None:
        wait_for(measuring)
        time.sleep(1.0)
        happens()

    thread = threading.Thread(target=meanwhile)
    thread.start()
    try:
        with contextlib.closing(device), pytest.raises(DeviceError) as caught:
            device.run(*file, {file[0].inputs[0].name: images}, ENDLESS)
    finally:
        thread.join()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def lay_cable(network: str, addresses: str) -> str:
    """A cable from this machine to a network of its own, which needs root.

    Args:
        network: Path of its namespace.
        addresses: First three numbers: this machine is at ``.1``, the other end at ``.2``.

    Returns:
        Name of the interface here.
    """
    ip = shutil.which("ip", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin") or "ip"
    near, far = (f"ek{os.getpid() % 10000}{addresses.rpartition('.')[2]}{end}" for end in "ab")
    for line in (
        f"{ip} link add {near} type veth peer name {far} netns {network}",
        f"{ip} addr add {addresses}.1/30 dev {near}",
        f"{ip} link set {near} up",
        f"nsenter --net={network} {ip} addr add {addresses}.2/30 dev {far}",
        f"nsenter --net={network} {ip} link set {far} up",
    ):
        subprocess.run(line.split(), check=True)
    return near

"""What the tests of devices share: waiting, what happens during a run and outside it, a cable to another network."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import pytest

from edgekd.devices.agent.block import TURN_RUNS, TURN_S
from edgekd.errors import DeviceError
from edgekd.measurement import Block, Plan
from edgekd.protocols import Device
from edgekd.types import Artifact

ENDLESS = Plan(blocks=1, warmup_runs=3, warmup_s=0.0, min_runs=10, min_s=60.0, max_s=60.0)


MEASURE = """
import contextlib, json, signal, sys
from pathlib import Path
import numpy as np
from edgekd.measurement import Plan
from edgekd.profiles import load_device
from edgekd.types import Artifact
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it otherwise
device, artifact, folder = sys.argv[1:]
artifact = Artifact.from_json(json.loads(artifact))
inputs = {artifact.inputs[0].name: np.zeros((1, 1, 12, 12), "float32")}
plan = Plan(blocks=1, warmup_runs=1, warmup_s=0.0, min_s=60.0, max_s=60.0)
with contextlib.closing(load_device(device)) as device:
    device.run(artifact, Path(folder), inputs, plan)
"""


def wait_for(condition: Callable[[], object], seconds: float = 240.0) -> None:
    """By default as long as it may take a busy machine to start a process or two."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


def still_runs(process: psutil.Process) -> bool:
    """Whether it does; one that ended and was not asked for its exit code does not."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:  # between the two questions
        return False


def running_below(words: str) -> list[psutil.Process]:
    """Processes that this one, or one of its, has started, with these words in their command line."""
    found = []
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if words in " ".join(child.cmdline()) and still_runs(child):
                found.append(child)
    return found


def running_in(folder: Path) -> list[psutil.Process]:
    """Processes of anybody that work in it, in a folder below, or in one whose name goes on after its name."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.cwd().startswith(str(folder)) and still_runs(process):
                found.append(process)
    return found


@dataclass(frozen=True)
class Measuring:
    """A process that measures a file on a device for a minute."""

    process: subprocess.Popen[bytes]
    words: Path

    def wait_for(self, condition: Callable[[], object]) -> None:
        """Until something happens, while it measures."""

        def happened() -> object:
            assert self.process.poll() is None, f"it measures no longer: {self.words.read_text()[-2000:]}"
            return condition()

        wait_for(happened)

    def end(self, how: signal.Signals) -> None:
        self.process.send_signal(how)
        assert self.process.wait(60) != 0


@contextlib.contextmanager
def measuring_elsewhere(
    device: str, file: tuple[Artifact, Path], folder: Path, environment: Mapping[str, str] | None = None
) -> Iterator[Measuring]:
    """In a process of its own, which a test ends.

    Args:
        device: Its name, or the path of its TOML.
        folder: Where it may write its last words.
        environment: Variables beside those of this process.
    """
    artifact, files = file
    command = [sys.executable, "-c", MEASURE, device, json.dumps(artifact.to_json()), str(files)]
    words = folder / "words.txt"
    with words.open("wb") as stderr:
        process = subprocess.Popen(command, stderr=stderr, env={**os.environ, **(environment or {})})
    try:
        yield Measuring(process, words)
    finally:
        process.kill()
        process.wait(60)


@contextlib.contextmanager
def meanwhile(happens: Callable[[], object]) -> Iterator[None]:
    """It happens while the block runs; what goes wrong with it is raised after the block."""
    pool = ThreadPoolExecutor(1)
    happening = pool.submit(happens)
    try:
        yield
    finally:
        pool.shutdown(wait=False)
    happening.result(90)


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

    def then() -> None:
        wait_for(measuring)
        time.sleep(1.0)
        happens()

    with meanwhile(then), contextlib.closing(device), pytest.raises(DeviceError) as caught:
        device.run(*file, {file[0].inputs[0].name: images}, ENDLESS)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def check_turns(blocks: Sequence[Block], plan: Plan) -> int:
    """All had the same number of turns: as many as their samples tell, and none after all had enough.

    A busy machine makes few turns of the same plan. The rule (docs/decisions/0007-turns.md) leaves no choice, though:
    from the samples follows where each turn ended, and from their sums after which round nobody needed more.

    Returns:
        How many there were.
    """
    taken, needed = set(), []
    for block in blocks:
        group = int(block.conditions["inferences_per_sample"])
        spent_ms, ends = 0.0, [(0, 0.0)]  # samples, and their time, up to the end of each turn
        for count, latency_ms in enumerate(block.latency_ms, 1):
            spent_ms += latency_ms * group
            if count - ends[-1][0] >= TURN_RUNS and spent_ms - ends[-1][1] >= TURN_S * 1e3:
                ends.append((count, spent_ms))
        assert ends[-1][0] == len(block.latency_ms), "the last turn was whole"
        taken |= {len(ends) - 1, int(block.conditions["turns"])}
        is_enough = [
            (count >= plan.min_runs and spent >= plan.min_s * 1e3) or spent >= plan.max_s * 1e3 for count, spent in ends
        ]
        needed.append(is_enough.index(True))
    assert taken == {max(needed)}
    return max(needed)


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

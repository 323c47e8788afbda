"""This machine: every block is a fresh process of the one-file agent."""

from __future__ import annotations

import dataclasses
import json
import signal
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import numpy as np

from edgekd.errors import DeviceError, StorageError, UsageError
from edgekd.plugins import missing
from edgekd.protocols import Arrays
from edgekd.types import Artifact, Block, DeviceStatus, Plan

from . import agent

__all__ = ["DEVICE", "HostDevice"]

TAIL_LINES = 3  # of the stderr of a process that could not end with a line of its own


@dataclass(frozen=True)
class HostDevice:
    """Fulfils ``edgekd.protocols.Device``.

    Attributes:
        python: Interpreter of the blocks; its environment must have the runtime.
        timeout_s: For one process; None takes the limits of host.toml.
        session_config: Entries for every session of ONNX Runtime.
    """

    python: str = sys.executable
    timeout_s: float | None = None
    session_config: Mapping[str, str] = field(default_factory=lambda: dict(agent.SESSION_CONFIG))

    def probe(self) -> DeviceStatus:
        """Look for the runtimes without starting any."""
        facts = _facts()
        not_run = dict(facts["not_run"])
        if sys.platform == "darwin":
            not_run["coreml"] = "the host device has no Core ML runner yet; measure the package in Xcode"
        targets = []
        for target, runtime in facts["runtimes"].items():
            if missing((runtime["module"],)):
                not_run[target] = f"{runtime['module']} is not installed; pip install 'edgekd[{runtime['extra']}]'"
            else:
                targets.append(target)
        described = {key: value for key, value in agent.describe_machine().items() if value}
        return DeviceStatus(reachable=True, facts=described, targets=tuple(targets), not_run=not_run)

    def run(
        self, artifact: Artifact, folder: Path, inputs: Arrays, plan: Plan
    ) -> tuple[tuple[Block, ...], dict[str, np.ndarray]]:
        """See ``edgekd.protocols.Device``; the process of the last block computes the outputs, after its timing.

        Raises:
            DeviceError: A process failed, was killed, or took too long; with its last words.
            StorageError: The folder for temporary files is full.
            UsageError: This machine does not run the target, or the plan has no block.
        """
        if artifact.target not in agent.RUNTIMES:
            raise UsageError(f"host runs {', '.join(agent.RUNTIMES)}; not {artifact.target!r}")
        if plan.blocks < 1 or plan.threads < 1 or plan.min_runs < 1:
            raise UsageError(f"a plan needs at least 1 block, thread and run; this one has {plan}")
        names = [spec.name for spec in artifact.inputs]
        lacking = [name for name in names if name not in inputs]
        if lacking:
            raise UsageError(f"{artifact.path} takes input {lacking[0]!r}; given are {', '.join(inputs) or 'none'}")
        try:
            return self._run(artifact, folder, {name: inputs[name] for name in names}, plan)
        except OSError as error:
            raise StorageError(f"cannot measure in {tempfile.gettempdir()}: {error.strerror or error}") from error

    def _run(
        self, artifact: Artifact, folder: Path, inputs: Arrays, plan: Plan
    ) -> tuple[tuple[Block, ...], dict[str, np.ndarray]]:
        with tempfile.TemporaryDirectory(prefix="edgekd-host-") as temporary, _agent_file() as script:
            work = Path(temporary)
            names = list(inputs)
            batch = max(1, artifact.inputs[0].shape[0])
            np.savez(work / "sample.npz", allow_pickle=False, **{name: inputs[name][:batch] for name in names})
            np.savez(work / "inputs.npz", allow_pickle=False, **inputs)
            job: dict[str, Any] = {
                "target": artifact.target,
                "model": str((folder / artifact.path).resolve()),
                "input_names": names,
                "output_names": [spec.name for spec in artifact.outputs],
                "sample": "sample.npz",
                "inputs": None,
                "outputs": None,
                "result": "block.json",
                "session_config": dict(self.session_config),
                "plan": dataclasses.asdict(plan),
            }
            blocks = []
            for index in range(plan.blocks):
                samples = 0
                if index == plan.blocks - 1:
                    job |= {"inputs": "inputs.npz", "outputs": "outputs.npz"}
                    samples = len(inputs[names[0]])
                blocks.append(self._block(script, work, job, artifact, samples))
            with np.load(work / "outputs.npz", allow_pickle=False) as outputs:
                return tuple(blocks), {name: outputs[name] for name in outputs.files}

    def _block(self, script: Path, work: Path, job: dict[str, Any], artifact: Artifact, samples: int) -> Block:
        """One process, from its start to its end; it never outlives this call."""
        result = work / job["result"]
        result.unlink(missing_ok=True)
        (work / "job.json").write_text(json.dumps(job), encoding="utf-8")
        plan, limits = job["plan"], _facts()["limits"]
        timeout_s = self.timeout_s or (
            limits["start_s"] + (plan["warmup_s"] + agent.SETTLING_S + plan["max_s"]) * 2 + samples * limits["sample_s"]
        )
        what = f"{artifact.path} ({artifact.target} {artifact.precision}) on host"
        with (work / "stderr.txt").open("w+b") as stderr:
            # -P keeps the script's folder off the path: files beside the agent must not shadow anyone's modules.
            process = subprocess.Popen(
                [self.python, "-P", str(script), "job.json"],
                cwd=work,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
            )
            try:
                code = process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                raise DeviceError(f"{what}: no result after {timeout_s:.0f} s; the process was stopped") from None
            finally:
                process.kill()  # nothing, when it has ended
                process.wait()
            if code != 0:
                raise DeviceError(f"{what}: {_last_words(code, work / 'stderr.txt')}")
        return Block.from_json(json.loads(result.read_text(encoding="utf-8")))


def _agent_file() -> Any:
    return as_file(files("edgekd.devices") / "agent.py")


def _facts() -> dict[str, Any]:
    return tomllib.loads((files("edgekd.devices") / "host.toml").read_text(encoding="utf-8"))


def _last_words(code: int, stderr: Path) -> str:
    """Why a process ended, on one line: the agent's own line, or the signal and the end of what it printed."""
    text = stderr.read_text(encoding="utf-8", errors="replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if code > 0:
        return lines[-1] if lines else f"the measuring process ended with exit code {code} and said nothing"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    hint = ", perhaps for lack of memory" if -code == signal.SIGKILL else ""
    return f"the measuring process was ended by {name}{hint}; {' | '.join(lines[-TAIL_LINES:]) or 'it said nothing'}"


DEVICE = HostDevice()

"""This machine: every block is a fresh process of the one-file agent."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from edgekd.errors import DeviceError, StorageError
from edgekd.plugins import missing
from edgekd.protocols import Arrays, Settings
from edgekd.types import Artifact, Block, DeviceStatus, Plan, Profile

from . import agent
from ._agents import NOT_RUN, RUNTIMES, agent_file, checked_inputs, last_words, limit_s, make_job, write_inputs

__all__ = ["DEVICE", "HostDevice"]


class HostSettings(Settings):
    cores: tuple[int, ...] = Field((), description="Processors to run on; all when empty.")


@dataclass(frozen=True)
class HostDevice:
    """Fulfils ``edgekd.protocols.Device``.

    Attributes:
        python: Interpreter of the blocks; its environment must have the runtime.
        timeout_s: For one process; None takes ``_agents.limit_s``.
        session_config: Entries for every session of ONNX Runtime.
        cores: Processors to run on; all when empty.
    """

    python: str = sys.executable
    timeout_s: float | None = None
    session_config: Mapping[str, str] = field(default_factory=lambda: dict(agent.SESSION_CONFIG))
    cores: tuple[int, ...] = ()

    def probe(self) -> DeviceStatus:
        """Look for the runtimes without starting any."""
        not_run = dict(NOT_RUN)
        if sys.platform == "darwin":
            not_run["coreml"] = "the host device runs no Core ML; use device mac"
        targets = []
        for target, packages in RUNTIMES.items():
            if missing((packages.module,)):
                not_run[target] = f"{packages.module} is not installed; pip install 'edgekd[{packages.extra}]'"
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
        inputs = checked_inputs("host", artifact, inputs, plan, tuple(RUNTIMES))
        try:
            return self._run(artifact, folder, inputs, plan)
        except OSError as error:
            raise StorageError(f"cannot measure in {tempfile.gettempdir()}: {error.strerror or error}") from error

    def close(self) -> None:
        """Nothing is left between runs."""

    def _run(
        self, artifact: Artifact, folder: Path, inputs: Arrays, plan: Plan
    ) -> tuple[tuple[Block, ...], dict[str, np.ndarray]]:
        with tempfile.TemporaryDirectory(prefix="edgekd-host-") as temporary, agent_file() as script:
            work = Path(temporary)
            write_inputs(work, artifact, inputs)
            job = make_job(artifact, str((folder / artifact.path).resolve()), plan, self.session_config)
            job["cores"] = list(self.cores)
            blocks = []
            for index in range(plan.blocks):
                samples = 0
                if index == plan.blocks - 1:
                    job |= {"inputs": "inputs.npz", "outputs": "outputs.npz"}
                    samples = len(next(iter(inputs.values())))
                timeout_s = self.timeout_s or limit_s(plan, samples)
                blocks.append(self._block(script, work, job, artifact, timeout_s))
            with np.load(work / "outputs.npz", allow_pickle=False) as outputs:
                return tuple(blocks), {name: outputs[name] for name in outputs.files}

    def _block(self, script: Path, work: Path, job: dict[str, Any], artifact: Artifact, timeout_s: float) -> Block:
        """One process, from its start to its end; it never outlives this call."""
        result = work / job["result"]
        result.unlink(missing_ok=True)
        (work / "job.json").write_text(json.dumps(job), encoding="utf-8")
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
                said = (work / "stderr.txt").read_text(encoding="utf-8", errors="replace")
                raise DeviceError(f"{what}: {last_words(code, said)}")
        return Block.from_json(json.loads(result.read_text(encoding="utf-8")))


class _Host:
    settings = HostSettings

    def __call__(self, profile: Profile, settings: HostSettings) -> HostDevice:
        return HostDevice(cores=settings.cores)


DEVICE = _Host()

"""This machine: every block is a fresh process of the agent."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from edgekd.errors import DeviceError, StorageError
from edgekd.measurement import Block, DeviceStatus, Plan, Profile
from edgekd.plugins import missing
from edgekd.protocols import Arrays, Settings, Side
from edgekd.types import Artifact

from ._agents import (
    AGENT,
    NOT_RUN,
    RUNTIMES,
    WITH_OUTPUTS,
    both,
    checked_inputs,
    in_turns,
    jobs_of,
    last_words,
    limit_s,
    make_job,
    packed_agent,
    samples_in,
    write_inputs,
)
from ._folders import own_folder
from .agent.machine import describe_machine
from .agent.parent import told_parent
from .agent.runtimes import DECODERS

__all__ = ["DEVICE", "HostDevice"]


class HostSettings(Settings):
    cores: tuple[int, ...] = Field((), description="Processors to run on; all when empty.")


@dataclass(frozen=True)
class HostDevice:
    """Fulfils ``edgekd.protocols.Device`` and ``TakingTurns``.

    Attributes:
        python: Interpreter of the blocks; its environment must have the runtime.
        timeout_s: For one process; None takes ``_agents.limit_s``.
        session_config: Entries for every session of ONNX Runtime; None takes those that suit this processor.
        cores: Processors to run on; all when empty.
        name: For the messages.
        targets: That it is asked to run.
        more: Of the agent's job, for these targets.
    """

    python: str = sys.executable
    timeout_s: float | None = None
    session_config: Mapping[str, str] | None = None
    cores: tuple[int, ...] = ()
    name: str = "host"
    targets: tuple[str, ...] = tuple(RUNTIMES)
    more: Mapping[str, Any] = field(default_factory=dict)

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
        return DeviceStatus(
            reachable=True,
            facts=describe_machine(),
            targets=tuple(targets),
            not_run=not_run,
            decodes=tuple(target for target in targets if target in DECODERS),
        )

    def run(
        self, artifact: Artifact, folder: Path, inputs: Arrays, plan: Plan
    ) -> tuple[tuple[Block, ...], dict[str, np.ndarray]]:
        """See ``edgekd.protocols.Device``; the process of the last block computes the outputs, after its timing.

        Raises:
            DeviceError: A process failed, was killed, or took too long; with its last words.
            StorageError: The folder for temporary files is full.
            UsageError: This machine does not run the target, or the plan has no block.
        """
        inputs = checked_inputs(self.name, artifact, inputs, plan, self.targets)
        try:
            return self._run(artifact, folder, inputs, plan)
        except OSError as error:
            raise StorageError(f"cannot measure in {tempfile.gettempdir()}: {error.strerror or error}") from error

    def close(self) -> None:
        """Nothing is left between runs."""

    def run_in_turns(
        self, sides: Sequence[Side], plan: Plan, seed: int
    ) -> tuple[tuple[Block, dict[str, np.ndarray]], ...]:
        """See ``edgekd.protocols.TakingTurns``; errors as in ``run``."""
        given = [checked_inputs(self.name, side.artifact, side.inputs, plan, self.targets) for side in sides]
        try:
            with own_folder("edgekd-host") as work:
                folders = [work / str(index) for index in range(len(sides))]
                samples = 0
                for side, inputs, folder in zip(sides, given, folders, strict=True):
                    folder.mkdir()
                    write_inputs(folder, side.artifact, inputs)
                    job = self._job(side.artifact, side.folder, plan) | WITH_OUTPUTS
                    (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
                    samples += samples_in(inputs)
                jobs = [str(folder / "job.json") for folder in folders]
                timeout_s = self.timeout_s or len(sides) * limit_s(plan, samples)
                self._process(in_turns(jobs, plan, seed), work, f"{both(sides)} on {self.name}", timeout_s)
                return tuple((_read_block(folder / job["result"]), _read_outputs(folder)) for folder in folders)
        except OSError as error:
            raise StorageError(f"cannot measure in {tempfile.gettempdir()}: {error.strerror or error}") from error

    def _job(self, artifact: Artifact, folder: Path, plan: Plan) -> dict[str, Any]:
        job = make_job(artifact, str((folder / artifact.path).resolve()), plan, self.session_config)
        return job | {"cores": list(self.cores), **self.more}

    def _run(
        self, artifact: Artifact, folder: Path, inputs: Arrays, plan: Plan
    ) -> tuple[tuple[Block, ...], dict[str, np.ndarray]]:
        with own_folder("edgekd-host") as work:
            write_inputs(work, artifact, inputs)
            job = self._job(artifact, folder, plan)
            what = f"{artifact.path} ({artifact.target} {artifact.precision}) on {self.name}"
            blocks = []
            result = work / job["result"]
            for asked, timeout_s in jobs_of(job, plan, inputs):
                result.unlink(missing_ok=True)
                (work / "job.json").write_text(json.dumps(asked), encoding="utf-8")
                self._process(["job.json"], work, what, self.timeout_s or timeout_s)
                blocks.append(_read_block(result))
            return tuple(blocks), _read_outputs(work)

    def _process(self, arguments: Sequence[str], work: Path, what: str, timeout_s: float) -> None:
        """One process of the agent, from its start to its end; it never outlives this call."""
        (work / AGENT).write_bytes(packed_agent())
        with (work / "stderr.txt").open("w+b") as stderr:
            process = subprocess.Popen(
                [self.python, AGENT, *arguments],
                cwd=work,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                env={**told_parent(), "TMPDIR": str(work)},  # what a runtime leaves there goes with the folder
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


def _read_block(path: Path) -> Block:
    return Block.from_json(json.loads(path.read_text(encoding="utf-8")))


def _read_outputs(folder: Path) -> dict[str, np.ndarray]:
    with np.load(folder / WITH_OUTPUTS["outputs"], allow_pickle=False) as outputs:
        return {name: outputs[name] for name in outputs.files}


class _Host:
    settings = HostSettings

    def __call__(self, profile: Profile, settings: HostSettings) -> HostDevice:
        return HostDevice(cores=settings.cores)


DEVICE = _Host()

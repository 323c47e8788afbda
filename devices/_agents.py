"""What host and ssh share: the agent's job, how long to wait for it, and why it ended."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import signal
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from edgekd.errors import DeviceError, UsageError
from edgekd.measurement import Plan
from edgekd.protocols import Arrays, Side
from edgekd.types import Artifact

from .agent.block import SETTLING_S
from .agent.runtimes import DECODERS

AGENT = "agent.pyz"
WITH_OUTPUTS = {"inputs": "inputs.npz", "outputs": "outputs.npz"}
START_S = 300  # what starting a process and loading a file may take
SAMPLE_S = 5  # what one sample's outputs may take
TAIL_LINES = 3  # of the stderr of a process that could not end with a line of its own


@dataclass(frozen=True)
class Packages:
    """What must be installed for a target.

    Attributes:
        module: That must be importable.
        extra: Of edgekd, that installs it.
        names: Packages that the agent needs from PyPI, beside NumPy.
    """

    module: str
    extra: str
    names: tuple[str, ...]


RUNTIMES: Mapping[str, Packages] = {
    "onnx": Packages("onnxruntime", "onnx", ("onnxruntime",)),
    "ort": Packages("onnxruntime", "onnx", ("onnxruntime",)),
    "tflite": Packages("ai_edge_litert", "tflite", ("ai-edge-litert",)),
    "executorch": Packages("executorch", "executorch", ("executorch",)),
}

APPLE_ONLY: Mapping[str, str] = {
    "coreml": "Core ML runs on Apple devices only; use a Mac or an iPhone",
    "coreai": "Core AI runs on Apple devices only; use a device with iOS 27",
}

NOT_RUN: Mapping[str, str] = {
    **APPLE_ONLY,
    "coreai": "off Apple devices Core AI's runtime proves files and its times mean nothing; "
    "use a device with iOS 27 or macOS 27",
}


@contextlib.contextmanager
def told_of(what: str) -> Iterator[None]:
    """Says of what a DeviceError is told."""
    try:
        yield
    except DeviceError as error:
        raise DeviceError(f"{what}: {error}") from None


def both(sides: Sequence[Side]) -> str:
    """The files that take turns, for the messages."""
    return " and ".join(f"{side.artifact.path} ({side.artifact.target})" for side in sides)


def checked_inputs(who: str, artifact: Artifact, inputs: Arrays, plan: Plan, targets: Sequence[str]) -> Arrays:
    """The inputs that the file takes, in its order.

    Raises:
        UsageError: The device does not run the target, an input is lacking, or the plan has no block.
    """
    if artifact.target not in targets:
        raise UsageError(f"{who} runs {', '.join(targets) or 'nothing'}; not {artifact.target!r}")
    decoder = artifact.card.decoder
    if decoder is not None and artifact.target not in DECODERS:
        raise UsageError(f"{who} runs language models with caches of {', '.join(DECODERS)}; not {artifact.target!r}")
    if decoder is not None and (plan.new_tokens < 2 or plan.prompt_tokens + plan.new_tokens > decoder.context):
        raise UsageError(
            f"{plan.prompt_tokens} tokens of prompt and {plan.new_tokens} new ones were asked for; {artifact.path} "
            f"holds {decoder.context} together, and an answer has at least 2"
        )
    if plan.blocks < 1 or plan.threads < 1 or plan.min_runs < 1:
        raise UsageError(f"a plan needs at least 1 block, thread and run; this one has {plan}")
    names = _given(artifact)
    lacking = [name for name in names if name not in inputs]
    if lacking:
        raise UsageError(f"{artifact.path} takes input {lacking[0]!r}; given are {', '.join(inputs) or 'none'}")
    return {name: inputs[name] for name in names}


def in_turns(jobs: Sequence[str], plan: Plan, seed: int) -> list[str]:
    """What the agent is told so that jobs take turns."""
    return ["--seed", str(seed), "--threads", str(plan.threads), *jobs]


@functools.cache
def packed_agent() -> bytes:
    """The folder ``agent`` as one file that Python runs as it is, like zipapp's; the same bytes every time.

    In it the folder has a name that shadows nobody's module: Python looks there first.
    """
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        main = "import sys\nfrom edgekd_agent.__main__ import main\nsys.exit(main(sys.argv[1:]))\n"
        archive.writestr(zipfile.ZipInfo("__main__.py"), main)
        for file in sorted(files("edgekd.devices.agent").iterdir(), key=lambda file: file.name):
            if file.name.endswith(".py"):
                archive.writestr(zipfile.ZipInfo(f"edgekd_agent/{file.name}"), file.read_bytes())
    return packed.getvalue()


def make_job(
    artifact: Artifact, model: str, plan: Plan, session_config: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """A job for the agent, without outputs; ``WITH_OUTPUTS`` adds them.

    Args:
        session_config: Entries for the session of ONNX Runtime; None leaves them to the agent, which knows where
            it runs.
    """
    decoder = artifact.card.decoder
    outputs = [spec.name for spec in artifact.outputs]
    return {
        "target": artifact.target,
        "model": model,
        "input_names": _given(artifact),
        "output_names": outputs if decoder is None else outputs[:1],
        "decoder": None if decoder is None else {"context": decoder.context, "new_tokens": plan.new_tokens},
        "sample": "sample.npz",
        "inputs": None,
        "outputs": None,
        "result": "block.json",
        "session_config": None if session_config is None else dict(session_config),
        "plan": dataclasses.asdict(plan),
    }


def _given(artifact: Artifact) -> list[str]:
    """Inputs that are handed over: of a language model with caches the first alone, its tokens."""
    names = [spec.name for spec in artifact.inputs]
    return names if artifact.card.decoder is None else names[:1]


def jobs_of(job: dict[str, Any], plan: Plan, inputs: Arrays) -> Iterator[tuple[dict[str, Any], float]]:
    """A job for each block, with the seconds after which to give up on it; the last computes the outputs as well."""
    for _ in range(plan.blocks - 1):
        yield job, limit_s(plan, 0)
    yield job | WITH_OUTPUTS, limit_s(plan, samples_in(inputs))


def samples_in(inputs: Arrays) -> int:
    """How many samples the inputs of a run hold."""
    return len(next(iter(inputs.values())))


def write_inputs(folder: Path, artifact: Artifact, inputs: Arrays) -> None:
    """``sample.npz``, what is timed, and ``inputs.npz``, what outputs are wanted for."""
    batch = 1 if artifact.card.decoder is not None else max(1, artifact.inputs[0].shape[0])
    np.savez(folder / "sample.npz", allow_pickle=False, **{name: array[:batch] for name, array in inputs.items()})
    np.savez(folder / "inputs.npz", allow_pickle=False, **dict(inputs))


def limit_s(plan: Plan, samples: int) -> float:
    """When to give up on one process, in seconds."""
    answers_s = samples * plan.new_tokens  # a second a token
    return START_S + (plan.warmup_s + SETTLING_S + plan.max_s) * 2 + samples * SAMPLE_S + answers_s


def last_words(code: int, said: str) -> str:
    """Why a process ended, on one line: the agent's own line, or the signal and the end of what it printed.

    Args:
        code: Negative for a signal; a shell's ``128 + signal`` means the same.
        said: Its stderr.
    """
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    number = -code if code < 0 else code - 128 if code > 128 else 0
    if not number:
        return lines[-1] if lines else f"the measuring process ended with exit code {code} and said nothing"
    name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
    hint = ", perhaps for lack of memory" if number == signal.SIGKILL else ""
    return f"the measuring process was ended by {name}{hint}; {' | '.join(lines[-TAIL_LINES:]) or 'it said nothing'}"

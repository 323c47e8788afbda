"""An Android phone on ``adb``: a block is a launch of the user's ``benchmark_model`` there, or in turns several.

Nothing is downloaded, and nothing is installed: the program is pushed for a sitting and removed with it.
"""

from __future__ import annotations

import contextlib
import hashlib
import random
import shlex
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from pydantic import Field

from edgekd.errors import DeviceError, UsageError
from edgekd.measurement import Block, DeviceStatus, OperatorTime, Plan, Profile
from edgekd.plugins import missing
from edgekd.protocols import Arrays, Settings, Side
from edgekd.types import Artifact

from . import _adb
from ._adb import Phone
from ._agents import APPLE_ONLY, both, checked_inputs, last_words, limit_s, samples_in, told_of
from ._benchmark_model import (
    PROFILE,
    RUN,
    Tensors,
    block_of,
    flags,
    launches,
    logs_of,
    operators_of,
    parse_log,
    read_outputs,
    share_of,
    tensors_of,
    write_sample,
)
from ._folders import new_name, own_folder, stale
from ._phone_state import ASK, is_hot, parse_state, void_reason
from ._shell import Ended, safe_name, watched

__all__ = ["DEVICE", "AndroidDevice"]

TARGETS = ("tflite",)
NOT_RUN = {
    **APPLE_ONLY,
    "onnx": "no program that runs ONNX in a phone's shell is published; measure it in the phone's browser",
    "executorch": "measuring ExecuTorch on a phone needs its own runner, which edgekd does not drive yet",
}
STALE_MINUTES = 24 * 60
TURNS = 8  # launches of each file in a pair of blocks
FIXED = "power set-fixed-performance-mode-enabled"  # https://developer.android.com/games/optimize/adpf/fixed-performance-mode
MINUTE_S = 60.0
PROFILED_RUNS = 30
LOOK_S = 5.0  # how often a hot phone is asked whether it has cooled down
COMPARED = 16  # samples whose outputs are compared with the host's runtime


class AndroidSettings(Settings):
    serial: str = Field("", description="Of adb devices; needed where several phones fit.")
    adb: str = Field("adb", description="The client.")
    benchmark_model: str = Field("", description="LiteRT's program for the phone's processor, on this machine.")
    benchmark_sha256: str = Field("", description="What that file must be.")
    folder: str = Field("/data/local/tmp", description="On the phone, where programs may be run.")
    flags: tuple[str, ...] = Field((), description="More of benchmark_model's flags: --use_gpu=true …")
    cores: tuple[int, ...] = Field((), description="Processors to run on, by taskset; all when empty.")
    cool_down_s: float = Field(300.0, description="How long a sitting waits in all for a hot phone.", ge=0)
    fixed_performance: bool = Field(True, description="Ask for fixed-performance mode during each block.")


@dataclass(frozen=True)
class _File:
    """A model file on the phone.

    Attributes:
        path: Here.
        model: Its name there.
        sample: Names there of the files that hold what is timed.
    """

    artifact: Artifact
    path: Path
    inputs: Arrays
    tensors: Tensors
    model: str
    sample: tuple[str, ...]


@dataclass
class _Sitting:
    """What the runs of one sitting leave for one another.

    Attributes:
        folder: On the phone.
        fingerprint: Of its build: another phone may answer to the same address later.
        sent: Names of files there, to the digest of what they hold.
        waited_s: For the phone to cool down.
    """

    phone: Phone
    folder: str
    fingerprint: str
    facts: dict[str, str]
    sent: dict[str, str] = field(default_factory=dict)
    waited_s: float = 0.0


class AndroidDevice:
    """Fulfils ``edgekd.protocols.Device`` and ``TakingTurns``."""

    def __init__(self, profile: Profile, settings: AndroidSettings) -> None:
        self._profile, self._settings = profile, settings
        self._sitting: _Sitting | None = None

    def probe(self) -> DeviceStatus:
        """Ask adb which phones are there, and the phone what it is; nothing is written there."""
        try:
            phone, properties = self._choose()
        except DeviceError as error:
            return DeviceStatus(reachable=False, reason=str(error))
        facts = self._profile.facts | _facts(phone, properties)
        try:
            self._program()
        except (UsageError, DeviceError) as error:
            return DeviceStatus(True, facts=facts, not_run={**NOT_RUN, "tflite": str(error)})
        if missing(("ai_edge_litert",)):
            mend = "ai_edge_litert is not installed here; pip install 'edgekd[tflite]'"
            return DeviceStatus(True, facts=facts, not_run={**NOT_RUN, "tflite": mend})
        return DeviceStatus(reachable=True, facts=facts, targets=TARGETS, not_run=dict(NOT_RUN))

    def run(
        self, artifact: Artifact, folder: Path, inputs: Arrays, plan: Plan
    ) -> tuple[tuple[Block, ...], dict[str, np.ndarray]]:
        """See ``edgekd.protocols.Device``; after the last block every input is run once more for its outputs.

        The outputs of up to 16 samples are compared with LiteRT's on this machine: ``differs_from_host`` in the last
        block's conditions is the largest difference.

        Raises:
            DeviceError: The phone is gone, is another one, or the program failed; with its last words.
            UsageError: The phone does not run the target, or no benchmark_model is named.
        """
        what = f"{artifact.path} ({artifact.target} {artifact.precision}) on {self._profile.name}"
        inputs = checked_inputs(self._profile.name, artifact, inputs, plan, TARGETS)
        with told_of(what), self._leaving():
            return self._run(artifact, folder / artifact.path, inputs, plan)

    def run_in_turns(
        self, sides: Sequence[Side], plan: Plan, seed: int
    ) -> tuple[tuple[Block, dict[str, np.ndarray]], ...]:
        """See ``edgekd.protocols.TakingTurns``; errors as in ``run``.

        The program cannot pause, so a turn is a launch: each file has ``TURNS`` short ones, and the phone alternates.
        """
        name = self._profile.name
        given = [checked_inputs(name, side.artifact, side.inputs, plan, TARGETS) for side in sides]
        with told_of(f"{both(sides)} on {name}"), self._leaving():
            return self._run_in_turns(sides, given, plan, seed)

    def close(self) -> None:
        """Undo the mode and remove the sitting's folder; no error when the phone is gone."""
        self._leave()

    def _run(
        self, artifact: Artifact, path: Path, inputs: Arrays, plan: Plan
    ) -> tuple[tuple[Block, ...], dict[str, np.ndarray]]:
        sitting = self._sit()
        with own_folder("edgekd-android") as work:
            file = self._send_file(sitting, artifact, path, inputs, work, "sample")
            minutes = max(1, round(plan.min_s / MINUTE_S))  # each a launch, since a launch tells one median
            once = share_of(plan, minutes)
            order, limit = [0] * minutes, limit_s(plan, 0)
            blocks = [self._blocks(sitting, [file], order, once, limit)[0] for _ in range(plan.blocks)]
            outputs, difference = self._outputs(sitting, file, plan, work)
            operators = self._operators(sitting, file, plan) if plan.profile else ()
        told = blocks[-1].conditions | {"differs_from_host": f"{difference:.3g}"}
        return (*blocks[:-1], replace(blocks[-1], conditions=told, operators=operators)), outputs

    def _run_in_turns(
        self, sides: Sequence[Side], given: Sequence[Arrays], plan: Plan, seed: int
    ) -> tuple[tuple[Block, dict[str, np.ndarray]], ...]:
        sitting, drawn, each = self._sit(), random.Random(seed), range(len(sides))
        order = [index for _ in range(TURNS) for index in drawn.sample(each, len(each))]
        with own_folder("edgekd-android") as work:
            files = [
                self._send_file(
                    sitting, side.artifact, side.folder / side.artifact.path, inputs, work, f"sample{index}"
                )
                for index, (side, inputs) in enumerate(zip(sides, given, strict=True))
            ]
            blocks = self._blocks(sitting, files, order, share_of(plan, TURNS), len(sides) * limit_s(plan, 0))
            return tuple(
                (block, self._outputs(sitting, file, plan, work)[0]) for block, file in zip(blocks, files, strict=True)
            )

    def _send_file(
        self, sitting: _Sitting, artifact: Artifact, path: Path, inputs: Arrays, work: Path, prefix: str
    ) -> _File:
        """A model to the phone, and what is timed of its inputs."""
        tensors, model = tensors_of(path, artifact), safe_name(artifact.sha256)
        self._send(sitting, path, model)
        names = write_sample(work, tensors, inputs, 0, prefix)
        for name in names:
            self._send(sitting, work / name, name)
        return _File(artifact, path, inputs, tensors, model, tuple(names))

    def _blocks(
        self, sitting: _Sitting, files: Sequence[_File], order: Sequence[int], plan: Plan, limit: float
    ) -> list[Block]:
        """A block of each file, with the phone's state before and after all of them.

        Args:
            order: Of the launches: which file each is of.
            plan: Of one launch.
            limit: Of all, in seconds.
        """
        commands = [self._command(files[index], plan, files[index].sample) for index in order]
        waited_s = sitting.waited_s
        before = self._cooled(sitting)
        done = self._script(sitting, launches(commands), limit)
        after = self._state(sitting)
        if done.code == 124:
            raise DeviceError(f"no result after {limit:.0f} s; the program was stopped")
        if done.code > 128:
            raise DeviceError(last_words(done.code, done.err).replace("measuring process", "program"))
        printed = done.out.decode(errors="replace")
        if done.code != 0:
            parse_log(done.err)
            raise DeviceError(f"benchmark_model ended with exit code {done.code}: {last_words(1, done.err or printed)}")
        conditions = dict(sitting.facts)
        for when, state in (("before", before), ("after", after)):
            conditions |= {f"{key}_{when}": value for key, value in state.items() if key not in _FIXED_FACTS}
        conditions |= {key: before[key] for key in _FIXED_FACTS if key in before}
        conditions |= {
            "threads": str(plan.threads),
            "pinned_to_cores": ",".join(map(str, self._settings.cores)),
            "flags": " ".join(self._settings.flags),
            "fixed_performance": "yes" if "@fixed" in printed else "no",
            "cooled_down_s": f"{sitting.waited_s - waited_s:.0f}" if sitting.waited_s > waited_s else "",
        }
        conditions, void = {key: value for key, value in conditions.items() if value}, void_reason(before, after)
        logs = list(zip(order, logs_of(printed), strict=True))
        return [
            block_of([log for index, log in logs if index == number], conditions, void) for number in range(len(files))
        ]

    def _command(self, file: _File, plan: Plan, sample: Sequence[str], output: str = "") -> list[str]:
        return ["./benchmark_model", *flags(file.tensors, file.model, plan, sample, output), *self._settings.flags]

    def _operators(self, sitting: _Sitting, file: _File, plan: Plan) -> tuple[OperatorTime, ...]:
        """From a launch of its own, since timing each operator slows them all."""
        short = replace(plan, warmup_runs=1, warmup_s=0.0, min_runs=PROFILED_RUNS, min_s=0.0)
        done = self._script(sitting, launches([[*self._command(file, short, file.sample), PROFILE]]), limit_s(plan, 0))
        if done.code != 0:
            raise DeviceError(f"the operators could not be timed: {last_words(1, done.err)}")
        return operators_of(done.out.decode(errors="replace"))

    def _script(self, sitting: _Sitting, script: str, limit: float) -> Ended:
        """Run a script there; the mode is undone by the phone itself, whatever happens to the cable."""
        with own_folder("edgekd-android") as work:
            (work / "launches.sh").write_text(script)
            self._send(sitting, work / "launches.sh", "launches.sh")
        command = ["sh", "launches.sh"]
        if self._settings.cores:
            command = ["taskset", f"{sum(1 << core for core in self._settings.cores):x}", *command]
        undo, mode = "true", ""
        if self._settings.fixed_performance:
            mode = f"cmd {FIXED} true >/dev/null 2>&1 && echo @fixed"
            undo = f"cmd {FIXED} false >/dev/null 2>&1"
        return sitting.phone.run_watched(f"{mode}\n{watched(command, sitting.folder, limit, undo=undo)}", limit)

    def _outputs(self, sitting: _Sitting, file: _File, plan: Plan, work: Path) -> tuple[dict[str, np.ndarray], float]:
        """Every batch in a launch of its own, all in one call; the files travel as one archive each way.

        Returns:
            The artifact's outputs, and how far they are from LiteRT's here.
        """
        count, batch = samples_in(file.inputs), file.tensors.inputs[0][2][0]
        once = replace(plan, warmup_runs=1, warmup_s=0.0, min_runs=1, min_s=0.0)
        lines = []
        for begin in range(0, count, batch):
            names = write_sample(work, file.tensors, file.inputs, begin, f"in{begin}")
            for name in names:
                sitting.phone.push(work / name, f"{sitting.folder}/{name}")
            lines.append(f"run log.txt {shlex.join(self._command(file, once, names, 'one.bin'))}")
            lines.append(f"cat one.bin >>outputs.bin || exit 1; rm -f one.bin {' '.join(names)}")
        done = self._script(sitting, RUN + "\n".join(["rm -f outputs.bin", *lines, ""]), limit_s(plan, count))
        if done.code != 0:
            raise DeviceError(f"the outputs could not be computed: {last_words(1, done.err)}")
        sitting.phone.pull(f"{sitting.folder}/outputs.bin", work / "outputs.bin")
        content, each = (work / "outputs.bin").read_bytes(), max(1, count // batch)
        size = len(content) // each
        parts = [read_outputs(content[index * size : (index + 1) * size], file.tensors) for index in range(each)]
        found = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        outputs = {spec.name: found[spec.name] for spec in file.artifact.outputs}
        return outputs, _difference_from_host(file.path, file.tensors, file.inputs, outputs)

    def _state(self, sitting: _Sitting) -> dict[str, str]:
        """The phone's state, which also tells whether it is still the same phone."""
        state = parse_state(sitting.phone.run(ASK).out.decode(errors="replace"))
        if state.pop("fingerprint", "") != sitting.fingerprint:
            raise DeviceError(f"another phone answers as {sitting.phone.serial} now; the sitting was ended")
        return state

    def _cooled(self, sitting: _Sitting) -> dict[str, str]:
        """The phone's state, hot only when it stayed so for as long as the sitting may wait in all."""
        while is_hot(state := self._state(sitting)) and sitting.waited_s < self._settings.cool_down_s:
            time.sleep(LOOK_S)
            sitting.waited_s += LOOK_S
        return state

    def _sit(self) -> _Sitting:
        """The sitting's folder on the phone, with the program in it; made by its first run."""
        if self._sitting is None:
            program = self._program()
            phone, properties = self._choose()
            base, folder = shlex.quote(self._settings.folder), f"{self._settings.folder}/{new_name('edgekd')}"
            done = phone.run(
                f"find {base} -maxdepth 1 -name 'edgekd-*' -mmin +{STALE_MINUTES} -exec rm -rf {{}} + ; "
                f"ls {base}; mkdir {shlex.quote(folder)}"
            )
            if done.code != 0:
                raise DeviceError(f"no folder can be made in {self._settings.folder}: {last_words(1, done.err)}")
            if left := stale(done.out.decode(errors="replace").split(), "edgekd"):
                phone.run(f"cd {base} && rm -rf {shlex.join(left)}")
            facts = _facts(phone, properties)
            self._sitting = _Sitting(phone, folder, properties.get("ro.build.fingerprint", ""), facts)
            self._send(self._sitting, program, "benchmark_model")
            phone.run(f"chmod 755 {shlex.quote(folder)}/benchmark_model")
        return self._sitting

    def _send(self, sitting: _Sitting, source: Path, name: str) -> None:
        """A file into the sitting's folder, unless it is there; what came over is checked."""
        digest = hashlib.sha256(source.read_bytes()).hexdigest()
        if sitting.sent.get(name) == digest:
            return
        target = f"{sitting.folder}/{name}"
        sitting.phone.push(source, target)
        there = sitting.phone.run(f"sha256sum {shlex.quote(target)}").out.decode(errors="replace").partition(" ")[0]
        if there != digest:
            raise DeviceError(f"{name} arrived damaged on {sitting.phone.serial}")
        sitting.sent[name] = digest

    @contextlib.contextmanager
    def _leaving(self) -> Iterator[None]:
        """A sitting that broke off is not gone on with."""
        try:
            yield
        except DeviceError:
            self._leave()
            raise

    def _leave(self) -> None:
        sitting, self._sitting = self._sitting, None
        if sitting is None:
            return
        undo = f"cmd {FIXED} false >/dev/null 2>&1; " if self._settings.fixed_performance else ""
        with contextlib.suppress(DeviceError):
            # A program that a broken connection left behind wrote its number to ``pid``.
            folder = shlex.quote(sitting.folder)
            sitting.phone.run(f"cd {folder} && kill -KILL $(cat pid) 2>/dev/null; {undo}rm -rf {folder}")

    def _choose(self) -> tuple[Phone, dict[str, str]]:
        settings = self._settings
        return _adb.choose(settings.adb, self._profile.name, settings.serial, self._profile.identity)

    def _program(self) -> Path:
        """The user's benchmark_model, which must be what its hash says.

        Raises:
            UsageError: None is named, or it is another file.
        """
        settings = self._settings
        if not settings.benchmark_model or not settings.benchmark_sha256:
            raise UsageError(
                "settings.benchmark_model and benchmark_sha256 are not set; docs/devices.md says where from"
            )
        path = Path(settings.benchmark_model).expanduser()
        if not path.is_file():
            raise UsageError(f"settings.benchmark_model: no file at {path}")
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        if digest != settings.benchmark_sha256.lower():
            raise UsageError(f"{path} has sha256 {digest}; settings.benchmark_sha256 is {settings.benchmark_sha256}")
        return path


_FIXED_FACTS = ("governor",)


def _facts(phone: Phone, properties: dict[str, str]) -> dict[str, str]:
    keys = {
        "model": "ro.product.model",
        "processor": "ro.soc.model",
        "hardware": "ro.hardware",
        "android": "ro.build.version.release",
        "build": "ro.build.fingerprint",
        "build_type": "ro.build.type",
    }
    found = {key: properties.get(name, "") for key, name in keys.items()}
    is_emulator = properties.get("ro.kernel.qemu") == "1" or properties.get("ro.boot.qemu") == "1"
    found |= {"serial": phone.serial, "emulated": "Android emulator" if is_emulator else ""}
    if not found["model"]:
        system = phone.run("uname -sm").out.decode(errors="replace").strip()
        found |= {"model": "no Android", "system": system}
    return {key: value for key, value in found.items() if value}


def _difference_from_host(path: Path, tensors: Tensors, inputs: Arrays, outputs: Arrays) -> float:
    """Largest difference of the phone's outputs from LiteRT's here, over the first samples."""
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_path=str(path), num_threads=1)
    interpreter.allocate_tensors()
    batch, largest = tensors.inputs[0][2][0], 0.0
    for begin in range(0, min(COMPARED, len(next(iter(inputs.values())))), batch):
        for (name, _, _, dtype), detail in zip(tensors.inputs, interpreter.get_input_details(), strict=True):
            interpreter.set_tensor(detail["index"], inputs[name][begin : begin + batch].astype(dtype))
        interpreter.invoke()
        for (name, *_), detail in zip(tensors.outputs, interpreter.get_output_details(), strict=True):
            if name in outputs:
                here = interpreter.get_tensor(detail["index"]).astype(np.float64)
                there = outputs[name][begin : begin + batch].astype(np.float64)
                largest = max(largest, float(np.max(np.abs(here - there))))
    return largest


class _Android:
    settings = AndroidSettings

    def __call__(self, profile: Profile, settings: AndroidSettings) -> AndroidDevice:
        return AndroidDevice(profile, settings)


DEVICE = _Android()

"""An Android phone on ``adb``: every block is one launch of the user's ``benchmark_model``, there.

Nothing is downloaded, and nothing is installed: the program is pushed for a sitting and removed with it.
"""

from __future__ import annotations

import contextlib
import hashlib
import secrets
import shlex
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from pydantic import Field

from edgekd.errors import DeviceError, UsageError
from edgekd.measurement import Block, DeviceStatus, Plan, Profile
from edgekd.plugins import missing
from edgekd.protocols import Arrays, Settings
from edgekd.types import Artifact

from . import _adb
from ._adb import Phone
from ._agents import APPLE_ONLY, checked_inputs, last_words, limit_s
from ._benchmark_model import Tensors, block_of, flags, parse_log, read_outputs, tensors_of, write_sample
from ._phone_state import ASK, parse_state, void_reason
from ._shell import Ended, safe_name, watched

__all__ = ["DEVICE", "AndroidDevice"]

TARGETS = ("tflite",)
NOT_RUN = {
    **APPLE_ONLY,
    "onnx": "no program that runs ONNX in a phone's shell is published; measure it in the phone's browser",
    "executorch": "measuring ExecuTorch on a phone needs its own runner, which edgekd does not drive yet",
}
STALE_MINUTES = 24 * 60
FIXED = "power set-fixed-performance-mode-enabled"  # https://developer.android.com/games/optimize/adpf/fixed-performance-mode
COMPARED = 16  # samples whose outputs are compared with the host's runtime


class AndroidSettings(Settings):
    serial: str = Field("", description="Of adb devices; needed where several phones fit.")
    adb: str = Field("adb", description="The client.")
    benchmark_model: str = Field("", description="LiteRT's program for the phone's processor, on this machine.")
    benchmark_sha256: str = Field("", description="What that file must be.")
    folder: str = Field("/data/local/tmp", description="On the phone, where programs may be run.")
    flags: tuple[str, ...] = Field((), description="More of benchmark_model's flags: --use_gpu=true …")
    cores: tuple[int, ...] = Field((), description="Processors to run on, by taskset; all when empty.")
    fixed_performance: bool = Field(True, description="Ask for fixed-performance mode during each block.")


@dataclass
class _Sitting:
    """What the runs of one sitting leave for one another.

    Attributes:
        folder: On the phone.
        fingerprint: Of its build: another phone may answer to the same address later.
        sent: Names of files there, to the digest of what they hold.
    """

    phone: Phone
    folder: str
    fingerprint: str
    facts: dict[str, str]
    sent: dict[str, str] = field(default_factory=dict)


class AndroidDevice:
    """Fulfils ``edgekd.protocols.Device``."""

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
        try:
            return self._run(artifact, folder / artifact.path, inputs, plan)
        except DeviceError as error:
            self._leave()
            raise DeviceError(f"{what}: {error}") from None

    def close(self) -> None:
        """Undo the mode and remove the sitting's folder; no error when the phone is gone."""
        self._leave()

    def _run(
        self, artifact: Artifact, path: Path, inputs: Arrays, plan: Plan
    ) -> tuple[tuple[Block, ...], dict[str, np.ndarray]]:
        sitting = self._sit()
        tensors = tensors_of(path, artifact)
        model = safe_name(artifact.sha256)
        self._send(sitting, path, model)
        with tempfile.TemporaryDirectory(prefix="edgekd-android-") as temporary:
            work = Path(temporary)
            files = write_sample(work, tensors, inputs, 0, "sample")
            for name in files:
                self._send(sitting, work / name, name)
            blocks = [self._block(sitting, tensors, model, plan, files) for _ in range(plan.blocks)]
            outputs = self._outputs(sitting, tensors, model, plan, inputs, work)
        wanted = {spec.name for spec in artifact.outputs}
        outputs = {name: output for name, output in outputs.items() if name in wanted}
        difference = _difference_from_host(path, tensors, inputs, outputs)
        told = blocks[-1].conditions | {"differs_from_host": f"{difference:.3g}"}
        return (*blocks[:-1], replace(blocks[-1], conditions=told)), outputs

    def _block(self, sitting: _Sitting, tensors: Tensors, model: str, plan: Plan, files: list[str]) -> Block:
        """One launch, with the phone's state before and after it."""
        before = self._state(sitting)
        arguments = [*flags(tensors, model, plan, files), *self._settings.flags]
        limit = limit_s(plan, 0)
        done = self._launch(sitting, ["./benchmark_model", *arguments], limit)
        after = self._state(sitting)
        if done.code == 124:
            raise DeviceError(f"no result after {limit:.0f} s; the program was stopped")
        text = f"{done.out.decode(errors='replace')}\n{done.err}"
        if done.code > 128:
            raise DeviceError(last_words(done.code, done.err).replace("measuring process", "program"))
        log = parse_log(text)
        if done.code != 0:
            raise DeviceError(f"benchmark_model ended with exit code {done.code}: {last_words(1, text)}")
        conditions = dict(sitting.facts)
        for when, state in (("before", before), ("after", after)):
            conditions |= {f"{key}_{when}": value for key, value in state.items() if key not in _FIXED_FACTS}
        conditions |= {key: before[key] for key in _FIXED_FACTS if key in before}
        conditions |= {
            "threads": str(plan.threads),
            "pinned_to_cores": ",".join(map(str, self._settings.cores)),
            "flags": " ".join(self._settings.flags),
            "fixed_performance": "yes" if "@fixed" in text else "no",
        }
        return block_of(log, {key: value for key, value in conditions.items() if value}, void_reason(before, after))

    def _launch(self, sitting: _Sitting, command: list[str], limit: float) -> Ended:
        """Run the program; the mode is undone by the phone itself, whatever happens to the cable."""
        if self._settings.cores:
            command = ["taskset", f"{sum(1 << core for core in self._settings.cores):x}", *command]
        undo, mode = "true", ""
        if self._settings.fixed_performance:
            mode = f"cmd {FIXED} true >/dev/null 2>&1 && echo @fixed"
            undo = f"cmd {FIXED} false >/dev/null 2>&1"
        return sitting.phone.run_watched(f"{mode}\n{watched(command, sitting.folder, limit, undo=undo)}", limit)

    def _outputs(
        self, sitting: _Sitting, tensors: Tensors, model: str, plan: Plan, inputs: Arrays, work: Path
    ) -> dict[str, np.ndarray]:
        """Every batch in a launch of its own, all in one call; the files travel as one archive each way."""
        count, batch = len(next(iter(inputs.values()))), tensors.inputs[0][2][0]
        once = replace(plan, warmup_runs=1, warmup_s=0.0, min_runs=1, min_s=0.0)
        lines = []
        for begin in range(0, count, batch):
            files = write_sample(work, tensors, inputs, begin, f"in{begin}")
            for name in files:
                sitting.phone.push(work / name, f"{sitting.folder}/{name}")
            arguments = [*flags(tensors, model, once, files, "one.bin"), *self._settings.flags]
            lines.append(f"{shlex.join(['./benchmark_model', *arguments])} >log.txt 2>&1 || exit 1")
            lines.append(f"cat one.bin >>outputs.bin || exit 1; rm -f one.bin {' '.join(files)}")
        (work / "all.sh").write_text("\n".join(["rm -f outputs.bin log.txt", *lines, ""]))
        sitting.phone.push(work / "all.sh", f"{sitting.folder}/all.sh")
        done = self._launch(sitting, ["sh", "all.sh"], limit_s(plan, count))
        if done.code != 0:
            log = sitting.phone.run(f"cat {shlex.quote(sitting.folder)}/log.txt").out.decode(errors="replace")
            raise DeviceError(f"the outputs could not be computed: {last_words(1, done.err or log)}")
        sitting.phone.pull(f"{sitting.folder}/outputs.bin", work / "outputs.bin")
        content, each = (work / "outputs.bin").read_bytes(), max(1, count // batch)
        size = len(content) // each
        parts = [read_outputs(content[index * size : (index + 1) * size], tensors) for index in range(each)]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _state(self, sitting: _Sitting) -> dict[str, str]:
        """The phone's state, which also tells whether it is still the same phone."""
        state = parse_state(sitting.phone.run(ASK).out.decode(errors="replace"))
        if state.pop("fingerprint", "") != sitting.fingerprint:
            raise DeviceError(f"another phone answers as {sitting.phone.serial} now; the sitting was ended")
        return state

    def _sit(self) -> _Sitting:
        """The sitting's folder on the phone, with the program in it; made by its first run."""
        if self._sitting is None:
            program = self._program()
            phone, properties = self._choose()
            base = shlex.quote(self._settings.folder)
            folder = f"{self._settings.folder}/edgekd-{secrets.token_hex(4)}"
            done = phone.run(
                f"find {base} -maxdepth 1 -name 'edgekd-*' -mmin +{STALE_MINUTES} -exec rm -rf {{}} + ; "
                f"mkdir {shlex.quote(folder)}"
            )
            if done.code != 0:
                raise DeviceError(f"no folder can be made in {self._settings.folder}: {last_words(1, done.err)}")
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

"""Core ML on a Mac, and on a connected iPhone through coremltools' remote devices. Neither has been run yet.

On a Mac a block is a fresh process of the agent. On an iPhone it is a fresh load of the file in Apple's ModelRunner,
whose clock is taken on the phone (coremltools.models.ml_program.experimental, coremltools 9).
"""

from __future__ import annotations

import asyncio
import shutil
import sys
import time
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from edgekd.errors import DeviceError, UsageError, first_line
from edgekd.measurement import Block, DeviceStatus, Plan, Profile
from edgekd.plugins import missing
from edgekd.protocols import Arrays, Device, Settings
from edgekd.types import Artifact

from ._agents import checked_inputs
from .agent.block import SETTLING_RUNS, SETTLING_S, settled
from .agent.machine import describe_machine
from .host import HostDevice

__all__ = ["DEVICE", "IPhoneDevice", "MacDevice"]

TARGETS = ("coreml",)
NOT_RUN = {
    "onnx": "measure ONNX on a Mac with device host, on an iPhone in its browser",
    "tflite": "measure TFLite on a Mac with device host, on an iPhone in its browser",
    "executorch": "measure ExecuTorch on a Mac with device host; on an iPhone import what your app measured",
    "coreai": "import what Xcode or your app measured: edgekd bench import",
}
TOOLS_S = 60


class AppleSettings(Settings):
    where: Literal["mac", "iphone"] = "mac"
    compute_units: Literal["ALL", "CPU_ONLY", "CPU_AND_GPU", "CPU_AND_NE"] = "ALL"
    identifier: str = Field("", description="iphone: of xcrun devicectl; needed where several are connected.")
    development_team: str = Field("", description="iphone: that signs ModelRunner.")
    provisioning_profile_uuid: str = Field("", description="iphone: instead of a team.")
    bundle_identifier: str = Field("", description="iphone: that the provisioning profile is for.")


def _unreachable(settings: AppleSettings) -> str:
    """Why Core ML cannot be measured from here; empty when it can be tried."""
    if sys.platform != "darwin":
        what = "an iPhone is measured from a Mac with Xcode" if settings.where == "iphone" else "this is no Mac"
        return f"{what}; bring results from there with: edgekd bench import"
    if missing(("coremltools",)):
        return "coremltools is not installed; pip install 'edgekd[coreml]'"
    if settings.where == "iphone" and shutil.which("xcrun") is None:
        return "Xcode is not installed (xcrun); it builds and starts the program on the phone"
    return ""


class MacDevice:
    """Fulfils ``edgekd.protocols.Device`` with the agent on this Mac."""

    def __init__(self, profile: Profile, settings: AppleSettings) -> None:
        self._settings = settings
        more = {"compute_units": settings.compute_units}
        self._host = HostDevice(name=profile.name, targets=TARGETS, more=more)

    def probe(self) -> DeviceStatus:
        if reason := _unreachable(self._settings):
            return DeviceStatus(reachable=False, reason=reason)
        return DeviceStatus(reachable=True, facts=describe_machine(), targets=TARGETS, not_run=dict(NOT_RUN))

    def run(
        self, artifact: Artifact, folder: Path, inputs: Arrays, plan: Plan
    ) -> tuple[tuple[Block, ...], dict[str, np.ndarray]]:
        """See ``edgekd.protocols.Device``.

        Raises:
            DeviceError: This is no Mac, or a process failed.
        """
        if reason := _unreachable(self._settings):
            raise DeviceError(f"{artifact.path}: {reason}")
        return self._host.run(artifact, folder, inputs, plan)

    def close(self) -> None:
        """Nothing is left between runs."""


class IPhoneDevice:
    """Fulfils ``edgekd.protocols.Device`` with Apple's ModelRunner on a connected iPhone."""

    def __init__(self, profile: Profile, settings: AppleSettings) -> None:
        self._profile, self._settings = profile, settings
        self._prepared: Any = None  # coremltools' device, with ModelRunner running on it

    def probe(self) -> DeviceStatus:
        """Look which iPhones are connected."""
        if reason := _unreachable(self._settings):
            return DeviceStatus(reachable=False, reason=reason)
        try:
            phone = self._choose()
        except DeviceError as error:
            return DeviceStatus(reachable=False, reason=str(error))
        return DeviceStatus(True, facts=self._facts(phone), targets=TARGETS, not_run=dict(NOT_RUN))

    def run(
        self, artifact: Artifact, folder: Path, inputs: Arrays, plan: Plan
    ) -> tuple[tuple[Block, ...], dict[str, np.ndarray]]:
        """See ``edgekd.protocols.Device``.

        Raises:
            DeviceError: No iPhone is connected, it cannot be prepared, or it broke off.
            UsageError: No team signs the program.
        """
        if reason := _unreachable(self._settings):
            raise DeviceError(f"{artifact.path}: {reason}")
        settings = self._settings
        if not (settings.development_team or settings.provisioning_profile_uuid):
            raise UsageError(f"device {self._profile.name}: settings.development_team is not set; it signs ModelRunner")
        inputs = checked_inputs(self._profile.name, artifact, inputs, plan, TARGETS)
        try:
            return asyncio.run(self._run(artifact, folder / artifact.path, inputs, plan))
        except (DeviceError, UsageError):
            raise
        except Exception as error:  # coremltools raises what its tools told
            self._prepared = None
            raise DeviceError(f"{artifact.path} on {self._profile.name}: {first_line(error)}") from error

    def close(self) -> None:
        """End the program on the phone."""
        if self._prepared is not None and self._prepared.session is not None:
            self._prepared.session.stop()
        self._prepared = None

    def _choose(self) -> Any:
        from coremltools.models.ml_program.experimental.remote_device import Device as Remote
        from coremltools.models.ml_program.experimental.remote_device import DeviceType

        try:
            phones = list(Remote.get_connected_devices(DeviceType.IPHONE))
        except Exception as error:
            raise DeviceError(f"xcrun devicectl failed: {error}") from error
        wanted = self._settings.identifier
        meant = [phone for phone in phones if not wanted or wanted in (phone.identifier, phone.udid)]
        told = ", ".join(f"{phone.name} ({phone.identifier})" for phone in phones) or "none"
        if not meant:
            raise DeviceError(f"no iPhone {wanted or ''} is connected; there are {told}; unlock it and trust this Mac")
        if len(meant) > 1:
            raise DeviceError(f"{len(meant)} iPhones are connected: {told}; name one with settings.identifier")
        return meant[0]

    def _facts(self, phone: Any) -> dict[str, str]:
        return self._profile.facts | {"model": phone.name, "system": f"iOS {phone.os_version}"}

    async def _run(
        self, artifact: Artifact, path: Path, inputs: Arrays, plan: Plan
    ) -> tuple[tuple[Block, ...], dict[str, np.ndarray]]:
        from coremltools.models.ml_program.experimental.remote_device import AppSigningCredentials

        if self._prepared is None:
            settings = self._settings
            credentials = AppSigningCredentials(
                development_team=settings.development_team,
                provisioning_profile_uuid=settings.provisioning_profile_uuid or None,
                bundle_identifier=settings.bundle_identifier or None,
            )
            self._prepared = await self._choose().prepare_for_model_debugging(credentials=credentials)
        batch = max(1, artifact.inputs[0].shape[0])
        blocks: list[Block] = []
        outputs: dict[str, np.ndarray] = {}
        for index in range(plan.blocks):
            is_last = index == plan.blocks - 1
            block, outputs = await self._block(artifact, path, inputs, plan, batch, is_last)
            blocks.append(block)
        return tuple(blocks), outputs

    async def _block(
        self, artifact: Artifact, path: Path, inputs: Arrays, plan: Plan, batch: int, wants_outputs: bool
    ) -> tuple[Block, dict[str, np.ndarray]]:
        """A fresh load; the times are those that the phone's own clock told."""
        import coremltools
        from coremltools.models.ml_program.experimental.async_wrapper import MLModelAsyncWrapper

        units = getattr(coremltools.ComputeUnit, self._settings.compute_units)
        model = MLModelAsyncWrapper.from_spec_or_path(str(path), "", compute_units=units, device=self._prepared)
        await model.load()
        try:
            sample = _cast({name: array[:batch] for name, array in inputs.items()}, artifact)

            async def one() -> float:
                await model.predict(sample)
                spent = model.last_predict_duration_in_nano_seconds
                if spent is None:
                    raise DeviceError("the phone told no time for an inference")
                return float(spent) / 1e6

            first = await one()
            warmup: list[float] = []
            # Every call costs the time of two copies over the cable: the settling has no more than its runs.
            while len(warmup) < plan.warmup_runs or (not settled(warmup) and len(warmup) < SETTLING_RUNS):
                warmup.append(await one())
            latency: list[float] = []
            end = time.monotonic() + SETTLING_S + plan.max_s
            while len(latency) < plan.min_runs and time.monotonic() < end:
                latency.append(await one())
            outputs = await self._outputs(model, artifact, inputs, batch) if wants_outputs else {}
            load = model.load_duration_in_nano_seconds
        finally:
            await model.unload()
        conditions = self._facts(self._prepared) | {
            "runtime": f"Core ML by ModelRunner of coremltools {coremltools.__version__}",
            "compute_units": self._settings.compute_units,
            "block": "a fresh load in a running program",
        }
        is_settled = settled(warmup)
        return Block(0.0, float(load or 0) / 1e6, first, tuple(warmup), tuple(latency), None, is_settled, conditions), {
            name: np.concatenate(parts) for name, parts in outputs.items()
        }

    async def _outputs(self, model: Any, artifact: Artifact, inputs: Arrays, batch: int) -> dict[str, list[np.ndarray]]:
        parts: dict[str, list[np.ndarray]] = {spec.name: [] for spec in artifact.outputs}
        for begin in range(0, len(next(iter(inputs.values()))), batch):
            given = _cast({name: array[begin : begin + batch] for name, array in inputs.items()}, artifact)
            found = await model.predict(given)
            for name in parts:
                parts[name].append(np.asarray(found[name]))
        return parts


def _cast(arrays: dict[str, np.ndarray], artifact: Artifact) -> dict[str, np.ndarray]:
    types = {spec.name: spec.dtype for spec in artifact.inputs}
    return {name: np.ascontiguousarray(array, dtype=types[name]) for name, array in arrays.items()}


class _Apple:
    settings = AppleSettings

    def __call__(self, profile: Profile, settings: AppleSettings) -> Device:
        return IPhoneDevice(profile, settings) if settings.where == "iphone" else MacDevice(profile, settings)


DEVICE = _Apple()

"""No device: times and outputs that a test asks for, for users' own tests of what they build around edgekd.

Nothing is run. Every block is ``emulated`` by ``fake``, the device's name says it, and a gate must refuse the numbers.
The same settings give the same blocks, always.

    device = FakeDevice(latency_ms={"fp32": 2.0, "w8a8": 1.0}, noise=0.01)
    blocks, outputs = device.run(artifact, folder, inputs, Plan(blocks=2))
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from pydantic import Field

from edgekd.errors import DeviceError
from edgekd.measurement import Block, DeviceStatus, Plan, Profile
from edgekd.plugins import exporter_names
from edgekd.protocols import Arrays, Settings
from edgekd.types import Artifact, TensorSpec

from ._agents import checked_inputs

__all__ = ["DEVICE", "FakeDevice"]

NAME = "fake (no device; nothing was run)"


class FakeSettings(Settings):
    latency_ms: dict[str, float] = Field(default_factory=dict, description="Median by precision; else 1 ms.")
    noise: float = Field(0.01, ge=0, description="Standard deviation of the logarithm of a sample.")
    drift: float = Field(0.0, description="Growth of the latency from one block to the next, as a share.")
    void: dict[int, str] = Field(default_factory=dict, description="Block, counted from 0, to the reason it is void.")
    breaks_at: int | None = Field(None, description="Block at which the device goes away.")
    seed: int = 0


@dataclass
class FakeDevice:
    """Fulfils ``edgekd.protocols.Device``; see the top of the file.

    Attributes:
        latency_ms: Median by precision, for those that are not 1 ms.
        noise: Standard deviation of the logarithm of a sample.
        drift: Growth from one block to the next, as a share: a device that warms up.
        void: Blocks, counted from 0 over the life of the device, and why they are void.
        breaks_at: The block at which the device goes away.
        outputs: By output name, for all inputs; those that are lacking are zeros.
        ran: How many blocks were asked for.
        closed: How often the sitting was ended.
    """

    latency_ms: Mapping[str, float] = field(default_factory=dict)
    noise: float = 0.01
    drift: float = 0.0
    void: Mapping[int, str] = field(default_factory=dict)
    breaks_at: int | None = None
    seed: int = 0
    outputs: Mapping[str, np.ndarray] = field(default_factory=dict)
    ran: int = 0
    closed: int = 0

    def probe(self) -> DeviceStatus:
        return DeviceStatus(reachable=True, facts={"model": NAME, "emulated": "fake"}, targets=exporter_names())

    def run(
        self, artifact: Artifact, folder: Path, inputs: Arrays, plan: Plan
    ) -> tuple[tuple[Block, ...], dict[str, np.ndarray]]:
        """Blocks as the settings have them.

        Raises:
            DeviceError: At block ``breaks_at``.
            UsageError: An input is lacking, or the plan has no block.
        """
        samples = len(next(iter(checked_inputs("fake", artifact, inputs, plan, exporter_names()).values())))
        blocks = tuple(self._block(artifact, plan) for _ in range(plan.blocks))
        return blocks, {spec.name: self._output(spec, samples) for spec in artifact.outputs}

    def close(self) -> None:
        self.closed += 1

    def _block(self, artifact: Artifact, plan: Plan) -> Block:
        index, self.ran = self.ran, self.ran + 1
        if index == self.breaks_at:
            raise DeviceError(f"{artifact.path} on fake: the device went away at block {index}, as it was told to")
        seed = hashlib.sha256(f"{self.seed} {index} {artifact.target} {artifact.precision}".encode()).digest()
        random = np.random.default_rng(list(seed))
        median = self.latency_ms.get(artifact.precision, 1.0) * (1 + self.drift) ** index
        drawn = median * np.exp(self.noise * random.standard_normal(plan.warmup_runs + plan.min_runs))
        return Block(
            runtime_load_ms=0.0,
            model_load_ms=0.0,
            first_inference_ms=2 * median,
            warmup_ms=tuple(drawn[: plan.warmup_runs].tolist()),
            latency_ms=tuple(drawn[plan.warmup_runs :].tolist()),
            peak_memory_bytes=None,
            converged=True,
            conditions={"runtime": "fake", "emulated": "fake", "threads": str(plan.threads)},
            void=self.void.get(index, ""),
        )

    def _output(self, spec: TensorSpec, samples: int) -> np.ndarray:
        if spec.name in self.outputs:
            return self.outputs[spec.name][:samples]
        return np.zeros((samples, *(max(1, size) for size in spec.shape[1:])), dtype=spec.dtype)


class _Fake:
    settings = FakeSettings

    def __call__(self, profile: Profile, settings: FakeSettings) -> FakeDevice:
        return FakeDevice(**settings.model_dump())


DEVICE = _Fake()

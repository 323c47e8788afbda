"""The state of a training: all that must be kept to go on bit for bit, and how many processes put it together."""

from __future__ import annotations

import io
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from edgekd import processes
from edgekd.distillation.parallel import like, whole
from edgekd.errors import CacheError
from edgekd.store import atomic_write

__all__ = ["Progressed", "load_checkpoint", "save_checkpoint", "seed_all"]


@dataclass
class Progressed:
    """How far a training is, and what it has seen of its loss.

    Attributes:
        step: Batches that are done.
        sums, counted: Of the parts of the loss in this epoch.
        history: Means of the epochs that are done.
        shares, looks: Of each part in the gradient, in this epoch.
    """

    step: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    counted: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    shares: dict[str, float] = field(default_factory=dict)
    looks: int = 0

    def see_shares(self, shares: dict[str, float]) -> None:
        for name, share in shares.items():
            self.shares[name] = self.shares.get(name, 0.0) + share
        self.looks += 1

    def add(self, parts: dict[str, float]) -> None:
        for key, value in parts.items():
            self.sums[key] = self.sums.get(key, 0.0) + value
        self.counted += 1
        self.step += 1

    def end_epoch(self) -> None:
        means = {key: value / self.counted for key, value in self.sums.items()}
        shares = {f"gradient share of {name}": share / self.looks for name, share in self.shares.items()}
        self.history.append(means | shares)
        self.sums, self.counted, self.shares, self.looks = {}, 0, {}, 0


def seed_all(seed: int) -> None:
    """torch's generators, Python's and NumPy's; each process draws its own numbers, the main one those of one process.

    What depends on draws while training (dropout) is therefore alike on 1 and on 2 processes, but not the same.
    """
    own = (seed + processes.rank() * 1_000_003) & 0xFFFFFFFF
    torch.manual_seed(own)
    random.seed(own)
    np.random.seed(own)


def save_checkpoint(
    path: Path, student: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, state: Progressed
) -> None:
    """Put together what all processes have; the main one writes it. All must call this together."""
    content = {
        "student": whole(student.state_dict()),
        "optimizer": whole(optimizer.state_dict()),
        "scaler": scaler.state_dict(),
        "generators": processes.collected(_generators()),
        "state": dict(vars(state)),
    }
    if processes.is_main():
        buffer = io.BytesIO()
        torch.save(content, buffer)
        atomic_write(path, buffer.getvalue())


def load_checkpoint(
    path: Path, student: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler
) -> Progressed:
    """Go on where a training stood, or start. All must call this together.

    With as many processes as before it goes on bit for bit; it goes on with another number as well, to rounding, and
    each process beyond them draws afresh.

    Raises:
        CacheError: The file is damaged.
    """
    if not processes.agreed(path.is_file()):
        return Progressed()
    try:
        content = torch.load(path, weights_only=True)
    except Exception as error:
        raise CacheError(f"checkpoint {path} is damaged; remove it to train from the start") from error
    weights = student.state_dict()
    student.load_state_dict({name: like(value, weights[name]) for name, value in content["student"].items()})
    moments = content["optimizer"]
    for number, parameter in enumerate(p for group in optimizer.param_groups for p in group["params"]):
        own = moments["state"].get(number, {})
        own |= {name: like(value, parameter) for name, value in own.items()}
    optimizer.load_state_dict(moments)
    scaler.load_state_dict(content["scaler"])
    if processes.rank() < len(content["generators"]):
        _set_generators(content["generators"][processes.rank()])
    return Progressed(**content["state"])


def _generators() -> dict[str, Any]:
    """States of all generators that a student or a loss may draw from, as what ``torch.load`` reads safely."""
    name, keys, *rest = np.random.get_state(legacy=True)
    device = processes.device()
    return {
        "torch": torch.get_rng_state(),
        "device": None if device.type == "cpu" else torch.get_device_module(device).get_rng_state(),
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.asarray(keys, np.int64)), *rest),
    }


def _set_generators(states: dict[str, Any]) -> None:
    torch.set_rng_state(states["torch"])
    if states["device"] is not None:
        torch.get_device_module(processes.device()).set_rng_state(states["device"])
    random.setstate(states["python"])
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))

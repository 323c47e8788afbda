"""The training loop, read from top to bottom. Killed at any step, it goes on from its checkpoint bit for bit.

Everything random comes from a seed: the order of an epoch from (seed, epoch), a view from its stored seed, dropout
from torch's generator, whose state lies in the checkpoint. The learning rate is a function of the step alone.
"""

from __future__ import annotations

import io
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from edgekd.capture import TeacherCache
from edgekd.data import Split
from edgekd.errors import CacheError, NumericalError
from edgekd.features import bare_student
from edgekd.losses import gradient_shares
from edgekd.order import Order
from edgekd.outputs import StudentOutputs, TeacherOutputs, student_outputs
from edgekd.protocols import Progress
from edgekd.store import atomic_write
from edgekd.truth import NO_LABEL, Truth
from edgekd.views import Views, view_batch
from edgekd.windows import counted_positions

__all__ = ["Objective", "OnEpoch", "TrainingPlan", "learning_rate_at", "train"]

CHECKPOINT_EVERY_S = 20.0

SHARES_EVERY = 25
"""Steps between two looks at how much each part of the loss pulls."""

Objective = Callable[[StudentOutputs, TeacherOutputs, Truth], dict[str, Tensor]]
"""(the student's outputs, the teacher's, ground truth) to the parts, by name, whose sum is minimised."""

OnEpoch = Callable[[int, Mapping[str, float]], None]
"""(epochs that are done, means of the last) after each epoch; what it raises ends the training."""


@dataclass(frozen=True)
class TrainingPlan:
    """How long and how fast.

    Attributes:
        epochs: Each shows as many views as there are samples, and every sample once in as many epochs as it shows
            views of each side by side.
        learning_rate: The peak; linear warm-up over ``warmup_share`` of the steps, then a cosine to zero.
        seed: Of the order of samples and of dropout.
        views_per_decode: Views of a sample side by side; see :class:`edgekd.order.Order`.
        labelled_only: Show only samples with a label, the more often, so that the steps are as many.
    """

    epochs: int
    batch_size: int
    learning_rate: float
    weight_decay: float
    warmup_share: float
    seed: int
    views_per_decode: int = 1
    labelled_only: bool = False


def train(
    student: nn.Module,
    split: Split,
    cache: TeacherCache,
    views: Views,
    objective: Objective,
    plan: TrainingPlan,
    checkpoint: Path,
    progress: Progress,
    name: str,
    on_epoch: OnEpoch | None = None,
) -> list[dict[str, float]]:
    """Train in place with AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101).

    Args:
        student: Freshly initialised; takes the split's inputs in order and returns logits (batch, classes), or
            (batch, positions, vocabulary) for windows of tokens, or :class:`edgekd.outputs.StudentOutputs`.
        split: Samples, labelled or not.
        cache: The teacher's outputs and what replays the views, for the same samples.
        views: How they are made.
        objective: What is minimised.
        checkpoint: Where the state is kept until training is done; only read if it is of the same work.
        name: For the progress.

    Returns:
        Mean loss, its parts, and how much of the gradient each part makes up, epoch by epoch.

    Raises:
        NumericalError: The loss is NaN or infinite; the last checkpoint stays.
    """
    from accelerate import Accelerator

    accelerator = Accelerator()
    assert split.labels is not None
    rows, places, labels = cache.rows(split.ids), cache.places(split), torch.from_numpy(split.labels)
    known = (split.labels != NO_LABEL).reshape(len(split), -1).any(axis=1)
    pool = np.flatnonzero(known) if plan.labelled_only else np.arange(len(split))
    order = Order(pool, split.ids[pool], cache.views, plan.views_per_decode, plan.seed)
    optimizer = torch.optim.AdamW(student.parameters(), lr=plan.learning_rate, weight_decay=plan.weight_decay)
    student, optimizer = accelerator.prepare(student, optimizer)
    steps = math.ceil(len(split) / plan.batch_size)
    torch.manual_seed(plan.seed)
    state = _load(checkpoint, accelerator.unwrap_model(student), optimizer)
    progress.start(name, plan.epochs * steps, state.step)
    saved_at = time.monotonic()
    student.train()
    while state.step < plan.epochs * steps:
        epoch, step = divmod(state.step, steps)
        begin = epoch * len(split) + step * plan.batch_size
        batch, turns = order.draws(begin, min(begin + plan.batch_size, (epoch + 1) * len(split)))
        own = slice(accelerator.process_index, None, accelerator.num_processes)
        batch, turns = batch[own], turns[own]
        wanted = labels[batch]
        counted = counted_positions(wanted.numpy()) if cache.positions else None
        stored = cache.read(rows[batch], turns, counted)
        partners = None if stored.partners is None else places[stored.partners]
        shown = view_batch(split, batch, stored.seeds, views, partners)
        mixed_in = None if partners is None else labels[partners]
        inputs = [x.to(accelerator.device) for x in shown.inputs]
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(state.step, plan.epochs * steps, plan)
        outputs = student_outputs(student(*inputs))
        device = outputs.logits.device
        if counted is not None:  # the positions that count, as if each were a sample: (tokens, vocabulary)
            chosen = torch.from_numpy(counted)
            outputs, wanted = replace(outputs, logits=outputs.logits[chosen.to(device)]), wanted[chosen]
        truth = Truth(wanted, mixed_in, shown.shares)
        parts = objective(outputs, stored.outputs.to(device), truth.to(device))
        loss = sum(parts.values(), start=torch.zeros((), device=device))
        if not math.isfinite(float(loss.detach())):
            raise NumericalError(
                f"{name}: the loss is {float(loss.detach())} in epoch {epoch + 1}, step {step + 1}; "
                "a lower distill.learning_rate or higher temperature may work"
            )
        if len(parts) > 1 and step % SHARES_EVERY == 0:
            state.see_shares(gradient_shares(parts, _pulled(accelerator.unwrap_model(student), outputs)))
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()
        state.add({"loss": float(loss.detach()), **{name: float(part.detach()) for name, part in parts.items()}})
        progress.advance(1, f"loss {float(loss.detach()):.3f}")
        if step + 1 == steps:
            state.end_epoch()
            if on_epoch is not None:
                on_epoch(epoch + 1, state.history[-1])
        if time.monotonic() - saved_at > CHECKPOINT_EVERY_S and accelerator.is_main_process:
            _save(checkpoint, accelerator.unwrap_model(student), optimizer, state)
            saved_at = time.monotonic()
    progress.finish()
    return state.history


def _pulled(student: nn.Module, outputs: StudentOutputs) -> list[Tensor]:
    """What every part of the loss pulls at."""
    if not outputs.features:
        return [outputs.logits]
    return [weight for weight in bare_student(student).parameters() if weight.requires_grad]


def learning_rate_at(step: int, total: int, plan: TrainingPlan) -> float:
    """Linear warm-up, then half a cosine to zero (Loshchilov & Hutter 2017, arXiv:1608.03983)."""
    warmup = int(total * plan.warmup_share)
    if step < warmup:
        return plan.learning_rate * (step + 1) / warmup
    return plan.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


@dataclass
class _State:
    """What a checkpoint holds besides weights, moments and the generator."""

    step: int
    sums: dict[str, float]
    counted: int
    history: list[dict[str, float]]
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


def _save(path: Path, student: nn.Module, optimizer: Any, state: _State) -> None:
    buffer = io.BytesIO()
    content = {
        "student": student.state_dict(),
        "optimizer": optimizer.state_dict(),
        "generator": torch.get_rng_state(),
        "state": dict(vars(state)),
    }
    torch.save(content, buffer)
    atomic_write(path, buffer.getvalue())


def _load(path: Path, student: nn.Module, optimizer: Any) -> _State:
    if not path.is_file():
        return _State(0, {}, 0, [])
    try:
        content = torch.load(path, weights_only=True)
    except Exception as error:
        raise CacheError(f"checkpoint {path} is damaged; remove it to train from the start") from error
    student.load_state_dict(content["student"])
    optimizer.load_state_dict(content["optimizer"])
    torch.set_rng_state(content["generator"])
    return _State(**content["state"])

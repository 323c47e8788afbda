"""The training loop, read from top to bottom. Killed at any step, it goes on from its checkpoint bit for bit.

Everything random comes from a seed: the order of an epoch from (seed, epoch), a view from its stored seed, dropout
from torch's generator, whose state lies in the checkpoint. The learning rate is a function of the step alone.

A batch is that of all processes and of all its pieces, one after another (``accumulate``). A piece is cut into one
slice per process, and every loss is taken over the whole piece; of windows of tokens over the slice, by its share of
the tokens. So the number of processes does not change what is learned; that of pieces changes what batch norms and
losses that relate samples (``dist``) see, which is one piece at a time.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from edgekd import processes
from edgekd.buffers import buffers_kept
from edgekd.data.order import Order
from edgekd.data.split import Split
from edgekd.data.truth import NO_LABEL, Truth
from edgekd.data.views import Views, view_batch
from edgekd.data.windows import counted_positions
from edgekd.distillation.checkpoint import load_checkpoint, save_checkpoint, seed_all
from edgekd.distillation.features import bare_student
from edgekd.distillation.layout import lay_channels_last
from edgekd.distillation.losses import LABELS, gradient_shares
from edgekd.distillation.parallel import accumulating, settle, shared_norms, spread
from edgekd.errors import NumericalError, UsageError
from edgekd.protocols import Progress
from edgekd.teachers.outputs import StudentOutputs, TeacherOutputs, student_outputs
from edgekd.teachers.teacher_cache import TeacherCache

__all__ = ["Objective", "OnEpoch", "TrainingPlan", "learning_rate_at", "steps_of", "train"]

CHECKPOINT_EVERY_S = 20.0

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

FIRST_SCALE = 2.0**10
"""Of the loss in fp16; it grows by itself. From torch's 2¹⁶ on, a short training loses its first steps to overflows."""

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
        batch_size: Of one step: over all processes and all pieces.
        learning_rate: The peak; linear warm-up over ``warmup_share`` of the steps, then a cosine to zero.
        seed: Of the order of samples and of dropout.
        views_per_decode: Views of a sample side by side; see :class:`edgekd.data.order.Order`.
        labelled_only: Show only samples with a label, the more often, so that the steps are as many.
        precision: Of activations; weights and moments stay float32. ``fp16`` scales the loss.
        accumulate: Pieces that a batch is cut into, one after another, to save memory.
        compile: Compile the student (``torch.compile``).
        shard: Keep a part of the student on each process; see :func:`edgekd.distillation.parallel.spread`.
    """

    epochs: int
    batch_size: int
    learning_rate: float
    weight_decay: float
    warmup_share: float
    seed: int
    views_per_decode: int = 1
    labelled_only: bool = False
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    accumulate: int = 1
    compile: bool = False
    shard: bool = False


@buffers_kept()
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
    learned_from: np.ndarray | None = None,
) -> list[dict[str, float]]:
    """Train in place with AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101); of several processes, all call this.

    Args:
        student: Freshly initialised, the same on each process; takes the split's inputs in order and returns logits
            (batch, classes), or (batch, positions, vocabulary) for windows of tokens, or
            :class:`edgekd.teachers.outputs.StudentOutputs`.
        split: Samples, labelled or not.
        cache: The teacher's outputs and what replays the views, for the same samples.
        views: How they are made.
        objective: What is minimised.
        checkpoint: Where the state is kept until training is done; only read if it is of the same work.
        name: For the progress.
        learned_from: Positions of the samples that are shown; all of the split by default.

    Returns:
        Mean loss, its parts, and how much of the gradient each part makes up, epoch by epoch.

    Raises:
        NumericalError: The loss is NaN or infinite; the last checkpoint stays.
        UsageError: The student cannot be kept in shards.
    """
    if plan.shard and bare_student(student) is not student:
        raise UsageError("distill.shard = true does not go with features or embeddings; leave out one of them")
    assert split.labels is not None
    lessons = _Lessons(split, cache, views, objective, plan, torch.from_numpy(split.labels))
    everyone = np.arange(len(split)) if learned_from is None else learned_from
    pool = everyone[split.labelled[everyone]] if plan.labelled_only else everyone
    order = Order(pool, split.ids[pool], cache.views, plan.views_per_decode, plan.seed)
    student.train()
    if processes.device().type == "cpu" and not plan.shard and not plan.compile:  # a compiler lays out by itself
        lay_channels_last(student, view_batch(split, pool[:2], np.zeros(2, np.int64), replace(views, mix=None)).inputs)
    trained, called = spread(student, plan.shard, plan.compile)
    optimizer = torch.optim.AdamW(
        trained.parameters(), lr=plan.learning_rate, weight_decay=plan.weight_decay, fused=True
    )
    scaler = torch.amp.GradScaler(processes.device().type, FIRST_SCALE, enabled=plan.precision == "fp16")
    samples = len(everyone)
    steps = steps_of(samples, plan.batch_size)
    seed_all(plan.seed)
    state = load_checkpoint(checkpoint, trained, optimizer, scaler)
    progress.start(name, plan.epochs * steps, state.step)
    saved_at = time.monotonic()
    with shared_norms(trained) as norms:
        while state.step < plan.epochs * steps:
            epoch, step = divmod(state.step, steps)
            begin = epoch * samples + step * plan.batch_size
            end = begin + plan.batch_size if step + 1 < steps else (epoch + 1) * samples
            batch, turns = order.draws(begin, end)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate_at(state.step, plan.epochs * steps, plan)
            optimizer.zero_grad()
            means: dict[str, float] = {}
            for piece, last in _pieces(len(batch), plan.accumulate):
                own, sizes = processes.share_of(piece.stop - piece.start)
                norms.counts = sizes[processes.rank()] > 0
                with accumulating(called, last):
                    outputs, parts, wanted = lessons.learned(called, batch[piece], turns[piece], own, sizes)
                    parts = _weighted(parts, wanted, lessons.labels[batch], norms.counts)
                    if len(parts) > 1 and last and step % SHARES_EVERY == 0:
                        state.see_shares(gradient_shares(parts, _pulled(trained, outputs)))
                    # Gradients are averaged over the processes, each of which has those of its own samples only.
                    scaler.scale(sum(parts.values()) * processes.count()).backward()
                values = {key: float(part.detach()) for key, part in parts.items()}
                means = {key: means.get(key, 0.0) + value for key, value in values.items()}
            if cache.positions:
                means = processes.added_up(means)
            loss = sum(means.values())
            if not math.isfinite(loss):
                raise NumericalError(
                    f"{name}: the loss is {loss} in epoch {epoch + 1}, step {step + 1}; "
                    "a lower distill.learning_rate or higher temperature may work"
                )
            scaler.step(optimizer)
            scaler.update()
            state.add({"loss": loss, **means})
            progress.advance(1, f"loss {loss:.3f}")
            if step + 1 == steps:
                state.end_epoch()
                if on_epoch is not None:
                    on_epoch(epoch + 1, state.history[-1])
            if processes.agreed(time.monotonic() - saved_at > CHECKPOINT_EVERY_S):
                save_checkpoint(checkpoint, trained, optimizer, scaler, state)
                saved_at = time.monotonic()
    settle(student, trained)
    progress.finish()
    return state.history


@dataclass(frozen=True)
class _Lessons:
    """What a student learns from, a piece of a batch at a time: samples, their views, the teacher's word on these."""

    split: Split
    cache: TeacherCache
    views: Views
    objective: Objective
    plan: TrainingPlan
    labels: Tensor

    @cached_property
    def rows(self) -> np.ndarray:
        """Where the cache has each sample."""
        return self.cache.rows(self.split.ids)

    @cached_property
    def places(self) -> np.ndarray:
        """Where the split has each sample of the cache."""
        return self.cache.places(self.split)

    def learned(
        self, student: Callable[..., Any], samples: np.ndarray, turns: np.ndarray, own: slice, sizes: list[int]
    ) -> tuple[StudentOutputs, dict[str, Tensor], Tensor]:
        """One piece, of which this process shows the student its own slice.

        Args:
            samples, turns: Positions in the split and views of the whole piece.
            own, sizes: This process's slice, and how many samples each process has.

        Returns:
            The student's outputs, the parts of the loss, and the labels of what the loss is taken over: of the whole
            piece, or of this slice where samples are windows of tokens.
        """
        windows, device, precision = self.cache.positions > 0, processes.device(), self.plan.precision
        compared, seen = (samples[own], turns[own]) if windows else (samples, turns)
        labels = wanted = self.labels[compared]
        counted = counted_positions(labels.numpy()) if windows else None
        stored = self.cache.read(self.rows[compared], seen, counted)
        mine = slice(None) if windows else own
        partners = None if stored.partners is None else self.places[stored.partners]
        partner = None if partners is None else partners[mine]
        shown = view_batch(self.split, samples[own], stored.seeds[mine], self.views, partner)
        with torch.autocast(device.type, _DTYPES[precision], enabled=precision != "fp32"):
            outputs = student_outputs(student(*(x.to(device) for x in shown.inputs)))
        if counted is None:
            outputs = _of_all(outputs, sizes)
            shares = None if shown.shares is None else processes.gathered(shown.shares, sizes)
        else:  # the positions that count, as if each were a sample: (tokens, vocabulary)
            chosen, shares = torch.from_numpy(counted), shown.shares
            outputs = replace(outputs, logits=outputs.logits[chosen.to(device)].float())
            wanted = labels[chosen]
        truth = Truth(wanted, None if partners is None else self.labels[partners], shares)
        return outputs, self.objective(outputs, stored.outputs.to(device), truth.to(device)), labels


def steps_of(samples: int, batch_size: int) -> int:
    """Of an epoch; a last sample that would be alone, which batch norms cannot take, goes with the batch before it."""
    whole, left = divmod(samples, batch_size)
    return max(1, whole + (left > 1))


def _pieces(samples: int, pieces: int) -> Iterator[tuple[slice, bool]]:
    """A batch in pieces that differ by at most one sample, and whether a piece is the last; none has a lone sample."""
    count = max(1, min(pieces, samples // 2))
    edges = [samples * number // count for number in range(count + 1)]
    for number in range(count):
        yield slice(edges[number], edges[number + 1]), number + 1 == count


def _of_all(outputs: StudentOutputs, sizes: list[int]) -> StudentOutputs:
    """Outputs of all processes, in float32."""
    features = {name: processes.gathered(feature.float(), sizes) for name, feature in outputs.features.items()}
    return StudentOutputs(processes.gathered(outputs.logits.float(), sizes), features)


def _weighted(parts: dict[str, Tensor], piece: Tensor, batch: Tensor, counts: bool) -> dict[str, Tensor]:
    """Losses of a piece by its share in the mean over a batch: of what is labelled, or of all samples.

    Args:
        piece, batch: Their labels, (samples,), or (samples, positions) of windows, of which only what is labelled
            counts.
        counts: False when windows are there only to keep step.
    """
    labelled = float((piece != NO_LABEL).sum()) / max(1.0, float((batch != NO_LABEL).sum()))
    share = len(piece) / len(batch)
    if batch.ndim == 2:
        labelled = share = labelled * counts
    return {name: (labelled if name == LABELS and share < 1 else share) * part for name, part in parts.items()}


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

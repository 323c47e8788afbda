"""Random-sampled sparse logits (RS-KD, Anshumann et al. 2025, arXiv:2503.16870): draws stand for a distribution.

N tokens are drawn with replacement from the teacher's distribution at T = 1, and kept with how often each came:
drawn / N is an unbiased estimate of every probability, so the gradient of ``kd`` (forward KL, linear in them) is in
expectation that of the whole distribution. The largest k do not have that: they teach a sharper one.

A record has a fixed size, so it has room for N // 4 different tokens (at least 8): 12 at N = 50, where a language
model's draws fall on about 12 on average. Where there are more, the room is drawn for again, without bias: with the τ
for which Σ min(1, drawn / τ) is the room, a token drawn at least τ times is kept as it is, and any other with the
probability drawn / τ and then counts τ (systematic sampling, Madow 1949; weights of Horvitz and Thompson 1952). Each
expectation stays what it was, and the sum of all weights is N exactly, so τ need not be stored: a count of 0 means an
equal part of the draws that the other counts leave over.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from edgekd.errors import UsageError

__all__ = ["Sampled", "SampledTargets"]

NOTHING = -80.0
"""Log of no mass: an exponential of it is below what float32 can add to 1, and no product with it is NaN."""


@dataclass(frozen=True)
class SampledTargets:
    """Estimated probabilities of a few classes; all others 0.

    Attributes:
        classes: int64, (batch, room); repeats of the first where nothing is.
        shares: float32, (batch, room); they add up to 1.
    """

    classes: Tensor
    shares: Tensor

    def paired(self, student: Tensor, labels: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
        """As of :class:`edgekd.teachers.targets.Targets`: (batch, room + 1), all other classes of the student last.

        What is returned are log-probabilities; a share of 0 is ``NOTHING`` on both sides.
        """
        if temperature != 1:
            raise UsageError(
                f"this teacher cache holds draws of the teacher's distribution at T = 1, not at T = {temperature:g}; "
                'take temperature = 1, or [teacher] codec = "top50"'
            )
        log_student = F.log_softmax(student, dim=1).gather(1, self.classes)
        drawn = self.shares > 0
        log_student = log_student.masked_fill(~drawn, NOTHING)
        rest = 1 - log_student.exp().sum(1, keepdim=True)
        log_rest = rest.clamp(min=torch.finfo(rest.dtype).eps).log()
        log_shares = self.shares.clamp(min=1e-30).log().masked_fill(~drawn, NOTHING)
        among = (self.classes == labels[:, None]) & drawn
        place = torch.where(among.any(1), among.int().argmax(1), self.classes.shape[1])
        place = torch.where(labels < 0, labels, place)
        return (
            torch.cat([log_student, log_rest], dim=1),
            torch.cat([log_shares, torch.full_like(log_rest, NOTHING)], dim=1),
            place,
        )

    def top_class(self) -> Tensor:
        """The one that was drawn most often."""
        return self.classes.gather(1, self.shares.argmax(1, keepdim=True))[:, 0]

    def errors(self, logits: Tensor) -> Tensor:
        """Of draws there is no rounding to tell: 0 where the teacher gives every class that was drawn any mass."""
        log_p = F.log_softmax(logits, dim=1).gather(1, self.classes)
        return (log_p < NOTHING).float() * (self.shares > 0)

    def to(self, device: torch.device) -> SampledTargets:
        return SampledTargets(self.classes.to(device), self.shares.to(device))


@dataclass(frozen=True)
class Sampled:
    """See the module.

    Attributes:
        draws: N, at most :data:`edgekd.recipes.recipe.MOST_DRAWS`.
    """

    draws: int

    @property
    def name(self) -> str:
        return f"sampled{self.draws}"

    @property
    def room(self) -> int:
        """Different classes that a record holds."""
        return min(self.draws, max(8, self.draws // 4))

    def fields(self, classes: int) -> list[tuple[str, str, tuple[int, ...]]]:
        index = "<u2" if classes <= 2**16 else "<u4"
        return [("classes", index, (self.room,)), ("drawn", "u1", (self.room,))]

    def encode(self, logits: np.ndarray, records: np.ndarray) -> None:
        """Fill the fields; the draws of a record follow from its ``seed`` alone."""
        reach = np.cumsum(np.exp(logits), axis=1, dtype=np.float64)
        for row, seed in enumerate(records["seed"].tolist()):
            generator = np.random.default_rng(seed)
            total = reach[row, -1]
            places = np.searchsorted(reach[row], generator.random(self.draws) * total, side="right")
            classes, drawn = np.unique(np.minimum(places, reach.shape[1] - 1), return_counts=True)
            if len(classes) > self.room:
                classes, drawn = _kept(classes, drawn, self.room, generator.random())
            records["classes"][row] = classes[0]  # where nothing is
            records["classes"][row, : len(classes)] = classes
            records["drawn"][row, : len(classes)] = drawn

    def decode(self, records: np.ndarray) -> SampledTargets:
        drawn = records["drawn"].astype(np.float32)
        left_over = self.draws - drawn.sum(axis=1, keepdims=True)
        light = drawn == 0
        drawn += light * left_over / np.maximum(light.sum(axis=1, keepdims=True), 1)
        return SampledTargets(
            torch.from_numpy(records["classes"].astype(np.int64)), torch.from_numpy(drawn / self.draws)
        )


def _kept(classes: np.ndarray, drawn: np.ndarray, room: int, start: float) -> tuple[np.ndarray, np.ndarray]:
    """As many classes as there is room for, without bias; a count of 0 for those that share what is left over.

    Args:
        start: Uniform in [0, 1): where systematic sampling begins.
    """
    order = np.argsort(-drawn, kind="stable")
    classes, drawn = classes[order], drawn[order]
    whole = 0  # so many are kept as they are
    rest = int(drawn.sum())
    while whole < room and drawn[whole] * (room - whole) >= rest:  # at least τ = rest / (room - whole)
        rest -= int(drawn[whole])
        whole += 1
    slots = room - whole  # at least 1: the last one would have to outweigh itself and all that has no room
    ends = np.cumsum(drawn[whole:]) * (slots / rest)
    light = np.searchsorted(ends, np.arange(slots) + start, side="right")
    light = np.minimum(light, len(ends) - 1)
    kept = np.concatenate([np.arange(whole), whole + light])
    return classes[kept], np.where(np.arange(room) < whole, drawn[kept], 0)

"""What the teacher said of a view: how a cache stores it, and how a loss compares a student with it.

==============  ========================================================  =======================  ====================
codec           stored for each view, beside the seed (4 bytes)           bytes at 1,000 classes   losses
==============  ========================================================  =======================  ====================
``dense-f16``   all logits less their largest                             2,004                    all
``dense-u8``    the same in 256 even steps, and the size of a step        1,008                    all
``top<k>``      the k largest, their classes, and the log of the sum of   56 at k = 10             all but those that
                exponentials of all logits at T = 1, 2 and 4                                       compare classes over
                                                                                                   the batch
``listed<k>``   the same, with the sum at T = 1 alone: all that an        48 at k = 10             kd … at T = 1
                endpoint says (:mod:`edgekd.teachers.listed`)
``vector-f16``  an embedding as it is                                      2,004                    mse, cosine, own
``sampled<N>``  classes of N draws at T = 1, and how often each came      40 at N = 50             kd at T = 1
                (:mod:`edgekd.teachers.sampled`)
==============  ========================================================  =======================  ====================

Top-k is exact at the temperatures whose sums are stored: the mass of the other classes is known and goes into one more
bucket, the *ghost*. At another temperature it is not known, and is refused: renormalising what is left, or spreading
it evenly, teaches another distribution (Anshumann et al. 2025, arXiv:2503.16870).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from edgekd.errors import NumericalError, UsageError
from edgekd.recipes.recipe import MOST_DRAWS, TAIL_TEMPERATURES, VECTOR_CODEC
from edgekd.teachers.sampled import Sampled

__all__ = ["PLAIN_CODEC", "Codec", "DenseTargets", "Targets", "TopTargets", "VectorTargets", "codec_of", "shown"]

PLAIN_CODEC = "dense-f16"
"""For samples that are only judged: few, and divergences over all classes are wanted."""

_STEPS = 255


class Targets(Protocol):
    """The teacher's outputs for a batch."""

    def paired(self, student: Tensor, labels: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
        """Logits of student and teacher over the same classes, and the labels among these: what a loss takes.

        Args:
            student: Logits, (batch, classes).
            labels: int64, (batch,); -1 for none stays so.
            temperature: That the loss will soften with.

        Raises:
            UsageError: The cache does not know the teacher's distribution at this temperature.
        """

    def top_class(self) -> Tensor:
        """int64, (batch,)."""

    def errors(self, logits: Tensor) -> Tensor:
        """How far logits less their largest, (batch, classes), are from what is stored, as a share of it (at least 1).

        What the codec's rounding explains is taken off, but for that of f16.
        """

    def to(self, device: torch.device) -> Targets:
        """The same, there."""


@dataclass(frozen=True)
class DenseTargets:
    """All classes.

    Attributes:
        logits: Less their largest, (batch, classes).
        step: What they were rounded to whole multiples of, (batch, 1); None for f16.
    """

    logits: Tensor
    step: Tensor | None = None

    def paired(self, student: Tensor, labels: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
        return student, self.logits, labels

    def top_class(self) -> Tensor:
        return self.logits.argmax(dim=1)

    def errors(self, logits: Tensor) -> Tensor:
        apart = (logits - self.logits).abs()
        if self.step is not None:
            apart = (apart - self.step).clamp(min=0)
        return apart / self.logits.abs().clamp(min=1)

    def to(self, device: torch.device) -> DenseTargets:
        return DenseTargets(self.logits.to(device), None if self.step is None else self.step.to(device))


@dataclass(frozen=True)
class TopTargets:
    """The largest classes and the mass of the others.

    Attributes:
        classes: int64, (batch, k), the largest first.
        logits: Theirs, less the largest, (batch, k).
        log_sums: Log of the sum of exponentials of all logits (less the largest) by T, each (batch,), by T.
    """

    classes: Tensor
    logits: Tensor
    log_sums: Mapping[float, Tensor]

    def paired(self, student: Tensor, labels: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
        """As of :class:`Targets`: (batch, k + 1), the ghost last.

        A softmax at T makes the probabilities of what is returned; it need not be taken over all classes before.
        """
        if temperature not in self.log_sums:
            raise UsageError(
                f"this teacher cache knows the mass outside its top classes at T = "
                f"{', '.join(f'{known:g}' for known in self.log_sums)}, not at T = {temperature:g}; "
                'take one of these, or [teacher] codec = "dense-f16"'
            )
        log_head = self.logits / temperature - self.log_sums[temperature][:, None]
        softened = student / temperature
        ghost = torch.logsumexp(softened.scatter(1, self.classes, -torch.inf), dim=1, keepdim=True)
        pairs = (
            torch.cat([softened.gather(1, self.classes), ghost], dim=1),
            torch.cat([log_head, _log_rest(log_head)], dim=1),
        )
        among = self.classes == labels[:, None]
        place = torch.where(among.any(1), among.int().argmax(1), self.classes.shape[1])
        place = torch.where(labels < 0, labels, place)
        return pairs[0] * temperature, pairs[1] * temperature, place

    def top_class(self) -> Tensor:
        return self.classes[:, 0]

    def errors(self, logits: Tensor) -> Tensor:
        return (logits.gather(1, self.classes) - self.logits).abs() / self.logits.abs().clamp(min=1)

    def to(self, device: torch.device) -> TopTargets:
        sums = {temperature: log_sum.to(device) for temperature, log_sum in self.log_sums.items()}
        return TopTargets(self.classes.to(device), self.logits.to(device), sums)


def _log_rest(log_probabilities: Tensor) -> Tensor:
    """Log of the mass that is missing to one, (batch, 1); rounding to f16 can make it a hair negative."""
    rest = 1 - log_probabilities.exp().sum(1, keepdim=True)
    return rest.clamp(min=torch.finfo(rest.dtype).eps).log()


@dataclass(frozen=True)
class VectorTargets:
    """Embeddings, which say nothing of classes.

    Attributes:
        vectors: (batch, width).
    """

    vectors: Tensor

    def paired(self, student: Tensor, labels: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
        raise UsageError("this teacher cache holds embeddings, and a loss over classes finds none; mse and cosine do")

    def top_class(self) -> Tensor:
        """Its largest number: of no meaning, but the same when the teacher says the same."""
        return self.vectors.argmax(dim=1)

    def errors(self, logits: Tensor) -> Tensor:
        return (logits - self.vectors).abs() / self.vectors.abs().clamp(min=1)

    def to(self, device: torch.device) -> VectorTargets:
        return VectorTargets(self.vectors.to(device))


class Codec(Protocol):
    """How one view's logits lie in a record."""

    @property
    def name(self) -> str: ...

    def fields(self, classes: int) -> list[tuple[str, str, tuple[int, ...]]]:
        """Of the record, as NumPy writes them."""

    def encode(self, logits: np.ndarray, records: np.ndarray) -> None:
        """Fill the fields; from :func:`shown`, float32 (records, classes)."""

    def decode(self, records: np.ndarray) -> Targets:
        """The opposite, as far as it goes."""


@dataclass(frozen=True)
class DenseHalf:
    """See the module; f16 is exact at the head, where it matters."""

    name: str = "dense-f16"

    def fields(self, classes: int) -> list[tuple[str, str, tuple[int, ...]]]:
        return [("logits", "<f2", (classes,))]

    def encode(self, logits: np.ndarray, records: np.ndarray) -> None:
        records["logits"] = np.maximum(logits, np.finfo(np.float16).min)

    def decode(self, records: np.ndarray) -> DenseTargets:
        return DenseTargets(torch.from_numpy(records["logits"].astype(np.float32)))


@dataclass(frozen=True)
class VectorHalf:
    """See the module."""

    name: str = VECTOR_CODEC

    def fields(self, classes: int) -> list[tuple[str, str, tuple[int, ...]]]:
        return [("vector", "<f2", (classes,))]

    def encode(self, logits: np.ndarray, records: np.ndarray) -> None:
        largest = float(np.abs(logits).max(initial=0))
        if largest > float(np.finfo(np.float16).max):
            raise NumericalError(f"the embedding reaches {largest:.3g}; what is kept of it ends at 65504 (f16)")
        records["vector"] = logits

    def decode(self, records: np.ndarray) -> VectorTargets:
        return VectorTargets(torch.from_numpy(records["vector"].astype(np.float32)))


@dataclass(frozen=True)
class DenseByte:
    """See the module."""

    name: str = "dense-u8"

    def fields(self, classes: int) -> list[tuple[str, str, tuple[int, ...]]]:
        return [("step", "<f4", ()), ("logits", "u1", (classes,))]

    def encode(self, logits: np.ndarray, records: np.ndarray) -> None:
        step = np.maximum(-logits.min(axis=1) / _STEPS, np.finfo(np.float32).tiny).astype(np.float32)
        records["step"] = step
        records["logits"] = np.clip(np.rint(-logits / step[:, None]), 0, _STEPS)

    def decode(self, records: np.ndarray) -> DenseTargets:
        step = torch.from_numpy(records["step"].astype(np.float32))[:, None]
        return DenseTargets(-torch.from_numpy(records["logits"].astype(np.float32)) * step, step)


@dataclass(frozen=True)
class Top:
    """See the module.

    Attributes:
        k: Classes that are kept.
        temperatures: At which the sum of all is known.
    """

    k: int
    temperatures: tuple[float, ...] = TAIL_TEMPERATURES

    @property
    def name(self) -> str:
        return f"{'top' if self.temperatures == TAIL_TEMPERATURES else 'listed'}{self.k}"

    def fields(self, classes: int) -> list[tuple[str, str, tuple[int, ...]]]:
        if classes <= self.k:
            raise UsageError(f"{self.name} keeps {self.k} classes, and there are {classes}; take dense-f16")
        index = "<u2" if classes <= 2**16 else "<u4"
        return [
            ("classes", index, (self.k,)),
            ("logits", "<f2", (self.k,)),
            ("log_sums", "<f4", (len(self.temperatures),)),
        ]

    def encode(self, logits: np.ndarray, records: np.ndarray) -> None:
        order = np.argsort(-logits, axis=1, kind="stable")[:, : self.k]
        records["classes"] = order
        records["logits"] = np.maximum(np.take_along_axis(logits, order, axis=1), np.finfo(np.float16).min)
        for position, temperature in enumerate(self.temperatures):
            records["log_sums"][:, position] = np.log(np.exp(logits.astype(np.float64) / temperature).sum(axis=1))

    def decode(self, records: np.ndarray) -> TopTargets:
        sums = torch.from_numpy(records["log_sums"].astype(np.float32))
        return TopTargets(
            torch.from_numpy(records["classes"].astype(np.int64)),
            torch.from_numpy(records["logits"].astype(np.float32)),
            {temperature: sums[:, position] for position, temperature in enumerate(self.temperatures)},
        )


def shown(logits: np.ndarray, codec: Codec) -> np.ndarray:
    """What a codec takes of a teacher's outputs: logits less their largest (no softmax changes), or embeddings."""
    return logits if isinstance(codec, VectorHalf) else logits - logits.max(axis=-1, keepdims=True)


def codec_of(name: str) -> Codec:
    """A codec by its name.

    Raises:
        ValueError: There is none of that name.
    """
    if name == "dense-f16":
        return DenseHalf()
    if name == VECTOR_CODEC:
        return VectorHalf()
    if name == "dense-u8":
        return DenseByte()
    if found := re.fullmatch(r"top([1-9]\d*)", name):
        return Top(int(found.group(1)))
    if found := re.fullmatch(r"listed([1-9]\d*)", name):
        return Top(int(found.group(1)), (1.0,))
    if (found := re.fullmatch(r"sampled([1-9]\d*)", name)) and int(found.group(1)) <= MOST_DRAWS:
        return Sampled(int(found.group(1)))
    raise ValueError(
        f"no codec called {name!r}; there are dense-f16, dense-u8, top10 (or another number) "
        f"and sampled50 (or another up to {MOST_DRAWS})"
    )

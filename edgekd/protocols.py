"""Every seam of edgekd on one screen. What a plugin must offer, and nothing about how."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
from pydantic import BaseModel, ConfigDict

from edgekd.contents import Contents
from edgekd.measurement import Block, DeviceStatus, Plan, Profile
from edgekd.types import Artifact, Conversion, Precision, Student, TensorSpec

if TYPE_CHECKING:
    from torch import Generator, Tensor, nn

    from edgekd.teaching import Preprocessing, Teacher

__all__ = [
    "Arrays",
    "Augmentation",
    "Decoding",
    "Device",
    "Exporter",
    "Kind",
    "Loss",
    "Mixing",
    "ModelRequest",
    "Options",
    "Origin",
    "OriginOptions",
    "Preparable",
    "Preprocessed",
    "Progress",
    "Runner",
    "Settings",
    "Side",
    "Step",
    "TakingTurns",
    "Teaching",
    "Tracing",
    "Trainable",
    "WritingCaches",
]

Arrays: TypeAlias = Mapping[str, np.ndarray]
"""Arrays by input or output name, samples on the first axis."""


class Runner(Protocol):
    """A loaded file that can be called: one batch in, one batch out."""

    @property
    def runtime(self) -> str:
        """Name and version of what runs the file."""

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """As the file declares them, in the order of the program's inputs."""

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """As the file declares them, in the order of the program's outputs."""

    def __call__(self, inputs: Arrays) -> dict[str, np.ndarray]:
        """Run once. ``inputs`` go by the file's names and in its shapes; integer types are cast to the file's."""


@runtime_checkable
class Tracing(Protocol):
    """What a runner may offer beside its call: to say where a file goes astray."""

    def first_overflow(self, inputs: Arrays) -> str | None:
        """The first operator whose result its type cannot hold, in one line; None when every value is finite."""


@runtime_checkable
class Decoding(Protocol):
    """What the runner of a language model with caches offers beside its call: its caches stay where they are.

    Attributes:
        context: Tokens that the caches hold.
    """

    context: int

    def read(self, tokens: Sequence[int], start: int) -> np.ndarray:
        """Put tokens at positions ``start``, ``start + 1`` … into the caches, over what stood there.

        Returns:
            Logits of the token after the last, float32 (vocabulary,).
        """


@runtime_checkable
class WritingCaches(Protocol):
    """What an exporter may offer beside ``write``: language models with caches; its runner is :class:`Decoding` then.

    Attributes:
        cached_precisions: In which of its precisions.
    """

    cached_precisions: tuple[Precision, ...]


class Options(BaseModel):
    """What a target alone can be told: ``[export.<target>]`` in a recipe, ``--option key=value`` on the command line.

    A target with something to set has a subclass; every field has a default and a description.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, coerce_numbers_to_str=True)  # batch=4 is one of "1,4,8"

    def applied(self, student: Student, samples: Arrays) -> tuple[Student, Arrays]:
        """The program that the file must compute when told this, and the samples as that program takes them.

        A target that is told to change what the file takes or gives (pixels in, probabilities out) says so here, and
        the file is proven against the changed program.
        """
        return student, samples


class Exporter(Protocol):
    """A target: ``exporters/<target>.py`` with ``EXPORTER``, or an entry point in group ``edgekd.exporters``.

    Attributes:
        suffix: Of the file: ``.onnx``.
        requires: Modules that must be importable.
        extra: Name of the extra that installs them.
        precisions: What it can write, by word: from which program, and how near the file must come to it. Those that
            all targets share are in ``edgekd.exporting.parity.conversions``. ``w8`` and ``w8a8`` arrive as programs
            that already hold quantize/dequantize nodes and are translated number for number.
        options: What can be set.
    """

    suffix: str
    requires: tuple[str, ...]
    extra: str
    precisions: Mapping[Precision, Conversion]
    options: type[Options]

    def write(self, student: Student, path: Path, precision: Precision, options: Any) -> None:
        """Write the file (or package folder); the same program and options give the same bytes.

        By default the file is for a batch of one, and keeps the program's input and output names and its float inputs
        and outputs. What the toolchain complains of is collected by the caller: nothing is printed.

        Args:
            options: An instance of ``self.options``.

        Raises:
            ExportError: The converter refuses; the message names the operator.
            UsageError: The program or the options do not go with the precision.
        """

    def load(self, path: Path) -> Runner:
        """Load the file in its own runtime.

        Raises:
            ModelFileError: The file is damaged or of another format.
        """

    def contents(self, path: Path) -> Contents:
        """Weights as stored, and operators as the runtime would run them: the evidence for ``edgekd.exporting.lint``.

        Raises:
            ModelFileError: The file is damaged or of another format.
        """


class Settings(BaseModel):
    """What a kind of device can be told: ``[settings]`` in a device's TOML. A kind has a subclass."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Kind(Protocol):
    """A kind of device: ``devices/<kind>.py`` with ``DEVICE``, or an entry point in group ``edgekd.devices``.

    Attributes:
        settings: What can be set; checked before the device is made.
    """

    settings: type[Settings]

    def __call__(self, profile: Profile, settings: Any) -> Device:
        """One device of this kind; nothing is touched yet.

        Args:
            profile: Its TOML.
            settings: An instance of ``self.settings``, from the profile.
        """


class Device(Protocol):
    """One device."""

    def probe(self) -> DeviceStatus:
        """Look, without changing anything."""

    def run(
        self, artifact: Artifact, folder: Path, inputs: Arrays, plan: Plan
    ) -> tuple[tuple[Block, ...], dict[str, np.ndarray]]:
        """Measure, then compute the outputs of all ``inputs`` in the same session.

        Args:
            artifact: What to run; its file lies in ``folder``.
            inputs: By the file's names, samples on the first axis; the first sample is the one that is timed.
            plan: How long and how often.

        Returns:
            The blocks, and the outputs by the file's names.

        Raises:
            DeviceError: The device went away, is another one than the profile's, or its runtime failed.
        """

    def close(self) -> None:
        """End a sitting: whoever called ``run`` calls this in ``finally``. Files, connections and modes that the runs
        left for one another are undone; without effect when there are none, and no error when the device is gone."""


@dataclass(frozen=True)
class Side:
    """One of the files that take turns.

    Attributes:
        artifact: What to run; its file lies in ``folder``.
        inputs: As in ``Device.run``.
    """

    artifact: Artifact
    folder: Path
    inputs: Arrays


@runtime_checkable
class TakingTurns(Protocol):
    """What a device may offer beside its runs: blocks of several files that take turns of a few inferences.

    What slows the device for a while then slows all of them alike, and their ratio shows far less of it than that of
    blocks one after the other (docs/decisions/0007-turns.md).
    """

    def run_in_turns(
        self, sides: Sequence[Side], plan: Plan, seed: int
    ) -> tuple[tuple[Block, dict[str, np.ndarray]], ...]:
        """A block of each file, each a fresh process as in ``Device.run``; only one works at a time.

        Args:
            plan: Its number of blocks is not looked at.
            seed: Of the order in which they start, and of that in each round of turns.

        Returns:
            For each side its block, and the outputs of all its ``inputs``.

        Raises:
            DeviceError: As ``Device.run``.
        """


@runtime_checkable
class Preparable(Protocol):
    """What a device may offer beside its runs: to be set up. Nothing is installed anywhere else."""

    def prepare(self, progress: Progress) -> None:
        """Install what its runs need, and say what and where.

        Raises:
            DeviceError: It failed; what was there before still is.
        """


class OriginOptions(BaseModel):
    """What an origin alone can be told of a model, beside it in ``[teacher]`` or ``[student]``. One with something to
    set has a subclass."""

    model_config = ConfigDict(extra="forbid", frozen=True)


@dataclass(frozen=True)
class ModelRequest:
    """A model that a recipe names.

    Attributes:
        reference: As written: ``keras:teacher.keras``.
        place: What stands behind the prefix: a path, a name, an address.
        folder: Of the recipe, which a path is relative to.
        options: An instance of the origin's ``options``.
        labels: Class names, in the order of the logits; empty when the recipe names none.
        taps: Modules or outputs that a teacher returns as features.
    """

    reference: str
    place: str
    folder: Path
    options: Any
    labels: tuple[str, ...] = ()
    taps: tuple[str, ...] = ()


class Origin(Protocol):
    """Where models come from: ``edgekd/origins/<prefix>.py`` with ``ORIGIN``, or an entry point in ``edgekd.origins``.

    It offers ``module`` (:class:`Trainable`), ``teacher`` (:class:`Teaching`), or both; a module serves as a teacher
    where there is no ``teacher``.

    Attributes:
        requires: Modules that must be importable.
        extra: Name of the extra that installs them.
        options: What can be set.
    """

    requires: tuple[str, ...]
    extra: str
    options: type[OriginOptions]

    def fault(self, place: str, folder: Path) -> str:
        """Why there can be no model, seen without loading anything; empty when there may be one."""


@runtime_checkable
class Trainable(Protocol):
    """An origin of modules."""

    def module(self, asked: ModelRequest) -> nn.Module:
        """Fresh, or with the weights that were asked for; takes the data's inputs in order.

        Raises:
            UsageError, DataError, ModelFileError: There is no such module.
        """


@runtime_checkable
class Teaching(Protocol):
    """An origin of models that give outputs and are run by something else than PyTorch's modules."""

    def teacher(self, asked: ModelRequest, example: Arrays) -> Teacher:
        """Load it.

        Args:
            example: A few samples as the teacher takes them.

        Raises:
            UsageError, DataError, ModelFileError: There is no such model, or it would run code when loaded.
        """


@runtime_checkable
class Preprocessed(Protocol):
    """What an origin may offer beside its models: to know how their images are made."""

    def preprocessing(self, asked: ModelRequest) -> Preprocessing:
        """Used for a teacher unless the recipe says another; from images of 0…1.

        Raises:
            UsageError: There is no such model, or what it takes cannot be declared.
        """


class Loss(Protocol):
    """Student against teacher: batch mean, explicit T²."""

    def __call__(self, student: Tensor, teacher: Tensor, labels: Tensor, temperature: float) -> Tensor:
        """Logits of both, (batch, classes), and the true classes, int64 (batch,); returns a scalar.

        No gradient flows into the teacher. A class is -1 where a sample has none, or is mixed of two.
        """


class Step(Protocol):
    """Compression: a student in, the same type out, so steps compose."""

    def __call__(self, student: Student, calibration: Arrays | None) -> Student: ...


class Augmentation(Protocol):
    """One sample to one view of it. All randomness comes from ``generator``: a view is replayed from its seed."""

    def __call__(self, sample: Mapping[str, Tensor], generator: Generator) -> Mapping[str, Tensor]: ...


class Mixing(Protocol):
    """Two samples to one view, and the share of it that is the first one's, 0 to 1: its labels are mixed so.

    All randomness comes from ``generator``; ``alpha`` is what the recipe says in ``data.mix_alpha``.
    """

    def __call__(
        self, sample: Mapping[str, Tensor], partner: Mapping[str, Tensor], generator: Generator, alpha: float, /
    ) -> tuple[Mapping[str, Tensor], float]: ...


class Progress(Protocol):
    """How long work speaks: the CLI draws a bar on a terminal and prints plain lines elsewhere."""

    def start(self, what: str, total: int, done: int = 0) -> None:
        """Begin a piece of work of ``total`` steps, ``done`` of which were done before."""

    def advance(self, steps: int = 1, note: str = "") -> None: ...

    def finish(self) -> None: ...

    def say(self, line: str) -> None:
        """One line for the user, outside any piece of work."""

"""The values that pass from one stage to the next: frozen, plain, and readable as JSON."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Self, TypeAlias

if TYPE_CHECKING:
    from torch.export import ExportedProgram

__all__ = [
    "LOGITS",
    "Artifact",
    "Calibration",
    "Card",
    "Conversion",
    "Decoder",
    "Finding",
    "Generation",
    "Json",
    "KeptLayer",
    "Mixture",
    "OutputParity",
    "Parity",
    "Precision",
    "Retraining",
    "Student",
    "TensorSpec",
    "Tolerance",
]

Json: TypeAlias = dict[str, Any]

LOGITS = "logits"
"""The meaning of an output whose largest value is a class; only there can a different top class fail a file."""

Precision: TypeAlias = str
"""Spelled by bits: w = weights, d = activations quantized as they come, a = activations with static scales.

``fp32``, ``fp16``, ``w8``, ``w8d8`` and ``w8a8`` mean the same on every target that has them; a target may have more.
"""


class JsonMixin:
    """Dataclass to JSON and back; unknown keys are refused, so a newer file is not read wrongly."""

    def to_json(self) -> Json:
        return dataclasses.asdict(self)  # type: ignore[call-overload]

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Rebuild a value.

        Raises:
            TypeError: A key is missing or unknown.
        """
        hints = typing.get_type_hints(cls)
        return cls(**{key: _restore(hints[key], value) if key in hints else value for key, value in data.items()})


def _restore(hint: Any, value: Any) -> Any:
    """Turn JSON lists and dicts back into the tuples and dataclasses that the type hint names."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        options = [a for a in args if a is not type(None)]
        return None if value is None else _restore(options[0], value) if len(options) == 1 else value
    if isinstance(hint, type) and issubclass(hint, JsonMixin):
        return hint.from_json(value)
    if origin is tuple:
        return tuple(_restore(args[0], item) for item in value)
    return value


@dataclass(frozen=True)
class TensorSpec(JsonMixin):
    """One input or output of a program or file.

    Attributes:
        name: As the program or file calls it.
        shape: Sizes with the batch first; -1 where any size is taken.
        dtype: NumPy's name: ``float32``, ``int64`` …
        meaning: For people and apps: ``image``, ``token ids``, ``logits`` …
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    meaning: str = ""


@dataclass(frozen=True)
class Calibration(JsonMixin):
    """What the static scales of a quantized program were taken from.

    Attributes:
        data: Fingerprint of the samples, in order.
        samples: How many samples were shown.
        observer: ``minmax`` …
        corrections: What made the program more accurate besides (``edgekd.compression.corrections``), in that order.
    """

    data: str
    samples: int
    observer: str
    corrections: tuple[str, ...] = ()


@dataclass(frozen=True)
class KeptLayer(JsonMixin):
    """A layer that mixed precision keeps in float.

    Attributes:
        name: Of the layer.
        error: Squared error of the outputs, as a share of their square, when this layer alone is int8.
    """

    name: str
    error: float


@dataclass(frozen=True)
class Mixture(JsonMixin):
    """What ``auto`` measured and chose (``edgekd.compression.mixed``).

    Attributes:
        metric: ``accuracy`` on labels, ``agreement`` with the fp32 program's top class, or ``cosine`` with its output.
        max_drop: The budget; 0.005 is half a point.
        drop: What the mix loses on the samples that it was chosen on.
        float_score: The metric of the fp32 program.
        samples: How many samples measured it: calibration or validation, never test.
        layers: How many layers could be int8.
        kept: Those that stayed float, the most sensitive first.
    """

    metric: str
    max_drop: float
    drop: float
    float_score: float
    samples: int
    layers: int
    kept: tuple[KeptLayer, ...] = ()


@dataclass(frozen=True)
class Retraining(JsonMixin):
    """Training that won back what compression lost.

    Attributes:
        method: ``qat`` (``edgekd.compression.qat``), or how it was pruned (``edgekd.compression.prune``).
        arm: The loss that it learned with; ``control`` is labels only.
        epochs: How long.
        before: Accuracy on the test split of the same compression without training.
        after: With it.
        control: With it, but from labels alone; None where ``arm`` is that.
    """

    method: str
    arm: str
    epochs: int
    before: float
    after: float
    control: float | None = None


@dataclass(frozen=True)
class Decoder(JsonMixin):
    """What makes a program a language model that keeps keys and values (``edgekd.programs.decoder``).

    Attributes:
        context: Slots of its caches: tokens of prompt and answer together.
        end_tokens: Those that end an answer.
    """

    context: int
    end_tokens: tuple[int, ...] = ()


@dataclass(frozen=True)
class Card(JsonMixin):
    """What a program is, for people and for apps; stands beside every ``.pt2`` and inside every manifest.

    Attributes:
        name: Of the model.
        inputs, outputs: With the batch axis first.
        labels: Class names in the order of the last output axis; empty when there are none.
        preprocessing: What the app does before the model, as plain data (see ``edgekd.data.samples``).
        precision: Of the program itself: ``fp32``, or one of those that ``edgekd.compression.compress`` makes.
        parameters: Count of trained numbers.
        macs: Multiply-accumulates for one sample, counted, not estimated; None when not counted.
        lineage: From the teacher to this program, oldest first, each ``stage: fingerprint``.
        calibration: Only where activations have static scales.
        assets: Files that belong to the model (a tokenizer), by name, in the same folder.
        mixture: Only for ``auto``.
        retraining: After pruning and quantization, in that order.
        decoder: Only of language models with caches.
    """

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    labels: tuple[str, ...] = ()
    preprocessing: Json = field(default_factory=dict)
    precision: Precision = "fp32"
    parameters: int = 0
    macs: int | None = None
    lineage: tuple[str, ...] = ()
    calibration: Calibration | None = None
    assets: tuple[str, ...] = ()
    mixture: Mixture | None = None
    retraining: tuple[Retraining, ...] = ()
    decoder: Decoder | None = None


@dataclass(frozen=True)
class Student:
    """A program and its card: what every stage after distillation takes and gives.

    Attributes:
        program: Inference only, float inputs and outputs, batch axis first; the batch is dynamic where the model
            allows it (``edgekd.programs.tracing.at_batch`` fixes it).
        card: What it is.
    """

    program: ExportedProgram
    card: Card


@dataclass(frozen=True)
class Tolerance:
    """When a file counts as the same as its program.

    Attributes:
        relative: Largest difference, as a share of the largest absolute output (at least 1) of the program; None where
            single values may differ by more (a rounding tie in integer arithmetic moves a value by a whole step).
        cosine: Smallest mean cosine.
        agreement: Smallest share of samples with the same top class, for outputs that mean logits.
    """

    relative: float | None
    cosine: float
    agreement: float


@dataclass(frozen=True)
class Conversion:
    """How a target comes by one of its precisions.

    Attributes:
        source: Precision of the program that the file is written from: ``fp32``, or one of those that
            ``edgekd.compression.compress`` makes, which the file then translates number for number.
        tolerance: How far the file may be from that program.
    """

    source: Precision
    tolerance: Tolerance


@dataclass(frozen=True)
class Finding(JsonMixin):
    """Something in a file that costs size or time and that its precision does not promise.

    Attributes:
        kind: ``float_weight``, ``wide_weight``, ``batch_norm``, ``quantization``, ``transpose`` or ``cast``.
        count: How many.
        cost_bytes: Room in the file that could be saved, or bytes that one inference moves for it.
        message: One line for people, with the cost.
        names: The costliest first, at most five.
    """

    kind: str
    count: int
    cost_bytes: int
    message: str
    names: tuple[str, ...]


@dataclass(frozen=True)
class OutputParity(JsonMixin):
    """One output of a file against the same output of its program.

    Attributes:
        max_abs: Largest difference; None when the two cannot be subtracted, which ``problem`` explains.
        cosine: Mean over the samples.
        agreement: Share of samples with the same top class; None when the output is not (samples, classes).
    """

    name: str
    max_abs: float | None
    cosine: float
    agreement: float | None
    passed: bool
    problem: str = ""


@dataclass(frozen=True)
class Generation(JsonMixin):
    """The most likely tokens that a file gives, beside those of its program.

    Attributes:
        prompts: How many were answered.
        prompt_tokens, new_tokens: Of each.
        same: How many answers are the same to the last token.
        first_difference: The earliest new token that differs in any answer, from 0; None where all are the same.
        agreement: Share of new tokens that are the same when both are given the program's tokens before.
    """

    prompts: int
    prompt_tokens: int
    new_tokens: int
    same: int
    first_difference: int | None
    agreement: float


@dataclass(frozen=True)
class Parity(JsonMixin):
    """A file against the program it came from, over held-out samples.

    Attributes:
        status: ``passed``, ``failed`` or ``not_run``; nothing else.
        reason: Why it failed or was not run; empty when passed.
        runtime: What ran the file, with its version.
        max_abs: Largest difference over all outputs.
        cosine: Smallest mean cosine over the outputs.
        agreement: Share of samples with the same top class; None without classes.
        samples: How many were compared.
        outputs: Output by output.
        generation: Only of language models with caches; ``samples`` is then the number of tokens whose logits were
            compared.
    """

    status: Literal["passed", "failed", "not_run"]
    reason: str = ""
    runtime: str = ""
    max_abs: float | None = None
    cosine: float | None = None
    agreement: float | None = None
    samples: int = 0
    outputs: tuple[OutputParity, ...] = ()
    generation: Generation | None = None


@dataclass(frozen=True)
class Artifact(JsonMixin):
    """An exported file and everything that is claimed of it: the content of ``manifest.json``.

    Attributes:
        target: Name of the exporter.
        precision: As written into the file.
        path: Of the model file or package, relative to the manifest.
        sha256: Of the file; of a package: over its sorted relative names and contents.
        size_bytes: Of the file or of everything in the package.
        inputs, outputs: As the file itself declares them.
        toolchain: Package versions that wrote and proved it.
        source: sha256 of the program it was written from.
        parity: Against that program.
        accuracy: Share of right classes on the test split; None when the data has no labels.
        teacher_agreement: Share of samples with the teacher's top class; None without a teacher.
        perplexity: Of a recipe's language model, read token by token on windows of the test split, as ``accuracy`` is.
        options: What the target was told, by name (``Exporter.options``).
        notes: What a user should know: why ``int8`` became this precision, a file larger than its parent …
        warnings: What the toolchain complained of while it wrote the file, each once.
        findings: Of ``edgekd.exporting.lint``: what costs size or time without need.
        regressions: In what it is worse than the fp32 file of the same target: larger, or slower where it was measured.
    """

    target: str
    precision: Precision
    path: str
    sha256: str
    size_bytes: int
    card: Card
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    toolchain: dict[str, str]
    source: str
    parity: Parity
    accuracy: float | None = None
    teacher_agreement: float | None = None
    options: Json = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    findings: tuple[Finding, ...] = ()
    regressions: tuple[str, ...] = ()
    perplexity: float | None = None

"""What a recipe can say: the tables of edgekd.toml, checked one by one. ``edgekd.recipes.reading`` makes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, PrivateAttr

from edgekd import plugins
from edgekd.protocols import Options
from edgekd.recipes.recipe_models import Feature, Model, Table, Teacher
from edgekd.types import Json, Precision

__all__ = ["TRAINING", "ArmOptions", "Recipe", "json_schema", "parse_drop"]

Share = Annotated[float, Field(ge=0.0, lt=1.0)]
Count = Annotated[int, Field(ge=1)]


class ImageData(Table):
    """How image files become arrays: shorter side resized, centre cropped, scaled to 0…1, then (x − mean) / std."""

    column: str = "image"
    label_column: str = "label"
    size: Count
    channels: Literal[1, 3] = 3
    mean: tuple[float, ...] = (0.0,)
    std: tuple[Annotated[float, Field(gt=0)], ...] = (1.0,)


class TextData(Table):
    """How text becomes ``input_ids`` and ``attention_mask``: a Hugging Face tokenizer.json, padded to one length."""

    column: str = "text"
    label_column: str = "label"
    tokenizer: str
    max_length: Count


class TokenData(Table):
    """How text becomes windows of tokens for a causal language model (:mod:`edgekd.data.tokens`).

    Rows of a jsonl have ``column``, a document; or a prompt, which is read but does not count, and its completion.
    ``end`` is a token of the tokenizer that ends each document and each completion.
    """

    tokenizer: str
    length: Count
    column: str = "text"
    prompt_column: str = "prompt"
    completion_column: str = "completion"
    end: str = ""


class Data(Table):
    """Where samples come from: ``module:function``, ``file.npz``, or ``imagefolder|csv|jsonl|parquet|text:path``."""

    train: str
    test: str
    validation: str | None = None
    validation_share: Share = 0.1
    unlabeled: str | None = None
    augment: str | None = None
    views: Count = 1
    views_per_decode: Count = 1
    mix: str | None = None
    mix_alpha: Annotated[float, Field(gt=0)] = 1.0
    image: ImageData | None = None
    text: TextData | None = None
    tokens: TokenData | None = None
    preprocessing: Json = Field(default_factory=dict)


class ArmOptions(Table):
    """What one arm says of its own mix and training; without ``losses``, its name is its only loss."""

    temperature: Annotated[float, Field(gt=0)] | None = None
    label_weight: Annotated[float, Field(ge=0, le=1)] | None = None
    losses: Annotated[dict[str, Annotated[float, Field(gt=0)]], Field(min_length=1)] | None = None
    standardize: bool = False
    epochs: Count | None = None
    batch_size: Count | None = None
    learning_rate: Annotated[float, Field(gt=0)] | None = None
    weight_decay: Annotated[float, Field(ge=0)] | None = None
    warmup_share: Share | None = None


@dataclass(frozen=True)
class Mix:
    """What one arm minimises: label_weight · cross-entropy + (1 − label_weight) · Σ weight · loss(temperature).

    Attributes:
        losses: Names, or ``module:function``, with their weights; none for the control.
        standardize: Whether the losses compare z-scores of the logits.
    """

    losses: Mapping[str, float]
    temperature: float
    label_weight: float
    standardize: bool = False


TAIL_TEMPERATURES = (1.0, 2.0, 4.0)
"""At which a cache of the top classes knows the mass of the others."""

VECTOR_CODEC = "vector-f16"
"""How embeddings are kept."""

MOST_DRAWS = 255
"""A cache of draws counts them in one byte."""

_USUAL = {
    "dist": ArmOptions(temperature=1.0, label_weight=0.33),
    "mse": ArmOptions(label_weight=0.0),
    "cosine": ArmOptions(label_weight=0.0),
}
"""What an arm is mixed with unless its own table says otherwise: DIST's paper has T = 1 and labels half as heavy; those
that learn an embedding learn nothing else."""

TRAINING = ("epochs", "batch_size", "learning_rate", "weight_decay", "warmup_share")
"""What holds for all arms unless an arm's own table says otherwise; temperature and weights are its mix."""


class Distill(Table):
    """How students are trained. The control arm (no teacher) is trained always."""

    arms: tuple[str, ...] = ("control", "kd", "dist")
    ship: str = "best"
    epochs: Count = 20
    batch_size: Count = 128
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    warmup_share: Share = 0.1
    temperature: Annotated[float, Field(gt=0)] = 2.0
    label_weight: Annotated[float, Field(ge=0, le=1)] = 0.3
    overrides: dict[str, ArmOptions] = Field(default_factory=dict)
    features: dict[str, Feature] = Field(default_factory=dict)
    seeds: Annotated[tuple[int, ...], Field(min_length=1)] = (0,)
    threads: Count | None = None
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    accumulate: Count = 1
    compile: bool = False
    shard: bool = False

    def mix(self, arm: str) -> Mix:
        """How one arm learns: what its own table says, else what is usual for it, else what holds for all."""
        if arm == "control":
            return Mix({}, temperature=1.0, label_weight=1.0)
        own, usual = self.overrides.get(arm, ArmOptions()), _USUAL.get(arm, ArmOptions())
        temperatures = (own.temperature, usual.temperature, self.temperature)
        weights = (own.label_weight, usual.label_weight, self.label_weight)
        return Mix(
            own.losses or {arm: 1.0},
            next(temperature for temperature in temperatures if temperature is not None),
            next(weight for weight in weights if weight is not None),
            own.standardize,
        )

    def features_of(self, arm: str) -> dict[str, Feature]:
        """Features among the losses of an arm, by name."""
        return {name: self.features[name] for name in self.mix(arm).losses if name in self.features}

    def wanted_features(self) -> list[Feature]:
        """What the teacher has to give beside logits for the arms of the recipe; each once."""
        wanted = {spec.stored: spec for arm in self.arms for spec in self.features_of(arm).values()}
        return list(wanted.values())

    def for_arm(self, arm: str) -> Distill:
        """The table as it holds for one arm: how it is trained where its own table says so."""
        own = self.overrides.get(arm, ArmOptions())
        said = {key: getattr(own, key) for key in ArmOptions.model_fields if key in TRAINING}
        return self.model_copy(update={key: value for key, value in said.items() if value is not None})

    def not_served_by_draws(self) -> str:
        """Why a cache of sampled logits would not do for these arms; empty when it does.

        Draws estimate probabilities without bias, and of the known losses only ``kd`` is linear in them.
        """
        for arm, mix in ((arm, self.mix(arm)) for arm in self.arms):
            losses = [name for name in mix.losses if name not in self.features]
            if losses and (mix.temperature != 1 or mix.standardize):
                return f"{arm}: draws are those at T = 1, of logits as they are"
            other = [name for name in losses if name != "kd" and ":" not in name]
            if other:
                return f"{arm}: {other[0]} is not linear in the probabilities, so draws would bias it"
        return ""

    def needs_all_classes(self) -> str:
        """Why a cache of the top classes would not do for these arms; empty when it does."""
        for arm, mix in ((arm, self.mix(arm)) for arm in self.arms):
            if not mix.losses.keys() - self.features:
                continue
            if "dist" in mix.losses:
                return f"{arm}: dist compares classes over the batch"
            if mix.standardize:
                return f"{arm}: standardize looks at the logits of all classes"
            if mix.temperature not in TAIL_TEMPERATURES:
                known = ", ".join(f"{value:g}" for value in TAIL_TEMPERATURES)
                return f"{arm}: the mass of the other classes is kept for T = {known}, not for {mix.temperature:g}"
        return ""


def parse_drop(text: Any) -> Any:
    """A budget of accuracy as a share: ``0.005``, ``"0.5pt"`` and ``"0.5%"`` are the same.

    Raises:
        ValueError: It is none of these.
    """
    if not isinstance(text, str):
        return text
    number = text.strip().removesuffix("pt").removesuffix("%").strip()
    try:
        return float(number) / (1 if number == text.strip() else 100)
    except ValueError:
        raise ValueError(f"{text!r} is no budget; 0.5pt (half a point) or 0.005 works") from None


def _checked_pruning(word: str | None) -> str | None:
    if word is not None:
        from edgekd.compression.prune import parse_pruning  # imports torch: only for those who prune

        parse_pruning(word)
    return word


class Compress(Table):
    """How a student is made smaller: scales of static int8, and what wins back the accuracy that it loses."""

    samples: Count = 256
    observer: Literal["minmax", "percentile", "mse"] = "minmax"
    corrections: tuple[Literal["auto", "equalize", "smooth", "bias"], ...] = ("auto",)
    max_drop: Annotated[Share | None, BeforeValidator(parse_drop)] = None
    prune: Annotated[str | None, AfterValidator(_checked_pruning)] = None
    prune_epochs: Annotated[int, Field(ge=0)] = 10
    qat_epochs: Annotated[int, Field(ge=0)] | None = None
    qat_learning_rate: Annotated[float, Field(gt=0)] | None = None


class Export(Table):
    """What is written, and how many held-out samples prove it; ``[export.<target>]`` is for one target alone.

    Samples of a language model are tokens: those that a file answers with, and those that it is judged on. Its
    ``context`` is how many tokens prompt and answer may have together; by default 1024 or what the student is made for.

    The table of a target holds its own ``precisions``, which replace the general ones, and what its exporter can be
    told (``Exporter.options``).
    """

    model_config = ConfigDict(extra="allow", frozen=True)

    targets: Annotated[tuple[str, ...], Field(min_length=1)] = ("onnx", "coreml", "tflite")
    precisions: Annotated[tuple[str, ...], Field(min_length=1)] = ("fp32", "int8")
    samples: Count = 64
    accuracy_samples: Count = 10_000
    context: Annotated[int, Field(ge=2)] | None = None

    def precisions_of(self, target: str) -> tuple[Precision, ...]:
        """What a target is written in; may hold ``int8``."""
        return tuple(self._own(target).get("precisions", self.precisions))

    def options_of(self, target: str) -> Options:
        """What a target is told."""
        own = {key: value for key, value in self._own(target).items() if key != "precisions"}
        return plugins.load_exporter(target).options.model_validate(own)

    def _own(self, target: str) -> Json:
        return (self.__pydantic_extra__ or {}).get(target, {})


class Bench(Table):
    """Where and how it is measured; a language model on answers of ``new_tokens`` to prompts of ``prompt_tokens``."""

    devices: tuple[str, ...] = ("host",)
    """Names, or paths of .toml files."""
    threads: Count = 1
    blocks: Count = 6
    warmup_s: Annotated[float, Field(ge=0)] = 0.5
    min_s: Annotated[float, Field(gt=0)] = 1.0
    prompt_tokens: Count = 64
    new_tokens: Annotated[int, Field(ge=2)] = 64


DENSE_CLASSES = 256
"""Up to so many classes a teacher cache is dense unless told otherwise."""


class Recipe(Table):
    """All of edgekd.toml, checked."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    runs: str = "runs"
    labels: tuple[str, ...] = ()
    data: Data
    teacher: Teacher
    student: Model
    distill: Distill = Field(default_factory=Distill)
    compress: Compress = Field(default_factory=Compress)
    export: Export = Field(default_factory=Export)
    bench: Bench = Field(default_factory=Bench)

    _folder: Path = PrivateAttr(default=Path())

    @property
    def folder(self) -> Path:
        """The folder of the recipe: what its paths are relative to."""
        return self._folder

    def codec(self, classes: int, positions: int = 0) -> str:
        """How a teacher's classes for the training views are kept.

        Dense up to 256 classes; the 10 largest above (Faghri et al. 2023, arXiv:2303.08983: 5 to 10 are enough). For
        windows of tokens 50 draws (Anshumann et al. 2025, arXiv:2503.16870), or the 50 largest where those won't do.

        Args:
            positions: Of a window; 0 for samples with one label.
        """
        if self.teacher.codec is not None:
            return self.teacher.codec
        if positions and classes > DENSE_CLASSES:
            if not self.distill.not_served_by_draws():
                return "sampled50"
            if not self.distill.needs_all_classes():
                return "top50"
        return "dense-f16" if classes <= DENSE_CLASSES or self.distill.needs_all_classes() else "top10"

    def not_served_by_listed(self) -> str:
        """Why a cache of the largest log-probabilities at T = 1 would not do; empty when it does."""
        if self.teacher.codec is not None:
            return f"codec = {self.teacher.codec!r} wants more; leave it out"
        for arm in self.distill.arms:
            mix = self.distill.mix(arm)
            if mix.temperature != 1 and mix.losses.keys() - self.distill.features:
                return f"{arm} has T = {mix.temperature:g}; temperature = 1 works"
        return self.distill.needs_all_classes()

    @property
    def run_folder(self) -> Path:
        return self._folder / self.runs / self.name


def json_schema() -> Json:
    """JSON Schema of edgekd.toml, for editors, with the options of every target."""
    schema = Recipe.model_json_schema()
    export = schema["$defs"]["Export"]
    for target in plugins.exporter_names():
        own = plugins.load_exporter(target).options.model_json_schema()
        own.setdefault("properties", {})["precisions"] = export["properties"]["precisions"]
        export["properties"][target] = own
    export["additionalProperties"] = False
    for origin in (plugins.load_origin(name) for name in plugins.origin_names()):
        own = origin.options.model_json_schema()
        for table in ("Model", "Member", "Teacher"):
            schema["$defs"][table]["properties"] |= own.get("properties", {})
            schema["$defs"][table]["additionalProperties"] = False
    return schema

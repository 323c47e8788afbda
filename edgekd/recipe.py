"""edgekd.toml to Recipe: every fault at once, each with its key path and what would work.

Paths are relative to the recipe. A recipe may name the user's own Python code, so it is trusted like a Makefile.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr, ValidationError

from edgekd import plugins
from edgekd.errors import RecipeError, UsageError
from edgekd.protocols import Options
from edgekd.types import Json, Precision

__all__ = [
    "FILE_NAME",
    "Recipe",
    "find_recipe",
    "json_schema",
    "known_losses",
    "load_recipe",
    "parse_drop",
    "parse_options",
]

FILE_NAME = "edgekd.toml"

Share = Annotated[float, Field(ge=0.0, lt=1.0)]
Count = Annotated[int, Field(ge=1)]


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ImageData(_Table):
    """How image files become arrays: shorter side resized, centre cropped, scaled to 0…1, then (x − mean) / std."""

    column: str = "image"
    label_column: str = "label"
    size: Count
    channels: Literal[1, 3] = 3
    mean: tuple[float, ...] = (0.0,)
    std: tuple[Annotated[float, Field(gt=0)], ...] = (1.0,)


class TextData(_Table):
    """How text becomes ``input_ids`` and ``attention_mask``: a Hugging Face tokenizer.json, padded to one length."""

    column: str = "text"
    label_column: str = "label"
    tokenizer: str
    max_length: Count


class Data(_Table):
    """Where samples come from: ``module:function``, ``file.npz``, or ``imagefolder|csv|jsonl|parquet:path``."""

    train: str
    test: str
    validation: str | None = None
    validation_share: Share = 0.1
    augment: str | None = None
    views: Count = 1
    image: ImageData | None = None
    text: TextData | None = None
    preprocessing: Json = Field(default_factory=dict)


class Model(_Table):
    """``module:function``, ``hf:folder``, ``onnx:file`` or ``pt2:file``."""

    model: str


class ArmOptions(_Table):
    """How one loss is mixed: label_weight · cross-entropy + (1 − label_weight) · loss(temperature)."""

    temperature: Annotated[float, Field(gt=0)] | None = None
    label_weight: Annotated[float, Field(ge=0, le=1)] | None = None


class Distill(_Table):
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
    overrides: dict[str, ArmOptions] = Field(
        default_factory=lambda: {"dist": ArmOptions(temperature=1.0, label_weight=0.33)}
    )
    seeds: Annotated[tuple[int, ...], Field(min_length=1)] = (0,)
    threads: Count | None = None

    def options(self, arm: str) -> tuple[float, float]:
        """Temperature and label weight of one arm."""
        own = self.overrides.get(arm, ArmOptions())
        temperature = self.temperature if own.temperature is None else own.temperature
        return temperature, self.label_weight if own.label_weight is None else own.label_weight


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
        from edgekd.prune import parse_pruning  # imports torch: only for those who prune

        parse_pruning(word)
    return word


class Compress(_Table):
    """How a student is made smaller: scales of static int8, and what wins back the accuracy that it loses."""

    samples: Count = 256
    observer: Literal["minmax", "percentile", "mse"] = "minmax"
    corrections: tuple[Literal["auto", "equalize", "smooth", "bias"], ...] = ("auto",)
    max_drop: Annotated[Share | None, BeforeValidator(parse_drop)] = None
    prune: Annotated[str | None, AfterValidator(_checked_pruning)] = None
    prune_epochs: Annotated[int, Field(ge=0)] = 10
    qat_epochs: Annotated[int, Field(ge=0)] | None = None
    qat_learning_rate: Annotated[float, Field(gt=0)] | None = None


class Export(_Table):
    """What is written, and how many held-out samples prove it; ``[export.<target>]`` is for one target alone.

    The table of a target holds its own ``precisions``, which replace the general ones, and what its exporter can be
    told (``Exporter.options``).
    """

    model_config = ConfigDict(extra="allow", frozen=True)

    targets: Annotated[tuple[str, ...], Field(min_length=1)] = ("onnx", "coreml", "tflite")
    precisions: Annotated[tuple[str, ...], Field(min_length=1)] = ("fp32", "int8")
    samples: Count = 64
    accuracy_samples: Count = 10_000

    def precisions_of(self, target: str) -> tuple[Precision, ...]:
        """What a target is written in; may hold ``int8``."""
        return tuple(self._own(target).get("precisions", self.precisions))

    def options_of(self, target: str) -> Options:
        """What a target is told."""
        own = {key: value for key, value in self._own(target).items() if key != "precisions"}
        return plugins.load_exporter(target).options.model_validate(own)

    def _own(self, target: str) -> Json:
        return (self.__pydantic_extra__ or {}).get(target, {})


class Bench(_Table):
    """Where and how it is measured."""

    devices: tuple[str, ...] = ("host",)
    threads: Count = 1
    blocks: Count = 6
    warmup_s: Annotated[float, Field(ge=0)] = 0.5
    min_s: Annotated[float, Field(gt=0)] = 1.0


class Recipe(_Table):
    """All of edgekd.toml, checked."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    runs: str = "runs"
    labels: tuple[str, ...] = ()
    data: Data
    teacher: Model
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

    @property
    def run_folder(self) -> Path:
        return self._folder / self.runs / self.name


def find_recipe(start: Path) -> Path:
    """The edgekd.toml of a folder or the nearest one above it, as pyproject.toml is found.

    Raises:
        UsageError: There is none.
    """
    for folder in (start.resolve(), *start.resolve().parents):
        if (folder / FILE_NAME).is_file():
            return folder / FILE_NAME
    raise UsageError(f"no {FILE_NAME} in {start.resolve()} or above it; edgekd init writes one")


def load_recipe(path: Path) -> Recipe:
    """Read and check a recipe without loading a model or any data.

    Raises:
        UsageError: There is no such file.
        RecipeError: With all faults.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None
    try:
        table = tomllib.loads(content.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError([f"{path.name}: not TOML: {error}"]) from None
    try:
        recipe = Recipe.model_validate(table)
    except ValidationError as error:
        raise RecipeError([*_faults(error), *_cross_faults(table, path.parent)]) from None
    recipe._folder = path.parent.resolve()
    faults = _cross_faults(table, path.parent)
    if faults:
        raise RecipeError(faults)
    return recipe


def json_schema() -> Json:
    """JSON Schema of edgekd.toml, for editors, with the options of every target."""
    schema = Recipe.model_json_schema()
    export = schema["$defs"]["Export"]
    for target in plugins.exporter_names():
        own = plugins.load_exporter(target).options.model_json_schema()
        own.setdefault("properties", {})["precisions"] = export["properties"]["precisions"]
        export["properties"][target] = own
    export["additionalProperties"] = False
    return schema


def parse_options(words: Sequence[str], targets: Sequence[str]) -> dict[str, Options]:
    """What targets are told on the command line: ``target.key=value``, or ``key=value`` where there is one target.

    A value is read as in edgekd.toml (``true``, ``3``, ``[1, 8]``); what is no TOML is text.

    Raises:
        UsageError: A word is no such pair, or names no target of the call.
        RecipeError: With everything that is wrong with the values.
    """
    tables: dict[str, Json] = {}
    for word in words:
        key, equals, text = word.partition("=")
        target, dot, name = key.rpartition(".")
        target = target if dot else targets[0] if len(targets) == 1 else ""
        if not equals or target not in targets:
            raise UsageError(f"--option {word!r} is not target.key=value with a target of {', '.join(targets)}")
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            value = text
        tables.setdefault(target, {})[name] = value
    faults = [fault for target, values in tables.items() for fault in _option_faults(target, values)]
    if faults:
        raise RecipeError(faults)
    return {target: plugins.load_exporter(target).options.model_validate(table) for target, table in tables.items()}


def _faults(error: ValidationError) -> list[str]:
    lines: dict[str, str] = {}
    for item in error.errors():
        where = ".".join(str(part) for part in item["loc"] if not str(part).startswith(("literal[", "function-")))
        if item["type"] == "extra_forbidden":
            table, key = _table_at(item["loc"][:-1]), str(item["loc"][-1])
            near = difflib.get_close_matches(key, table, n=1)
            text = f"no such key; {f'did you mean {near[0]}?' if near else 'there are ' + ', '.join(sorted(table))}"
        elif item["type"] == "too_short" and item["input"]:
            continue  # said of the items already: a wrong one is not counted
        elif item["type"] == "missing":
            text = "missing; it has no default"
        elif item["type"] == "literal_error":
            wanted = item["ctx"]["expected"].replace("'", "")
            text = f"{item['input']!r} is not known; there are {wanted}"
        else:
            text = f"{item['input']!r}: {item['msg'][:1].lower()}{item['msg'][1:]}"
        lines.setdefault(where, f"{where}: {text}")
    return list(lines.values())


def _table_at(location: tuple[int | str, ...]) -> list[str]:
    """Keys of the table at a key path."""
    model: Any = Recipe
    for part in location:
        annotation = model.model_fields[part].annotation if part in getattr(model, "model_fields", {}) else None
        candidates = [annotation, *getattr(annotation, "__args__", ())]
        found = [c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)]
        if not found:
            return []
        model = found[0]
    return list(model.model_fields)


def _cross_faults(table: Json, folder: Path) -> list[str]:
    """What types cannot say: names that must exist, keys that need each other, files that must be there."""
    faults: list[str] = []

    def section(name: str) -> Json:
        value = table.get(name, {})
        return value if isinstance(value, dict) else {}

    def each(name: str, key: str) -> list[str]:
        value = section(name).get(key, [])
        return [item for item in value if isinstance(item, str)] if isinstance(value, list) else []

    data, distill = section("data"), section("distill")
    for key in ("train", "test", "validation"):
        if isinstance(data.get(key), str):
            faults += _source_faults(f"data.{key}", data[key], data, folder)
    if isinstance(data.get("augment"), str):
        faults += _function_faults("data.augment", data["augment"], folder)
    if data.get("views", 1) != 1 and not data.get("augment"):
        faults.append(
            f"data.views: {data['views']!r} views without an augmentation would all be the same; set data.augment"
        )
    text = data.get("text")
    if isinstance(text, dict) and isinstance(text.get("tokenizer"), str) and not (folder / text["tokenizer"]).is_file():
        faults.append(
            f"data.text.tokenizer: no file {text['tokenizer']!r} beside the recipe; a tokenizer.json is expected"
        )
    for name in ("teacher", "student"):
        reference = section(name).get("model")
        if isinstance(reference, str):
            faults += _model_faults(f"{name}.model", reference, folder)
    known = ("control", *known_losses())
    for index, arm in enumerate(each("distill", "arms")):
        if ":" in arm:
            faults += _function_faults(f"distill.arms.{index}", arm, folder)
        elif arm not in known:
            faults.append(
                f"distill.arms.{index}: no loss called {arm!r}; there are {', '.join(known)}, or module:function"
            )
    ship = distill.get("ship", "best")
    if ship not in ("best", "control", *(each("distill", "arms") or known)):
        faults.append(f"distill.ship: {ship!r} is not an arm; 'best' or one of distill.arms would work")
    faults += _export_faults(section("export"), each("export", "targets"), each("export", "precisions"))
    for index, device in enumerate(each("bench", "devices")):
        if device not in plugins.device_names():
            faults.append(f"bench.devices.{index}: no device {device!r}; there are {', '.join(plugins.device_names())}")
    labels = table.get("labels", [])
    if isinstance(labels, list) and len({str(label) for label in labels}) != len(labels):
        faults.append("labels: a name stands twice; every class needs its own")
    return faults


def _export_faults(table: Json, targets: list[str], precisions: list[str]) -> list[str]:
    """Targets, precisions and options: what the exporters know, and no type does."""
    faults = []
    known = plugins.exporter_names()
    for index, target in enumerate(targets):
        if target not in known:
            faults.append(f"export.targets.{index}: no target {target!r}; there are {', '.join(known)}")
    for key, own in table.items():
        if key in Export.model_fields:
            continue
        if key not in known:
            near = difflib.get_close_matches(key, [*Export.model_fields, *known], n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join((*Export.model_fields, *known))}"
            faults.append(f"export.{key}: no such key; {hint}")
        elif not isinstance(own, dict):
            faults.append(f"export.{key}: {own!r} is not a table; [export.{key}] holds what {key} alone is told")
        else:
            faults += _option_faults(key, {name: value for name, value in own.items() if name != "precisions"})
    lacking: dict[str, str] = {}
    for target in [name for name in targets if name in known] or Export().targets:
        own = table.get(target, {})
        words = own.get("precisions") if isinstance(own, dict) else None
        where = "export.precisions" if words is None else f"export.{target}.precisions"
        has = plugins.load_exporter(target).precisions
        for index, word in enumerate(precisions if words is None else words):
            if word not in has and word != "int8":
                hint = "" if words is not None else f"; [export.{target}] precisions would be its own"
                text = f"{target} has no precision {word!r}; it has {', '.join(has)}, and int8{hint}"
                lacking.setdefault(f"{where}.{index}", text)
    return faults + [f"{where}: {text}" for where, text in lacking.items()]


def _option_faults(target: str, values: Json) -> list[str]:
    """What is wrong with what a target is told, by ``export.<target>.<option>``."""
    options = plugins.load_exporter(target).options
    try:
        options.model_validate(values)
    except ValidationError as error:
        faults = []
        for item in error.errors():
            where = ".".join(str(part) for part in item["loc"])
            if item["type"] == "extra_forbidden":
                has = ", ".join(options.model_fields)
                text = f"{target} has no such option; " + (f"it has {has}" if has else "it has none")
            else:
                text = f"{item['input']!r}: {item['msg'][:1].lower()}{item['msg'][1:]}"
            faults.append(f"export.{target}.{where}: {text}")
        return faults
    return []


def known_losses() -> tuple[str, ...]:
    """Names in ``edgekd.losses.LOSSES``; not read from there, since that imports torch. A test holds the two equal."""
    return ("kd", "dist")


def _source_faults(key: str, reference: str, data: Json, folder: Path) -> list[str]:
    prefix, _, rest = reference.partition(":")
    if prefix in ("imagefolder", "csv", "jsonl", "parquet"):
        faults = [] if (folder / rest).exists() else [f"{key}: no {rest!r} beside the recipe"]
        if not data.get("image") and not data.get("text"):
            faults.append(f"{key}: {prefix} needs [data.image] with a size, or [data.text] with a tokenizer")
        return faults
    if reference.endswith(".npz"):
        return [] if (folder / reference).is_file() else [f"{key}: no file {reference!r} beside the recipe"]
    if ":" not in reference:
        return [f"{key}: {reference!r} is none of module:function, file.npz, imagefolder:, csv:, jsonl:, parquet:"]
    return _function_faults(key, reference, folder)


def _model_faults(key: str, reference: str, folder: Path) -> list[str]:
    prefix, _, rest = reference.partition(":")
    if prefix in ("hf", "onnx", "pt2"):
        return [] if (folder / rest).exists() else [f"{key}: no {rest!r} beside the recipe"]
    if ":" not in reference:
        return [f"{key}: {reference!r} is none of module:function, hf:folder, onnx:file, pt2:file"]
    return _function_faults(key, reference, folder)


def _function_faults(key: str, reference: str, folder: Path) -> list[str]:
    """Look at the source only: nothing of the user's is run by a check of the text."""
    module, _, function = reference.partition(":")
    path = folder.joinpath(*module.split(".")).with_suffix(".py")
    if not function:
        return [f"{key}: {reference!r} is not module:function"]
    if path.is_file():
        source = path.read_text(encoding="utf-8", errors="replace")
        if (
            not any(f"{keyword} {function}" in source for keyword in ("def", "class", "import"))
            and f"{function} =" not in source
        ):
            return [f"{key}: {path.name} beside the recipe defines no {function!r}"]
        return []
    import importlib.util

    try:
        found = importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        found = False
    return [] if found else [f"{key}: no {path.name} beside the recipe, and no module {module!r} is installed"]

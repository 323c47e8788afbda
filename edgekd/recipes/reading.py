"""edgekd.toml, and options on the command line, to values; every fault at once, with its key path and what would work.

Paths are relative to the recipe. A recipe may name the user's own Python code, so it is trusted like a Makefile.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from edgekd import plugins
from edgekd.errors import RecipeError, UsageError
from edgekd.profiles import load_profile
from edgekd.protocols import Options
from edgekd.recipes.arm_faults import arm_faults, learning_faults
from edgekd.recipes.faults import fault_lines, no_such_key, table_of, texts_of
from edgekd.recipes.places import file_fault, function_faults
from edgekd.recipes.recipe import Export, Recipe
from edgekd.recipes.recipe_models import AS_DATA, Member, Model, Teacher
from edgekd.types import Json

__all__ = ["FILE_NAME", "MIXINGS", "find_recipe", "load_recipe", "parse_options", "source_faults"]

FILE_NAME = "edgekd.toml"

MIXINGS = ("mixup", "cutmix")
"""Names in ``edgekd.data.mixing.MIXINGS``; not read there: that imports torch. A test holds them equal."""


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
        raise RecipeError([*fault_lines(error, _no_such_key), *_cross_faults(table, path.parent)]) from None
    recipe._folder = path.parent.resolve()
    faults = [*_cross_faults(table, path.parent), *learning_faults(recipe)]
    if faults:
        raise RecipeError(faults)
    return recipe


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


def _no_such_key(location: tuple[int | str, ...]) -> str:
    return no_such_key(str(location[-1]), _keys_at(location[:-1]))


def _keys_at(location: tuple[int | str, ...]) -> list[str]:
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
        return table_of(table.get(name))

    def each(name: str, key: str) -> list[str]:
        return texts_of(section(name).get(key))

    data = section("data")
    for key in ("train", "test", "validation", "unlabeled"):
        if isinstance(data.get(key), str):
            faults += source_faults(f"data.{key}", data[key], data, folder)
    faults += _view_faults(data, folder)
    for key in ("text", "tokens"):
        named = table_of(data.get(key)).get("tokenizer")
        if isinstance(named, str) and (fault := file_fault(named, folder)):
            faults.append(f"data.{key}.tokenizer: {fault}; a tokenizer.json is expected")
    faults += _models_faults(section("teacher"), section("student"), folder)
    faults += arm_faults(table, folder)
    if data.get("tokens") and section("compress").get("prune"):
        faults.append("compress.prune: a language model is not pruned; leave it out")
    faults += _export_faults(section("export"), each("export", "targets"), each("export", "precisions"))
    for index, device in enumerate(each("bench", "devices")):
        try:
            load_profile(str(folder / device) if device.endswith(".toml") else device)
        except UsageError as error:
            faults.append(f"bench.devices.{index}: {error}")
    labels = table.get("labels", [])
    if isinstance(labels, list) and len({str(label) for label in labels}) != len(labels):
        faults.append("labels: a name stands twice; every class needs its own")
    return faults


def _models_faults(teacher: Json, student: Json, folder: Path) -> list[str]:
    """Models that cannot be there, code that is not, and what no origin can be told."""
    several = teacher.get("models")
    tables: list[tuple[str, Json]] = [("teacher", teacher), ("student", student)]
    if isinstance(several, list):
        members = [entry if isinstance(entry, dict) else {"model": entry} for entry in several]
        tables = [*((f"teacher.models.{index}", member) for index, member in enumerate(members)), *tables[1:]]
    faults = []
    for key, table in tables:
        reference, preprocessing = table.get("model"), table.get("preprocessing")
        if isinstance(reference, str):
            faults += _model_faults(f"{key}.model", reference, folder)
            faults += _told_faults(key, reference, table)
        if isinstance(preprocessing, str) and preprocessing != AS_DATA:
            faults += function_faults(f"{key}.preprocessing", preprocessing, folder)
    return faults


def _told_faults(key: str, reference: str, table: Json) -> list[str]:
    """What is wrong with what an origin alone is told of a model."""
    tables: dict[str, type[BaseModel]] = {"teacher": Teacher, "student": Model}
    known = set(tables.get(key, Member).model_fields) - {"models"}
    options = plugins.load_origin(plugins.origin_of(reference)[0]).options
    try:
        options.model_validate({name: value for name, value in table.items() if name not in known})
    except ValidationError as error:
        every = [*known, *options.model_fields]
        return fault_lines(error, lambda where: no_such_key(str(where[-1]), every), f"{reference} needs it", key)
    return []


def _view_faults(data: Json, folder: Path) -> list[str]:
    """Augmentation, mixing, and how many views there are."""
    faults = []
    augment, mix, views, beside = (data.get(key) for key in ("augment", "mix", "views", "views_per_decode"))
    if isinstance(augment, str):
        faults += function_faults("data.augment", augment, folder)
    if isinstance(mix, str) and mix not in MIXINGS:
        faults += (
            function_faults("data.mix", mix, folder)
            if ":" in mix
            else [f"data.mix: {mix!r} is not known; there are {', '.join(MIXINGS)}, and module:function"]
        )
    if "mix_alpha" in data and not mix:
        faults.append("data.mix_alpha: nothing is mixed; set data.mix")
    if (views or 1) != 1 and not augment and not mix:
        faults.append(
            f"data.views: {views!r} views without an augmentation would all be the same; set data.augment or data.mix"
        )
    if isinstance(beside, int) and beside > 0 and (not isinstance(views or 1, int) or (views or 1) % beside):
        faults.append(
            f"data.views_per_decode: {beside} does not divide the {views or 1} views, so some would come more often"
        )
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
            if (words := own.get("precisions", [])) != texts_of(words):
                text = f'{words!r} is not a list of words, as ["fp32", "int8"] is'
                faults.append(f"export.{key}.precisions: {text}")
    lacking: dict[str, str] = {}
    for target in [name for name in targets if name in known] or Export().targets:
        own = table.get(target, {})
        words = texts_of(own["precisions"]) if isinstance(own, dict) and "precisions" in own else None
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
    known = f"it has {', '.join(options.model_fields)}" if options.model_fields else "it has none"
    try:
        options.model_validate(values)
    except ValidationError as error:
        return fault_lines(error, lambda _: f"{target} has no such option; {known}", under=f"export.{target}")
    return []


def source_faults(key: str, reference: str, data: Json, folder: Path) -> list[str]:
    """Why a reference names no samples, seen without reading any; none where it may.

    Args:
        key: What they are told by.
        data: The table ``[data]``.
    """
    prefix, _, rest = reference.partition(":")
    if prefix in ("imagefolder", "csv", "jsonl", "parquet", "text"):
        faults = [] if (folder / rest).exists() else [f"{key}: no {rest!r} beside the recipe"]
        if data.get("tokens") and prefix not in ("jsonl", "text"):
            faults.append(f"{key}: {prefix} holds no text for [data.tokens]; text: and jsonl: do")
        elif prefix == "text" and not data.get("tokens"):
            faults.append(f"{key}: text needs [data.tokens] with a tokenizer and a length")
        elif not data.get("tokens") and not data.get("image") and not data.get("text"):
            faults.append(
                f"{key}: {prefix} needs [data.image] with a size, or [data.text] or [data.tokens] with a tokenizer"
            )
        return faults
    if reference.endswith(".npz"):
        fault = file_fault(reference, folder)
        return [f"{key}: {fault}"] if fault else []
    if ":" not in reference:
        known = "module:function, file.npz, imagefolder:, csv:, jsonl:, parquet:, text:"
        return [f"{key}: {reference!r} is none of {known}"]
    return function_faults(key, reference, folder)


def _model_faults(key: str, reference: str, folder: Path) -> list[str]:
    if ":" not in reference:
        known = ", ".join(f"{name}:" for name in plugins.origin_names())
        return [f"{key}: {reference!r} is none of module:function, {known}"]
    name, place = plugins.origin_of(reference)
    fault = plugins.load_origin(name).fault(place, folder)
    return [f"{key}: {fault}"] if fault else []

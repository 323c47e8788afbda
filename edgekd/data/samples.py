"""All data of a recipe: from the user's function, an .npz or local files, to splits."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from edgekd import plugins
from edgekd.data.files import Column, ImageFiles, hashes, read_files, unique_ids
from edgekd.data.split import Split, content_hashes
from edgekd.data.tokens import read_tokens
from edgekd.data.truth import NO_LABEL
from edgekd.data.unlabeled import Joined, join_unlabeled
from edgekd.data.views import split_mix
from edgekd.data.windows import counted_positions
from edgekd.errors import DataError, NumericalError
from edgekd.types import Json

if TYPE_CHECKING:
    from edgekd.recipes.recipe import Data, Recipe

__all__ = ["Splits", "load_arrays", "load_splits", "load_unlabeled", "split_from_arrays"]


@dataclass(frozen=True)
class Splits:
    """All data of a recipe.

    Attributes:
        train: What students learn from.
        validation: Held out from training; choices are made on it.
        labels: Class names.
        preprocessing: What an app does before the model, as plain data.
        assets: Files that belong beside the model, by name (a tokenizer).
        joined: How many samples of ``train`` have no label, and why others were left out; None when none were given.
    """

    train: Split
    validation: Split
    labels: tuple[str, ...]
    preprocessing: Json
    assets: Mapping[str, bytes]
    load_test: Callable[[], Split]
    joined: Joined | None = None

    def example(self) -> list[Tensor]:
        """Two training samples, or the only one, as a student takes them."""
        return [torch.from_numpy(array) for array in self.train.arrays(np.arange(min(2, len(self.train)))).values()]

    @cached_property
    def test(self) -> Split:
        """Seen by no choice, reports are made on it: loaded when first asked for, so what chooses need not have it.

        Raises:
            DataError: It lacks labels that are needed, has other inputs than ``train``, or only samples that were
                trained or chosen on.
        """
        return self.load_test()

    @cached_property
    def validation_in_train(self) -> int:
        """How many samples of ``validation`` are in ``train`` as well: a few are found in many data sets."""
        return int(self.validation.found_in(self.train).sum())

    @cached_property
    def test_in_others(self) -> int:
        """How many samples of ``test`` are in ``train`` or ``validation`` as well."""
        return int((self.test.found_in(self.train) | self.test.found_in(self.validation)).sum())


def load_splits(recipe: Recipe) -> Splits:
    """Load everything that a recipe names, the test split when it is asked for or unlabeled samples may be in it.

    Raises:
        DataError: Shapes, labels or splits that do not fit; the message names the split.
        MissingToolchainError: A file format whose loader is not installed.
        NumericalError: NaN or infinity in the inputs.
    """
    data, folder = recipe.data, recipe.folder
    labelled = None if recipe.teacher.embeds else True
    raw = {"train": _read(data.train, data, folder, labelled)}
    if data.validation is not None:
        raw["validation"] = _read(data.validation, data, folder, labelled)
    names = recipe.labels or _label_names(raw)
    if raw["train"][1] is None and labelled is None:
        names = ()
    read = {key: _labelled_split(*part, key, names, labelled) for key, part in raw.items()}
    train = read["train"]
    if "validation" in read:
        validation = read["validation"]
        _check_held_out(validation, "validation", {"train": train})
    else:
        train, validation = _hold_out(train, data.validation_share)

    def load_test() -> Split:
        test = _labelled_split(*_read(data.test, data, folder, labelled), "test", names, labelled)
        _check_held_out(test, "test", {"train": train, "validation": validation})
        return test

    splits = Splits(train, validation, names, _preprocessing(data), _assets(data, folder), load_test)
    if data.unlabeled is None:
        return splits
    extra = load_unlabeled(recipe, data.unlabeled, "unlabeled")
    together, joined = join_unlabeled(train, extra, {"test": splits.test, "validation": validation})
    return replace(splits, train=together, load_test=lambda: splits.test, joined=joined)


def load_unlabeled(recipe: Recipe, reference: str, name: str) -> Split:
    """Samples whose labels, if they have any, are not looked at; see :func:`load_splits` for what is raised.

    Args:
        reference: As of ``data.train``.
        name: What errors call them.
    """
    inputs, _, ids = _read(reference, recipe.data, recipe.folder, labelled=False)
    return _split(inputs, None, ids, name, ())


def _labelled_split(
    inputs: Mapping[str, Column],
    label: np.ndarray | None,
    ids: np.ndarray | None,
    name: str,
    names: tuple[str, ...],
    needed: bool | None,
) -> Split:
    """A split whose samples all have a label, or ``NO_LABEL`` where none are needed and the training data has none."""
    if needed:
        split = _split(inputs, label, ids, name, names)
        if split.labels is None:
            raise DataError(
                f"{name} has no labels; a 'label' array (or [data.*] label_column) gives the class of each sample"
            )
        return split
    split = _split(inputs, label if names else None, ids, name, names)
    return split if split.labels is not None else replace(split, labels=np.full(len(split), NO_LABEL, np.int64))


def load_arrays(path: Path) -> dict[str, np.ndarray]:
    """Arrays of an .npz file, samples on the first axis.

    Raises:
        DataError: It is missing, damaged, pickled, empty, or its arrays differ in length.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except FileNotFoundError:
        raise DataError(f"no data file at {path}") from None
    except Exception as error:
        raise DataError(f"{path} cannot be read as .npz (numpy.savez writes one): {error}") from error
    if not arrays:
        raise DataError(f"{path} holds no arrays")
    lengths = {name: len(array) if array.ndim else 0 for name, array in arrays.items()}
    if len(set(lengths.values())) != 1 or 0 in lengths.values():
        raise DataError(f"{path}: arrays must have the same samples on the first axis; found {lengths}")
    return arrays


def split_from_arrays(arrays: Mapping[str, np.ndarray], name: str = "data", labels: Sequence[str] = ()) -> Split:
    """A split from arrays in hand: inputs by name, optionally ``label`` and ``id``.

    Raises:
        DataError: Lengths, labels or ids that do not fit.
        NumericalError: NaN or infinity in an input.
    """
    inputs, label, ids = _parts(arrays)
    return _split(inputs, label, ids, name, tuple(labels))


# ── reading ───────────────────────────────────────────────────────────────────────────────────────────────────────────

_Raw = tuple[dict[str, Column], "np.ndarray | None", "np.ndarray | None"]


def _read(reference: str, data: Data, folder: Path, labelled: bool | None = True) -> _Raw:
    prefix, _, rest = reference.partition(":")
    if data.tokens is not None and prefix in ("text", "jsonl"):
        ids, mask, labels = read_tokens(prefix, folder / rest, data.tokens, folder)
        return {"input_ids": ids, "attention_mask": mask}, labels, None
    if prefix in ("imagefolder", "csv", "jsonl", "parquet"):
        return read_files(prefix, folder / rest, data, folder, labelled)
    if reference.endswith(".npz"):
        return _parts(load_arrays(folder / reference))
    arrays = plugins.load_function(reference, folder)()
    if not isinstance(arrays, Mapping) or not arrays:
        raise DataError(
            f"{reference} returned {type(arrays).__name__}; a dict of arrays by input name, with 'label', works"
        )
    return _parts({name: np.asarray(array) for name, array in arrays.items()})


def _parts(arrays: Mapping[str, np.ndarray]) -> _Raw:
    inputs: dict[str, Column] = {k: v for k, v in arrays.items() if k not in ("label", "id")}
    return inputs, arrays.get("label"), None if "id" not in arrays else _given_ids(arrays["id"])


def _given_ids(ids: np.ndarray) -> np.ndarray:
    """Ids as spread out as hashes are, since the first by id are taken for a random choice; different ones stay so."""
    if ids.dtype.kind in "ui":
        return split_mix(ids)
    return unique_ids(hashes(str(item).encode() for item in ids))


# ── checking ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def _split(
    inputs: Mapping[str, Column], label: np.ndarray | None, ids: np.ndarray | None, name: str, names: tuple[str, ...]
) -> Split:
    if not inputs:
        raise DataError(f"{name} has no inputs; arrays besides 'label' and 'id' are the inputs")
    lengths = {key: len(column) for key, column in inputs.items()}
    if label is not None:
        lengths["label"] = len(label)
    if ids is not None:
        lengths["id"] = len(ids)
    if len(set(lengths.values())) != 1 or 0 in lengths.values():
        raise DataError(f"{name}: all arrays need the same samples on the first axis; found {lengths}")
    for key, column in inputs.items():
        if isinstance(column, np.ndarray) and column.dtype.kind == "f" and not np.isfinite(column).all():
            bad = int(np.flatnonzero(~np.isfinite(column).reshape(len(column), -1).all(axis=1))[0])
            raise NumericalError(f"{name}: input {key!r} has NaN or infinity, first in sample {bad}")
    inputs = {key: _tidy(column) for key, column in inputs.items()}
    labels = None if label is None else _labels(np.asarray(label), name, names, inputs)
    if ids is None:
        ids = unique_ids(content_hashes(inputs))
    if len(np.unique(ids)) != len(ids):
        raise DataError(f"{name}: 'id' has the same value twice; ids tell samples apart")
    digest = hashlib.sha256(ids.tobytes())
    for key, column in inputs.items():
        digest.update(f"{key}{column.shape}".encode())
        if isinstance(column, np.ndarray):
            digest.update(np.ascontiguousarray(column).tobytes())
        elif isinstance(column, ImageFiles):
            digest.update(column.reading.encode())
    digest.update(b"" if labels is None else labels.tobytes())
    return Split(inputs, labels, ids, digest.hexdigest()[:16])


def _tidy(column: Column) -> Column:
    """float64 to float32 and int64 to int32: what phones take."""
    if isinstance(column, np.ndarray):
        wanted = {"f": np.float32, "i": np.int32, "u": np.int32, "b": np.int32}.get(column.dtype.kind)
        if wanted is None:
            raise DataError(f"an input of dtype {column.dtype} cannot be fed to a model; numbers work")
        return column.astype(wanted, copy=False)
    return column


def _labels(label: np.ndarray, name: str, names: tuple[str, ...], inputs: Mapping[str, Column]) -> np.ndarray:
    tokens = [c.shape for c in inputs.values() if isinstance(c, np.ndarray) and c.dtype.kind == "i" and c.ndim == 2]
    if label.ndim == 2 and label.dtype.kind == "i" and label.shape in tokens:
        empty = np.flatnonzero(~counted_positions(label).any(axis=1))
        if len(empty):
            raise DataError(f"{name}: no position of window {empty[0]} counts (all labels are negative)")
        return np.maximum(label.astype(np.int64), -1)
    if label.ndim != 1:
        raise DataError(f"{name}: 'label' has shape {label.shape}; one class per sample, (samples,), is needed")
    if label.dtype.kind in "US":
        unknown = sorted(set(label.tolist()) - set(names))
        if unknown:
            raise DataError(f"{name}: label {unknown[0]!r} is not among the labels {', '.join(names)}")
        index = {value: position for position, value in enumerate(names)}
        return np.asarray([index[value] for value in label.tolist()], np.int64)
    if label.dtype.kind not in "iub":
        raise DataError(f"{name}: 'label' has dtype {label.dtype}; class numbers or names are needed")
    label = label.astype(np.int64)
    if names and (label.min() < 0 or label.max() >= len(names)):
        bad = int(label.min()) if label.min() < 0 else int(label.max())
        raise DataError(f"{name}: label {bad} is out of range; there are {len(names)} labels, 0 to {len(names) - 1}")
    return label


def _label_names(raw: Mapping[str, _Raw]) -> tuple[str, ...]:
    """Class names when the recipe gives none: those found in train, or the numbers up to the largest."""
    label = raw["train"][1]
    if label is None or label.ndim == 2:  # a language model's classes are its tokens, which tokenizer.json names
        return ()
    if label.dtype.kind in "US":
        return tuple(sorted(set(label.tolist())))
    return tuple(str(number) for number in range(int(label.max()) + 1))


def _check_held_out(split: Split, name: str, others: Mapping[str, Split]) -> None:
    """That a split has the inputs of train, in their order, and a sample that is in no other."""
    inputs = others["train"].inputs
    if list(inputs) != list(split.inputs):
        raise DataError(f"train has the inputs {', '.join(inputs)}; {name} has {', '.join(split.inputs)}")
    if np.logical_or.reduce([split.found_in(other) for other in others.values()]).all():
        raise DataError(f"all {len(split)} samples of data.{name} are in {' or '.join(others)}; others are needed")


def _hold_out(train: Split, share: float) -> tuple[Split, Split]:
    """Validation by content: all copies on one side, where a sample stays when others are added."""
    if share == 0:
        raise DataError("data.validation_share is 0 and data.validation is not given; choices need held-out samples")
    held = (train.contents >> np.uint64(11)).astype(np.float64) / 2.0**53 < share
    if not held.any() or held.all():
        different = len(np.unique(train.contents))
        raise DataError(
            f"{len(train)} training samples ({different} different) are too few to hold out a share of {share}"
        )
    return train.take(np.flatnonzero(~held)), train.take(np.flatnonzero(held))


def _preprocessing(data: Data) -> Json:
    if data.image is not None:
        spec = data.image
        return {
            "kind": "image",
            "size": [spec.size, spec.size],
            "channels": "grey" if spec.channels == 1 else "RGB",
            "fit": "shorter side resized bilinearly, centre cropped",
            "scale": 1 / 255,
            "mean": list(spec.mean),
            "std": list(spec.std),
            "layout": "NCHW",
            **data.preprocessing,
        }
    if data.text is not None:
        tokenizer = Path(data.text.tokenizer).name
        return {"kind": "text", "tokenizer": tokenizer, "max_length": data.text.max_length, **data.preprocessing}
    if data.tokens is not None:
        told = {"tokenizer": Path(data.tokens.tokenizer).name, "length": data.tokens.length, "end": data.tokens.end}
        return {"kind": "tokens", **told, **data.preprocessing}
    return dict(data.preprocessing)


def _assets(data: Data, folder: Path) -> dict[str, bytes]:
    spec = data.text or data.tokens
    if spec is None:
        return {}
    path = folder / spec.tokenizer
    return {path.name: path.read_bytes()}

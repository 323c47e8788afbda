"""Local files to columns: image folders, CSV, JSONL and Parquet, through Hugging Face ``datasets``.

Images are decoded when they are indexed; text becomes token ids at once, since those are small.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from edgekd import plugins
from edgekd.data.tokens import load_tokenizer
from edgekd.errors import DataError, MissingToolchainError, first_line
from edgekd.quiet import quiet

if TYPE_CHECKING:
    from edgekd.recipes.recipe import Data, ImageData, TextData

__all__ = ["Column", "ImageFiles", "hashes", "read_files", "unique_ids"]


class Column(Protocol):
    """What indexing needs of an input: a NumPy array is one."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: Any, /) -> Any: ...


def hashes(contents: Iterable[bytes]) -> np.ndarray:
    """One of each, the same for all copies: uint64 (samples,)."""
    return np.fromiter((_hash(content) for content in contents), np.uint64)


def unique_ids(contents: np.ndarray) -> np.ndarray:
    """Hashes of contents, the second copy of the same in its place that of itself and its number: uint64 (samples,)."""
    seen: dict[int, int] = {}
    ids = contents.copy()
    for position, content in enumerate(contents.tolist()):
        copy = seen.get(content, 0)
        seen[content] = copy + 1
        if copy:
            ids[position] = _hash(content.to_bytes(8, "little") + copy.to_bytes(8, "little"))
    return ids


def _hash(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


Columns = tuple[dict[str, "Column"], np.ndarray | None, np.ndarray | None]
"""Inputs by name, labels (names or numbers) where they were asked for, and ids where the files give them."""


def read_files(kind: str, path: Path, data: Data, folder: Path, labelled: bool | None = True) -> Columns:
    """Read one split; nothing is fetched.

    Args:
        kind: ``imagefolder``, ``csv``, ``jsonl`` or ``parquet``.
        path: Of the file, or of the folder with one folder for each class.
        data: How columns become arrays: its ``text`` or ``image`` table.
        folder: Of the recipe, where the tokenizer is.
        labelled: Whether labels are read; without, the files need none, and an image folder no folders in it. None
            reads them where there are any.

    Raises:
        MissingToolchainError: ``datasets`` or ``tokenizers`` is not installed.
        DataError: The files cannot be read, lack a column, or a row its label.
    """
    absent = plugins.missing(("datasets",))
    if absent:
        raise MissingToolchainError(f"data from {kind}:", "datasets", "hf")
    import datasets
    from datasets.utils.logging import disable_progress_bar

    disable_progress_bar()
    said = f"{kind}:{path.name}"
    loader = "json" if kind == "jsonl" else kind
    where: dict[str, Any] = {"data_dir": str(path)} if kind == "imagefolder" else {"data_files": str(path)}
    if path.is_file() and not path.stat().st_size:
        raise DataError(f"{said} cannot be read: it holds no rows")
    try:
        with quiet():
            table = datasets.load_dataset(loader, split="train", **where)
    except Exception as error:
        raise DataError(f"{said} cannot be read: {first_line(error.__cause__ or error)}") from error
    spec = data.text or data.image
    assert spec is not None  # the recipe's check
    if labelled is None:
        labelled = spec.label_column in table.column_names
    for column in (spec.column, spec.label_column) if labelled else (spec.column,):
        if column not in table.column_names:
            raise DataError(f"{said} has no column {column!r}; there are {', '.join(table.column_names)}")
    labels = None
    if labelled:
        feature, found = table.features[spec.label_column], _values(table, spec.label_column, said)
        is_class = isinstance(feature, datasets.ClassLabel)
        for row, label in enumerate(found, 1):
            if label is None or label == "" or label != label or (is_class and label < 0):  # NaN differs from itself
                raise DataError(
                    f"{said}: row {row} has no {spec.label_column!r}; every row needs one, "
                    "and samples without it can be data.unlabeled"
                )
        labels = np.asarray([feature.names[index] for index in found] if is_class else found)
    if data.text is not None:
        texts = _values(table, spec.column, said)
        if None in texts:
            raise DataError(f"{said}: row {texts.index(None) + 1} has no {spec.column!r}; every row needs one")
        return _tokenize(texts, data.text, folder), labels, None
    assert data.image is not None
    column_data = table.cast_column(spec.column, datasets.Image(decode=False)).with_format(None)[spec.column]
    images = ImageFiles(list(column_data), data.image)
    return {spec.column: images}, labels, images.ids()


def _values(table: Any, column: str, said: str) -> list[Any]:
    """All of a column."""
    values: list[Any] = []
    try:
        values.extend(table[column])
    except UnicodeDecodeError as error:
        raise DataError(f"{said}: row {len(values) + 1} is not UTF-8: {first_line(error)}") from error
    return values


def _tokenize(texts: list[Any], spec: TextData, folder: Path) -> dict[str, Column]:
    tokenizer = load_tokenizer(folder / spec.tokenizer, "text data")
    tokenizer.enable_truncation(spec.max_length)
    tokenizer.enable_padding(length=spec.max_length)
    encoded = tokenizer.encode_batch([str(text) for text in texts])
    return {
        "input_ids": np.asarray([item.ids for item in encoded], np.int32),
        "attention_mask": np.asarray([item.attention_mask for item in encoded], np.int32),
    }


class ImageFiles:
    """A column of encoded images, decoded when indexed; float32 (samples, channels, size, size).

    An image that is asked for several times at once, for several of its views, is decoded once.
    """

    def __init__(self, files: list[Any], spec: ImageData) -> None:
        self._files, self._spec = files, spec
        self._mean = np.asarray(spec.mean, np.float32).reshape(-1, 1, 1)
        self._std = np.asarray(spec.std, np.float32).reshape(-1, 1, 1)

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self._files), self._spec.channels, self._spec.size, self._spec.size)

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: Any) -> np.ndarray:
        positions = np.arange(len(self))[index]
        if positions.ndim == 0:
            return self._decode(self._files[positions])
        different, places = np.unique(positions, return_inverse=True)
        return np.stack([self._decode(self._files[i]) for i in different])[places]

    def take(self, indices: np.ndarray) -> ImageFiles:
        taken = ImageFiles([self._files[i] for i in indices], self._spec)
        taken.contents = self.contents[indices]  # a million sizes are not asked for again
        return taken

    def joined(self, other: ImageFiles) -> ImageFiles:
        """These, then those."""
        return ImageFiles([*self._files, *other._files], self._spec)

    @property
    def reading(self) -> str:
        """How pixels become inputs, for a fingerprint."""
        return self._spec.model_dump_json(exclude={"column", "label_column"})

    def found_in(self, other: ImageFiles) -> np.ndarray:
        """Which of these are in the other by content, whatever their names: bool (samples,).

        Only files of a size that both have are read.
        """
        sizes = {_file_size(file) for file in other._files} & {_file_size(file) for file in self._files}
        known = {_file_hash(file) for file in other._files if _file_size(file) in sizes}
        return np.asarray([_file_size(file) in sizes and _file_hash(file) in known for file in self._files], bool)

    @cached_property
    def contents(self) -> np.ndarray:
        """Hashes of the content where the bytes are at hand, else of folder, name and size: uint64 (samples,)."""
        return hashes(self._identity(file) for file in self._files)

    def ids(self) -> np.ndarray:
        """As ``contents``, each copy with an id of its own."""
        return unique_ids(self.contents)

    @staticmethod
    def _identity(file: Any) -> bytes:
        if file["bytes"] is not None:
            return bytes(file["bytes"])
        path = Path(file["path"])
        return f"{path.parent.name}/{path.name}:{path.stat().st_size}".encode()

    def _decode(self, file: Any) -> np.ndarray:
        from PIL import Image, ImageOps

        size = self._spec.size
        source = io.BytesIO(file["bytes"]) if file["bytes"] is not None else file["path"]
        try:
            with Image.open(source) as image:
                image = image.convert("L" if self._spec.channels == 1 else "RGB")
                fitted = ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR)
        except OSError as error:
            raise DataError(f"{file['path'] or 'an image'} cannot be decoded: {error}") from None
        pixels = np.asarray(fitted, np.float32).reshape(size, size, -1).transpose(2, 0, 1) / 255.0
        return ((pixels - self._mean) / self._std).astype(np.float32)


def _file_size(file: Any) -> int:
    return len(file["bytes"]) if file["bytes"] is not None else Path(file["path"]).stat().st_size


def _file_hash(file: Any) -> bytes:
    content = file["bytes"] if file["bytes"] is not None else Path(file["path"]).read_bytes()
    return hashlib.blake2b(content, digest_size=16).digest()

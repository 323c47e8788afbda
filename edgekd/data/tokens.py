"""Text to windows of tokens for a causal language model: what it reads, and the next token at each position.

A document is cut into windows one after another; the last is padded. Each of its tokens but the first is a label once.
A row with a prompt and a completion is one window: the prompt is read and does not count (its labels are -1). Such rows
are also what ``edgekd generate`` writes (:mod:`edgekd.teachers.completions`).
Windows never hold two documents, so no text stands before another that has nothing to do with it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgekd import plugins
from edgekd.errors import DataError, MissingToolchainError, first_line

if TYPE_CHECKING:
    from edgekd.recipes.recipe import TokenData

__all__ = [
    "Windows",
    "document_windows",
    "jsonl_rows",
    "load_tokenizer",
    "prompt_rows",
    "read_text",
    "read_tokens",
    "row_window",
]

Windows = tuple[np.ndarray, np.ndarray, np.ndarray]
"""input_ids and attention_mask, int32, and labels, int64: each (windows, length)."""


def load_tokenizer(path: Path, what: str) -> Any:
    """A ``tokenizer.json`` as ``tokenizers.Tokenizer``.

    Args:
        what: Needs it.

    Raises:
        MissingToolchainError: ``tokenizers`` is not installed.
        DataError: The file is missing or damaged.
    """
    if plugins.missing(("tokenizers",)):
        raise MissingToolchainError(what, "tokenizers", "hf")
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise DataError(f"{path} cannot be read as a tokenizer.json: {first_line(error)}") from error


def read_tokens(kind: str, path: Path, spec: TokenData, folder: Path) -> Windows:
    """Read one split.

    Args:
        kind: ``text``, one document; or ``jsonl``, rows that have the document's column, or prompt and completion.
        path: Of the file.
        spec: How text becomes windows.
        folder: Of the recipe, where the tokenizer is.

    Raises:
        MissingToolchainError: ``tokenizers`` is not installed.
        DataError: The file cannot be read, lacks a column, or no position of it counts.
    """
    tokenizer = load_tokenizer(folder / spec.tokenizer, "data of tokens")
    tokenizer.no_padding()
    tokenizer.no_truncation()
    end: list[int] = []
    if spec.end:
        token = tokenizer.token_to_id(spec.end)
        if token is None:
            raise DataError(f"data.tokens.end: {spec.tokenizer} has no token {spec.end!r}")
        end = [token]

    def encoded(text: str) -> list[int]:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    content = read_text(path)
    parts: list[Windows] = []
    if kind == "text":
        parts.append(document_windows(encoded(content) + end, spec.length))
    else:
        for number, row in jsonl_rows(content, path.name):
            if spec.prompt_column in row and spec.completion_column in row:
                prompt, completion = str(row[spec.prompt_column]), str(row[spec.completion_column])
                stop = end if row.get("ended", True) else []  # a completion that was cut off does not end there
                parts.append(row_window(encoded(prompt), encoded(completion) + stop, spec.length))
            elif spec.column in row:
                parts.append(document_windows(encoded(str(row[spec.column])) + end, spec.length))
            else:
                raise DataError(
                    f"jsonl:{path.name} line {number} has neither {spec.column!r} nor {spec.prompt_column!r} and "
                    f"{spec.completion_column!r}; it has {', '.join(row) or 'nothing'}"
                )
    if not sum(len(part[0]) for part in parts):
        raise DataError(f"{kind}:{path.name} has no position whose next token counts (a window is {spec.length} long)")
    ids, mask, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return ids, mask, labels


def document_windows(tokens: Sequence[int], length: int) -> Windows:
    """Windows of one document; none of a document of fewer than two tokens."""
    count = -(-(len(tokens) - 1) // length) if len(tokens) > 1 else 0
    ids = np.zeros((count, length), np.int32)
    labels = np.full((count, length), -1, np.int64)
    mask = np.zeros((count, length), np.int32)
    read = len(tokens) - 1  # the last token is a label only
    ids.reshape(-1)[:read], mask.reshape(-1)[:read] = tokens[:read], 1
    labels.reshape(-1)[:read] = tokens[1 : read + 1]
    return ids, mask, labels


def row_window(prompt: Sequence[int], completion: Sequence[int], length: int) -> Windows:
    """One window of prompt and completion, cut at its length; none where no token of the completion is left.

    Without a prompt, the first token of the completion has none before it and is read only.
    """
    tokens = [*prompt, *completion][: length + 1]
    ids, mask, labels = document_windows(tokens, length)
    labels[:, : max(0, len(prompt) - 1)] = -1
    some = (labels >= 0).any(axis=1)
    return ids[some], mask[some], labels[some]


def jsonl_rows(content: str, name: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows and the lines they stand on, from 1; blank lines are none.

    Raises:
        DataError: A line is no JSON object.
    """
    # Not splitlines(): JSON may hold U+2028, U+0085 and others as they are, and they end no line.
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"jsonl:{name} line {number} is not JSON: {error}") from None
        if not isinstance(row, dict):
            raise DataError(f"jsonl:{name} line {number} is no object with columns")
        yield number, row


def prompt_rows(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """Rows of a .jsonl that each have a ``prompt``, with the lines they stand on.

    Raises:
        DataError: The file cannot be read, or a row has no prompt.
    """
    numbered = list(jsonl_rows(read_text(path), path.name))
    for number, row in numbered:
        if not isinstance(row.get("prompt"), str) or not row["prompt"]:
            raise DataError(f"{path.name} line {number} has no 'prompt'; it has {', '.join(row) or 'nothing'}")
    return numbered


def read_text(path: Path) -> str:
    """A file of text.

    Raises:
        DataError: It cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from None

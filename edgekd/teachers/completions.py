"""The teacher's own words as training data: sequence-level distillation (Kim & Rush 2016, arXiv:1606.07947).

A student that learns from what the teacher says, instead of from what people wrote, learns one mode of its distribution
well. The completions are rows that ``[data.tokens]`` reads (:mod:`edgekd.data.tokens`); cache and arms are the usual.

A completion depends on the teacher, the settings and its own prompt alone, so a file that broke off goes on where it
ended, and the whole file is the same.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from edgekd import plugins
from edgekd.data.tokens import jsonl_rows, load_tokenizer, prompt_rows, read_text
from edgekd.errors import DataError, MissingToolchainError, UsageError
from edgekd.programs.hugging_face import generating
from edgekd.protocols import Progress
from edgekd.store import atomic_write, fingerprint, hash_path
from edgekd.teachers.sources import module_fingerprint
from edgekd.types import Json

__all__ = ["CompletionSettings", "Writer", "complete_file", "prompt_tokens", "teacher_writer"]


@dataclass(frozen=True)
class Writer:
    """What completes prompts.

    Attributes:
        require: Looks at all rows of a .jsonl, and raises a DataError for the first prompt that cannot be completed.
        write: (prompt, seed) to a completion, and whether it came to its end.
    """

    require: Callable[[Path], object]
    write: Callable[[str, int], tuple[str, bool]]


@dataclass(frozen=True)
class CompletionSettings:
    """How completions are made.

    Attributes:
        max_tokens: Of a completion.
        temperature: 0 takes the likeliest token each time; above, tokens are drawn.
        beams: More than 1 searches for the likeliest completion (what Kim & Rush train on); only at temperature 0.
        seed: Of all draws.
        end: The token that ends a completion; empty for none.
    """

    max_tokens: int = 128
    temperature: float = 0.0
    beams: int = 1
    seed: int = 0
    end: str = ""


def complete_file(prompts: Path, out: Path, writer: Writer, made_by: str, seed: int, progress: Progress) -> int:
    """Complete every row of a .jsonl that has a ``prompt``; rows that ``out`` has already are not done again.

    A row keeps what else it holds, and gets ``completion``, ``ended`` and ``made_by``.

    Args:
        made_by: Fingerprint of teacher and settings.

    Returns:
        How many rows were done now.

    Raises:
        DataError: A row has no prompt, or one that the writer cannot complete; nothing was written.
        UsageError: ``out`` was made by another teacher, with other settings or from other prompts.
    """
    rows = [row for _, row in prompt_rows(prompts)]
    writer.require(prompts)
    done = _done(out, rows, made_by)
    progress.start(f"generate {out.name}", len(rows), done)
    with out.open("a", encoding="utf-8") as file:
        for number, row in enumerate(rows[done:], done):
            completion, ended = writer.write(row["prompt"], _seed_of(seed, number, row["prompt"]))
            made = {**row, "completion": completion, "ended": ended, "made_by": made_by}
            file.write(json.dumps(made, ensure_ascii=False) + "\n")
            file.flush()  # a row that is whole is kept
            progress.advance()
    progress.finish()
    return len(rows) - done


def prompt_tokens(prompts: Path, tokenizer: Any, models: Sequence[Any], max_tokens: int) -> list[list[int]]:
    """The tokens of each prompt of a .jsonl.

    Args:
        models: Causal language models of transformers, which read prompt and completion.
        max_tokens: Of a completion.

    Raises:
        DataError: A row has no prompt, one without a token, or one that does not fit the models with a completion.
    """
    tokens = []
    room = min(getattr(model.config, "max_position_embeddings", 1 << 30) for model in models) - max_tokens
    for number, row in prompt_rows(prompts):
        ids: list[int] = tokenizer.encode(row["prompt"], add_special_tokens=False).ids
        if not 0 < len(ids) <= room:
            fit = f"1 to {room} fit" if room > 0 else f"none fits into {room + max_tokens}"
            raise DataError(
                f"{prompts.name} line {number} has {len(ids)} tokens of prompt; with {max_tokens} of completion, {fit}"
            )
        tokens.append(ids)
    return tokens


def teacher_writer(module: nn.Module, tokenizer_file: Path, settings: CompletionSettings) -> tuple[Writer, str]:
    """What completes a prompt with a transformers teacher (``generate`` with its key-value cache), one at a time.

    Args:
        module: Of :func:`edgekd.programs.hugging_face.hugging_face_module`, a causal language model.

    Returns:
        The writer, and the fingerprint of teacher and settings.

    Raises:
        UsageError: The model does not generate, a setting does not go with another, or ``end`` is no token.
        MissingToolchainError: ``transformers`` or ``tokenizers`` is not installed.
    """
    if plugins.missing(("transformers",)):
        raise MissingToolchainError("generating text", "transformers", "hf")
    from transformers import GenerationConfig

    model = generating(module)
    if model is None:
        raise UsageError("this teacher does not generate text; hf:folder of a causal language model does")
    if settings.beams > 1 and settings.temperature > 0:
        raise UsageError(f"{settings.beams} beams search for the likeliest text; that goes with temperature 0")
    if not tokenizer_file.is_file():
        raise UsageError(f"no tokenizer at {tokenizer_file}; --tokenizer names a tokenizer.json")
    tokenizer = load_tokenizer(tokenizer_file, "generating text")
    end = tokenizer.token_to_id(settings.end) if settings.end else None
    if settings.end and end is None:
        raise UsageError(f"{tokenizer_file.name} has no token {settings.end!r}")
    config = GenerationConfig(
        max_new_tokens=settings.max_tokens,
        do_sample=settings.temperature > 0,
        temperature=settings.temperature or None,
        top_k=0 if settings.temperature > 0 else None,  # transformers' own default would cut at the 50 likeliest
        num_beams=settings.beams,
        eos_token_id=end,
        pad_token_id=0,
    )

    def require(prompts: Path) -> None:
        prompt_tokens(prompts, tokenizer, [model], settings.max_tokens)

    def write(prompt: str, seed: int) -> tuple[str, bool]:
        ids = torch.tensor([tokenizer.encode(prompt, add_special_tokens=False).ids])
        torch.manual_seed(seed)
        with torch.no_grad():
            mask = torch.ones_like(ids)
            told = {"generation_config": config, "use_model_defaults": False}  # its top_p would bend what we asked for
            found = model.generate(ids, attention_mask=mask, use_cache=True, **told)
        made = found[0, ids.shape[1] :].tolist()
        ended = end is not None and end in made
        return tokenizer.decode(made[: made.index(end)] if ended else made, skip_special_tokens=False), ended

    made_by = fingerprint([module_fingerprint(module), hash_path(tokenizer_file), dict(vars(settings))])
    return Writer(require, write), made_by


def _done(out: Path, prompts: list[Json], made_by: str) -> int:
    """How many rows are there already; a last line that broke off is taken away."""
    if not out.is_file():
        return 0
    content = out.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        atomic_write(out, whole)
    rows = list(jsonl_rows(read_text(out), out.name))
    for (number, row), prompt in zip(rows, prompts, strict=False):
        if row.get("made_by") != made_by or row.get("prompt") != prompt["prompt"]:
            what = "another prompt" if row.get("made_by") == made_by else "another teacher or other settings"
            raise UsageError(f"{out} line {number} was made from {what}; remove it, or name another file")
    if len(rows) > len(prompts):
        raise UsageError(f"{out} has {len(rows)} rows for {len(prompts)} prompts; remove it, or name another file")
    return len(rows)


def _seed_of(seed: int, number: int, prompt: str) -> int:
    """Of one row: the same whichever rows were done before, another for the same prompt asked twice."""
    digest = hashlib.blake2b(f"{seed} {number} {prompt}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1

"""Language models with caches as students: of any causal language model of transformers, and of a recipe's own.

Training sees windows, all positions at once; a file answers token by token. So what was trained is put back into the
module that it was trained in, and that is traced once more, with caches (:mod:`edgekd.programs.decoder`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import nn

from edgekd.errors import UsageError
from edgekd.programs.decoder import POSITIONS, TOKENS, decoder_program
from edgekd.programs.hugging_face import generating
from edgekd.programs.models import count_macs, count_parameters, example_inputs, input_specs, output_specs
from edgekd.programs.student_files import load_student
from edgekd.teachers.sources import fresh_module
from edgekd.types import LOGITS, Card, Decoder, Json, Student

if TYPE_CHECKING:
    from pathlib import Path

    from edgekd.stages.workspace import Workspace

__all__ = [
    "NoCachesError",
    "configured_ends",
    "context_of",
    "decoder_student",
    "put_weights",
    "trained_decoder",
    "untrained_decoder",
]

DEFAULT_CONTEXT = 1024
"""Tokens of prompt and answer together, where a model was made for so many."""


class NoCachesError(UsageError):
    """A student that no caches can be made of: it can be trained, and gives no files."""


def context_of(model: Any, asked: int | None) -> int:
    """Slots of the caches: as asked, else 1024 or what the model was made for."""
    return asked or min(DEFAULT_CONTEXT, getattr(model.config, "max_position_embeddings", DEFAULT_CONTEXT))


def decoder_student(
    model: Any, context: int, name: str, lineage: Sequence[str], end_tokens: Sequence[int], tokenizer: str = ""
) -> Student:
    """A causal language model of transformers as a program with caches, and its card.

    Args:
        tokenizer: Name of the asset; empty for none.

    Raises:
        UsageError: The context is beyond what the model was made for.
        ModelFileError: The architecture is one that caches of slots do not serve.
    """
    program = decoder_program(model, context)
    meanings = {TOKENS: "token ids", POSITIONS: "positions", LOGITS: LOGITS}
    card = Card(
        name=name,
        inputs=tuple(replace(spec, meaning=meanings.get(spec.name, "cache")) for spec in input_specs(program)),
        outputs=tuple(replace(spec, meaning=meanings.get(spec.name, "cache")) for spec in output_specs(program)),
        preprocessing={"kind": "text", "tokenizer": tokenizer} if tokenizer else {},
        parameters=count_parameters(program),
        macs=count_macs(program) // example_inputs(program)[0].shape[1],
        lineage=tuple(lineage),
        assets=(tokenizer,) if tokenizer else (),
        decoder=Decoder(context, tuple(end_tokens)),
    )
    return Student(program, card)


def _fresh_model(work: Workspace) -> tuple[nn.Module, Any]:
    """The recipe's student before training, and the causal language model in it.

    Raises:
        NoCachesError: It has none, so no caches can be made of it.
    """
    module, name = fresh_module(work.recipe, 0).eval(), work.recipe.student.model
    model = generating(module)
    if model is None:
        raise NoCachesError(
            f"files of language models keep keys and values, and {name!r} is no causal language model of transformers; "
            f"edgekd export {work.folder.path / 'students' / 'ARM-SEED'} --target onnx writes it without, all "
            "positions of a window at once"
        )
    return module, model


def untrained_decoder(work: Workspace) -> Student:
    """The recipe's student with caches before it is trained: what its files will be, hours before.

    Raises:
        NoCachesError, UsageError, ModelFileError: As :func:`trained_decoder`.
    """
    model = _fresh_model(work)[1]
    return decoder_student(model, context_of(model, work.recipe.export.context), work.recipe.name, (), ())


def trained_decoder(work: Workspace, folder: Path) -> tuple[Student, dict[str, bytes]]:
    """A trained student of a recipe with caches, and its assets.

    Args:
        folder: Where its program of windows lies.

    Raises:
        NoCachesError: It is no model that caches can be made of.
        UsageError: The recipe's student is another one than was trained.
        ModelFileError: See :func:`decoder_student`.
    """
    module, model = _fresh_model(work)
    trained, assets = put_weights(module, folder, work.recipe.student.model)
    card = trained.card
    tokenizer = card.preprocessing.get("tokenizer", "") if assets else ""
    context = context_of(model, work.recipe.export.context)
    ends = _end_tokens(model, card.preprocessing, assets.get(tokenizer))
    student = decoder_student(model, context, card.name, card.lineage, ends, tokenizer)
    return student, assets


def put_weights(module: nn.Module, folder: Path, name: str) -> tuple[Student, dict[str, bytes]]:
    """Put what a student has learned into the module that it was trained in.

    Args:
        folder: Where its program of windows lies.
        name: Of the module, for the message.

    Returns:
        That program and its assets.

    Raises:
        UsageError: The student is another one than was trained.
    """
    trained, assets = load_student(folder)
    try:
        missing, unexpected = module.load_state_dict(trained.program.state_dict, strict=False)
    except RuntimeError:  # of other shapes
        missing, unexpected = [], ["weights of other shapes"]
    if missing or unexpected:
        raise UsageError(
            f"{folder} holds other weights than {name!r}: {[*missing, *unexpected][0]}; "
            "a student that was changed is trained again: edgekd distill"
        )
    return trained, assets


def _end_tokens(model: Any, preprocessing: Json, tokenizer: bytes | None) -> tuple[int, ...]:
    """The token that ended documents in training, else those that the model's configuration names."""
    if preprocessing.get("end") and tokenizer is not None:
        from tokenizers import Tokenizer

        token = Tokenizer.from_str(tokenizer.decode()).token_to_id(preprocessing["end"])
        return () if token is None else (token,)
    return configured_ends(model)


def configured_ends(model: Any) -> tuple[int, ...]:
    """Tokens that end an answer, as the model's own configuration has them."""
    ends = getattr(model.generation_config, "eos_token_id", None)
    return tuple(ends) if isinstance(ends, list) else () if ends is None else (ends,)

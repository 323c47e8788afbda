"""Teachers and students by reference: the doors to ``edgekd.origins``.

A teacher only has to give outputs; a student must be a module that can be trained.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from edgekd import plugins
from edgekd.errors import DataError, ModelFileError, UsageError, first_line
from edgekd.programs.models import count_macs, count_parameters, flatten_outputs
from edgekd.programs.tracing import export_program
from edgekd.protocols import Arrays, ModelRequest, Preprocessed, Teaching, Trainable
from edgekd.teachers.taps import tapped
from edgekd.teaching import Answer, Teacher
from edgekd.types import Json

if TYPE_CHECKING:
    from torch.export import ExportedProgram

    from edgekd.recipes.recipe import Recipe
    from edgekd.teaching import Preprocessing

__all__ = [
    "answer_by_name",
    "checked_logits",
    "fresh_module",
    "load_student_module",
    "load_teacher",
    "module_fingerprint",
    "module_teacher",
    "own_preprocessing",
    "trainable_module",
]


def load_teacher(
    reference: str,
    folder: Path,
    example: Arrays,
    told: Json | None = None,
    taps: Sequence[str] = (),
    labels: Sequence[str] = (),
) -> Teacher:
    """Load one teacher.

    Args:
        reference: As in a recipe.
        folder: What it is relative to.
        example: A few samples as the teacher takes them, to count the work of one.
        told: What the recipe says to its origin alone.
        taps: Modules or outputs that it returns as features.
        labels: Class names of the recipe.

    Raises:
        UsageError: The function is not there.
        ModelFileError: The file is damaged or foreign.
        MissingToolchainError: Its toolchain is not installed.
        DataError: It returns no logits of shape (batch, classes).
    """
    origin, asked = _request(reference, folder, told, taps, labels)
    if isinstance(origin, Teaching):
        return origin.teacher(asked, example)
    return module_teacher(origin.module(asked), asked, example)


def own_preprocessing(
    reference: str, folder: Path, told: Json | None = None, labels: Sequence[str] = ()
) -> Preprocessing | None:
    """What a teacher's library says of its inputs; None where no library is asked.

    Args:
        reference, folder, told, labels: See :func:`load_teacher`.
    """
    origin, asked = _request(reference, folder, told, (), labels)
    return origin.preprocessing(asked) if isinstance(origin, Preprocessed) else None


def load_student_module(
    reference: str, folder: Path, seed: int, told: Json | None = None, labels: Sequence[str] = ()
) -> nn.Module:
    """A student to train; the global generator is seeded first, so the same seed gives the same start.

    Args:
        told, labels: See :func:`load_teacher`.

    Raises:
        UsageError: The function is not there.
        DataError: The reference names no module that can be trained.
    """
    torch.manual_seed(seed)
    return trainable_module(reference, folder, told, labels)


def fresh_module(recipe: Recipe, seed: int) -> nn.Module:
    """The student of a recipe before it is trained; see :func:`load_student_module`."""
    student = recipe.student
    return load_student_module(student.model, recipe.folder, seed, student.told, recipe.labels)


def trainable_module(reference: str, folder: Path, told: Json | None = None, labels: Sequence[str] = ()) -> nn.Module:
    """A module that can be trained, drawn from the global generator as it stands; see :func:`load_student_module`."""
    origin, asked = _request(reference, folder, told, (), labels)
    if not isinstance(origin, Trainable):
        able = [f"{name}:" for name in plugins.origin_names() if isinstance(plugins.load_origin(name), Trainable)]
        raise DataError(f"{reference!r} cannot be trained; a student is module:function, {', '.join(able)}")
    return origin.module(asked)


def _request(
    reference: str, folder: Path, told: Json | None, taps: Sequence[str], labels: Sequence[str]
) -> tuple[Any, ModelRequest]:
    """The origin of a model, and what is asked of it."""
    name, place = plugins.origin_of(reference)
    origin = plugins.load_origin(name)
    plugins.require_origin(reference, origin)
    options = origin.options.model_validate(told or {})
    return origin, ModelRequest(reference, place, folder, options, tuple(labels), tuple(taps))


def module_teacher(module: nn.Module, asked: ModelRequest, example: Arrays) -> Teacher:
    """A module as a teacher; its features are what its modules return, found by their names."""
    module = module.eval()

    def outputs(arrays: Arrays) -> Answer:
        with torch.no_grad(), tapped(module, asked.taps, asked.reference) as seen:
            try:
                returned = flatten_outputs(module(*(torch.from_numpy(array) for array in arrays.values())))
            except Exception as error:
                taken = ", ".join(f"{name} {array.shape}" for name, array in arrays.items())
                raise DataError(f"teacher {asked.reference!r} cannot take {taken}: {first_line(error)}") from error
            features = {tap: seen(tap).float().numpy() for tap in asked.taps}
        return Answer(checked_logits(returned[0].float().numpy() if returned else np.empty(0), asked), features)

    program: ExportedProgram | None = None
    with contextlib.suppress(ModelFileError):  # a teacher need not be exportable: only its MACs stay unknown then
        program = export_program(module, [torch.from_numpy(a[:1]) for a in example.values()], dynamic_batch=False)
    state = {tensor.data_ptr(): tensor for tensor in module.state_dict().values()}  # tied weights are stored once
    return Teacher(
        outputs,
        module_fingerprint(module),
        count_parameters(module),
        count_macs(program) if program is not None else None,
        sum(tensor.numel() * tensor.element_size() for tensor in state.values()),
    )


def answer_by_name(asked: ModelRequest, outputs: Arrays) -> Answer:
    """An answer from named outputs: the first are the logits, features are found by their names.

    Raises:
        UsageError: There is no output of a feature's name.
        DataError: The first has no shape of logits.
    """
    if missing := [tap for tap in asked.taps if tap not in outputs]:
        raise UsageError(f"{asked.reference} has no output {missing[0]!r} for a feature; it has {', '.join(outputs)}")
    return Answer(checked_logits(next(iter(outputs.values())), asked), {tap: outputs[tap] for tap in asked.taps})


def checked_logits(logits: Any, asked: ModelRequest) -> np.ndarray:
    """As float32.

    Raises:
        DataError: They have no shape of logits.
    """
    array = np.asarray(logits, np.float32)
    if array.ndim not in (2, 3):
        raise DataError(
            f"teacher {asked.reference!r} returns shape {array.shape}; logits of (batch, classes) are needed, "
            "or of (batch, positions, vocabulary) from a language model"
        )
    return array


def module_fingerprint(module: nn.Module) -> str:
    """Sixteen hex digits of the weights, in the order of their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]

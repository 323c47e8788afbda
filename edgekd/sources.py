"""Teachers and students by reference: ``module:function``, ``hf:folder``, ``onnx:file``, ``pt2:file``.

A teacher only has to give outputs; a student must be a module that can be trained.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from edgekd import plugins
from edgekd.errors import DataError, MissingToolchainError, ModelFileError
from edgekd.models import (
    bind_inputs,
    count_macs,
    count_parameters,
    export_program,
    flatten_outputs,
    input_specs,
    load_program,
    run_program,
)
from edgekd.protocols import Arrays
from edgekd.quiet import quiet
from edgekd.store import hash_path

if TYPE_CHECKING:
    from torch.export import ExportedProgram

__all__ = [
    "Teacher",
    "hugging_face_example",
    "hugging_face_module",
    "load_student_module",
    "load_teacher",
    "module_fingerprint",
]


@dataclass(frozen=True)
class Teacher:
    """A model that gives outputs.

    Attributes:
        logits: From inputs by name, in the order of the data, to float32 (batch, classes); of a causal language model
            (batch, positions, vocabulary).
        fingerprint: Of its weights.
        parameters: None when they cannot be counted.
        macs: For one sample; None when they cannot be counted.
        size_bytes: Of its weights, as stored.
    """

    logits: Callable[[Arrays], np.ndarray]
    fingerprint: str
    parameters: int | None
    macs: int | None
    size_bytes: int


def load_teacher(reference: str, folder: Path, example: Arrays) -> Teacher:
    """Load a teacher.

    Args:
        reference: As in a recipe.
        folder: What it is relative to.
        example: A few samples, to count the work of one.

    Raises:
        UsageError: The function is not there.
        ModelFileError: The file is damaged or foreign.
        MissingToolchainError: Its toolchain is not installed.
        DataError: It returns no logits of shape (batch, classes).
    """
    prefix, _, rest = reference.partition(":")
    if prefix == "onnx":
        return _onnx_teacher(folder / rest)
    if prefix == "pt2":
        return _program_teacher(folder / rest)
    module = _module(reference, folder, tuple(example))
    return _module_teacher(module, reference, example)


def load_student_module(reference: str, folder: Path, inputs: Sequence[str], seed: int) -> nn.Module:
    """A student to train; the global generator is seeded first, so the same seed gives the same start.

    Raises:
        UsageError: The function is not there.
        DataError: The reference names no module that can be trained.
    """
    torch.manual_seed(seed)
    prefix, _, rest = reference.partition(":")
    if prefix == "onnx":
        raise DataError(f"{reference!r} cannot be trained; a student is module:function, hf:folder or pt2:file")
    if prefix == "pt2":
        return load_program(folder / rest).module()
    return _module(reference, folder, inputs)


def hugging_face_module(folder: Path, task: str | None = None) -> nn.Module:
    """A transformers folder as a module with plain tensors in and out.

    Args:
        folder: With ``config.json`` and ``model.safetensors``, or with one ``.gguf`` of a causal language model.
        task: ``text-classification``, ``text-generation``, ``image-classification`` or ``feature-extraction``; by
            default what optimum's ``TasksManager`` finds in the configuration.

    Returns:
        ``forward(input_ids, attention_mask)`` or ``forward(pixel_values)``, giving logits or the last hidden state;
        of a causal language model: logits of the next token at each position, (batch, positions, vocabulary).

    Raises:
        MissingToolchainError: transformers or optimum is not installed.
        ModelFileError: The folder holds no such model, or only pickled weights.
    """
    absent = plugins.missing(("transformers", "optimum"))
    if absent:
        raise MissingToolchainError(f"hf:{folder.name}", ", ".join(absent), "hf")
    if not (folder / "config.json").is_file():
        return _gguf_module(folder)
    supported = ("text-classification", "text-generation", "image-classification", "feature-extraction")
    try:
        with quiet():
            import transformers
            from optimum.exporters.tasks import TasksManager

            transformers.logging.set_verbosity_error()
            transformers.logging.disable_progress_bar()
            library = {"library_name": "transformers"}
            task = task or TasksManager.infer_task_from_model(_model_class(folder), **library)
            if task not in supported:
                raise ModelFileError(f"{folder}: task {task!r} is not supported; there are {', '.join(supported)}")
            options = {"use_safetensors": True, "local_files_only": True, "attn_implementation": "sdpa", **library}
            model = TasksManager.get_model_from_task(task, folder, framework="pt", **options)
    except ModelFileError:
        raise
    except Exception as error:
        raise ModelFileError(f"{folder} cannot be loaded: {str(error).strip().splitlines()[0]}") from error
    image = getattr(model, "main_input_name", "input_ids") == "pixel_values"
    model.config.use_cache = False  # a window is read at once; with a cache the outputs would hold one
    return (_ImageModel(model) if image else _TextModel(model)).eval()


def _gguf_module(folder: Path) -> nn.Module:
    """A causal language model from a GGUF file, its weights dequantized to float32 by transformers."""
    files = sorted(folder.glob("*.gguf"))
    if len(files) != 1:
        raise ModelFileError(f"{folder} is not a transformers folder: it has no config.json, and {len(files)} .gguf")
    absent = plugins.missing(("gguf",))
    if absent:
        raise MissingToolchainError(f"hf:{folder.name} ({files[0].name})", "gguf", "hf")
    try:
        with quiet():
            import transformers

            transformers.logging.set_verbosity_error()
            transformers.logging.disable_progress_bar()
            model = transformers.AutoModelForCausalLM.from_pretrained(
                folder, gguf_file=files[0].name, dtype=torch.float32, attn_implementation="sdpa", local_files_only=True
            )
    except Exception as error:
        raise ModelFileError(f"{files[0]} cannot be loaded: {str(error).strip().splitlines()[0]}") from error
    model.config.use_cache = False
    return _TextModel(model).eval()


def _model_class(folder: Path) -> type:
    """The class that a folder's configuration names; TasksManager infers the task from it (not from a local path)."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    name = (config.architectures or ["none"])[0]
    found = getattr(transformers, name, None)
    if not isinstance(found, type):
        raise ModelFileError(
            f"{folder / 'config.json'} names the architecture {name!r}, which transformers does not have"
        )
    return found


class _TextModel(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        output = self.model(input_ids=input_ids, attention_mask=attention_mask)
        return output.logits if "logits" in output else output.last_hidden_state


class _ImageModel(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        output = self.model(pixel_values=pixel_values)
        return output.logits if "logits" in output else output.last_hidden_state


def module_fingerprint(module: nn.Module) -> str:
    """Sixteen hex digits of the weights, in the order of their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _module(reference: str, folder: Path, inputs: Sequence[str]) -> nn.Module:
    prefix, _, rest = reference.partition(":")
    if prefix == "hf":
        return hugging_face_module(folder / rest)
    module = plugins.load_function(reference, folder)()
    if not isinstance(module, nn.Module):
        raise DataError(f"{reference} returned {type(module).__name__}; a torch.nn.Module works")
    return module


def _module_teacher(module: nn.Module, reference: str, example: Arrays) -> Teacher:
    module = module.eval()

    def logits(arrays: Arrays) -> np.ndarray:
        with torch.no_grad():
            try:
                outputs = flatten_outputs(module(*(torch.from_numpy(array) for array in arrays.values())))
            except Exception as error:
                taken = ", ".join(f"{name} {array.shape}" for name, array in arrays.items())
                reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
                raise DataError(f"teacher {reference!r} cannot take {taken}: {reason}") from error
        return _checked(outputs[0].float().numpy() if outputs else np.empty(0), reference)

    program: ExportedProgram | None = None
    with contextlib.suppress(ModelFileError):  # a teacher need not be exportable: only its MACs stay unknown then
        program = export_program(module, [torch.from_numpy(a[:1]) for a in example.values()], dynamic_batch=False)
    state = module.state_dict().values()
    return Teacher(
        logits,
        module_fingerprint(module),
        count_parameters(module),
        count_macs(program) if program is not None else None,
        sum(tensor.numel() * tensor.element_size() for tensor in state),
    )


def _program_teacher(path: Path) -> Teacher:
    program = load_program(path)

    def logits(arrays: Arrays) -> np.ndarray:
        outputs = run_program(program, bind_inputs(input_specs(program), arrays))
        return _checked(next(iter(outputs.values())), path.name)

    return Teacher(logits, hash_path(path)[:16], count_parameters(program), count_macs(program), path.stat().st_size)


def _onnx_teacher(path: Path) -> Teacher:
    exporter = plugins.load_exporter("onnx")
    plugins.require("onnx", exporter)
    runner = exporter.load(path)
    batch = runner.inputs[0].shape[0]

    def logits(arrays: Arrays) -> np.ndarray:
        bound = bind_inputs(runner.inputs, arrays)
        name = runner.outputs[0].name
        if batch == -1:
            return _checked(runner(bound)[name], path.name)
        count = len(next(iter(bound.values())))
        steps = [{key: a[i : i + batch] for key, a in bound.items()} for i in range(0, count, batch)]
        return _checked(np.concatenate([runner(step)[name] for step in steps]), path.name)

    return Teacher(logits, hash_path(path)[:16], _onnx_parameters(path), None, path.stat().st_size)


def _onnx_parameters(path: Path) -> int:
    import onnx

    return sum(int(np.prod(tensor.dims)) for tensor in onnx.load(path).graph.initializer)


def _checked(logits: Any, reference: str) -> np.ndarray:
    array = np.asarray(logits, np.float32)
    if array.ndim not in (2, 3):
        raise DataError(
            f"teacher {reference!r} returns shape {array.shape}; logits of (batch, classes) are needed, "
            "or of (batch, positions, vocabulary) from a language model"
        )
    return array


def hugging_face_example(folder: Path, module: nn.Module, max_length: int) -> list[Tensor]:
    """One input of each kind that ``hugging_face_module`` takes: int32 ids and mask, or an image."""
    import json

    config = json.loads((folder / "config.json").read_text())
    if isinstance(module, _ImageModel):
        size = config.get("image_size", 224)
        height, width = (size, size) if isinstance(size, int) else (size[0], size[1])
        return [torch.zeros(1, int(config.get("num_channels", 3)), height, width)]
    longest = int(config.get("max_position_embeddings", max_length))
    if max_length > longest:
        raise DataError(f"{folder.name} takes at most {longest} tokens, not {max_length}")
    ones = torch.ones(1, max_length, dtype=torch.int32)
    return [ones, ones.clone()]

"""A folder that transformers saved, as a module with plain tensors in and out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edgekd import plugins
from edgekd.errors import DataError, MissingToolchainError, ModelFileError, first_line
from edgekd.quiet import quiet

__all__ = ["generating", "hugging_face_example", "hugging_face_module"]


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
        raise ModelFileError(f"{folder} cannot be loaded: {first_line(error)}") from error
    image = getattr(model, "main_input_name", "input_ids") == "pixel_values"
    model.config.use_cache = False  # a window is read at once; with a cache the outputs would hold one
    return (_ImageModel(model) if image else _TextModel(model)).eval()


def generating(module: nn.Module) -> Any:
    """The causal language model of transformers that a module is or wraps; None where there is none."""
    for found in module.modules():
        can = getattr(found, "can_generate", None)
        if callable(can) and can():
            return found
    return None


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
        raise ModelFileError(f"{files[0]} cannot be loaded: {first_line(error)}") from error
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


def hugging_face_example(folder: Path, module: nn.Module, max_length: int) -> list[Tensor]:
    """One input of each kind that ``hugging_face_module`` takes: int32 ids and mask, or an image."""
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

"""``torchscript:file``: what ``torch.jit.save`` wrote.

``torch.jit.load`` reads the archive's pickles with an unpickler of its own, which knows tensors and the archive's own
TorchScript classes and calls no Python (a test makes an archive that tries). Its code is TorchScript: interpreted, but
with operators that read and write files; a model with one of those is refused.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from edgekd.errors import DataError, ModelFileError, first_line
from edgekd.protocols import Arrays, ModelRequest, OriginOptions
from edgekd.quiet import quiet
from edgekd.recipes.places import file_fault

if TYPE_CHECKING:
    from pathlib import Path

    from edgekd.teaching import Answer, Teacher

__all__ = ["ORIGIN"]

_FILES = ("aten::from_file", "aten::save")
"""Operators of TorchScript that touch files."""


class _TorchScript:
    requires: tuple[str, ...] = ()
    extra = ""
    options = OriginOptions
    fault = staticmethod(file_fault)

    def teacher(self, asked: ModelRequest, example: Arrays) -> Teacher:
        """Features are further outputs, by number (``output 1``): compiled modules cannot be listened to."""
        import torch

        from edgekd.programs.models import count_parameters, flatten_outputs
        from edgekd.store import hash_path
        from edgekd.teachers.sources import answer_by_name
        from edgekd.teaching import Teacher

        path = asked.folder / asked.place
        module = _loaded(path)

        def outputs(arrays: Arrays) -> Answer:
            with torch.no_grad():
                try:
                    returned = flatten_outputs(module(*(torch.from_numpy(array) for array in arrays.values())))
                except Exception as error:
                    taken = ", ".join(f"{name} {array.shape}" for name, array in arrays.items())
                    lines = str(error).strip().splitlines() or [type(error).__name__]
                    raise DataError(f"teacher {asked.reference!r} cannot take {taken}: {lines[-1]}") from error
            named = {f"output {number}": tensor.float().numpy() for number, tensor in enumerate(returned)}
            return answer_by_name(asked, named or {"output 0": np.empty(0)})

        return Teacher(outputs, hash_path(path)[:16], count_parameters(module), None, path.stat().st_size)


def _loaded(path: Path) -> Any:
    import warnings

    import torch

    try:
        with quiet(), warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of torch.jit as a whole, since torch 2.10
            module = torch.jit.load(path, map_location="cpu").eval()
    except Exception as error:
        raise ModelFileError(f"{path} cannot be loaded as TorchScript: {first_line(error)}") from error
    for name, part in module.named_modules():
        for method in part._c._method_names():
            graph = str(part._c._get_method(method).graph)
            found = [operator for operator in _FILES if f"{operator}(" in graph]
            if found:
                raise ModelFileError(f"{path}: {name or 'it'} uses {found[0]}, which touches files; it is never run")
    return module


ORIGIN = _TorchScript()

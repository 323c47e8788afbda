"""Language models with caches in ONNX: past caches in, present ones out, which may be the same memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from edgekd.errors import DataError, UsageError, first_line
from edgekd.programs.decoder import POSITIONS, TOKENS, last_token
from edgekd.types import LOGITS, Student

from ._onnx_options import OnnxOptions

if TYPE_CHECKING:
    from torch.export import ExportedProgram

__all__ = ["Bound", "decoder_program_for", "translations"]


def decoder_program_for(student: Student, options: OnnxOptions) -> ExportedProgram:
    """The program with logits of the last token alone; any number of tokens is read, one or a whole prompt.

    Raises:
        UsageError: Sizes were asked for, which a cache has of its own.
    """
    if options.batch != "1" or options.length:
        raise UsageError("a language model with caches reads one sequence, any number of tokens: no batch, no length")
    return last_token(student.program)


def translations() -> dict[Any, Callable[..., Any]]:
    """Writing into slots as ``ScatterND`` with whole indices: no transposes, and no copy where past is present.

    torch.onnx would bring the axis of the slots to the front, which turns every cache twice a token.
    """
    import torch
    from onnxscript import opset20 as op

    def write_slots(cache: Any, dim: int, positions: Any, new: Any) -> Any:
        heads = int(cache.shape[1])
        count = op.Shape(positions)
        shape = op.Concat(op.Constant(value_ints=[1, heads]), count, op.Constant(value_ints=[1]), axis=0)
        places = op.Expand(op.Reshape(positions, op.Constant(value_ints=[1, 1, -1, 1])), shape)
        rows = op.Constant(value=_tensor(np.arange(heads, dtype=np.int64).reshape(1, heads, 1, 1)))
        first = op.Constant(value=_tensor(np.zeros((1, 1, 1, 1), np.int64)))
        index = op.Concat(op.Expand(first, shape), op.Expand(rows, shape), places, axis=-1)
        return op.ScatterND(cache, index, new)

    return {torch.ops.aten.index_copy.default: write_slots}


def _tensor(array: np.ndarray) -> Any:
    import onnx

    return onnx.numpy_helper.from_array(array)


class Bound:
    """A session whose caches are bound to it: each is input and output in one, and stays where it is.

    Attributes:
        context: Tokens that the caches hold.
    """

    def __init__(self, session: Any, context: int) -> None:
        import onnxruntime

        self.context = context
        self._session, self._binding = session, session.io_binding()
        self._binding.bind_output(LOGITS, "cpu")  # the first of its outputs
        for value in session.get_inputs():
            if value.name.startswith("kv_cache_"):
                dtype = {"tensor(float)": np.float32, "tensor(float16)": np.float16}[value.type]
                cache = onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros(value.shape, dtype))
                self._binding.bind_ortvalue_input(value.name, cache)
                self._binding.bind_ortvalue_output(f"{value.name}_out", cache)

    def read(self, tokens: Sequence[int], start: int) -> np.ndarray:
        """See :class:`edgekd.protocols.Decoding`.

        Raises:
            DataError: The tokens do not fit the caches, or are none of the model's.
        """
        if not 0 < len(tokens) <= self.context - start:
            raise DataError(f"{len(tokens)} tokens from position {start}; the caches hold {self.context}")
        self._binding.bind_cpu_input(TOKENS, np.array([tokens], np.int32))
        self._binding.bind_cpu_input(POSITIONS, np.arange(start, start + len(tokens), dtype=np.int32)[None])
        try:
            self._session.run_with_iobinding(self._binding)
        except Exception as error:
            raise DataError(f"ONNX Runtime cannot read these tokens: {first_line(error)}") from error
        return np.array(self._binding.get_outputs()[0].numpy()[0, -1], np.float32)  # a copy: the next call writes there

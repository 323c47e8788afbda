"""Language models with caches in Core ML: the caches are states, which stay in the package from call to call.

One package reads one token or a whole prompt: its length is open (Apple's own Llama package is built so:
https://machinelearning.apple.com/research/core-ml-on-device-llama).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from edgekd.errors import DataError, UsageError
from edgekd.programs.decoder import POSITIONS, TOKENS, caches_of, last_token
from edgekd.programs.models import input_specs
from edgekd.programs.tracing import rename_outputs, without_origin
from edgekd.protocols import Arrays
from edgekd.types import LOGITS, Student

from ._mil_options import CoreMLOptions
from ._mil_runner import ProgramRunner
from ._sizes import Sizes, sizes

__all__ = ["CONTEXT", "CoreMLDecoder", "decoder_input_types", "lengths_of", "stateful_program"]

CONTEXT = "edgekd.context"
"""Metadata of a package with caches: how many tokens they hold."""

_NAME = "edgekd::write_slots"


@torch.library.custom_op(_NAME, mutates_args=())
def _write_slots(cache: Tensor, positions: Tensor, new: Tensor) -> Tensor:
    """``new`` (1, heads, n, size) in the slots of a cache (1, heads, context, size) from the first position on."""
    return cache.index_copy(2, positions, new)


@_write_slots.register_fake
def _(cache: Tensor, positions: Tensor, new: Tensor) -> Tensor:
    return torch.empty_like(cache)


def _register_writing() -> None:
    """Teach coremltools' converter to write slots as Core ML's ``slice_update``; once a process is enough.

    Of ``index_copy`` it would make a scatter, for which the cache is turned twice a token.
    """
    from coremltools.converters.mil import Builder as mb
    from coremltools.converters.mil.frontend.torch.ops import _get_inputs
    from coremltools.converters.mil.frontend.torch.torch_op_registry import _TORCH_OPS_REGISTRY, register_torch_op

    if _TORCH_OPS_REGISTRY.get_func(_NAME) is not None:
        return

    def write_slots(context: Any, node: Any) -> None:
        cache, positions, new = _get_inputs(context, node, expected=3)
        positions = mb.cast(x=positions, dtype="int32")
        first = mb.slice_by_size(x=positions, begin=[0], size=[1])
        count = mb.slice_by_size(x=mb.shape(x=new), begin=[2], size=[1])
        nothing = np.zeros(1, np.int32)
        begin = mb.concat(values=[nothing, nothing, first, nothing], axis=0)
        end = mb.concat(values=[nothing, nothing, mb.add(x=first, y=count), nothing], axis=0)
        whole = [True, True, False, True]
        written = mb.slice_update(
            x=cache, update=new, begin=begin, end=end, begin_mask=whole, end_mask=whole, name=node.name
        )
        context.add(written, node.name)

    register_torch_op(torch_alias=[_NAME])(write_slots)


def lengths_of(student: Student, options: CoreMLOptions) -> Sizes:
    """How many tokens a package reads at once: any number up to the context, or those of a list.

    Raises:
        UsageError: They do not fit the caches, or options were set that a language model does not have.
    """
    assert student.card.decoder is not None
    context = student.card.decoder.context
    if options.batch != "1" or options.image or options.classifier:
        raise UsageError("coreml batch, image and classifier are not for a language model with caches; length is")
    wanted = sizes(options.length or f"1..{context}", "coreml", "length")
    if min(wanted) != 1 or max(wanted) > context:
        raise UsageError(
            f"coreml length={options.length}, but this model reads 1 to {context} tokens at once, and 1 must be among "
            f"them: a range as 1..{context}, or a list as 1,{min(64, context)}"
        )
    return wanted


def decoder_input_types(lengths: Sizes) -> list[Any]:
    """Core ML's types of tokens and positions."""
    import coremltools as ct

    def shape() -> Any:
        if isinstance(lengths, range):
            return ct.Shape((1, ct.RangeDim(lengths[0], lengths[-1], default=1)))
        if len(lengths) == 1:
            return (1, 1)
        return ct.EnumeratedShapes([(1, length) for length in lengths], default=(1, 1))

    return [ct.TensorType(name, shape(), dtype=np.int32) for name in (TOKENS, POSITIONS)]


def stateful_program(program: ExportedProgram, context: int) -> ExportedProgram:
    """The program with its caches as buffers that it writes, and logits of the last token, (1, 1, vocabulary).

    Args:
        program: Of ``edgekd.programs.decoder``.
    """
    module = last_token(program).module(check_guards=False)
    for node in list(module.graph.nodes):
        if node.target is torch.ops.aten.index_copy.default:
            cache, _, positions, new = node.args
            with module.graph.inserting_before(node):
                written = module.graph.call_function(torch.ops.edgekd.write_slots.default, (cache, positions, new))
            node.replace_all_uses_with(written)
            module.graph.erase_node(node)
    module.recompile()
    kept = _Keeping(module, {spec.name: torch.zeros(spec.shape) for spec in caches_of(input_specs(program))})
    tokens = torch.zeros(1, 2, dtype=torch.int32)
    positions = torch.arange(2, dtype=torch.int32)[None]
    length = Dim("length", min=2, max=context)  # torch.export takes 1 for a size of its own; the program does not
    shapes = ({1: length}, {1: length})
    _register_writing()
    traced = torch.export.export(kept, (tokens, positions), dynamic_shapes=shapes, strict=False)
    return rename_outputs(without_origin(traced), [LOGITS])


class _Keeping(nn.Module):
    def __init__(self, module: nn.Module, caches: dict[str, Tensor]) -> None:
        super().__init__()
        self.module, self.names = module, list(caches)
        for name, zeros in caches.items():
            self.register_buffer(name, zeros)

    def forward(self, tokens: Tensor, input_pos: Tensor) -> Tensor:
        caches = [getattr(self, name) for name in self.names]
        logits, *written = self.module(tokens, input_pos, *caches)
        for cache, new in zip(caches, written, strict=True):
            cache.copy_(new)
        return logits


class CoreMLDecoder:
    """A package with caches; fulfils :class:`edgekd.protocols.Decoding` beside ``Runner``.

    Attributes:
        context: Tokens that the caches hold.
    """

    def __init__(self, runner: ProgramRunner) -> None:
        self.runtime, self.inputs, self.outputs = runner.runtime, runner.inputs, runner.outputs
        self.context = int(runner.program.metadata[CONTEXT])
        self._runner = runner

    def __call__(self, inputs: Arrays) -> dict[str, np.ndarray]:
        return self._runner(inputs)

    def first_overflow(self, inputs: Arrays) -> str | None:
        return self._runner.first_overflow(inputs)

    def read(self, tokens: Sequence[int], start: int) -> np.ndarray:
        """See :class:`edgekd.protocols.Decoding`.

        Raises:
            DataError: The tokens do not fit the caches, or are none of the model's.
        """
        if not 0 < len(tokens) <= self.context - start:
            raise DataError(f"{len(tokens)} tokens from position {start}; the caches hold {self.context}")
        done = 0
        while done < len(tokens):
            count = max(n for n in range(1, len(tokens) - done + 1) if self._runner.program.takes(TOKENS, (1, n)))
            positions = np.arange(start + done, start + done + count, dtype=np.int32)[None]
            found = self._runner({TOKENS: np.array([tokens[done : done + count]], np.int32), POSITIONS: positions})
            done += count
        logits: np.ndarray = next(iter(found.values()))[0, -1].astype(np.float32)
        return logits

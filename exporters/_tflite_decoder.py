"""Language models with caches in LiteRT: a signature that reads a part of a prompt, one that reads a token, one memory.

LiteRT knows no open length, so a prompt is read by signatures of fixed ones (``prefill_<n>``), which give nothing but
caches, and its last token by ``decode``, which gives logits. Names are those of LiteRT-LM: a cache is called the same
where it goes in and where it comes out. https://github.com/google-ai-edge/LiteRT-LM
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node
from torch.fx.graph import CodeGen

from edgekd.errors import DataError, UsageError
from edgekd.programs.decoder import POSITIONS, TOKENS, caches_of
from edgekd.programs.models import input_specs
from edgekd.programs.tracing import retrace, without_origin
from edgekd.quiet import quiet_native
from edgekd.types import LOGITS, Student

from ._sizes import sizes
from ._tflite_convert import Signature, first_line
from ._tflite_options import TFLiteOptions

__all__ = ["DECODE", "Kept", "prefill_lengths", "signatures"]

DECODE = "decode"

_PREFILL = 128
"""Tokens of the one prefill signature where no lengths were asked for. More signatures cost time to write and, since
each packs the weights for itself, memory to run."""

_ATEN = torch.ops.aten


def prefill_lengths(student: Student, options: TFLiteOptions) -> tuple[int, ...]:
    """How many tokens a prefill signature of the file reads, the shortest first.

    Raises:
        UsageError: They do not fit the caches, or options were set that a language model does not have.
    """
    assert student.card.decoder is not None
    context = student.card.decoder.context
    others = options.model_copy(update={"prefill": ""})
    if others != TFLiteOptions():
        raise UsageError(
            "a language model with caches has the signatures prefill_<n> and decode, a batch of one and float logits; "
            "only prefill can be set"
        )
    wanted = sizes(options.prefill, "tflite", "prefill") if options.prefill else (min(_PREFILL, context),)
    if isinstance(wanted, range) or not 2 <= min(wanted) <= max(wanted) <= context:
        raise UsageError(
            f"tflite prefill={options.prefill}, but a signature reads a fixed number of tokens, 2 to {context} for "
            "this model: one, or a list as 8,64"
        )
    return tuple(sorted(set(wanted)))


def signatures(module: GraphModule, program: ExportedProgram, lengths: Sequence[int]) -> Iterator[Signature]:
    """``decode`` first (what a file is looked at by), then a prefill of each length; all share the module's weights.

    Args:
        module: That of ``program``, prepared for the converter; it is changed.
    """
    _write_slices(module)
    inputs = [spec.name for spec in input_specs(program)]
    caches = [spec.name for spec in caches_of(input_specs(program))]
    yield Signature(DECODE, retrace(module, program, batch=1, length=1), inputs, [LOGITS, *caches])
    output = next(node for node in module.graph.nodes if node.op == "output")
    output.args = (tuple(output.args[0])[1:],)
    module.graph.set_codegen(CodeGen())  # the program's own still returns logits
    module.graph.eliminate_dead_code()
    module.recompile()
    zeros = [torch.zeros(spec.shape, dtype=getattr(torch, spec.dtype)) for spec in caches_of(input_specs(program))]
    for length in lengths:
        tokens = torch.zeros(1, length, dtype=torch.int32)
        positions = torch.arange(length, dtype=torch.int32)[None]
        traced = torch.export.export(module, (tokens, positions, *zeros), strict=False)
        yield Signature(f"prefill_{length}", without_origin(traced), inputs, caches)


def _write_slices(module: GraphModule) -> None:
    """Slots are written as one slice from the first position, in place: positions follow one another.

    litert-torch would make a scatter of it, which LiteRT computes number by number.
    """
    from litert_torch.generative.custom_ops import dynamic_update_slice  # noqa: F401 - registers the operator

    graph = module.graph
    starts: dict[Node, list[Node]] = {}
    for node in list(graph.nodes):
        if node.target is not _ATEN.index_copy.default:
            continue
        cache, axis, positions, new = node.args
        with graph.inserting_before(node):
            if positions not in starts:
                zero = graph.call_function(_ATEN.full.default, ([], 0), {"dtype": torch.int64})
                first = graph.call_function(_ATEN.select.int, (positions, 0, 0))
                starts[positions] = [first if place == axis else zero for place in range(4)]
            written = graph.call_function(
                torch.ops.litert_torch.dynamic_update_slice.default, (cache, new, starts[positions])
            )
        node.replace_all_uses_with(written)
        graph.erase_node(node)


class Kept:
    """A file's signatures over one set of buffers: each cache is input and output in one, and stays where it is.

    Attributes:
        context: Tokens that the caches hold.
    """

    def __init__(self, path: Path, context: int) -> None:
        self.context = context
        with quiet_native():  # LiteRT tells of every accelerator that it looks for, and again when it lets go of them
            self._open = _Open(path)
        weakref.finalize(self, _close, self._open)

    def read(self, tokens: Sequence[int], start: int) -> np.ndarray:
        """See :class:`edgekd.protocols.Decoding`.

        Raises:
            DataError: The tokens do not fit the caches, or are none of the model's.
        """
        if not 0 < len(tokens) <= self.context - start:
            raise DataError(f"{len(tokens)} tokens from position {start}; the caches hold {self.context}")
        done = 0
        while done < len(tokens) - 1:
            done += self._step(tokens[done : len(tokens) - 1], start + done)
        self._step(tokens[-1:], start + done)
        return np.asarray(self._open.logits.read(self._open.vocabulary, np.float32))

    def _step(self, tokens: Sequence[int], start: int) -> int:
        """Have a signature read as many of the tokens as it takes.

        Where it takes more, zeros follow them: no token sees what comes after it, and their slots are written again.

        Returns:
            How many of the tokens were read.
        """
        room = self.context - start  # a slice that does not fit would be written further to the front
        fitting = [length for length in self._open.signatures if length <= room]
        length = next((length for length in fitting if length >= len(tokens)), fitting[-1])
        given = list(tokens[:length])
        try:
            self._open.run(length, given + [0] * (length - len(given)), start)
        except RuntimeError as error:
            raise DataError(f"LiteRT cannot read these tokens: {first_line(str(error))}") from error
        return len(given)


class _Open:
    """A file in LiteRT's compiled model, and its buffers."""

    def __init__(self, path: Path) -> None:
        from ai_edge_litert.compiled_model import CompiledModel

        self.model = model = CompiledModel.from_file(str(path))
        found = model.get_signature_list()
        taken = model.get_input_tensor_details(DECODE)
        caches = [name for name in found[DECODE]["inputs"] if name.startswith("kv_cache_")]
        self.caches = {name: model.create_input_buffer_by_name(DECODE, name) for name in caches}
        for name, buffer in self.caches.items():
            buffer.write(np.zeros(taken[name]["shape"], np.float32))
        self.logits = model.create_output_buffer_by_name(DECODE, LOGITS)
        self.vocabulary = int(model.get_output_tensor_details(DECODE)[LOGITS]["shape"][-1])
        lengths = {int(model.get_input_tensor_details(key)[TOKENS]["shape"][-1]): key for key in found}
        self.signatures = dict(sorted(lengths.items()))
        self.told = {
            key: {name: model.create_input_buffer_by_name(key, name) for name in (TOKENS, POSITIONS)} for key in found
        }

    def run(self, length: int, tokens: Sequence[int], start: int) -> None:
        key = self.signatures[length]
        told = self.told[key]
        told[TOKENS].write(np.array([tokens], np.int32))
        told[POSITIONS].write(np.arange(start, start + length, dtype=np.int32)[None])
        logits = {LOGITS: self.logits} if key == DECODE else {}
        self.model.run_by_name(key, told | self.caches, logits | self.caches)


def _close(opened: _Open) -> None:
    with quiet_native():
        vars(opened).clear()

"""Pruning by magnitude (Han et al. 2015, arXiv:1506.02626), and training that wins back what it costs.

=============== =======================================================================================================
``2:4``         Of every 4 weights along a layer's inputs the 2 smallest become zero. Same size and speed on a processor
                that knows nothing of it; compressed files get smaller, and hardware for 2:4 gets faster.
``channels:s``  The share s of channels with the smallest weights is removed for real: fewer multiply-accumulates
                everywhere (:mod:`edgekd.compression.channels`).
=============== =======================================================================================================
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from edgekd.compression.channels import find_channels, remove_channels
from edgekd.compression.compressed import refuse_compressed
from edgekd.compression.static import copied
from edgekd.errors import UsageError
from edgekd.programs.fold import attribute, folded_module
from edgekd.programs.layers import CONVOLUTIONS, LINEAR
from edgekd.programs.models import call_arguments, count_macs, flatten_outputs, program_bytes
from edgekd.programs.tracing import retrace
from edgekd.types import Student

__all__ = ["Pruning", "parse_pruning", "prune"]


@dataclass(frozen=True)
class Pruning:
    """How to prune.

    Attributes:
        word: As it was written.
        keep, of: ``2:4`` keeps 2 of 4; both 0 for channels.
        share: Of the channels to remove; 0 for ``2:4``.
    """

    word: str
    keep: int = 0
    of: int = 0
    share: float = 0.0


def parse_pruning(word: str) -> Pruning:
    """``2:4`` (any N:M) or ``channels:0.3``.

    Raises:
        ValueError: It is neither.
    """
    kind, _, number = word.partition(":")
    try:
        if kind == "channels" and 0 < float(number) < 1:
            return Pruning(word, share=float(number))
        if kind.isdigit() and number.isdigit() and 0 < int(kind) < int(number):
            return Pruning(word, int(kind), int(number))
    except ValueError:
        pass
    raise ValueError(f"{word!r} is no pruning; 2:4 (2 of 4 weights stay) or channels:0.3 (3 of 10 are removed) works")


def prune(student: Student, pruning: Pruning, fit: Callable[[nn.Module], None] | None = None) -> Student:
    """A student with fewer weights, still in ``fp32``: quantization comes after it.

    Args:
        student: In ``fp32``; batch norm is folded first.
        fit: Trains a module in place, under the mask of N:M; it takes the student's inputs in order and returns logits.

    Raises:
        UsageError: The student is compressed already, or has nothing that can be pruned so.
    """
    refuse_compressed(student, f"pruning {pruning.word}")
    module = copied(folded_module(student.program))
    if pruning.share:
        _remove(module, pruning.share, student.card.name)
        masks = dict[str, Tensor]()
    else:
        masks = _masks(module, pruning, student.card.name)
    trainable = _Trainable(module, masks, student.program)
    if fit is not None:
        fit(trainable)
    trainable.settle(module)
    program = retrace(module, student.program)
    step = hashlib.sha256(pruning.word.encode() + program_bytes(student.program)).hexdigest()
    zeros = sum(int((mask == 0).sum()) for mask in masks.values())
    card = dataclasses.replace(
        student.card,
        parameters=sum(parameter.numel() for parameter in module.parameters()) - zeros,
        macs=None if student.card.macs is None else count_macs(program),
        lineage=(*student.card.lineage, f"prune {pruning.word}: {step}"),
    )
    return Student(program, card)


class _Trainable(nn.Module):
    """A folded float module that can be trained, its masked weights staying masked."""

    def __init__(self, module: GraphModule, masks: dict[str, Tensor], program: ExportedProgram) -> None:
        super().__init__()
        self._program = [program]
        own = copied(module)
        for node in list(own.graph.nodes):
            if node.op == "get_attr" and str(node.target) in masks:
                own.register_buffer(name := f"mask_{node.name}", masks[str(node.target)])
                users = list(node.users)
                with own.graph.inserting_after(node):
                    mask = own.graph.get_attr(name)
                with own.graph.inserting_after(mask):
                    masked = own.graph.call_function(torch.mul, (node, mask))
                for user in users:
                    user.replace_input_with(node, masked)
        self.net = GraphModule(own, own.graph)  # a new one: an exported module forbids train()
        self.masks = masks
        for parameter in self.net.parameters():
            parameter.requires_grad_(parameter.is_floating_point())

    def forward(self, *inputs: Tensor) -> Tensor:
        args, kwargs = call_arguments(self._program[0], inputs)
        return flatten_outputs(self.net(*args, **kwargs))[0]

    def settle(self, module: GraphModule) -> None:
        """Put what was learned into the module that this was made from."""
        learned = dict(self.net.named_parameters(remove_duplicate=False))
        with torch.no_grad():
            for name, parameter in module.named_parameters(remove_duplicate=False):
                parameter.copy_(learned[name] * self.masks.get(name, torch.ones(())))


def _masks(module: GraphModule, pruning: Pruning, name: str) -> dict[str, Tensor]:
    """By name of a weight, ones where it stays; layers whose inputs are no multiple of M are left alone."""
    masks: dict[str, Tensor] = {}
    for node in module.graph.nodes:
        if node.op != "call_function" or node.target not in CONVOLUTIONS | LINEAR:
            continue
        constant = node.args[1]
        if not isinstance(constant, Node) or constant.op != "get_attr":
            continue
        weight = attribute(module, str(constant.target)).detach()
        if weight.shape[1] % pruning.of:
            continue
        rows = weight.abs().movedim(1, -1)  # groups along the input channels, place by place
        groups = rows.reshape(-1, pruning.of)
        kept = groups.topk(pruning.keep, dim=1).indices
        mask = torch.zeros_like(groups).scatter_(1, kept, 1.0)
        masks[str(constant.target)] = mask.reshape(rows.shape).movedim(-1, 1).contiguous()
    if not masks:
        raise UsageError(
            f"pruning {pruning.word} takes layers whose inputs are a multiple of {pruning.of}; {name!r} has none"
        )
    return masks


def _remove(module: GraphModule, share: float, name: str) -> None:
    groups = find_channels(module)
    removed = 0
    for group in groups:
        count = group.count - max(1, round(group.count * (1 - share)))
        if not count:
            continue
        sizes = torch.zeros(group.count)
        for maker in group.makers:
            weight = attribute(module, str(maker.args[1].target)).detach()
            norms = weight.flatten(1).norm(dim=1)
            sizes += norms / norms.mean().clamp_min(1e-12)  # of layers that share channels, none outweighs another
        keep = sizes.topk(group.count - count).indices.sort().values
        remove_channels(module, group, keep)
        removed += count
    if not removed:
        raise UsageError(
            f"pruning channels:{share:g} finds no channels in {name!r} that can be removed: all reach an output, a "
            "concatenation or a layer that needs them all; 2:4 may work"
        )

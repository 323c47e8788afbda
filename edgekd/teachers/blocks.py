"""Blocks that a model repeats, and the same model with some of them: a student that starts from its teacher's layers.

What others found: 6 of BERT's 12 layers keep 97 % of it on GLUE, and starting from them is crucial (DistilBERT, Sanh et
al. 2019, arXiv:1910.01108); 4 of 12 keep 99.4 % of a sentence encoder (sentence-transformers, model distillation).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from edgekd.errors import UsageError

__all__ = ["Stack", "find_stacks", "keep_blocks", "mark_started", "spread_evenly", "started_from"]

_STARTED = "_edgekd_started_from"

_COUNTS = ("num_hidden_layers", "num_layers", "encoder_layers", "num_decoder_layers", "decoder_layers")
"""How configurations of transformers call the number of blocks."""


@dataclass(frozen=True)
class Stack:
    """Blocks of one kind, one after another.

    Attributes:
        name: Of the list that holds them (``model.layers``); empty for the model itself.
        first: Position of the first in it.
        count: How many; 2 or more.
    """

    name: str
    first: int
    count: int


def find_stacks(module: nn.Module) -> list[Stack]:
    """Every run of equal blocks in an ``nn.ModuleList`` or ``nn.Sequential``, the outermost only.

    Blocks are equal when their class, and the names and shapes of their weights, are; what has no weights is none.
    """
    return list(_stacks(module, ""))


def _stacks(module: nn.Module, name: str) -> Iterator[Stack]:
    within: set[int] = set()
    if isinstance(module, nn.ModuleList | nn.Sequential):
        for first, count in _runs([_kind(block) for block in module]):
            within |= set(range(first, first + count))
            yield Stack(name, first, count)
    for position, (own, child) in enumerate(module.named_children()):
        if position not in within:
            yield from _stacks(child, f"{name}.{own}" if name else own)


def _kind(block: nn.Module) -> tuple[object, ...] | None:
    shapes = tuple((name, tuple(tensor.shape)) for name, tensor in block.state_dict().items())
    return (type(block), shapes) if shapes else None


def _runs(kinds: Sequence[tuple[object, ...] | None]) -> Iterator[tuple[int, int]]:
    """(first, count) of what stands at least twice in a row."""
    first = 0
    for position in range(1, len(kinds) + 1):
        if position == len(kinds) or kinds[position] != kinds[first]:
            if kinds[first] is not None and position - first > 1:
                yield first, position - first
            first = position


def spread_evenly(count: int, kept: int) -> tuple[int, ...]:
    """Positions of ``kept`` of ``count`` blocks, the first and the last among them: 6 of 12 are 0, 2, 4, 7, 9, 11.

    As DistilBERT chose them.
    """
    if kept == 1:
        return (0,)
    return tuple(round(position * (count - 1) / (kept - 1)) for position in range(kept))


def keep_blocks(
    module: nn.Module, every: int | None = None, keep: Sequence[int] = (), stacks: Sequence[str] = ()
) -> list[tuple[Stack, tuple[int, ...]]]:
    """Leave some blocks of each stack in a model, in place; configurations and layer numbers follow.

    Args:
        every: One of so many is kept, spread evenly over the stack.
        keep: Or the positions, from 0 at the first of the equal blocks.
        stacks: Names of those that are cut; all of them when empty.

    Returns:
        Each stack that was cut, and the positions that were kept.

    Raises:
        UsageError: The model repeats no block, there is no such stack or position, or nothing would be left out.
    """
    found = find_stacks(module)
    told = ", ".join(f"{stack.name or 'the model itself'} ({stack.count})" for stack in found)
    if not found:
        raise UsageError(
            f"{type(module).__name__} repeats no block of equal shapes in an nn.ModuleList or nn.Sequential, so there "
            "are none to keep; a student of your own (module:function) works"
        )
    if missing := sorted(set(stacks) - {stack.name for stack in found}):
        raise UsageError(f"there is no stack of equal blocks called {missing[0]!r}; there are {told}")
    wanted = [stack for stack in found if not stacks or stack.name in stacks]
    kept = []
    for stack in wanted:
        positions = tuple(sorted(set(keep))) if keep else spread_evenly(stack.count, -(-stack.count // (every or 1)))
        if positions[-1] >= stack.count or positions[0] < 0:
            raise UsageError(f"block {positions[-1]} is asked of {stack.name or 'the model'}; it has {stack.count}")
        kept.append((stack, positions))
    if all(len(positions) == stack.count for stack, positions in kept):
        raise UsageError(f"all blocks would stay; there are {told}")
    for stack, positions in reversed(kept):  # the last run of a list first, so that the others keep their positions
        blocks = module.get_submodule(stack.name)
        assert isinstance(blocks, nn.ModuleList | nn.Sequential)
        left_out = set(range(stack.count)) - set(positions)
        for position in sorted(left_out, reverse=True):
            del blocks[stack.first + position]
        _follow(module, stack, blocks, positions)
    return kept


def _follow(module: nn.Module, stack: Stack, blocks: nn.Module, positions: Sequence[int]) -> None:
    """What transformers keeps beside the blocks: how many there are, of which type each is, and its number."""
    for owner in module.modules():
        config = getattr(owner, "config", None)
        for key in _COUNTS if hasattr(config, "to_dict") else ():
            other = "decoder" if "encoder" in stack.name else "encoder" if "decoder" in stack.name else "–"
            if other not in key and getattr(config, key, None) == stack.count:
                setattr(config, key, len(positions))
        types = getattr(config, "layer_types", None)
        if isinstance(types, list) and len(types) == stack.count:
            setattr(config, "layer_types", [types[position] for position in positions])  # noqa: B010 - any class
    for number, block in enumerate(blocks.children()):
        for part in block.modules():
            if isinstance(getattr(part, "layer_idx", None), int):
                part.layer_idx = number


def mark_started(module: nn.Module, line: str) -> nn.Module:
    """Note on a module whose weights it starts from, for :func:`started_from`."""
    setattr(module, _STARTED, line)
    return module


def started_from(module: nn.Module) -> str:
    """Whose weights a student starts from, in a line for its card; empty when they are its own."""
    found: str = getattr(module, _STARTED, "")
    return found

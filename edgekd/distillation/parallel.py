"""A student on many processes: whole on each (DDP), or in shards (FSDP2), with the batch norm of one.

With one process this does nothing.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from edgekd import processes
from edgekd.errors import UsageError

__all__ = ["Norms", "accumulating", "like", "settle", "shared_norms", "spread", "whole"]


def spread(student: nn.Module, shard: bool, compiled: bool) -> tuple[nn.Module, nn.Module]:
    """What is trained in place of the student, and what is called, so that gradients are the mean over all processes.

    Args:
        student: The same on every process.
        shard: Keep a part of the weights, gradients and moments on each process (FSDP2, Zhao et al. 2023,
            arXiv:2304.11277; ``torch.distributed.fsdp.fully_shard``): for students that one device cannot hold.
        compiled: Compile it (``torch.compile``).

    Returns:
        The trained module (the student itself, or a copy whose parameters are DTensors) and the called one.

    Raises:
        UsageError: It is to be kept in shards, and no launcher has started the processes.
    """
    if shard and "RANK" not in os.environ:
        raise UsageError(
            "distill.shard = true keeps parts of the student on several processes, and this one was started alone; "
            "torchrun --nproc-per-node 2 -m edgekd distill starts two"
        )
    trained = student.to(processes.device()) if not shard else _sharded(student)
    # Module.compile would leave an nn.Sequential as it is. Each size of a batch by itself: kernels for any size would
    # serve what follows the first ragged batch, and a training that goes on behind it would add up in another order
    # than one that was never cut off.
    called = torch.compile(trained, dynamic=False) if compiled else trained
    if shard or processes.count() == 1:
        return trained, called
    # With find_unused_parameters the buckets stay as they are made; else they are made anew after the first step, and
    # more than two processes would add in another order after a resume than without one.
    return trained, nn.parallel.DistributedDataParallel(called, find_unused_parameters=True)


def settle(student: nn.Module, trained: nn.Module) -> None:
    """Bring what was trained back into the student, as plain contiguous tensors on the CPU."""
    if trained is not student:
        student.load_state_dict(whole(trained.state_dict()))
    student.to("cpu", memory_format=torch.contiguous_format)


def whole(tree: Any) -> Any:
    """The same with the shards of all processes put together. All must call this together."""
    if isinstance(tree, DTensor):
        return tree.full_tensor().cpu()
    if isinstance(tree, dict):
        return {key: whole(value) for key, value in tree.items()}
    return [whole(value) for value in tree] if isinstance(tree, list) else tree


def like(value: Tensor, place: Tensor) -> Tensor:
    """A whole tensor in shards, if what it is for lies in shards."""
    if isinstance(place, DTensor) and value.shape == place.shape:
        return distribute_tensor(value.to(place.device), place.device_mesh, place.placements)
    return value


def _sharded(student: nn.Module) -> nn.Module:
    """A copy in shards: the blocks of every list of blocks one by one, then the rest."""
    mesh = init_device_mesh(processes.device().type, (processes.count(),))
    copy = deepcopy(student)
    for module in reversed(list(copy.modules())):  # the inner ones first
        if isinstance(module, nn.ModuleList | nn.Sequential):
            for block in module.children():
                if any(True for _ in block.parameters()):
                    fully_shard(block, mesh=mesh)
    fully_shard(copy, mesh=mesh)
    return copy


def accumulating(learner: nn.Module, last: bool) -> contextlib.AbstractContextManager[None]:
    """Leave gradients on each process until the last part of a batch; FSDP2 reduces each part, to save memory."""
    if isinstance(learner, nn.parallel.DistributedDataParallel) and not last:
        return learner.no_sync()
    return contextlib.nullcontext()


@dataclass
class Norms:
    """What the shared batch norms have to know.

    Attributes:
        counts: Whether this process's samples count; not when it got one only to keep step.
    """

    counts: bool = True


@contextlib.contextmanager
def shared_norms(student: nn.Module) -> Iterator[Norms]:
    """While this holds, batch norms in training take mean and variance over the batch of all processes.

    torch's own SyncBatchNorm runs on accelerators only and would stay in the module.
    """
    norms = Norms()
    found = [m for m in student.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if processes.count() > 1:
        for module in found:
            module.forward = MethodType(_shared_forward(norms), module)
    try:
        yield norms
    finally:
        for module in found:
            module.__dict__.pop("forward", None)


def _shared_forward(norms: Norms) -> Any:
    def forward(self: nn.modules.batchnorm._BatchNorm, x: Tensor) -> Tensor:
        if not self.training:
            return type(self).forward(self, x)
        axes = [0, *range(2, x.ndim)]
        shape = [1, -1, *[1] * (x.ndim - 2)]
        wide = x.float()
        counted = wide if norms.counts else wide * 0
        number = torch.full((1,), float(x.numel() // x.shape[1]) * norms.counts, device=x.device)
        sums = _Sum.apply(torch.cat([counted.sum(axes), number]))
        total = sums[-1].detach()
        mean = sums[:-1] / total
        centred = wide - mean.view(shape)
        variance = _Sum.apply(((centred if norms.counts else centred * 0) ** 2).sum(axes)) / total
        _remember(self, mean.detach(), variance.detach(), float(total))
        scaled = centred * torch.rsqrt(variance + self.eps).view(shape)
        if self.weight is not None:
            scaled = scaled * self.weight.view(shape) + self.bias.view(shape)
        return scaled.to(x.dtype)

    return forward


def _remember(norm: nn.modules.batchnorm._BatchNorm, mean: Tensor, variance: Tensor, total: float) -> None:
    """Running statistics, as :class:`torch.nn.BatchNorm2d` keeps them."""
    if not norm.track_running_stats or norm.running_mean is None or norm.running_var is None:
        return
    assert norm.num_batches_tracked is not None
    norm.num_batches_tracked.add_(1)
    share = 1 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
    norm.running_mean.lerp_(mean, share)
    norm.running_var.lerp_(variance * total / max(1.0, total - 1), share)


class _Sum(torch.autograd.Function):
    """Sum over all processes; so is that of its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.clone()
        distributed.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous().clone()
        distributed.all_reduce(gradient)
        return gradient

"""Weights by chance, as they must be for a file to be proven with them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["settle"]


def settle(module: nn.Module, samples: Sequence[Tensor], generator: torch.Generator) -> nn.Module:
    """Random weights with which every operator matters, and batch norms that know their inputs; in place.

    As they are created, many models would hide a wrong operator: layer scales of 1e-6 switch whole blocks off, weights
    of 0.02 make every attention uniform, fresh norms are identities. So weights get a spread of one over the root of
    what they sum, constants get a spread, and the statistics of batch norms are those of the samples.
    """
    owners = {id(p): m for m in module.modules() for p in m.parameters(recurse=False)}
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            owner, noise = owners[id(parameter)], torch.randn(parameter.shape, generator=generator)
            if isinstance(owner, nn.Embedding):
                parameter.copy_(noise)
            elif parameter.ndim < 2 or max(parameter.shape) == parameter.numel():
                if float(parameter.abs().max()) < 0.1 and not name.endswith("bias"):
                    parameter.copy_(0.5 + 0.1 * noise)  # a layer scale
                else:
                    parameter.add_(0.1 * noise)
            elif parameter.shape[0] == 1:  # positions, class tokens
                parameter.copy_(0.5 * noise)
            else:
                summed = parameter[0].numel()
                convolution = isinstance(owner, nn.modules.conv._ConvNd)
                parameter.copy_(noise * (1.4 if convolution else 1.0) / summed**0.5)
        norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        if norms:
            module.eval()
            for norm in norms:
                norm.train()
                norm.momentum = None  # the mean of all that it sees
                norm.reset_running_stats()
            module(*samples)
        _settle_affine(module, samples)
    return module.eval()


def _settle_affine(module: nn.Module, samples: Sequence[Tensor]) -> None:
    """Scales and shifts of MobileBERT's ``NoNorm`` that keep numbers in bounds, as its training does."""

    def normalize(layer: Any, inputs: tuple[Tensor, ...]) -> None:
        values = inputs[0].flatten(0, -2)
        layer.weight.copy_(1 / values.std(0).clamp(min=1e-3))
        layer.bias.copy_(-values.mean(0) * layer.weight)

    hooks = [m.register_forward_pre_hook(normalize) for m in module.modules() if type(m).__name__ == "NoNorm"]
    if hooks:
        module.eval()(*samples)
    for hook in hooks:
        hook.remove()

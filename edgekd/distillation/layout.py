"""The layout in which convolutions train fastest on CPUs: channels last.

With its weights laid out so, a convolution answers so, and what follows it reads along the channels. The function is
the same, to rounding. A student that looks at strides (``view`` after a convolution) refuses; it stays as it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy

import torch
from torch import Tensor, nn

from edgekd.teachers.outputs import student_outputs

__all__ = ["lay_channels_last"]


def lay_channels_last(student: nn.Module, inputs: Sequence[Tensor]) -> None:
    """Lay a student's images and weights out with the channels last, if a step of training runs that way.

    Args:
        student: Changed in place: the strides of its four-dimensional weights, and nothing else.
        inputs: An example in the order of ``forward``, of two samples or more: one step is tried on a copy.
    """
    if any(weight.ndim == 4 for weight in student.parameters()) and _trains(student, inputs):
        student.to(memory_format=torch.channels_last)


def _trains(student: nn.Module, inputs: Sequence[Tensor]) -> bool:
    """Whether forward and backward run on a copy; torch's generator is left where it was."""
    with torch.random.fork_rng(devices=[]):
        tried = deepcopy(student).to(memory_format=torch.channels_last)
        try:
            student_outputs(tried(*inputs)).logits.sum().backward()
        except RuntimeError:  # what is wrong in every layout is told by the training itself
            return False
    return True

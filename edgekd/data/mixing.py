"""Mixing: two samples to one view, and how much of it is the first one's. Each is a ``edgekd.protocols.Mixing``.

All randomness comes from the view's generator, so the student sees the very mix that the teacher saw.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np
import torch
from torch import Generator, Tensor

from edgekd.errors import DataError
from edgekd.protocols import Mixing

__all__ = ["MIXINGS", "cutmix", "mixup"]


def mixup(
    sample: Mapping[str, Tensor], partner: Mapping[str, Tensor], generator: Generator, alpha: float
) -> tuple[dict[str, Tensor], float]:
    """λ · sample + (1 − λ) · partner, λ from Beta(α, α) (Zhang et al. 2017, arXiv:1710.09412).

    Args:
        sample, partner: Inputs by name, without a batch axis.
        generator: Of the view.
        alpha: Above 0: 1 makes every λ as likely, 0.2 mostly leaves one of the two nearly alone.

    Returns:
        The mix, and λ.

    Raises:
        DataError: An input is of whole numbers (token ids): a mix of two means nothing.
    """
    share = _beta(generator, alpha)
    for name, column in sample.items():
        if not column.is_floating_point():
            raise DataError(
                f"data.mix: mixup mixes floats, and {name} is {str(column.dtype).removeprefix('torch.')}; "
                "a module:function of your own can mix it"
            )
    return {name: torch.lerp(partner[name], column, share) for name, column in sample.items()}, share


def cutmix(
    sample: Mapping[str, Tensor], partner: Mapping[str, Tensor], generator: Generator, alpha: float
) -> tuple[dict[str, Tensor], float]:
    """A box of the partner, pasted over the same place of the sample (Yun et al. 2019, arXiv:1905.04899).

    The box has a share 1 − λ of the area before the edges cut it, λ from Beta(α, α), and its centre anywhere.

    Args:
        sample, partner: Images by name, (channels, height, width); of several, all of one height and width.
        generator: Of the view.
        alpha: Above 0.

    Returns:
        The mix, and the share of the area that is still the sample's.

    Raises:
        DataError: An input is no image.
    """
    sizes = {name: tuple(image.shape[1:]) for name, image in sample.items()}
    if any(len(size) != 2 for size in sizes.values()) or len(set(sizes.values())) != 1:
        shapes = ", ".join(f"{name} {tuple(image.shape)}" for name, image in sample.items())
        raise DataError(f"data.mix: cutmix needs images of (channels, height, width), not {shapes}; mixup may do")
    height, width = next(iter(sizes.values()))
    side = (1 - _beta(generator, alpha)) ** 0.5
    row, column = torch.rand(2, generator=generator).tolist()
    top, bottom = _edges(row, side, height)
    left, right = _edges(column, side, width)
    mixed = {name: image.clone() for name, image in sample.items()}
    for name, image in mixed.items():
        image[:, top:bottom, left:right] = partner[name][:, top:bottom, left:right]
    return mixed, 1 - (bottom - top) * (right - left) / (height * width)


MIXINGS: Mapping[str, Mixing] = MappingProxyType({"mixup": mixup, "cutmix": cutmix})
"""By the name that a recipe uses in ``data.mix``."""


def _edges(centre: float, side: float, size: int) -> tuple[int, int]:
    """Where a box begins and ends along an axis; centre and side as shares of it."""
    middle, half = int(centre * size), int(side * size) // 2
    return max(0, middle - half), min(size, middle + half)


def _beta(generator: Generator, alpha: float) -> float:
    """From Beta(α, α); torch's own takes no generator."""
    seed = int(torch.randint(2**31, (), generator=generator))
    return float(np.random.default_rng(seed).beta(alpha, alpha))

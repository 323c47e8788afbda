"""A teacher's own preprocessing: from samples as the data has them to what the teacher takes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgekd import plugins
from edgekd.errors import DataError
from edgekd.protocols import Arrays
from edgekd.recipe_models import Preprocessing

if TYPE_CHECKING:
    from edgekd.recipe import ImageData

__all__ = ["Prepare", "prepared_images", "preparing"]

Prepare = Callable[[Arrays], Arrays]
"""A batch of samples by input name to what the teacher takes, by its names or in its order."""


def preparing(spec: str | Preprocessing | None, folder: Path, image: ImageData | None) -> Prepare:
    """What a recipe says of a teacher's preprocessing, as a function.

    Args:
        folder: Of the recipe.
        image: How the data's images were normalised, if they were.

    Raises:
        UsageError: The function is not there.
    """
    if spec is None:
        return lambda arrays: arrays
    if isinstance(spec, Preprocessing):
        return lambda arrays: {name: prepared_images(array, spec, image) for name, array in arrays.items()}
    own = plugins.load_function(spec, folder)

    def prepare(arrays: Arrays) -> Arrays:
        made = own(arrays)
        count = len(next(iter(arrays.values())))
        if not isinstance(made, dict) or not made or any(len(array) != count for array in made.values()):
            raise DataError(f"{spec} returned no dict of arrays with the {count} samples that it was given")
        return {name: np.asarray(array) for name, array in made.items()}

    return prepare


def prepared_images(array: np.ndarray, spec: Preprocessing, image: ImageData | None = None) -> np.ndarray:
    """Images as declared; what is not float32 (samples, channels, height, width) is passed as it is.

    Raises:
        DataError: Colours cannot be made of so many channels, or means fit no channels.
    """
    if array.ndim != 4 or array.dtype.kind != "f":
        return array
    pixels = array.astype(np.float32)
    if image is not None:
        pixels = pixels * _channels(image.std) + _channels(image.mean)
    if spec.channels is not None and spec.channels != pixels.shape[1]:
        if {spec.channels, pixels.shape[1]} != {1, 3}:
            raise DataError(f"the teacher's {spec.channels} channels cannot be made of the data's {pixels.shape[1]}")
        grey = (0.299, 0.587, 0.114)  # ITU-R BT.601, as Pillow
        pixels = (
            np.repeat(pixels, 3, axis=1)
            if spec.channels == 3
            else (pixels * _channels(grey)).sum(axis=1, keepdims=True, dtype=np.float32)
        )
    if spec.size is not None and pixels.shape[2:] != (spec.size, spec.size):
        pixels = _resized(pixels, spec.size)
    for name, values in (("mean", spec.mean), ("std", spec.std)):
        if len(values) not in (1, pixels.shape[1]):
            raise DataError(f"the teacher's {name} has {len(values)} values for {pixels.shape[1]} channels")
    pixels = ((pixels * np.float32(spec.scale) - _channels(spec.mean)) / _channels(spec.std)).astype(np.float32)
    return np.ascontiguousarray(pixels.transpose(0, 2, 3, 1)) if spec.layout == "NHWC" else pixels


def _channels(values: tuple[float, ...]) -> np.ndarray:
    return np.asarray(values, np.float32).reshape(-1, 1, 1)


def _resized(pixels: np.ndarray, size: int) -> np.ndarray:
    import torch
    from torch.nn import functional as F

    made: np.ndarray = F.interpolate(
        torch.from_numpy(pixels), (size, size), mode="bilinear", antialias=True, align_corners=False
    ).numpy()
    return made

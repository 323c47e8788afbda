"""A teacher's own preprocessing: from samples as the data has them to what the teacher takes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgekd import plugins
from edgekd.errors import DataError
from edgekd.protocols import Arrays
from edgekd.recipes.recipe_models import AS_DATA
from edgekd.teaching import Preprocessing

if TYPE_CHECKING:
    from edgekd.recipes.recipe import ImageData

__all__ = ["Prepare", "check_pixels", "prepared_images", "preparing"]

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


def check_pixels(arrays: Arrays, model: str) -> None:
    """Whether images are what a library's preprocessing starts from, where ``[data.image]`` does not say so.

    Raises:
        DataError: They are not within 0…1.
    """
    for name, array in arrays.items():
        if array.ndim == 4 and array.dtype.kind == "f" and not (array.min() >= -0.01 and array.max() <= 1.01):
            raise DataError(
                f"{model} is shown images of 0 to 1 by its library, and {name} is {array.min():.3g} to "
                f"{array.max():.3g}; say preprocessing = {{ … }} beside the model, or preprocessing = "
                f'"{AS_DATA}" where it takes what the student takes'
            )


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
    if spec.size is not None:
        pixels = _squares(pixels, spec.size, spec.resize, spec.interpolation)
    for name, values in (("mean", spec.mean), ("std", spec.std)):
        if len(values) not in (1, pixels.shape[1]):
            raise DataError(f"the teacher's {name} has {len(values)} values for {pixels.shape[1]} channels")
    pixels = ((pixels * np.float32(spec.scale) - _channels(spec.mean)) / _channels(spec.std)).astype(np.float32)
    return np.ascontiguousarray(pixels.transpose(0, 2, 3, 1)) if spec.layout == "NHWC" else pixels


def _channels(values: tuple[float, ...]) -> np.ndarray:
    return np.asarray(values, np.float32).reshape(-1, 1, 1)


def _squares(pixels: np.ndarray, size: int, resize: int | None, interpolation: str) -> np.ndarray:
    """Of ``size``; cut from the centre when the shorter side is first resized."""
    height, width = pixels.shape[2:]
    if resize is None:
        wanted = (size, size)
    else:
        longer = int(resize * max(height, width) / min(height, width))
        wanted = (resize, longer) if height <= width else (longer, resize)
    if (height, width) != wanted:
        pixels = _resized(pixels, wanted, interpolation)
    top, left = (round((side - size) / 2) for side in wanted)
    return pixels[:, :, top : top + size, left : left + size]


def _resized(pixels: np.ndarray, size: tuple[int, int], interpolation: str) -> np.ndarray:
    import torch
    from torch.nn import functional as F

    made: np.ndarray = F.interpolate(
        torch.from_numpy(pixels), size, mode=interpolation, antialias=True, align_corners=False
    ).numpy()
    return made

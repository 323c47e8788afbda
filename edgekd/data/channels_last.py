"""Binding inputs of models whose images have their channels last, and saying so where the data has them first."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edgekd.errors import DataError
from edgekd.programs.models import bind_inputs
from edgekd.protocols import Arrays
from edgekd.types import TensorSpec

__all__ = ["bind_images"]


def bind_images(specs: Sequence[TensorSpec], arrays: Arrays) -> dict[str, np.ndarray]:
    """As :func:`edgekd.programs.models.bind_inputs`; the error names the layout where that alone is wrong.

    Raises:
        DataError: The arrays do not fit.
    """
    try:
        return bind_inputs(specs, arrays)
    except DataError as error:
        turned = {name: array.transpose(0, 2, 3, 1) if array.ndim == 4 else array for name, array in arrays.items()}
        try:
            bind_inputs(specs, turned)
        except DataError:
            raise error from None
        raise DataError(
            f'{error}; preprocessing = {{ layout = "NHWC" }} beside the teacher\'s model would fit'
        ) from None

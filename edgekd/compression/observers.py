"""Observers: from the values that a tensor took in calibration to the range that int8 covers.

========== =============================================================================================================
minmax     Everything seen; nothing saturates.
percentile Without the outermost 0.01 % of the values on each side, which saturate.
mse        The range with the smallest squared error over all values seen: rounding inside, saturation outside.
========== =============================================================================================================

``percentile`` and ``mse`` keep a histogram, so all need a single pass over the samples. The scales of 4-bit weights
always have the smallest squared error, channel by channel: 15 levels leave no room for a lone large weight.

Importing this module imports torchao; see :func:`edgekd.compression.compress.quantize_static`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchao.quantization.pt2e import HistogramObserver, MinMaxObserver, PerChannelMinMaxObserver

from edgekd.programs.weights import smallest_error_scales

__all__ = ["OBSERVERS", "MseObserver", "PercentileObserver", "WeightMseObserver"]


class PercentileObserver(HistogramObserver):
    """Range that leaves out the outermost 0.01 % of the values on each side; what is beyond saturates."""

    share = 1e-4

    @torch.jit.unused
    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        low, high = self.min_val, self.max_val
        if low.numel() and high > low and self.histogram.sum() > 0:
            below = torch.cumsum(self.histogram.double(), 0) / self.histogram.double().sum()
            edges = torch.linspace(float(low), float(high), self.bins + 1, dtype=torch.float64)
            first = int((below > self.share).nonzero()[0])
            last = int((below >= 1 - self.share).nonzero()[0])
            low, high = edges[first].to(low.dtype), edges[last + 1].to(high.dtype)
        return self._calculate_qparams(low, high)


class MseObserver(HistogramObserver):
    """Range with the smallest mean squared error, searched on the histogram.

    Both ends shrink independently, in 32 steps each, first down to a fiftieth of what was seen and then, finer, around
    the best of these. A candidate costs one look at the 2,048 bins, whatever the number of samples.
    """

    steps = 32

    @torch.jit.unused
    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        low, high = self.min_val, self.max_val
        if low.numel() and high > low and self.histogram.sum() > 0:
            edges = torch.linspace(float(low), float(high), self.bins + 1, dtype=torch.float64)
            centres, counts = (edges[1:] + edges[:-1]) / 2, self.histogram.double()
            kept = counts > 0
            centres, counts = centres[kept], counts[kept]
            lowest, highest = min(float(low), 0.0), max(float(high), 0.0)
            shares = torch.logspace(-1.7, 0, self.steps, dtype=torch.float64)
            best = self._search(lowest * shares, highest * shares, centres, counts)
            fine = torch.linspace(0.9, 1.1, self.steps, dtype=torch.float64)
            lows, highs = (best[0] * fine).clamp_min(lowest), (best[1] * fine).clamp_max(highest)
            best = self._search(lows, highs, centres, counts)
            low, high = torch.tensor(best, dtype=low.dtype)
        return self._calculate_qparams(low, high)

    def _search(self, lows: Tensor, highs: Tensor, centres: Tensor, counts: Tensor) -> tuple[float, float]:
        """The pair of ends whose levels are nearest to the values."""
        best, found = (float(lows[-1]), float(highs[-1])), torch.inf
        levels = self.quant_max - self.quant_min
        for low in lows.unique().tolist():
            ends = highs.unique()
            scales = ((ends - low) / levels).clamp_min(torch.finfo(torch.float32).eps)[:, None]
            zeros = torch.round(-low / scales)
            integers = (torch.round(centres / scales) + zeros).clamp(0, levels)
            errors = (((integers - zeros) * scales - centres).square() * counts).sum(1)
            place = int(errors.argmin())
            if float(errors[place]) < found:
                best, found = (low, float(ends[place])), float(errors[place])
        return best


class WeightMseObserver(PerChannelMinMaxObserver):
    """Scales of constant weights with the smallest squared error, one a channel (:func:`smallest_error_scales`)."""

    def forward(self, weight: Tensor) -> Tensor:
        self.weight = weight.detach()
        result: Tensor = super().forward(weight)
        return result

    @torch.jit.unused
    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        scales = smallest_error_scales(self.weight, self.ch_axis, self.quant_max)
        return scales, torch.zeros(len(scales), dtype=torch.int64)


OBSERVERS = {"minmax": MinMaxObserver, "percentile": PercentileObserver, "mse": MseObserver}
"""By name, as ``edgekd.compression.compressed.OBSERVER_NAMES`` has them."""

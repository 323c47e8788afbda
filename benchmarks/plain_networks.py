"""Small networks of plain PyTorch modules, for :mod:`edgekd.benchmarks.architectures`."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["KeywordSpotter", "Recurrent", "SuperResolution", "TemporalNet", "UNet"]


class UNet(nn.Module):
    """Two levels down and up, with transposed convolutions and skips (Ronneberger et al. 2015)."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()

        def block(inputs: int, outputs: int) -> nn.Sequential:
            layers: list[nn.Module] = []
            for before in (inputs, outputs):
                layers += [nn.Conv2d(before, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
            return nn.Sequential(*layers)

        self.down1, self.down2, self.bottom = block(3, width), block(width, 2 * width), block(2 * width, 4 * width)
        self.up2, self.up1 = (
            nn.ConvTranspose2d(4 * width, 2 * width, 2, 2),
            nn.ConvTranspose2d(2 * width, width, 2, 2),
        )
        self.side2, self.side1, self.last = block(4 * width, 2 * width), block(2 * width, width), nn.Conv2d(width, 4, 1)

    def forward(self, image: Tensor) -> Tensor:
        first = self.down1(image)
        second = self.down2(F.max_pool2d(first, 2))
        deep = self.bottom(F.max_pool2d(second, 2))
        second = self.side2(torch.cat([self.up2(deep), second], 1))
        answer: Tensor = self.last(self.side1(torch.cat([self.up1(second), first], 1)))
        return answer


class Recurrent(nn.Module):
    """Two layers of a recurrent network over (batch, time, features), the first one in both directions."""

    def __init__(self, kind: type[nn.LSTM] | type[nn.GRU]) -> None:
        super().__init__()
        self.both = kind(12, 24, batch_first=True, bidirectional=True)
        self.last = kind(48, 32, batch_first=True)
        self.head = nn.Linear(32, 10)

    def forward(self, features: Tensor) -> Tensor:
        answer: Tensor = self.head(self.last(self.both(features)[0])[0][:, -1])
        return answer


class KeywordSpotter(nn.Module):
    """Depthwise separable convolutions over a spectrogram (Zhang et al. 2017)."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        layers: list[nn.Module] = [
            nn.Conv2d(1, width, (10, 4), (2, 2), (5, 1)),
            nn.BatchNorm2d(width),
            nn.ReLU(),
        ]
        for _ in range(3):
            layers += [nn.Conv2d(width, width, 3, padding=1, groups=width), nn.BatchNorm2d(width), nn.ReLU()]
            layers += [nn.Conv2d(width, width, 1), nn.BatchNorm2d(width), nn.ReLU()]
        self.body, self.head = nn.Sequential(*layers), nn.Linear(width, 12)

    def forward(self, spectrogram: Tensor) -> Tensor:
        answer: Tensor = self.head(self.body(spectrogram[:, None]).mean((2, 3)))
        return answer


class TemporalNet(nn.Module):
    """Causal dilated convolutions over time (Bai et al. 2018)."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(nn.Conv1d(12 if d == 1 else width, width, 3, dilation=d) for d in (1, 2, 4))
        self.head = nn.Linear(width, 6)

    def forward(self, features: Tensor) -> Tensor:
        x = features.transpose(1, 2)
        for convolution in self.convolutions:
            assert isinstance(convolution, nn.Conv1d)
            y = F.elu(convolution(F.pad(x, (2 * convolution.dilation[0], 0))))
            x = y + x if x.shape == y.shape else y
        answer: Tensor = self.head(x[..., -1])
        return answer


class SuperResolution(nn.Module):
    """Convolutions and a pixel shuffle on top of the enlarged picture (Shi et al. 2016)."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, width, 5, padding=2),
            nn.PReLU(width),
            nn.Conv2d(width, width, 3, padding=1),
            nn.PReLU(width),
            nn.Conv2d(width, 12, 3, padding=1),
            nn.PixelShuffle(2),
        )

    def forward(self, image: Tensor) -> Tensor:
        answer: Tensor = self.body(image) + F.interpolate(image, scale_factor=2.0, mode="bilinear", align_corners=False)
        return answer

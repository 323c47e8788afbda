"""Ground truth of a batch: the class of each sample, of the two that a mixed one is made of, or none."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["NO_LABEL", "Truth"]

NO_LABEL = -1
"""In place of a class: the sample has none."""


@dataclass(frozen=True)
class Truth:
    """What is known of a batch besides the teacher's word.

    Attributes:
        classes: int64, (batch,); ``NO_LABEL`` where there is none.
        partners: Those of the samples that were mixed in, the same shape; None when nothing was.
        shares: How much of each view is the sample's own, 0 to 1, (batch,); None when nothing was mixed.
    """

    classes: Tensor
    partners: Tensor | None = None
    shares: Tensor | None = None

    def cross_entropy(self, logits: Tensor) -> Tensor:
        """Mean over what is labelled, each half of a mixed sample by its share (Zhang et al. 2017, arXiv:1710.09412).

        Args:
            logits: (batch, classes).

        Returns:
            Shape (); zero, with a gradient of zero, when nothing is labelled.
        """
        if self.partners is None or self.shares is None:
            total = F.cross_entropy(logits, self.classes, ignore_index=NO_LABEL, reduction="sum")
            return total / (self.classes != NO_LABEL).sum().clamp(min=1)
        total, weight = logits.new_zeros(()), logits.new_zeros(())
        for classes, shares in ((self.classes, self.shares), (self.partners, 1 - self.shares)):
            losses = F.cross_entropy(logits, classes, ignore_index=NO_LABEL, reduction="none")
            total = total + (shares * losses).sum()
            weight = weight + (shares * (classes != NO_LABEL)).sum()
        return total / torch.where(weight > 0, weight, 1.0)

    def single(self) -> Tensor:
        """The class of each sample that has one and only one, else ``NO_LABEL``: what a loss may look at."""
        if self.partners is None:
            return self.classes
        return torch.where(self.classes == self.partners, self.classes, NO_LABEL)

    def to(self, device: torch.device) -> Truth:
        """The same, there."""
        if self.partners is None or self.shares is None:
            return Truth(self.classes.to(device))
        return Truth(self.classes.to(device), self.partners.to(device), self.shares.to(device))

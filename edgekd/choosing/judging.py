"""A student judged on samples that it does not learn from, also amid its training; and which samples these are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgekd.data.truth import NO_LABEL
from edgekd.data.views import split_mix
from edgekd.data.windows import counted_positions, positions_of

if TYPE_CHECKING:
    from edgekd.data.split import Split
    from edgekd.stages.workspace import Workspace

__all__ = ["HeldOut", "Judged", "hold_out", "judge"]

SHARE, MOST = 0.2, 5_000
"""Of the labelled training samples, held out for choices; a standard error of 5,000 samples is at most 0.7 points."""

_POSITIONS_AT_ONCE, _SAMPLES_AT_ONCE = 2_048, 256


@dataclass(frozen=True)
class Judged:
    """A student on held-out samples.

    Attributes:
        scores: Of each sample, float32 (samples,): right or wrong; of a window, its log-likelihood, so weighted that
            the mean is that of a token.
        loss: Mean cross-entropy with the label, nats.
    """

    scores: np.ndarray
    loss: float

    @property
    def score(self) -> float:
        """The larger the better: accuracy, or how likely the next tokens are."""
        return float(self.scores.mean(dtype=np.float64))

    @property
    def rank(self) -> float:
        """The score, and among equal ones the loss: the latter never outweighs a single sample."""
        return self.score - min(self.loss, 100.0) * 1e-3 / (100.0 * len(self.scores))


def judge(module: Callable[..., Tensor], split: Split, device: torch.device | None = None) -> Judged:
    """Run some samples; their labels are all that is looked at.

    Args:
        module: From the inputs in order to logits: in the state for inference.
        device: Where it is.
    """
    labels = split.labels
    assert labels is not None
    positions = positions_of(labels)
    step = max(1, _POSITIONS_AT_ONCE // positions) if positions else _SAMPLES_AT_ONCE
    right, losses = [], []
    for start in range(0, len(split), step):
        rows = np.arange(start, min(start + step, len(split)))
        inputs = [torch.from_numpy(np.ascontiguousarray(x)).to(device) for x in split.arrays(rows).values()]
        with torch.no_grad():
            logits, wanted = module(*inputs).float().cpu(), torch.from_numpy(labels[rows])
        loss = F.cross_entropy(logits.flatten(0, -2), wanted.flatten(), ignore_index=NO_LABEL, reduction="none")
        losses.append(loss.view(wanted.shape).numpy())
        right.append((logits.argmax(-1) == wanted).numpy())
    loss_of = np.concatenate(losses)
    if not positions:
        return Judged(np.concatenate(right).astype(np.float32), float(loss_of.mean(dtype=np.float64)))
    counted = int(counted_positions(labels).sum())
    by_window = loss_of.sum(axis=1, dtype=np.float64)
    scores = -by_window * len(split) / counted
    return Judged(scores.astype(np.float32), float(by_window.sum() / counted))


def judge_in_training(module: nn.Module, split: Split) -> Judged:
    """The same of a module that goes on training."""
    module.eval()
    found = judge(module, split, next(module.parameters()).device)
    module.train()
    return found


@dataclass(frozen=True)
class HeldOut:
    """Who learns, who chooses, and who judges what was chosen. The test split is none of them.

    Attributes:
        learned_from: Positions in the training split that trials learn from.
        chosen_on: What trials are judged on.
        judged_on: What the best is judged on in the end: it chose nothing, so its word is not too good.
        words: Where ``chosen_on`` is from.
    """

    learned_from: np.ndarray
    chosen_on: Split
    judged_on: Split
    words: str


def hold_out(work: Workspace) -> HeldOut:
    """A fifth of the labelled training samples for choices (5,000 at most), validation for the verdict.

    Half of validation chooses where it has more samples than that fifth, as where few training samples have a label;
    and where samples are mixed: one that is held out would be mixed into others. By content: copies stay together, and
    the same samples are held out when others are added.
    """
    train, validation = work.splits.train, work.splits.validation
    wanted = min(SHARE * int(train.labelled.sum()), MOST)
    if work.recipe.data.mix is not None or wanted < len(validation) / 2:
        held = _fraction(validation.contents) < 0.5
        parts = [validation.take(np.flatnonzero(part)) for part in (held, ~held)]
        return HeldOut(np.arange(len(train)), parts[0], parts[1], "one half of validation, the other judges")
    held = train.labelled & (_fraction(train.contents) < wanted / max(1, int(train.labelled.sum())))
    return HeldOut(np.flatnonzero(~held), train.take(np.flatnonzero(held)), validation, "held out of train")


def _fraction(ids: np.ndarray) -> np.ndarray:
    """From 0 to 1 by id, whatever part of the ids validation took."""
    found: np.ndarray = (split_mix(ids) >> np.uint64(11)).astype(np.float64) / 2.0**53
    return found

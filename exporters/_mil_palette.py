"""Palettes: the few numbers that stand for many, found by k-means in one dimension, many groups at a time.

In one dimension a cluster is a stretch of the sorted numbers. With running sums over those, one step of Lloyd's
algorithm (1982) is a binary search for each border and one subtraction for each mean, however many numbers there are.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["palettize"]

_MOST_STEPS = 200
_PER_BIN, _MOST_BINS = 16, 2048  # numbers in a bin, on average, and bins of a density
_CELLS = 128
_MOST_EXACT = 16  # centres up to which the best split of the cells is searched
_GROUPS_AT_ONCE = 64


def palettize(values: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Cluster each row.

    Args:
        values: (groups, numbers), float.
        size: How many numbers a palette has.

    Returns:
        Palettes, (groups, size) float32 in ascending order, and the index of each number, (groups, numbers) uint8.
        The same values always give the same palettes.
    """
    ordered = values.double().sort(dim=1).values
    if size <= _MOST_EXACT:
        parts = [_lloyd(part, _best_of_cells(part, size)) for part in ordered.split(_GROUPS_AT_ONCE)]
        palettes = torch.cat(parts).float()
    else:
        candidates = [_lloyd(ordered, start) for start in (_evenly(ordered, size), _by_density(ordered, size))]
        errors = torch.stack([_error(ordered, palette) for palette in candidates])  # (starts, groups)
        palettes = torch.stack(candidates)[errors.argmin(0), torch.arange(len(values))].float()
    return palettes, _nearest(values.float(), palettes).to(torch.uint8)


def _evenly(ordered: Tensor, size: int) -> Tensor:
    """One centre in the middle of each of ``size`` equal shares of the numbers."""
    count = ordered.shape[1]
    places = ((torch.arange(size, dtype=torch.float64) + 0.5) * count / size).long().clamp(max=count - 1)
    return ordered[:, places].clone()


def _by_density(ordered: Tensor, size: int) -> Tensor:
    """Centres as dense as the cube root of the numbers' density, which is best for many centres (Panter, Dite 1951)."""
    low, high = ordered[:, :1], ordered[:, -1:]
    bins = min(max(ordered.shape[1] // _PER_BIN, 32), _MOST_BINS)
    step = (high - low).clamp(min=1e-30) / bins
    ends = _ends(ordered, low + step * torch.arange(1, bins, dtype=torch.float64))
    counts = ends - torch.nn.functional.pad(ends[:, :-1], (1, 0))
    shares = torch.nn.functional.pad(counts.double().pow(1 / 3).cumsum(1), (1, 0))
    wanted = ((torch.arange(size, dtype=torch.float64) + 0.5) / size * shares[:, -1:]).contiguous()
    right = torch.searchsorted(shares, wanted).clamp(1, bins)
    left, inside = shares.gather(1, right - 1), shares.gather(1, right)
    return low + (right - 1 + (wanted - left) / (inside - left).clamp(min=1e-30)) * step


def _best_of_cells(ordered: Tensor, size: int) -> Tensor:
    """Means of the best split of 128 cells into ``size`` stretches, by dynamic programming over all splits.

    Few centres have many poor resting places for Lloyd's steps; many have none that matters.
    """
    groups = len(ordered)
    edges = _borders(_by_density(ordered, _CELLS))
    ends = torch.nn.functional.pad(_ends(ordered, edges), (1, 0))  # (groups, cells + 1)
    sums = torch.nn.functional.pad(ordered.cumsum(1), (1, 0)).gather(1, ends)
    squares = torch.nn.functional.pad(ordered.square().cumsum(1), (1, 0)).gather(1, ends)
    counts = (ends.unsqueeze(1) - ends.unsqueeze(2)).clamp(min=1)  # from cell i up to cell j: [i, j]
    total = sums.unsqueeze(1) - sums.unsqueeze(2)
    cost = squares.unsqueeze(1) - squares.unsqueeze(2) - total.square() / counts
    cost = torch.where(torch.ones(_CELLS + 1, _CELLS + 1, dtype=torch.bool).triu(), cost, torch.inf)
    error, choices = cost[:, 0], []
    for _ in range(size - 1):
        error, choice = (error.unsqueeze(2) + cost).min(1)
        choices.append(choice)
    places = [torch.full((groups, 1), _CELLS)]
    for choice in reversed(choices):
        places.append(choice.gather(1, places[-1]))
    split = torch.cat([torch.zeros(groups, 1, dtype=torch.int64), *reversed(places)], 1)
    number, amount = ends.gather(1, split).diff(dim=1), sums.gather(1, split).diff(dim=1)
    # An empty stretch stands where it is, between its neighbours.
    return torch.where(number > 0, amount / number.clamp(min=1), ordered.gather(1, _clamped(ends, split, ordered)))


def _clamped(ends: Tensor, split: Tensor, ordered: Tensor) -> Tensor:
    return ends.gather(1, split[:, :-1]).clamp(max=ordered.shape[1] - 1)


def _lloyd(ordered: Tensor, centres: Tensor) -> Tensor:
    """Means of the nearest numbers, again and again until none moves to another."""
    sums = torch.nn.functional.pad(ordered.cumsum(1), (1, 0))
    present: Tensor | None = None
    for _ in range(_MOST_STEPS):
        ends = _ends(ordered, _borders(centres))
        if present is not None and torch.equal(ends, present):
            break
        present = ends
        starts = torch.nn.functional.pad(ends[:, :-1], (1, 0))
        counts = ends - starts
        means = (sums.gather(1, ends) - sums.gather(1, starts)) / counts.clamp(min=1)
        centres = torch.where(counts > 0, means, centres).sort(dim=1).values
    return centres


def _borders(centres: Tensor) -> Tensor:
    return ((centres[:, 1:] + centres[:, :-1]) / 2).contiguous()


def _ends(ordered: Tensor, borders: Tensor) -> Tensor:
    """Where each stretch of the sorted numbers ends, (groups, stretches)."""
    inner = torch.searchsorted(ordered, borders)
    return torch.nn.functional.pad(inner, (0, 1), value=ordered.shape[1])


def _nearest(values: Tensor, palettes: Tensor) -> Tensor:
    """Index of the nearest number of each row's palette."""
    return torch.searchsorted(_borders(palettes), values.contiguous())


def _error(ordered: Tensor, palette: Tensor) -> Tensor:
    """Sum of squares by group."""
    return (ordered - palette.gather(1, _nearest(ordered, palette))).square().sum(1)

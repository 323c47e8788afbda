"""Has what an app sees drifted from the recipe's data? Two-sample tests on inputs and what the teacher says of them.

Black-box shift detection (Rabanser et al. 2019, "Failing Loudly", arXiv:1810.11953): what a trained model makes of the
samples shows more than the raw inputs do. One kernel test over the teacher's outputs and features together (maximum
mean discrepancy, Gretton et al. 2012, JMLR 13:723), Kolmogorov–Smirnov for each statistic, χ² for the teacher's top
classes; all under Holm's correction, so that ``alpha`` is the chance of any false alarm.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from edgekd.errors import DataError
from edgekd.metrics import softmax
from edgekd.types import JsonMixin

__all__ = ["ALPHA", "Described", "Finding", "Shift", "compare", "describe", "holm", "ks_test", "mmd_test"]

ALPHA = 0.01
"""Chance of an alarm when nothing drifted."""

AT_MOST = 2_000
"""Samples of each side: more would call differences drift that matter to nobody."""

AT_LEAST = 20

WORDS = {
    "confidence": ("the teacher is surer of its top class", "the teacher is less sure of its top class"),
    "entropy": ("the teacher's answers are more spread", "the teacher's answers are more peaked"),
    "brightness": ("is brighter", "is darker"),
    "contrast": ("has more contrast", "has less contrast"),
    "mean": ("is larger", "is smaller"),
    "spread": ("varies more within a sample", "varies less within a sample"),
    "length": ("is longer", "is shorter"),
}


@dataclass(frozen=True)
class Described:
    """What is compared of some samples.

    Attributes:
        statistics: By name (``confidence``, ``brightness of image``), each (samples,).
        top: The teacher's top class, int64 (samples,).
        vectors: What the kernel sees: class probabilities and features, each (samples, width).
    """

    statistics: Mapping[str, np.ndarray]
    top: np.ndarray
    vectors: Sequence[np.ndarray]


@dataclass(frozen=True)
class Finding(JsonMixin):
    """One test.

    Attributes:
        what: That was compared.
        test: Its name.
        p: After Holm's correction.
        drifted: Whether ``p`` is below alpha.
        sentence: In words.
    """

    what: str
    test: str
    p: float
    drifted: bool
    sentence: str


@dataclass(frozen=True)
class Shift(JsonMixin):
    """All tests.

    Attributes:
        known, served: Samples on each side.
    """

    known: int
    served: int
    alpha: float
    findings: tuple[Finding, ...]

    @property
    def drifted(self) -> bool:
        return any(finding.drifted for finding in self.findings)

    def sentences(self) -> list[str]:
        """What drifted, or that nothing can be told."""
        told = [finding.sentence for finding in self.findings if finding.drifted]
        sides = f"{self.served:,} served samples against {self.known:,} of the recipe's"
        if told:
            return [f"Drifted ({sides}, false alarms {self.alpha:.0%}):", *told]
        nearest = min(self.findings, key=lambda finding: finding.p)
        return [f"No drift can be told ({sides}); the smallest p, of {nearest.what}, is {nearest.p:.2g}."]


def describe(inputs: Mapping[str, np.ndarray], logits: np.ndarray, features: Mapping[str, np.ndarray]) -> Described:
    """What is compared of some samples.

    Args:
        inputs: By name, as the models take them, samples first.
        logits: Of the teacher, (samples, classes).
        features: Of the teacher, by name, samples first.
    """
    probabilities = softmax(logits)
    entropy = -(probabilities * np.log(np.maximum(probabilities, 1e-30))).sum(axis=1)
    statistics = {"confidence": probabilities.max(axis=1), "entropy": entropy}
    for name, column in inputs.items():
        flat = np.asarray(column).reshape(len(column), -1)
        if flat.dtype.kind == "f":
            level, spread = ("brightness", "contrast") if np.ndim(column) == 4 else ("mean", "spread")
            statistics[f"{level} of {name}"] = flat.mean(axis=1, dtype=np.float64)
            statistics[f"{spread} of {name}"] = flat.std(axis=1, dtype=np.float64)
        else:
            statistics[f"length of {name}"] = (flat != 0).sum(axis=1).astype(np.float64)
    vectors = [probabilities, *(np.asarray(feature).reshape(len(feature), -1) for feature in features.values())]
    return Described(statistics, probabilities.argmax(axis=1), vectors)


def compare(known: Described, served: Described, labels: Sequence[str] = (), alpha: float = ALPHA) -> Shift:
    """Test for test, with Holm's correction over all.

    Args:
        known: Samples of the recipe that the teacher was not trained on.
        labels: Class names.
        alpha: Chance of any false alarm.

    Raises:
        DataError: Too few samples.
    """
    counts = len(known.top), len(served.top)
    if min(counts) < AT_LEAST:
        raise DataError(f"{counts[1]} served samples against {counts[0]} are too few; {AT_LEAST} of each are needed")
    hypotheses = len(known.statistics) + 2
    permutations = max(999, math.ceil(2 * hypotheses / alpha) - 1)  # so that the smallest p can pass Holm's
    tests = [("outputs", "kernel MMD", mmd_test(known.vectors, served.vectors, permutations))]
    tests.append(("top class", "χ²", chi2_test(known.top, served.top)))
    for name, values in known.statistics.items():
        tests.append((name, "Kolmogorov–Smirnov", ks_test(values, served.statistics[name])))
    corrected = holm([p for _, _, p in tests])
    findings = []
    for (what, test, _), p in zip(tests, corrected, strict=True):
        sentence = f"{_sentence(what, known, served, labels)} ({test}, {_p_words(p)})."
        findings.append(Finding(what, test, p, p < alpha, sentence))
    return Shift(*counts, alpha, tuple(findings))


def _p_words(p: float) -> str:
    return "p < 0.0001" if p < 1e-4 else f"p = {p:.2g}"


def _sentence(what: str, known: Described, served: Described, labels: Sequence[str]) -> str:
    if what == "outputs":
        return "Taken together, what the teacher says of the served samples is distributed in another way"
    if what == "top class":
        classes = max(int(known.top.max()), int(served.top.max())) + 1
        before, after = (np.bincount(side.top, minlength=classes) / len(side.top) for side in (known, served))
        moved = np.argsort(-np.abs(after - before))[:3]
        named = [labels[c] if c < len(labels) else str(c) for c in moved.tolist()]
        parts = [
            f"{name} {after[c]:.1%} instead of {before[c]:.1%}" for name, c in zip(named, moved.tolist(), strict=True)
        ]
        return f"The teacher's top class has other shares: {', '.join(parts)}"
    kind, _, name = what.partition(" of ")
    old, new = (float(np.mean(side.statistics[what])) for side in (known, served))
    more, less = WORDS[kind]
    words = f"input {name} {more if new > old else less}" if name else (more if new > old else less)
    return f"{words[0].upper()}{words[1:]}: on average {new:.4g}, it was {old:.4g}"


# ── tests ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def ks_test(first: np.ndarray, second: np.ndarray) -> float:
    """p of the two-sample Kolmogorov–Smirnov test, its limit with Stephens' correction; too large where values tie."""
    values = np.sort(np.concatenate([first, second]))
    below = [np.searchsorted(np.sort(side), values, side="right") / len(side) for side in (first, second)]
    distance = float(np.abs(below[0] - below[1]).max())
    root = math.sqrt(len(first) * len(second) / (len(first) + len(second)))
    scaled = (root + 0.12 + 0.11 / root) * distance
    if scaled < 0.2:
        return 1.0  # where the series below is slow, p is 1 to twelve digits
    terms = [(-1) ** (j - 1) * math.exp(-2 * (j * scaled) ** 2) for j in range(1, 101)]
    return float(min(1.0, max(0.0, 2 * sum(terms))))


def chi2_test(first: np.ndarray, second: np.ndarray) -> float:
    """p that two rows of classes have the same shares (Pearson's χ²); classes of fewer than ten are taken together."""
    classes = int(max(first.max(), second.max())) + 1
    table = np.stack([np.bincount(side, minlength=classes) for side in (first, second)]).astype(np.float64)
    rare = table.sum(axis=0) < 10
    table = np.concatenate([table[:, ~rare], table[:, rare].sum(axis=1, keepdims=True)], axis=1)
    table = table[:, table.sum(axis=0) > 0]
    if table.shape[1] < 2:
        return 1.0
    expected = table.sum(axis=1, keepdims=True) * table.sum(axis=0, keepdims=True) / table.sum()
    statistic = float(((table - expected) ** 2 / expected).sum())
    freedom = torch.tensor((table.shape[1] - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, torch.tensor(statistic / 2, dtype=torch.float64)))


def mmd_test(
    first: Sequence[np.ndarray], second: Sequence[np.ndarray], permutations: int = 999, seed: int = 0
) -> float:
    """p of the maximum mean discrepancy by permutation.

    The kernel is a mean of Gaussians, one for each kind of vector, as wide as the median distance.

    Args:
        first, second: Kinds of vectors, in the same order; each (samples, width).
    """
    count, total = len(first[0]), len(first[0]) + len(second[0])
    kernel = np.zeros((total, total), np.float32)
    for ours, theirs in zip(first, second, strict=True):
        both = np.concatenate([ours, theirs]).astype(np.float32)
        both = (both - both.mean(axis=0)) / np.maximum(both.std(axis=0), 1e-6 + both.std() * 1e-3)
        norms = (both**2).sum(axis=1)
        squares = np.maximum(norms[:, None] + norms[None] - 2 * both @ both.T, 0)
        kernel += np.exp(-squares / max(float(np.median(squares)), 1e-12)) / len(first)
    random = np.random.default_rng(seed)
    signs = np.full((permutations + 1, total), -1 / (total - count), np.float32)
    signs[0, :count] = 1 / count
    for row in signs[1:]:
        row[random.permutation(total)[:count]] = 1 / count
    found = ((signs @ kernel) * signs).sum(axis=1)
    return float((1 + (found[1:] >= found[0] * (1 - 1e-6)).sum()) / (permutations + 1))


def holm(values: Sequence[float]) -> list[float]:
    """p-values adjusted for having looked so often (Holm 1979)."""
    adjusted, running = [0.0] * len(values), 0.0
    for rank, index in enumerate(sorted(range(len(values)), key=lambda i: values[i])):
        running = max(running, min(1.0, (len(values) - rank) * values[index]))
        adjusted[index] = running
    return adjusted

"""Mixed precision by measurement (``auto``): static int8 but for the fewest layers that a budget of accuracy needs.

1. All layers in int8; where that is within the budget, it is the answer.
2. Each layer alone in int8, the others in float: the error that it makes in the outputs ranks the layers.
3. The worst layers stay float, as many of them as the budget needs: doubled until it is met, then bisected.
4. Each of these, the least sensitive first, goes back to int8 if the budget is still met.

Steps 1, 3 and 4 measure real programs; only the ranking is an approximation. Choices are made on calibration and
validation samples; no step sees the test split.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from edgekd.compression.bias import correct_biases
from edgekd.compression.compressed import calibration_of, check_observer, finished, refuse_compressed
from edgekd.compression.corrections import Static, StaticPlan, static_of
from edgekd.compression.static import checked_samples, interpret, output_error, outputs_of, round_biases, static_module
from edgekd.errors import BudgetError, UsageError
from edgekd.metrics import accuracy, agreement
from edgekd.programs.layers import CONVOLUTIONS, LINEAR
from edgekd.programs.weights import float_weight, layer_name, put_integers, weight_names
from edgekd.protocols import Arrays
from edgekd.types import LOGITS, KeptLayer, Mixture, Student

__all__ = ["DEFAULT_MAX_DROP", "Budget", "mixed_precision"]

DEFAULT_MAX_DROP = 0.005

_RANKED = 32  # samples that rank the layers
_RETURNS = 12  # layers that are tried again in int8


@dataclass(frozen=True)
class Budget:
    """How much may be lost, and where that is measured.

    Attributes:
        max_drop: 0.005 is half a point of accuracy (or of agreement, or 0.005 of cosine).
        samples: By input name; never those of the test split.
        labels: Their classes, (samples,); None when there are none.
    """

    max_drop: float
    samples: Arrays
    labels: np.ndarray | None = None


def mixed_precision(
    student: Student,
    calibration: Arrays,
    budget: Budget,
    observer: str = "minmax",
    corrections: Sequence[str] = ("auto",),
    say: Callable[[str], None] = lambda line: None,
) -> Student:
    """A student in int8 (``w8a8``) but for the fewest layers that the budget needs.

    Args:
        student: In ``fp32``.
        calibration, observer, corrections: See :func:`edgekd.compression.compress.quantize_static`.
        say: Hears each thing that was measured.

    Returns:
        In precision ``auto``; ``card.mixture`` has what was kept and why.

    Raises:
        BudgetError: No mix meets the budget.
        UsageError, DataError, NumericalError: As :func:`edgekd.compression.compress.quantize_static`.
    """
    check_observer(observer)
    refuse_compressed(student, "auto")
    if not 0 <= budget.max_drop < 1:
        raise UsageError(f"a budget of {budget.max_drop} is no share; 0.005 is half a point")
    program = student.program
    samples, judged = checked_samples(program, calibration), checked_samples(program, budget.samples)
    static = static_of(program, samples, StaticPlan(observer, 8, tuple(corrections)))
    reference = outputs_of(static.source, program, judged)
    metric, place = _metric(student, reference, budget.labels)
    best = _score(metric, reference[place], reference[place], budget.labels)
    names = _layers(static)

    def variant(kept: Collection[str]) -> GraphModule:
        if not kept:
            return static.module
        module = static_module(static.source, program, samples, observer, keep_float=kept)
        if "bias" in static.applied:
            correct_biases(module, static.source, program, samples)
        return module

    def drop(kept: Collection[str]) -> float:
        found = outputs_of(variant(kept), program, judged)[place]
        lost = best - _score(metric, reference[place], found, budget.labels)
        say(f"auto: {len(kept)} of {len(names)} layers in float: {metric} drops by {lost * 100:.2f} pt")
        return lost

    kept: list[str] = []
    lost, errors = drop(kept), dict[str, float]()
    if lost > budget.max_drop:
        errors = _errors(static, student, samples)
        kept, lost = _fewest(sorted(names, key=lambda name: -errors[name]), budget.max_drop, drop, metric)
    module = variant(kept)
    put_integers(module, kept)
    round_biases(module)
    layers = tuple(KeptLayer(layer_name(name), errors[name]) for name in kept)
    count = len(next(iter(judged.values())))
    mixture = Mixture(metric, budget.max_drop, lost, best, count, len(names), layers)
    calibrated = calibration_of(samples, observer, static.applied)
    return finished(student, module, "auto", calibrated, mixture=mixture)


def _fewest(
    ranked: list[str], max_drop: float, drop: Callable[[Collection[str]], float], metric: str
) -> tuple[list[str], float]:
    """The shortest list of layers found to meet the budget, the most sensitive first, and what it loses."""
    count, low, losses = 1, 0, dict[int, float]()
    while count < len(ranked):
        losses[count] = drop(ranked[:count])
        if losses[count] <= max_drop:
            break
        low, count = count, min(2 * count, max(len(ranked) - 1, count + 1))
    else:
        least = f"; {low} of {len(ranked)} layers in float still lose {losses[low] * 100:.2f} pt" if low else ""
        raise BudgetError(
            f"auto: no mix of int8 and float layers loses at most {max_drop * 100:.2f} pt of {metric}{least}; "
            "a larger max_drop, another observer or w8 may work"
        )
    while count - low > 1:
        middle = (count + low) // 2
        losses[middle] = drop(ranked[:middle])
        low, count = (low, middle) if losses[middle] <= max_drop else (middle, count)
    kept, lost = ranked[:count], losses[count]
    for name in list(reversed(kept))[:_RETURNS]:
        fewer = [other for other in kept if other != name]
        if fewer and (found := drop(fewer)) <= max_drop:
            kept, lost = fewer, found
    return kept, lost


def _metric(student: Student, reference: list[np.ndarray], labels: np.ndarray | None) -> tuple[str, int]:
    """What is measured, and on which output."""
    for place, (spec, output) in enumerate(zip(student.card.outputs, reference, strict=True)):
        classes = output.ndim == 2 and output.shape[1] > 1 and spec.meaning in (LOGITS, "")
        if classes:
            return ("agreement" if labels is None else "accuracy"), place
    return "cosine", 0


def _score(metric: str, reference: np.ndarray, found: np.ndarray, labels: np.ndarray | None) -> float:
    if metric == "accuracy":
        assert labels is not None
        return accuracy(found, labels)
    if metric == "agreement":
        return agreement(reference, found)
    a, b = (array.reshape(len(array), -1).astype(np.float64) for array in (reference, found))
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return float(((a * b).sum(1) / np.maximum(norms, 1e-30)).mean())


def _layers(static: Static) -> list[str]:
    """Names of the weights of all layers that int8 runs in integers, in the order of the graph."""
    names = weight_names(static.source)
    quantized = [n for n in static.module.graph.nodes if n.name in names and _weight_node(n) is not None]
    return list(dict.fromkeys(names[node.name] for node in quantized))


def _errors(static: Static, student: Student, samples: Arrays) -> dict[str, float]:
    """By the name of its weight, the error that each layer alone makes in the outputs."""
    names = weight_names(static.source)
    layers: dict[str, list[Node]] = {}
    for node in static.module.graph.nodes:
        if node.name in names and _weight_node(node) is not None:
            layers.setdefault(names[node.name], []).append(node)
    runs = _Partly(static)

    def outputs() -> list[np.ndarray]:
        return [output.numpy() for output in interpret(runs, student.program, samples, _RANKED)]

    reference, errors = outputs(), {}
    for name, nodes in layers.items():
        runs.active = {found for node in nodes for found in _roundings(node)}
        errors[name] = output_error(reference, outputs())
    return errors


class _Partly(Interpreter):
    """Runs a quantized module in which only some nodes round; ``active`` has their names."""

    def __init__(self, static: Static) -> None:
        super().__init__(static.module)
        self.active: set[str] = set()
        self._floats: dict[str, Tensor] = {}
        for node in static.module.graph.nodes:
            if "dequantize_per_channel" in str(node.target):
                self._floats[node.name] = float_weight(static.module, static.source, node)

    def run_node(self, n: Node) -> Any:
        target = str(n.target)
        if "dequantize_per_channel" in target and n.name not in self.active:
            return self._floats[n.name]
        if "quantize_per_tensor" in target:
            (value, *_), _ = self.fetch_args_kwargs_from_env(n)
            passes = value.is_floating_point() if ".dequantize" in target else n.name not in self.active
            if passes:
                return value
        return super().run_node(n)


def _weight_node(layer: Node) -> Node | None:
    """The node that dequantizes the weight of a layer."""
    return next((s for s in layer.all_input_nodes if "dequantize_per_channel" in str(s.target)), None)


def _roundings(layer: Node) -> list[str]:
    """Nodes that round the weight, the inputs and the output of a layer."""
    found = [s.name for s in layer.all_input_nodes if "dequantize_per_channel" in str(s.target)]
    found += [str(s.args[0]) for s in layer.all_input_nodes if "dequantize_per_tensor" in str(s.target)]
    readers = list(layer.users)
    for user in layer.users:
        if user.target not in CONVOLUTIONS | LINEAR:
            readers += user.users  # the activation that is fused with the layer
    return found + [n.name for n in readers if str(n.target).startswith("quantized_decomposed.quantize_per_tensor")]

"""Was it really compressed? What a file still holds in float, and what its converter added, each with its cost."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from torch.export import ExportedProgram

from edgekd import plugins
from edgekd.contents import Contents, OperatorFact, OperatorKind, WeightFact
from edgekd.store import MANIFEST, load_artifact
from edgekd.types import Finding, Precision

__all__ = ["lint", "lint_file"]

SMALLEST_WEIGHT = 1024
"""Numbers of a constant below which it is no weight; biases and scales have one axis and are none either."""

_SHOWN = 5
_TURNS = ("aten.permute.", "aten.transpose.", "aten.t.", "aten.numpy_T.", "aten.movedim.", "aten.swapaxes.")
_CASTS = ("aten._to_copy.", "aten.to.", "aten.type_as.")


def lint(contents: Contents, precision: Precision, program: ExportedProgram | None = None) -> tuple[Finding, ...]:
    """What in a file costs size or time and is not what its precision promises, the costliest kind first.

    Args:
        contents: Of the file, by its exporter.
        precision: That the file claims.
        program: That it was written from: what transposes and casts it has itself are not held against the file.
    """
    findings = [_float_weights(contents.weights, precision), _wide_weights(contents.weights, precision)]
    findings.append(_operators(contents, ("batch_norm",), 0, "batch norm", "not folded into a layer"))
    edges = 2 if program is None else len(program.graph_signature.user_inputs + program.graph_signature.user_outputs)
    if "a" in precision:
        findings.append(
            _operators(contents, ("quantize", "dequantize"), edges, "conversion", "between float and int8 on the way")
        )
    turns = 0 if program is None else _count(program, _TURNS)
    findings.append(_operators(contents, ("transpose",), turns, "transpose", "that the program has not"))
    casts = (0 if program is None else _count(program, _CASTS)) + edges
    findings.append(_operators(contents, ("cast",), casts, "cast", "that the program has not"))
    return tuple(sorted((f for f in findings if f is not None), key=lambda finding: -finding.cost_bytes))


def lint_file(path: Path, precision: Precision | None = None) -> tuple[Contents, tuple[Finding, ...]]:
    """See :func:`lint`.

    Args:
        path: A model file, whoever made it, or the folder of an artifact.
        precision: That it claims; by default that of the manifest beside it, or ``w8``.

    Raises:
        UsageError: No target writes such files.
        ModelFileError: The file is damaged.
        MissingToolchainError: The target's toolchain is not installed.
    """
    folder = path if (path / MANIFEST).is_file() else path.parent
    artifact = load_artifact(folder) if (folder / MANIFEST).is_file() else None
    file = folder / artifact.path if artifact is not None and folder == path else path
    target = plugins.exporter_of(file)
    exporter = plugins.load_exporter(target)
    plugins.require(target, exporter)
    contents = exporter.contents(file)
    return contents, lint(contents, precision or (artifact.precision if artifact is not None else "w8"))


def claimed_bits(precision: Precision) -> int:
    """Bits of a weight by the word for the precision: 8 for ``w8a8``, 4 for ``p4``; 32 where it has no digits."""
    found = re.search(r"\d+", precision)
    return int(found.group()) if found else 32


def _float_weights(weights: Sequence[WeightFact], precision: Precision) -> Finding | None:
    bits = claimed_bits(precision)
    large = [weight for weight in weights if weight.elements >= SMALLEST_WEIGHT and len(weight.shape) > 1]
    wide = [weight for weight in large if weight.dtype.startswith("float") and _saved(weight, bits) > 0]
    if not wide:
        return None
    wide.sort(key=lambda weight: -_saved(weight, bits))
    saved, total = sum(_saved(weight, bits) for weight in wide), sum(weight.size_bytes for weight in weights)
    message = (
        f"{_plural(len(wide), 'weight')} left in float: {_size(saved)} of {_size(total)} more than {bits} bits would "
        f"take; {_list([f'{weight.name} ({weight.reader})' for weight in wide])}"
    )
    return Finding("float_weight", len(wide), saved, message, tuple(weight.name for weight in wide[:_SHOWN]))


def _wide_weights(weights: Sequence[WeightFact], precision: Precision) -> Finding | None:
    """Integers of more bits than the precision says: a kernel or a block of scales that they do not fit."""
    bits = claimed_bits(precision)
    large = [weight for weight in weights if weight.elements >= SMALLEST_WEIGHT and len(weight.shape) > 1]
    wide = [w for w in large if w.dtype in ("int8", "uint8") and w.reader and _saved(w, bits) > 0]
    if not wide:
        return None
    wide.sort(key=lambda weight: -_saved(weight, bits))
    saved = sum(_saved(weight, bits) for weight in wide)
    message = (
        f"{_plural(len(wide), 'weight')} in 8 bits: {_size(saved)} more than {bits} bits would take; "
        f"{_list([f'{weight.name} ({weight.reader})' for weight in wide])}"
    )
    return Finding("wide_weight", len(wide), saved, message, tuple(weight.name for weight in wide[:_SHOWN]))


def _operators(
    contents: Contents, kinds: tuple[OperatorKind, ...], allowed: int, noun: str, what: str
) -> Finding | None:
    found = sorted((fact for fact in contents.operators if fact.kind in kinds), key=lambda fact: -fact.size_bytes)
    surplus = len(found) - allowed
    if surplus <= 0:
        return None
    shown: list[OperatorFact] = found[:surplus]
    cost, names = sum(fact.size_bytes for fact in shown), [fact.name for fact in shown]
    message = f"{_plural(surplus, noun)} {what}: up to {_size(cost)} moved in each inference; {_list(names)}"
    kind = "quantization" if len(kinds) > 1 else kinds[0]
    return Finding(kind, surplus, cost, message, tuple(names[:_SHOWN]))


def _count(program: ExportedProgram, prefixes: tuple[str, ...]) -> int:
    return sum(str(node.target).startswith(prefixes) for node in program.graph.nodes)


def _saved(weight: WeightFact, bits: int) -> int:
    return weight.size_bytes - weight.elements * bits // 8


def _plural(count: int, word: str) -> str:
    return f"{count} {word}{'' if count == 1 else 's'}"


def _list(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (" …" if len(names) > _SHOWN else "")


def _size(count: int) -> str:
    for unit, size in (("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"

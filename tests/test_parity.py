"""Parity: what passes, what fails, and what it says."""

import numpy as np
import pytest

from edgekd.exporting.parity import TOLERANCES, compare, conversions
from edgekd.types import TensorSpec, Tolerance

SPECS = [TensorSpec("logits", (-1, 3), "float32", "logits")]
STRICT = Tolerance(1e-4, 0.9999, 0.999)


def _logits(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(50, 3)).astype(np.float32)


def test_equal_outputs_pass() -> None:
    x = _logits()
    parity = compare(SPECS, [x], [x.copy()], STRICT, "runtime 1")

    assert parity.status == "passed"
    assert (parity.max_abs, parity.agreement, parity.samples) == (0.0, 1.0, 50)
    assert parity.cosine == pytest.approx(1.0)
    assert parity.runtime == "runtime 1"


def test_a_dropped_activation_fails_and_says_which_output_and_by_how_much() -> None:
    x = _logits()
    parity = compare(SPECS, [np.maximum(x, 0)], [x], STRICT, "r")

    assert parity.status == "failed"
    assert "output 'logits': max error" in parity.reason
    assert "agreement" in parity.reason


def test_one_wrong_output_among_good_ones_fails() -> None:
    x = _logits()
    specs = [*SPECS, TensorSpec("features", (-1, 3), "float32")]
    parity = compare(specs, [x, x], [x, x + 1], STRICT, "r")

    assert [item.passed for item in parity.outputs] == [True, False]
    assert "'features'" in parity.reason
    assert "'logits'" not in parity.reason


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_fails_and_is_still_json(bad: float) -> None:
    x = _logits()
    y = x.copy()
    y[3, 1] = bad
    parity = compare(SPECS, [x], [y], Tolerance(None, 0.0, 0.0), "r")

    assert parity.status == "failed"
    assert parity.max_abs is None
    assert "NaN or infinity" in parity.reason


def test_another_shape_fails() -> None:
    parity = compare(SPECS, [_logits()], [_logits()[:, :2]], STRICT, "r")

    assert parity.status == "failed"
    assert "has shape (50, 2), the program's is (50, 3)" in parity.reason


def test_zeros_do_not_pass_for_anything() -> None:
    """The delegate that is fast because it returns zeros."""
    x = _logits()

    assert compare(SPECS, [x], [np.zeros_like(x)], TOLERANCES["w8a8"], "r").status == "failed"


def test_features_without_classes_have_no_agreement() -> None:
    x = np.random.default_rng(0).normal(size=(4, 7, 3)).astype(np.float32)

    assert compare([TensorSpec("h", (-1, 7, 3), "float32")], [x], [x], STRICT, "r").agreement is None


def test_what_every_target_shares_is_written_from_fp32_or_from_a_program_of_its_own() -> None:
    sources = {precision: conversion.source for precision, conversion in conversions(*TOLERANCES).items()}

    own = ("w8", "w8a8", "w4a8", "w8a16", "auto")
    assert sources == {"fp32": "fp32", "fp16": "fp32", "w8d8": "fp32"} | {precision: precision for precision in own}


def test_another_largest_value_fails_only_where_it_is_a_class() -> None:
    """An embedding's largest value says nothing; a class does."""
    x = np.tile(np.array([[1.0, 1.001, 0.0]], np.float32), (20, 1))
    y = x[:, [1, 0, 2]]
    loose = Tolerance(None, 0.99, 0.9)
    embedding = compare([TensorSpec("embedding", (-1, 3), "float32")], [x], [y], loose, "r")

    assert embedding.status == "passed"
    assert embedding.agreement == 0.0
    assert compare(SPECS, [x], [y], loose, "r").status == "failed"

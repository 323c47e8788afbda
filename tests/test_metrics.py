"""Metrics against counting by hand."""

import numpy as np
import pytest

from edgekd.errors import DataError
from edgekd.metrics import accuracy, agreement, check_labels, expected_calibration_error, mean_kl, quality, softmax


def test_softmax_sums_to_one_and_survives_large_logits() -> None:
    p = softmax(np.array([[1e4, 0.0], [-1e4, 1e4]]))

    assert p.sum(axis=1) == pytest.approx([1.0, 1.0])
    assert p[0, 0] == pytest.approx(1.0)


def test_accuracy_and_agreement_count_top_classes() -> None:
    a = np.array([[2.0, 1.0], [0.0, 1.0], [3.0, 0.0], [0.0, 4.0]])
    b = np.array([[1.0, 2.0], [0.0, 1.0], [3.0, 0.0], [0.0, 4.0]])

    assert accuracy(a, np.array([0, 1, 1, 1])) == 0.75
    assert agreement(a, b) == 0.75


@pytest.mark.parametrize(
    ("labels", "found"),
    [
        (np.array([0, 3]), "0 to 3 was found; the model has 3 classes"),
        (np.array([-1, 2]), "-1 to 2 was found; the model has 3 classes"),
        (np.array([0.0, 1.5]), "0 to 1.5 was found, not all of it whole"),
        (np.array([0.0, np.nan]), "nan to nan was found, not all of it whole"),
        (np.array(["cat", "dog"]), "dtype <U3 was found"),
        (np.eye(3), r"shape \(3, 3\) was found"),
    ],
)
def test_labels_that_no_answer_can_match_are_refused(labels: np.ndarray, found: str) -> None:
    with pytest.raises(DataError, match=f"^'label' of a.npz: {found}.*from 0 to 2, is needed$"):
        check_labels(labels, 3, "'label' of a.npz")


@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.float32])
def test_labels_of_any_numeric_type_are_taken(dtype: type) -> None:
    check_labels(np.array([0, 2, 1], dtype), 3, "'label' of a.npz")


def test_kl_is_zero_for_equal_and_positive_for_others() -> None:
    a = np.random.default_rng(0).normal(size=(5, 3))

    assert mean_kl(a, a + 7.0) == pytest.approx(0.0, abs=1e-12)
    assert mean_kl(a, -a) > 0


def test_ece_of_a_perfectly_calibrated_coin_is_small_and_of_a_boaster_large() -> None:
    random = np.random.default_rng(0)
    labels = random.integers(0, 2, 20_000)
    right = random.random(20_000) < 0.8
    top = np.where(right, labels, 1 - labels)
    calibrated = np.zeros((20_000, 2))
    calibrated[np.arange(20_000), top] = np.log(0.8 / 0.2)
    boaster = calibrated * 10

    assert expected_calibration_error(calibrated, labels) < 0.01
    assert expected_calibration_error(boaster, labels) == pytest.approx(0.2, abs=0.01)


def test_quality_counts_class_by_class() -> None:
    logits = np.array([[2.0, 0, 0], [0, 2.0, 0], [0, 0, 2.0], [2.0, 0, 0]])
    found = quality(logits, np.array([0, 1, 1, 0]), logits)

    assert [(c.support, c.correct) for c in found.classes] == [(2, 2), (2, 1), (0, 0)]
    assert found.accuracy == 0.75
    assert found.teacher_agreement == 1.0
    assert found.kl == pytest.approx(0.0, abs=1e-12)

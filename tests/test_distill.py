"""Which arms are trained, which one is shipped, and how each is trained."""

import pytest

from edgekd.distillation.arms import CONTROL
from edgekd.distillation.distill import ArmResult, check_outputs, choose_arm
from edgekd.errors import DataError
from edgekd.metrics import ClassCount, Quality
from edgekd.recipes.recipe import Distill


def result(arm: str, seed: int, validation: float, test: float) -> ArmResult[Quality]:
    def quality(accuracy: float) -> Quality:
        return Quality(1000, accuracy, 0.9, 0.1, 0.02, (ClassCount(1000, int(1000 * accuracy)),))

    return ArmResult(arm, seed, quality(validation), quality(test))


def test_the_arm_is_chosen_on_validation_over_all_its_seeds_and_never_on_test() -> None:
    results = [
        result(CONTROL, 0, 0.99, 0.99),
        result(CONTROL, 1, 0.99, 0.99),
        result("kd", 0, 0.92, 0.80),
        result("kd", 1, 0.94, 0.80),
        result("dist", 0, 0.95, 0.99),
        result("dist", 1, 0.90, 0.99),
    ]
    chosen = choose_arm(results)

    assert (chosen.arm, chosen.seed) == ("kd", 1)


def test_an_arm_can_be_named_and_the_control_alone_is_shipped() -> None:
    results = [result(CONTROL, 0, 0.9, 0.9), result("kd", 0, 0.8, 0.8)]

    assert choose_arm(results, "control").arm == CONTROL
    assert choose_arm(results[:1]).arm == CONTROL


def test_classes_that_do_not_fit_are_all_three_named() -> None:
    import torch

    with pytest.raises(DataError, match="the student gives 4 classes, the teacher 5, and there are 5 labels"):
        check_outputs(torch.zeros(2, 4), 5, 5)
    with pytest.raises(DataError, match=r"the student returns \(2, 3, 4\)"):
        check_outputs(torch.zeros(2, 3, 4), 4, 4)
    check_outputs(torch.zeros(2, 4), 4, 4)


def test_an_arm_may_be_trained_in_a_way_of_its_own() -> None:
    distill = Distill.model_validate(
        {"epochs": 9, "overrides": {"kd": {"learning_rate": 0.01, "epochs": 3}, "control": {"batch_size": 7}}}
    )
    kd, dist, control = (distill.for_arm(arm) for arm in ("kd", "dist", CONTROL))

    assert (kd.learning_rate, kd.epochs, kd.batch_size) == (0.01, 3, 128)
    assert dist == distill
    assert (control.batch_size, control.epochs) == (7, 9)

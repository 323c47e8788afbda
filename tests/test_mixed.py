"""Mixed precision by measurement: the budget is met with few layers in float, and what was kept is told."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edgekd.compression.compress import compress, quantize_static
from edgekd.compression.compressed import notes_of
from edgekd.compression.mixed import Budget, mixed_precision
from edgekd.errors import BudgetError, DataError, UsageError
from edgekd.metrics import accuracy
from edgekd.programs.models import input_specs, output_specs, run_program
from edgekd.programs.tracing import export_program
from edgekd.types import Card, Student, TensorSpec


class Narrow(nn.Module):
    """Six layers; what the second makes has one channel a thousand times the others, so int8 rounds those away."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, padding=1)
        self.d, self.e, self.head = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 16, 3, padding=1), nn.Linear(16, 6)
        with torch.no_grad():
            self.b.weight[0] *= 1000
            self.c.weight[:, 0] /= 1000

    def forward(self, image: Tensor) -> Tensor:
        image = nn.functional.hardswish(self.a(image))  # no pair of layers can be equalized
        image = nn.functional.hardswish(self.b(image))
        image = nn.functional.hardswish(self.d(nn.functional.hardswish(self.c(image))))
        return self.head(nn.functional.hardswish(self.e(image)).mean((2, 3)))


Material = tuple[Student, dict[str, np.ndarray], dict[str, np.ndarray], np.ndarray]


@pytest.fixture(scope="module")
def material() -> Material:
    """A student, calibration samples, validation samples, and the classes that the student itself gives them."""
    torch.manual_seed(0)
    images = np.random.default_rng(0).standard_normal((364, 3, 6, 6), dtype=np.float32)
    net = Narrow().eval()
    with torch.no_grad():  # every class is somebody's
        net.head.bias -= net(torch.from_numpy(images)).mean(0)
    program = export_program(net, [torch.zeros(1, 3, 6, 6)])
    outputs = tuple(TensorSpec(s.name, s.shape, s.dtype, "logits") for s in output_specs(program))
    student = Student(program, Card("net", input_specs(program), outputs))
    validation = {"image": images[64:]}
    labels = next(iter(run_program(program, validation).values())).argmax(1)
    return student, {"image": images[:64]}, validation, labels


@pytest.fixture(scope="module")
def mixed(material: Material) -> Student:
    student, calibration, validation, labels = material
    return mixed_precision(student, calibration, Budget(0.05, validation, labels), corrections=())


def drop(student: Student, material: Material) -> float:
    outputs = next(iter(run_program(student.program, material[2]).values()))
    return 1 - accuracy(outputs, material[3])


def test_the_budget_is_met_where_static_int8_does_not_meet_it(material: Material, mixed: Student) -> None:
    student, calibration, _, _ = material
    assert drop(quantize_static(student, calibration, corrections=()), material) > 0.5
    assert drop(mixed, material) <= 0.05
    assert mixed.card.mixture is not None
    assert mixed.card.mixture.drop == pytest.approx(drop(mixed, material), abs=1e-6)


def test_the_guilty_layers_are_kept_and_told(mixed: Student) -> None:
    mixture = mixed.card.mixture
    assert mixture is not None
    assert (mixture.metric, mixture.layers, mixture.samples) == ("accuracy", 6, 300)
    kept = [layer.name for layer in mixture.kept]
    assert set(kept[:2]) == {"b", "c"}
    assert len(kept) < 6
    assert mixed.card.precision == "auto"
    (sentence,) = notes_of(mixed.card)
    assert sentence.startswith(f"{len(kept)} of 6 layers stay float: {kept[0]} (")


def test_layers_in_float_keep_their_weights_and_leave_no_stray_pairs(mixed: Student) -> None:
    kept = {layer.name for layer in mixed.card.mixture.kept}  # type: ignore[union-attr]
    state = mixed.program.state_dict
    for name in ("a", "b", "c", "d", "e", "head"):
        assert (f"{name}.weight" in state) == (name in kept)
        assert (f"{name}.weight_int8" in state) == (name not in kept)
    for node in mixed.program.graph.nodes:
        if str(node.target) == "quantized_decomposed.dequantize_per_tensor.default":
            # Each pair comes out of an integer layer or leads into one.
            layers = ("aten.conv2d.default", "aten.linear.default")
            weights = [
                any("dequantize_per_channel" in str(s.target) for s in n.all_input_nodes)
                for n in (*node.users, node.args[0].args[0])
                if str(n.target) in layers
            ]
            assert any(weights), node


def test_without_a_loss_nothing_is_kept(material: Material) -> None:
    student, calibration, validation, labels = material
    made = mixed_precision(student, calibration, Budget(0.9, validation, labels), corrections=())
    assert made.card.mixture is not None
    assert made.card.mixture.kept == ()
    static = quantize_static(student, calibration, corrections=())
    for name, array in run_program(static.program, validation).items():
        assert np.array_equal(run_program(made.program, validation)[name], array)


def test_without_labels_the_top_class_of_fp32_is_what_counts(material: Material) -> None:
    student, calibration, _, _ = material
    made = compress(student, "auto", calibration, corrections=(), budget=Budget(0.1, calibration))
    assert made.card.mixture is not None
    assert (made.card.mixture.metric, made.card.mixture.samples) == ("agreement", 64)


def test_an_output_without_classes_is_judged_by_cosine() -> None:
    class Features(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)

        def forward(self, steps: Tensor) -> Tensor:
            return self.down(nn.functional.gelu(self.up(steps)))

    program = export_program(Features().eval(), [torch.zeros(1, 3, 4)])
    student = Student(program, Card("net", input_specs(program), output_specs(program)))
    steps = {"steps": np.random.default_rng(0).standard_normal((40, 3, 4), dtype=np.float32)}
    made = mixed_precision(student, steps, Budget(0.01, steps))
    assert made.card.mixture is not None
    assert made.card.mixture.metric == "cosine"
    assert 0 < made.card.mixture.drop < 0.01


def test_a_budget_that_no_mix_meets_is_refused_in_one_line() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 2, 1)

        def forward(self, image: Tensor) -> Tensor:
            return self.conv(image).flatten(1)

    program = export_program(Pair().eval(), [torch.zeros(1, 1, 4, 4)])
    student = Student(program, Card("net", input_specs(program), output_specs(program)))
    images = {"image": np.random.default_rng(0).standard_normal((200, 1, 4, 4), dtype=np.float32)}
    with pytest.raises(
        BudgetError, match=r"^auto: no mix of int8 and float layers loses at most 0\.00 pt of agreement"
    ):
        mixed_precision(student, images, Budget(0.0, images))
    with pytest.raises(UsageError, match=r"a budget of 1\.5 is no share"):
        mixed_precision(student, images, Budget(1.5, images))
    with pytest.raises(DataError, match="takes"):
        mixed_precision(student, images, Budget(0.0, {"image": np.zeros((4, 3, 4, 4), np.float32)}))

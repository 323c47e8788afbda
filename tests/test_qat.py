"""Quantization-aware training: what is trained is what is shipped, and it learns."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edgekd.compression.compress import quantize_static
from edgekd.compression.corrections import StaticPlan, static_of
from edgekd.compression.qat import FakeQuantized, QuantizedWeight, train_quantized
from edgekd.compression.static import checked_samples
from edgekd.programs.models import input_specs, output_specs, run_program
from edgekd.programs.tracing import export_program
from edgekd.programs.weights import put_integers
from edgekd.types import Card, Student


class Net(nn.Module):
    """Depthwise and pointwise convolutions, a residual, an embedding-free head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.depthwise, self.pointwise = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, 4)

    def forward(self, image: Tensor) -> Tensor:
        image = nn.functional.relu6(self.norm(self.stem(image)))
        image = image + torch.relu(self.pointwise(torch.relu(self.depthwise(image))))
        return self.head(image.mean((2, 3)))


@pytest.fixture(scope="module")
def student() -> Student:
    torch.manual_seed(0)
    net = Net()
    for _ in range(3):
        net(torch.randn(16, 1, 6, 6))
    program = export_program(net.eval(), [torch.zeros(1, 1, 6, 6)])
    return Student(program, Card("net", input_specs(program), output_specs(program)))


@pytest.fixture(scope="module")
def images() -> dict[str, np.ndarray]:
    return {"image": np.random.default_rng(0).standard_normal((64, 1, 6, 6), dtype=np.float32)}


def logits(student: Student, images: dict[str, np.ndarray]) -> np.ndarray:
    return next(iter(run_program(student.program, images).values()))


def imitate(student: Student, images: dict[str, np.ndarray], steps: int = 150) -> Callable[[nn.Module], None]:
    """Train towards the float outputs."""
    wanted, inputs = torch.from_numpy(logits(student, images)), torch.from_numpy(images["image"])

    def fit(module: nn.Module) -> None:
        optimizer = torch.optim.Adam(module.parameters(), lr=3e-4)
        module.train()
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = 3e-4 * (1 - step / steps)
            loss = (module(inputs) - wanted).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return fit


@pytest.mark.parametrize("precision", ["w8a8", "w4a8"])
def test_training_nothing_gives_the_static_program(
    student: Student, images: dict[str, np.ndarray], precision: str
) -> None:
    static, (trained,) = train_quantized(student, precision, images, [lambda module: None])
    np.testing.assert_allclose(logits(trained, images), logits(static, images), atol=1e-6)
    again = quantize_static(student, images, precision=precision)
    assert np.array_equal(logits(static, images), logits(again, images))


@pytest.mark.parametrize("precision", ["w8a8", "w4a8"])
def test_the_trained_module_computes_what_the_program_computes(
    student: Student, images: dict[str, np.ndarray], precision: str
) -> None:
    modules = []
    fit = imitate(student, images, steps=10)

    def keep(module: nn.Module) -> None:
        fit(module)
        modules.append(module)

    _, (trained,) = train_quantized(student, precision, images, [keep])
    with torch.no_grad():
        seen = modules[0](torch.from_numpy(images["image"])).numpy()
    shipped = logits(trained, images)
    step = next(n for n in reversed(trained.program.graph.nodes) if "quantize_per_tensor" in str(n.target)).args[1]
    assert np.abs(shipped - seen).max() <= 2.1 * step  # biases are rounded at the end
    assert np.median(np.abs(shipped - seen)) < 1e-5


def test_training_wins_back_most_of_what_four_bits_lose(student: Student, images: dict[str, np.ndarray]) -> None:
    wanted = logits(student, images)
    static, (trained,) = train_quantized(student, "w4a8", images, [imitate(student, images)], corrections=())
    before, after = (float(np.square(logits(s, images) - wanted).mean()) for s in (static, trained))
    assert after < before / 3


def test_the_trained_program_has_the_form_of_the_static_one(student: Student, images: dict[str, np.ndarray]) -> None:
    static, (trained,) = train_quantized(student, "w4a8", images, [imitate(student, images, steps=30)])
    targets = [[str(n.target) for n in s.program.graph.nodes if n.op == "call_function"] for s in (static, trained)]
    assert targets[0] == targets[1]
    assert set(static.program.state_dict) == set(trained.program.state_dict)
    changed = False
    for name, value in trained.program.state_dict.items():
        if value.dtype == torch.int8:
            assert value.abs().max() <= 7
            changed |= not torch.equal(value, static.program.state_dict[name])
    assert changed
    ranges = [n.args[4:6] for n in trained.program.graph.nodes if "dequantize_per_channel" in str(n.target)]
    assert ranges == [(-7, 7)] * 4
    assert trained.card.precision == "w4a8"
    assert trained.card.calibration is not None
    assert trained.card.calibration.corrections[-1] == "qat"
    assert trained.card.lineage != static.card.lineage


def test_a_rounded_weight_passes_gradients_where_it_does_not_saturate() -> None:
    weight = QuantizedWeight(torch.tensor([[0.24, -0.9, 5.0]]), torch.tensor([0.1]), 0, 7)
    rounded = weight()
    torch.testing.assert_close(rounded, torch.tensor([[0.2, -0.7, 0.7]]))
    rounded.sum().backward()
    assert weight.weight.grad is not None
    torch.testing.assert_close(weight.weight.grad, torch.tensor([[1.0, 0.0, 0.0]]))
    # LSQ: the rounding error inside the range, the end of the range outside; here for the logarithm of the scale.
    assert weight.factor.grad is not None
    torch.testing.assert_close(weight.factor.grad, torch.tensor([0.1 * ((2 - 2.4) - 7 + 7)]))


def test_training_starts_from_the_same_weights_every_time(student: Student, images: dict[str, np.ndarray]) -> None:
    samples = checked_samples(student.program, images)
    states = []
    for _ in range(2):
        static = static_of(student.program, samples, StaticPlan(weight_bits=4))
        put_integers(static.module)
        states.append(FakeQuantized(static, student.program).state_dict())
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])

"""Pruning: what is removed is really gone, what is left computes what it should, and training keeps the mask."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edgekd.compression.channels import find_channels
from edgekd.compression.compress import quantize_static
from edgekd.compression.prune import parse_pruning, prune
from edgekd.errors import UsageError
from edgekd.programs.fold import folded_module
from edgekd.programs.models import count_macs, count_parameters, input_specs, output_specs, run_program
from edgekd.programs.tracing import export_program
from edgekd.types import Card, Student


class Net(nn.Module):
    """A residual, a depthwise convolution, a gate, a flattened head, and a concatenation that keeps its channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.depthwise, self.pointwise = nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.Conv2d(16, 16, 1)
        self.squeeze, self.excite = nn.Conv2d(16, 8, 1), nn.Conv2d(8, 16, 1)
        self.left, self.right = nn.Conv2d(16, 8, 1), nn.Conv2d(16, 8, 1)
        self.last, self.head = nn.Conv2d(16, 12, 1), nn.Linear(12 * 4, 5)

    def forward(self, image: Tensor) -> Tensor:
        image = torch.relu(self.norm(self.stem(image)))
        image = image + self.pointwise(torch.relu(self.depthwise(image)))
        gate = torch.sigmoid(self.excite(torch.relu(self.squeeze(image.mean((2, 3), keepdim=True)))))
        image = image * gate
        image = torch.cat([self.left(image), self.right(image)], dim=1)
        image = nn.functional.avg_pool2d(torch.relu(self.last(image)), 3)
        return self.head(image.flatten(1))


def student_of(net: nn.Module, example: Tensor) -> Student:
    program = export_program(net.eval(), [example])
    card = Card("net", input_specs(program), output_specs(program), macs=count_macs(program))
    return Student(program, card)


@pytest.fixture(scope="module")
def student() -> Student:
    torch.manual_seed(0)
    net = Net()
    for _ in range(3):
        net(torch.randn(16, 3, 6, 6))
    return student_of(net, torch.zeros(1, 3, 6, 6))


@pytest.fixture(scope="module")
def images() -> dict[str, np.ndarray]:
    return {"image": np.random.default_rng(0).standard_normal((32, 3, 6, 6), dtype=np.float32)}


def test_channels_that_belong_together_are_found_together(student: Student) -> None:
    groups = find_channels(folded_module(student.program))
    makers = [{str(node.args[1].target) for node in group.makers} for group in groups]
    stream = {"stem.weight", "depthwise.weight", "pointwise.weight", "excite.weight"}
    assert sorted(makers, key=len) == [{"squeeze.weight"}, {"last.weight"}, stream]  # the concatenation's are not here


def test_removed_channels_are_gone_and_those_left_compute_the_same() -> None:
    """Channels whose weights are zero on both sides: without them, nothing changes."""
    torch.manual_seed(0)
    net = Net()
    dead = torch.tensor([1, 4, 9, 12])
    with torch.no_grad():
        for layer in (net.stem, net.depthwise, net.pointwise, net.excite):
            layer.weight[dead] = 0
            if layer.bias is not None:
                layer.bias[dead] = 0
        net.last.weight[[2, 5, 7]] = 0
        net.last.bias[[2, 5, 7]] = 0
        net.squeeze.weight[[3, 6]] = 0
        net.squeeze.bias[[3, 6]] = 0
    whole = student_of(net, torch.zeros(1, 3, 6, 6))
    small = prune(whole, parse_pruning("channels:0.25"))
    x = {"image": np.random.default_rng(0).standard_normal((8, 3, 6, 6), dtype=np.float32)}
    for name, array in run_program(whole.program, x).items():
        np.testing.assert_allclose(run_program(small.program, x)[name], array, atol=1e-5)
    shapes = {name: tuple(value.shape) for name, value in small.program.state_dict.items()}
    assert shapes["stem.weight"] == (12, 3, 3, 3)
    assert shapes["depthwise.weight"] == (12, 1, 3, 3)
    assert shapes["head.weight"] == (5, 9 * 4)
    assert small.card.macs is not None
    assert whole.card.macs is not None
    assert small.card.macs == count_macs(small.program) < 0.75 * whole.card.macs
    assert small.card.parameters == count_parameters(small.program) < count_parameters(whole.program)
    assert small.card.inputs == input_specs(small.program)
    assert input_specs(small.program)[0].shape == (-1, 3, 6, 6)


def test_two_of_four_weights_are_the_largest_of_each_group(student: Student) -> None:
    small = prune(student, parse_pruning("2:4"))
    before = folded_module(student.program)
    for name in ("pointwise.weight", "head.weight", "stem.weight"):
        weight, old = small.program.state_dict[name], before.get_parameter(name)
        groups, olds = (w.detach().movedim(1, -1) for w in (weight, old))
        if name == "stem.weight":  # three inputs are no multiple of four
            assert torch.equal(weight, old)
            continue
        groups, olds = groups.reshape(-1, 4), olds.reshape(-1, 4)
        assert ((groups != 0).sum(1) == 2).all()
        assert (groups.abs().sum(1) == olds.abs().sort(1).values[:, 2:].sum(1)).all()


@pytest.mark.parametrize("word", ["2:4", "channels:0.25"])
def test_training_wins_back_what_pruning_costs_and_quantization_follows(
    student: Student, images: dict[str, np.ndarray], word: str
) -> None:
    (wanted,) = run_program(student.program, images).values()

    def fit(module: nn.Module) -> None:
        module.train()
        optimizer = torch.optim.Adam(module.parameters(), lr=3e-3)
        for _ in range(80):
            loss = (module(torch.from_numpy(images["image"])) - torch.from_numpy(wanted)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    errors = []
    for train in (None, fit):
        small = prune(student, parse_pruning(word), train)
        (found,) = run_program(small.program, images).values()
        errors.append(float(np.square(found - wanted).mean()))
    assert errors[1] < errors[0] / 4
    if word == "2:4":
        groups = small.program.state_dict["pointwise.weight"].movedim(1, -1).reshape(-1, 4)
        assert ((groups != 0).sum(1) <= 2).all()
    quantized = quantize_static(small, images)
    assert any(value.dtype == torch.int8 for value in quantized.program.state_dict.values())
    assert any(step.startswith(f"prune {word}: ") for step in quantized.card.lineage)


def test_what_cannot_be_pruned_is_refused(student: Student, images: dict[str, np.ndarray]) -> None:
    for word in ("4:2", "channels:1.5", "channels:", "half"):
        with pytest.raises(ValueError, match=r"is no pruning; 2:4 .* or channels:0\.3"):
            parse_pruning(word)
    single = student_of(nn.Sequential(nn.Flatten(), nn.Linear(3, 2)), torch.zeros(1, 3))
    with pytest.raises(UsageError, match=r"pruning channels:0\.5 finds no channels in 'net' that can be removed"):
        prune(single, parse_pruning("channels:0.5"))
    with pytest.raises(UsageError, match="pruning 2:4 takes layers whose inputs are a multiple of 4; 'net' has none"):
        prune(single, parse_pruning("2:4"))
    with pytest.raises(UsageError, match="pruning 2:4 needs an fp32 program; 'net' is w8a8"):
        prune(quantize_static(student, images), parse_pruning("2:4"))

"""Equalization, smoothing and bias correction: the float function stays, the quantized one comes nearer to it."""

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edgekd.compression.bias import correct_biases
from edgekd.compression.compress import quantize_static
from edgekd.compression.corrections import CORRECTION_NAMES, StaticPlan, parse_corrections, static_of
from edgekd.compression.equalize import equalize, pairs_of
from edgekd.compression.smooth import smooth
from edgekd.compression.static import output_error, outputs_of, static_module
from edgekd.errors import UsageError
from edgekd.programs.fold import folded_module
from edgekd.programs.models import input_specs, output_specs, program_bytes
from edgekd.programs.tracing import export_program
from edgekd.types import Card, Student


class Uneven(nn.Module):
    """Depthwise and pointwise convolutions whose channels differ in range by a factor of up to 1,000."""

    def __init__(self, activation: type[nn.Module] = nn.ReLU) -> None:
        super().__init__()
        self.stem, self.depthwise = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.pointwise, self.head = nn.Conv2d(16, 8, 1), nn.Linear(8 * 4, 5)
        self.act, self.pool = activation(), nn.AvgPool2d(3)
        spread = torch.logspace(-1.5, 1.5, 16)
        with torch.no_grad():
            self.stem.weight.mul_(spread[:, None, None, None])
            self.stem.bias.mul_(spread)
            self.depthwise.weight.div_(spread.flip(0)[:, None, None, None])
            self.pointwise.weight.mul_((spread.flip(0) / spread)[None, :, None, None])

    def forward(self, image: Tensor) -> Tensor:
        image = self.act(self.depthwise(self.act(self.stem(image))))
        return self.head(self.pool(self.act(self.pointwise(image))).flatten(1))


class Outliers(nn.Module):
    """A transformer's feed-forward layers in BERT's order: the layer norm feeds the residual too, and has outliers."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(32), nn.Linear(32, 64), nn.Linear(64, 32)
        self.last, self.head = nn.LayerNorm(32), nn.Linear(32, 6)
        with torch.no_grad():
            for norm in (self.norm, self.last):
                norm.weight[[3, 17]] = 60.0
            self.up.weight[:, [3, 17]] /= 60.0
            self.head.weight[:, [3, 17]] /= 60.0

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.norm(tokens)
        hidden = hidden + self.down(nn.functional.gelu(self.up(hidden)))
        return self.head(self.last(hidden))


def student_of(module: nn.Module, example: Tensor) -> Student:
    program = export_program(module.eval(), [example])
    return Student(program, Card("net", input_specs(program), output_specs(program)))


@pytest.fixture(scope="module")
def uneven() -> tuple[Student, dict[str, np.ndarray]]:
    torch.manual_seed(0)
    images = np.random.default_rng(0).standard_normal((64, 3, 6, 6), dtype=np.float32)
    return student_of(Uneven(), torch.zeros(1, 3, 6, 6)), {"image": images}


@pytest.fixture(scope="module")
def outliers() -> tuple[Student, dict[str, np.ndarray]]:
    torch.manual_seed(0)
    tokens = np.random.default_rng(0).standard_normal((64, 7, 32), dtype=np.float32)
    return student_of(Outliers(), torch.zeros(1, 7, 32)), {"tokens": tokens}


def error_of(material: tuple[Student, dict[str, np.ndarray]], *corrections: str, bits: int = 8) -> float:
    student, samples = material
    static = static_of(student.program, samples, StaticPlan("minmax", bits, corrections))
    reference = outputs_of(folded_module(student.program), student.program, samples)
    return output_error(reference, outputs_of(static.module, student.program, samples))


def assert_same_function(student: Student, changed: torch.fx.GraphModule, samples: dict[str, np.ndarray]) -> None:
    expected = outputs_of(folded_module(student.program), student.program, samples)
    for a, b in zip(expected, outputs_of(changed, student.program, samples), strict=True):
        np.testing.assert_allclose(b, a, atol=1e-5 * max(1.0, float(np.abs(a).max())))


def test_equalization_leaves_the_float_function_and_evens_out_ranges(
    uneven: tuple[Student, dict[str, np.ndarray]],
) -> None:
    student, samples = uneven
    module = copy.deepcopy(folded_module(student.program))
    assert equalize(module) == 3  # stem to depthwise, depthwise to pointwise, pointwise over a pool to the linear head
    assert_same_function(student, module, samples)
    ranges = module.get_parameter("stem.weight").abs().flatten(1).amax(1)
    before = student.program.state_dict["stem.weight"].abs().flatten(1).amax(1)
    assert float(before.max() / before.min()) > 100
    assert float(ranges.max() / ranges.min()) < 10


def test_equalization_of_badly_ranged_channels_is_a_large_gain(uneven: tuple[Student, dict[str, np.ndarray]]) -> None:
    assert error_of(uneven, "equalize") < error_of(uneven) / 10


def test_relu6_is_equalized_only_where_it_provably_stays_linear() -> None:
    torch.manual_seed(0)
    student = student_of(Uneven(nn.ReLU6), torch.zeros(1, 3, 6, 6))
    samples = {"image": np.random.default_rng(0).standard_normal((64, 3, 6, 6), dtype=np.float32) * 3}
    module = copy.deepcopy(folded_module(student.program))
    equalize(module)
    assert_same_function(student, module, samples)
    stem = "stem.weight"  # nothing bounds an image
    assert torch.equal(module.get_parameter(stem), student.program.state_dict[stem])
    changed = module.get_parameter("depthwise.weight") != student.program.state_dict["depthwise.weight"]
    assert 0 < changed.flatten(1).any(1).sum() < 16


def test_layers_with_a_residual_or_another_reader_between_them_are_no_pair() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.a(x))
            return self.c(nn.functional.hardswish(self.b(x) + x))

    student = student_of(Branching(), torch.zeros(1, 2, 4, 4))
    assert pairs_of(folded_module(student.program)) == []


def test_smoothing_leaves_the_float_function_and_is_a_gain_where_there_are_outliers(
    outliers: tuple[Student, dict[str, np.ndarray]],
) -> None:
    student, samples = outliers
    module = copy.deepcopy(folded_module(student.program))
    assert smooth(module, student.program, samples) == 2
    assert_same_function(student, module, samples)
    products = [node for node in module.graph.nodes if str(node.target) == "aten.mul.Tensor"]
    assert len(products) == 1  # the second layer norm feeds the head alone and takes the division itself
    assert error_of(outliers, "smooth") < error_of(outliers) / 3


def test_smoothing_does_nothing_without_outliers(uneven: tuple[Student, dict[str, np.ndarray]]) -> None:
    student, samples = uneven
    assert smooth(copy.deepcopy(folded_module(student.program)), student.program, samples) == 0


def test_bias_correction_gives_each_layer_its_mean_back(uneven: tuple[Student, dict[str, np.ndarray]]) -> None:
    student, samples = uneven
    program, source = student.program, folded_module(student.program)
    module = static_module(source, program, samples, "minmax", 4)
    few = {"image": samples["image"][:32]}  # those that the means are taken from
    expected = outputs_of(source, program, few)[0].mean(0)
    before = np.abs(outputs_of(module, program, few)[0].mean(0) - expected).max()
    assert correct_biases(module, source, program, samples) == 4
    after = np.abs(outputs_of(module, program, few)[0].mean(0) - expected).max()
    assert after < before / 5


def test_auto_keeps_what_helps_and_the_card_tells(
    uneven: tuple[Student, dict[str, np.ndarray]], outliers: tuple[Student, dict[str, np.ndarray]]
) -> None:
    for (student, samples), name in ((uneven, "equalize"), (outliers, "smooth")):
        card = quantize_static(student, samples).card
        assert card.calibration is not None
        assert name in card.calibration.corrections
    assert error_of(uneven, "auto") <= min(error_of(uneven), error_of(uneven, "equalize")) * 1.0001
    student, samples = uneven
    assert quantize_static(student, samples, corrections=()).card.calibration.corrections == ()  # type: ignore[union-attr]


def test_corrections_do_not_change_the_program_that_they_start_from(
    uneven: tuple[Student, dict[str, np.ndarray]], outliers: tuple[Student, dict[str, np.ndarray]]
) -> None:
    for student, samples in (uneven, outliers):
        before = program_bytes(student.program)
        for corrections in (("auto",), CORRECTION_NAMES):
            quantize_static(student, samples, corrections=corrections)
        assert program_bytes(student.program) == before


def test_an_unknown_correction_is_refused_with_the_known(uneven: tuple[Student, dict[str, np.ndarray]]) -> None:
    student, samples = uneven
    with pytest.raises(UsageError, match="no correction called 'adaround'; there are equalize, smooth, bias, or auto"):
        quantize_static(student, samples, corrections=("adaround",))


def test_the_command_line_names_corrections_as_a_recipe_does() -> None:
    assert parse_corrections("auto") == ("auto",)
    assert parse_corrections("none") == ()
    assert parse_corrections("equalize, bias") == ("equalize", "bias")
    for text in ("adaround", "auto,bias", ""):
        with pytest.raises(UsageError, match="no correction called"):
            parse_corrections(text)

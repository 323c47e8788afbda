"""int8 programs against numpy, and against the float program that they came from."""

import hashlib
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edgekd.compression.compress import choose_int8, compress, quantize_static, quantize_weights
from edgekd.errors import DataError, NumericalError, UsageError
from edgekd.exporting.parity import TOLERANCES
from edgekd.programs.fold import fold_batch_norm
from edgekd.programs.models import input_specs, load_program, output_specs, program_bytes, run_program
from edgekd.programs.tracing import at_batch, export_program
from edgekd.programs.weights import integers_of, largest_scales, smallest_error_scales
from edgekd.types import Card, Student


class Residual(nn.Module):
    """A convnet in the style of torchvision: in place, a residual, a concatenation, pools; two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8, eps=1e-3)
        self.relu = nn.ReLU6(inplace=True)
        self.left = nn.Conv2d(8, 8, 3, padding=1)
        self.left_norm = nn.BatchNorm2d(8)
        self.right = nn.Conv2d(8, 4, 1)
        self.pool = nn.MaxPool2d(2)
        self.dropout = nn.Dropout(0.2)
        self.head = nn.Linear(12, 5)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        stem = self.relu(self.norm(self.stem(image)))
        left = self.left_norm(self.left(stem))
        left += stem
        left = torch.relu_(left)
        both = self.pool(torch.cat([left, self.right(left)], dim=1))
        features = both.mean((2, 3))
        return {"logits": self.head(self.dropout(features)), "features": features}


def student_of(module: nn.Module, *examples: Tensor, dynamic_batch: bool = True) -> Student:
    program = export_program(module, list(examples), dynamic_batch=dynamic_batch)
    return Student(program, Card("net", input_specs(program), output_specs(program), parameters=123, lineage=("a: b",)))


@pytest.fixture(scope="module")
def residual() -> Student:
    torch.manual_seed(1)
    net = Residual()
    for _ in range(3):
        net(torch.randn(16, 3, 8, 8))
    return student_of(net.eval(), torch.zeros(1, 3, 8, 8))


@pytest.fixture(scope="module")
def images() -> dict[str, np.ndarray]:
    return {"image": np.random.default_rng(0).standard_normal((40, 3, 8, 8), dtype=np.float32)}


@pytest.fixture(scope="module")
def residual_w8a8(residual: Student, images: dict[str, np.ndarray]) -> Student:
    return quantize_static(residual, images)


@pytest.fixture(scope="module")
def residual_w8(residual: Student) -> Student:
    return quantize_weights(residual)


@pytest.fixture(scope="module")
def encoder_w8(encoder_student: Student) -> Student:
    return quantize_weights(encoder_student)


@pytest.fixture(scope="module")
def texts() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    lengths = generator.integers(2, 7, (30, 1))
    return {
        "ids": generator.integers(0, 40, (30, 6)).astype(np.int32),
        "mask": (np.arange(6) < lengths).astype(np.int32),
    }


def int8_names(student: Student) -> set[str]:
    return {name for name, value in student.program.state_dict.items() if value.dtype == torch.int8}


def calls(student: Student) -> list[str]:
    return [str(node.target) for node in student.program.graph.nodes if node.op == "call_function"]


def largest_error(student: Student, other: Student, samples: dict[str, np.ndarray]) -> float:
    """Over the outputs, as a share of the largest absolute value of each."""
    a, b = run_program(student.program, samples), run_program(other.program, samples)
    return max(float(np.abs(a[name] - b[name]).max() / np.abs(a[name]).max()) for name in a)


# Batch norm


def test_folded_batch_norm_computes_the_same_with_any_epsilon() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6, eps=0.5), nn.Flatten(), nn.Linear(24, 4))
    net.append(nn.BatchNorm1d(4, eps=0.1))
    for _ in range(3):
        net(torch.randn(32, 3, 4, 4))
    program = export_program(net.eval(), [torch.zeros(1, 3, 4, 4)])
    folded = fold_batch_norm(program)
    assert not [node for node in folded.graph.nodes if "norm" in str(node.target)]
    x = torch.randn(20, 3, 4, 4)
    with torch.no_grad():
        expected = net(x).numpy()
    (found,) = run_program(folded, {"input": x.numpy()}).values()
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert output_specs(folded) == output_specs(program)
    assert input_specs(folded) == input_specs(program)


def test_batch_norm_after_a_grouped_transposed_convolution_is_folded() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), nn.BatchNorm2d(6, eps=1e-2), nn.ReLU())
    net(torch.randn(16, 4, 5, 5) * 2)
    x = torch.randn(4, 4, 5, 5)
    with torch.no_grad():
        expected = net.eval()(x).numpy()
    folded = fold_batch_norm(export_program(net, [x[:1]]))
    assert not [node for node in folded.graph.nodes if "norm" in str(node.target)]
    np.testing.assert_allclose(next(iter(run_program(folded, {"x": x.numpy()}).values())), expected, atol=1e-5)


def settled(net: nn.Module, x: Tensor) -> nn.Module:
    """With statistics, weights and biases of batch norm that are not those it starts with."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1.0, 0.3)
            nn.init.normal_(module.bias)
    for _ in range(3):
        net(x * 2 + 1)
    return net.eval()


def folded_targets(net: nn.Module, x: Tensor) -> list[str]:
    """Operators after folding, which computes the same."""
    with torch.no_grad():
        expected = net(x).numpy()
    folded = fold_batch_norm(export_program(net, [x[:1]]))
    found = next(iter(run_program(folded, {"x": x.numpy()}).values()))
    np.testing.assert_allclose(found, expected, atol=2e-5 * float(np.abs(expected).max()))
    return [str(node.target) for node in folded.graph.nodes if node.op == "call_function"]


def test_batch_norm_after_a_layer_that_is_read_twice_becomes_a_product_and_a_sum() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return self.norm(y) + y

    torch.manual_seed(0)
    x = torch.randn(8, 3, 4, 4)
    assert folded_targets(settled(Twice(), x), x) == [
        "aten.conv2d.default",
        "aten.mul.Tensor",
        "aten.add.Tensor",
        "aten.add.Tensor",
    ]


def test_batch_norm_of_a_dense_block_becomes_a_product_and_a_sum() -> None:
    class Dense(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.conv = nn.BatchNorm2d(6), nn.Conv2d(6, 3, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(torch.relu(self.norm(torch.cat([x, x * 2], 1))))

    torch.manual_seed(0)
    x = torch.randn(8, 3, 4, 4)
    targets = folded_targets(settled(Dense(), x), x)
    assert not [target for target in targets if "norm" in target]
    assert targets.index("aten.add.Tensor") < targets.index("aten.relu.default")


@pytest.mark.parametrize("layer", ["convolution", "grouped", "linear"])
def test_batch_norm_is_folded_into_the_layer_after_it_where_nothing_is_padded(layer: str) -> None:
    torch.manual_seed(0)
    if layer == "linear":
        x = torch.randn(16, 6)
        net: nn.Module = nn.Sequential(nn.BatchNorm1d(6, eps=0.1), nn.Linear(6, 4))
        expected = "aten.linear.default"
    else:
        x, groups = torch.randn(8, 6, 5, 5), 3 if layer == "grouped" else 1
        net = nn.Sequential(nn.BatchNorm2d(6, eps=0.1), nn.Conv2d(6, 9, 3, groups=groups, bias=False))
        expected = "aten.conv2d.default"
    assert folded_targets(settled(net, x), x) == [expected]


def test_batch_norm_before_a_padding_convolution_is_folded_only_without_a_shift() -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 3, 5, 5)
    net = settled(nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, padding=1)), x)
    assert folded_targets(net, x) == ["aten.mul.Tensor", "aten.add.Tensor", "aten.conv2d.default"]
    net[0].bias.data, net[0].running_mean = torch.zeros(3), torch.zeros(3)
    assert folded_targets(net, x) == ["aten.conv2d.default"]


def test_batch_norm_over_the_steps_of_a_sequence_scales_the_steps() -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 5, 4)  # axis 1 holds the steps
    net = settled(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(5)), x)
    assert folded_targets(net, x) == ["aten.linear.default", "aten.mul.Tensor", "aten.add.Tensor"]


# w8


def test_w8_weights_are_those_of_the_formula(small_convnet: nn.Module, convnet_student: Student) -> None:
    conv, norm = small_convnet[0], small_convnet[1]
    scale = (norm.weight / torch.sqrt(norm.running_var + norm.eps)).detach().double().numpy()
    folded = (conv.weight.detach().double().numpy() * scale[:, None, None, None]).astype(np.float32)
    state = quantize_weights(convnet_student).program.state_dict
    steps = np.abs(folded).max(axis=(1, 2, 3)) / 127
    np.testing.assert_allclose(state["0.weight_scale"].numpy(), steps, rtol=1e-6)
    integers = state["0.weight_int8"].numpy()
    np.testing.assert_allclose(
        integers, np.rint(folded / steps[:, None, None, None]), atol=1
    )  # ties may fall either way
    assert (integers != np.rint(folded / steps[:, None, None, None])).mean() < 0.05
    assert np.abs(integers.astype(int)).max(axis=(1, 2, 3)).tolist() == [127] * 8


def test_w8_holds_every_weight_of_convolutions_linear_layers_and_embeddings_in_int8(
    residual_w8: Student, encoder_w8: Student
) -> None:
    assert int8_names(residual_w8) == {f"{n}.weight_int8" for n in ("stem", "left", "right", "head")}
    assert int8_names(encoder_w8) == {
        "tokens.weight_int8",
        "layer.self_attn.in_proj_weight_int8",
        "layer.self_attn.out_proj.weight_int8",
        "layer.linear1.weight_int8",
        "layer.linear2.weight_int8",
        "head.weight_int8",
    }
    for student in (residual_w8, encoder_w8):
        state = student.program.state_dict.values()
        assert not [value for value in state if value.dtype == torch.float32 and value.ndim > 1]


def test_w8_computes_nearly_the_same(
    residual: Student,
    residual_w8: Student,
    encoder_student: Student,
    encoder_w8: Student,
    images: dict[str, np.ndarray],
    texts: dict[str, np.ndarray],
) -> None:
    assert 0 < largest_error(residual, residual_w8, images) < 0.02
    assert 0 < largest_error(encoder_student, encoder_w8, texts) < 0.02


def test_tied_weights_are_held_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens = nn.Embedding(30, 8)

        def forward(self, ids: Tensor) -> Tensor:
            return nn.functional.linear(self.tokens(ids), self.tokens.weight)

    student = student_of(Tied().eval(), torch.zeros(1, 4, dtype=torch.int64))
    ids = {"ids": np.arange(32, dtype=np.int64).reshape(8, 4) % 30}
    for small in (quantize_weights(student), quantize_static(student, ids)):
        assert int8_names(small) == {"tokens.weight_int8"}
        assert largest_error(student, small, ids) < 0.05


def test_a_channel_of_zeros_stays_zero() -> None:
    net = nn.Conv2d(2, 3, 1)
    with torch.no_grad():
        net.weight[1] = 0
    student = student_of(net.eval(), torch.zeros(1, 2, 4, 4))
    x = {"x": np.ones((2, 2, 4, 4), np.float32)}
    for small in (quantize_weights(student), quantize_static(student, x)):
        assert not small.program.state_dict["weight_int8"][1].any()
        assert largest_error(student, small, x) < 0.02


def test_decomposed_matrix_products_are_found() -> None:
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4, bias=False)).eval()
    program = export_program(net, [torch.zeros(1, 6)]).run_decompositions()
    assert "aten.addmm.default" in [str(node.target) for node in program.graph.nodes]
    student = Student(program, Card("net", input_specs(program), output_specs(program)))
    x = {"x": np.random.default_rng(0).standard_normal((20, 6), dtype=np.float32)}
    for small in (quantize_weights(student), quantize_static(student, x)):
        assert len(int8_names(small)) == 2
        assert 0 < largest_error(student, small, x) < 0.05


# w8a8


def test_w8a8_stays_close_to_float_and_has_nothing_left_of_calibration(
    residual: Student, residual_w8a8: Student, images: dict[str, np.ndarray]
) -> None:
    assert 0 < largest_error(residual, residual_w8a8, images) < 0.05
    targets = calls(residual_w8a8)
    assert not [target for target in targets if "activation_post_process" in target or "dropout" in target]
    assert not [node for node in residual_w8a8.program.graph.nodes if node.op == "call_module"]
    assert int8_names(residual_w8a8) == {f"{n}.weight_int8" for n in ("stem", "left", "right", "head")}


def test_w8a8_quantizes_each_tensor_once_and_fuses_what_runtimes_fuse(residual_w8a8: Student) -> None:
    # Out of: the image, stem with relu6, left, the sum with relu, right, their concatenation, the pool, mean, head.
    assert calls(residual_w8a8).count("quantized_decomposed.quantize_per_tensor.default") == 9
    for node in residual_w8a8.program.graph.nodes:
        if str(node.target) in ("aten.conv2d.default", "aten.linear.default", "aten.add.Tensor", "aten.cat.default"):
            sources = node.args[0] if isinstance(node.args[0], list) else node.all_input_nodes[:1]
            assert all("dequantize_per_tensor" in str(source.target) for source in sources), node


def test_concatenation_and_pooling_read_and_write_one_scale(residual_w8a8: Student) -> None:
    seen = set()
    for node in residual_w8a8.program.graph.nodes:
        if str(node.target) in ("aten.cat.default", "aten.max_pool2d.default"):
            sources = [source for source in node.all_input_nodes if source.op == "call_function"]
            (user,) = node.users
            assert {source.args[1:3] for source in sources} == {user.args[1:3]}
            seen.add(str(node.target))
    assert seen == {"aten.cat.default", "aten.max_pool2d.default"}


def test_residual_stream_of_a_transformer_stays_float(encoder_student: Student, texts: dict[str, np.ndarray]) -> None:
    small = quantize_static(encoder_student, texts)
    assert 0 < largest_error(encoder_student, small, texts) < 0.1
    assert len(int8_names(small)) == 6
    for node in small.program.graph.nodes:
        if str(node.target) == "aten.layer_norm.default":
            assert str(node.args[0].target) == "aten.add.Tensor"  # not rounded between the sum and the norm


def test_hard_swish_and_squeeze_excite_stay_right() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.act = nn.Conv2d(3, 8, 3, padding=1), nn.Hardswish(inplace=True)
            self.down, self.up = nn.Conv2d(8, 2, 1), nn.Conv2d(2, 8, 1)
            self.last = nn.Conv2d(8, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.act(self.conv(x))
            gate = nn.functional.hardsigmoid(self.up(torch.relu(self.down(x.mean((2, 3), keepdim=True)))))
            return self.last(x * gate).mean((2, 3))

    torch.manual_seed(0)
    student = student_of(Gated().eval(), torch.zeros(1, 3, 6, 6))
    x = {"x": np.random.default_rng(0).standard_normal((20, 3, 6, 6), dtype=np.float32)}
    small = quantize_static(student, x)
    assert len(int8_names(small)) == 4
    assert 0 < largest_error(student, small, x) < 0.05


def test_biases_are_multiples_of_the_product_of_their_scales(residual_w8a8: Student) -> None:
    state = residual_w8a8.program.state_dict
    nodes = {node.name: node for node in residual_w8a8.program.graph.nodes}
    names = {**residual_w8a8.program.graph_signature.inputs_to_parameters}
    seen = 0
    for node in nodes.values():
        if str(node.target) in ("aten.conv2d.default", "aten.linear.default"):
            data, weight, bias = node.args[:3]
            target = next(n for n in state if n.replace(".", "_") == weight.args[1].name.removeprefix("b_"))
            steps = state[names[bias.name]].double() / (state[target].double() * data.args[1])
            np.testing.assert_allclose(steps, steps.round(), atol=1e-2)
            seen += 1
    assert seen == 4


def test_percentile_leaves_out_what_minmax_stretches_for(residual: Student, images: dict[str, np.ndarray]) -> None:
    spoiled = {"image": np.concatenate([images["image"]] * 4)}  # one in 30,720 values
    spoiled["image"][0, 0, 0, 0] = 1000
    scales = {}
    for observer in ("minmax", "percentile"):
        student = quantize_static(residual, spoiled, observer)
        node = next(n for n in student.program.graph.nodes if "quantize_per_tensor" in str(n.target))
        scales[observer] = node.args[1]
    assert scales["minmax"] == pytest.approx((1000 - images["image"].min()) / 255, rel=1e-3)
    assert scales["percentile"] < scales["minmax"] / 20


def test_mse_finds_the_range_that_brute_force_finds() -> None:
    from edgekd.compression.observers import MseObserver

    values = torch.from_numpy(np.random.default_rng(0).standard_t(2, 100_000).astype(np.float32))
    observer = MseObserver(dtype=torch.int8, quant_min=-128, quant_max=127, qscheme=torch.per_tensor_affine)
    observer(values[:50_000])
    observer(values[50_000:])

    def error(scale: float, zero: int) -> float:
        return float((torch.fake_quantize_per_tensor_affine(values, scale, zero, -128, 127) - values).square().mean())

    scale, zero = observer.calculate_qparams()
    brute = min(error(2 * end / 255, 0) for end in np.geomspace(1, float(values.abs().max()), 200))
    assert error(float(scale), int(zero)) < brute * 1.02
    lowest, highest = float(values.min()), float(values.max())
    widest = (highest - lowest) / 255
    assert error(float(scale), int(zero)) < error(widest, round(-128 - lowest / widest)) * 0.9


def test_scales_of_four_bit_weights_have_less_error_than_the_largest_weight_gives() -> None:
    weight = torch.from_numpy(np.random.default_rng(0).standard_t(4, (6, 40)).astype(np.float32))

    def errors(scales: torch.Tensor) -> torch.Tensor:
        return (integers_of(weight, scales, 0, 7) * scales[:, None] - weight).square().sum(1)

    found, largest = errors(smallest_error_scales(weight, 0, 7)), errors(largest_scales(weight, 0, 7))
    assert (found <= largest).all()
    assert found.sum() < 0.98 * largest.sum()
    brute = torch.stack([errors(largest_scales(weight, 0, 7) * share) for share in torch.linspace(0.2, 1.2, 400)]).amin(
        0
    )
    assert (found <= brute * 1.05).all()


# The card


def test_card_tells_what_was_done(
    residual: Student, residual_w8: Student, residual_w8a8: Student, images: dict[str, np.ndarray]
) -> None:
    card = residual_w8a8.card
    assert card.precision == "w8a8"
    assert card.calibration is not None
    assert (card.calibration.samples, card.calibration.observer) == (40, "minmax")
    digest = hashlib.sha256(b"image <f4 (40, 3, 8, 8)" + images["image"].tobytes())
    assert card.calibration.data == digest.hexdigest()
    assert card.lineage[0] == "a: b"
    assert card.lineage[1].startswith("compress: ")
    assert card.parameters == 123
    assert quantize_static(residual, {"image": images["image"][:32]}).card.lineage != card.lineage
    for name in ("inputs", "outputs"):
        assert getattr(card, name) == getattr(residual.card, name)
    assert input_specs(residual_w8a8.program) == card.inputs
    assert output_specs(residual_w8a8.program) == card.outputs
    assert residual_w8.card.calibration is None
    assert residual_w8.card.lineage[1] != card.lineage[1]


# Programs


def test_compressed_programs_survive_their_files_and_another_process(
    residual_w8: Student, residual_w8a8: Student, images: dict[str, np.ndarray], tmp_path: Path
) -> None:
    students = {"w8": residual_w8, "w8a8": residual_w8a8}
    np.save(tmp_path / "x.npy", images["image"])
    for name, student in students.items():
        (tmp_path / f"{name}.pt2").write_bytes(program_bytes(student.program))
    code = (
        "import sys, pathlib, numpy as np\n"
        "from edgekd.programs.models import load_program, run_program\n"
        "folder = pathlib.Path(sys.argv[1])\n"
        "for name in ('w8', 'w8a8'):\n"
        "    outputs = run_program(load_program(folder / f'{name}.pt2'), {'image': np.load(folder / 'x.npy')})\n"
        "    np.save(folder / f'{name}.npy', outputs['linear'])\n"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path], check=True)
    for name, student in students.items():
        expected = run_program(student.program, images)["linear"]
        np.testing.assert_allclose(np.load(tmp_path / f"{name}.npy"), expected, atol=1e-6)
        loaded = load_program(tmp_path / f"{name}.pt2")
        assert output_specs(loaded) == student.card.outputs
        assert program_bytes(loaded) == program_bytes(student.program)


def test_batch_stays_dynamic_and_can_be_fixed(
    residual_w8: Student, residual_w8a8: Student, images: dict[str, np.ndarray]
) -> None:
    for student in (residual_w8, residual_w8a8):
        assert input_specs(student.program)[0].shape == (-1, 3, 8, 8)
        fixed = at_batch(student.program)
        assert input_specs(fixed)[0].shape == (1, 3, 8, 8)
        assert [spec.name for spec in output_specs(fixed)] == [spec.name for spec in student.card.outputs]
        one, many = run_program(fixed, images), run_program(student.program, images)
        for name in many:
            np.testing.assert_allclose(one[name], many[name], atol=1e-5)


def test_a_program_of_fixed_batch_is_compressed_too(images: dict[str, np.ndarray]) -> None:
    torch.manual_seed(1)
    student = student_of(Residual().eval(), torch.zeros(1, 3, 8, 8), dynamic_batch=False)
    assert input_specs(student.program)[0].shape == (1, 3, 8, 8)
    for small in (quantize_weights(student), quantize_static(student, images)):
        assert small.card.inputs == student.card.inputs == input_specs(small.program)
        assert largest_error(student, small, images) < 0.05


def test_keyword_inputs_keep_their_names() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 2, 1)

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return self.conv(a) + self.conv(b)

    one = torch.ones(1, 1, 4, 4)
    program = torch.export.export(Sum().eval(), (), {"a": one, "b": one})
    student = Student(program, Card("sum", input_specs(program), output_specs(program)))
    x = {name: np.random.default_rng(0).standard_normal((6, 1, 4, 4), dtype=np.float32) for name in "ab"}
    for small in (quantize_weights(student), quantize_static(student, x)):
        assert [spec.name for spec in input_specs(small.program)] == ["a", "b"]
        assert largest_error(student, small, x) < 0.05


_DIGESTS = """
import hashlib, numpy as np, torch
from torch import nn
from edgekd.compression.compress import compress
from edgekd.programs.models import input_specs, output_specs, program_bytes
from edgekd.programs.tracing import export_program
from edgekd.exporting.parity import TOLERANCES
from edgekd.types import Card, Student
torch.manual_seed(0)
net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)).eval()
program = export_program(net, [torch.zeros(1, 1, 4, 4)])
student = Student(program, Card("net", input_specs(program), output_specs(program)))
x = {"x": np.random.default_rng(0).standard_normal((8, 1, 4, 4), dtype=np.float32)}
students = [compress(student, precision, x) for precision in ("w8", "w8a8")]
digests = [(hashlib.sha256(program_bytes(s.program)).hexdigest(), s.card.lineage) for s in students]
"""


def test_same_input_gives_the_same_bytes_in_another_process() -> None:
    here: dict[str, object] = {}
    exec(_DIGESTS, here)
    there = subprocess.run(
        [sys.executable, "-c", _DIGESTS + "print(digests)"],
        env={**os.environ, "PYTHONHASHSEED": "7"},
        check=True,
        capture_output=True,
        text=True,
    )
    assert there.stdout.strip() == str(here["digests"])
    assert there.stderr == "", "compression says nothing by itself"


# The choice of int8


def test_int8_of_a_convnet_is_static(residual: Student) -> None:
    precision, reason = choose_int8(residual.program, TOLERANCES)
    assert precision == "w8a8"
    assert "convnet" in reason
    assert choose_int8(residual.program, ("fp32", "w8"))[0] == "w8"


def test_int8_of_a_transformer_is_dynamic_where_the_target_has_it(encoder_student: Student) -> None:
    assert choose_int8(encoder_student.program, TOLERANCES)[0] == "w8d8"
    precision, reason = choose_int8(encoder_student.program, ("fp32", "fp16", "w8", "w8a8"))
    assert precision == "w8"
    assert "no w8d8" in reason
    with pytest.raises(UsageError, match="only fp32, fp16"):
        choose_int8(encoder_student.program, ("fp32", "fp16"))


# Refusals


def test_precisions_that_are_not_programs_are_refused(residual: Student, images: dict[str, np.ndarray]) -> None:
    assert compress(residual, "fp32") is residual
    for precision in ("fp16", "w8d8"):
        with pytest.raises(UsageError, match=f"{precision} is made by the exporter"):
            compress(residual, precision)
    with pytest.raises(
        UsageError, match="no precision called 'w4' to compress to; there are fp32, w8, w8a8, w4a8, w8a16, auto"
    ):
        compress(residual, "w4")
    with pytest.raises(UsageError, match="w8a8 takes its scales from real samples"):
        compress(residual, "w8a8")
    with pytest.raises(UsageError, match="no observer called 'entropy'; there are minmax, percentile, mse"):
        compress(residual, "w8a8", images, "entropy")


def test_a_compressed_student_is_not_compressed_again(residual_w8a8: Student, images: dict[str, np.ndarray]) -> None:
    with pytest.raises(UsageError, match="w8 needs an fp32 program; 'net' is w8a8"):
        compress(residual_w8a8, "w8")
    with pytest.raises(UsageError, match="w8a8 needs an fp32 program"):
        compress(residual_w8a8, "w8a8", images)


def test_calibration_that_is_not_finite_is_refused_by_sample(residual: Student, images: dict[str, np.ndarray]) -> None:
    for bad in (np.nan, np.inf):
        spoiled = images["image"].copy()
        spoiled[7, 1, 2, 3] = bad
        with pytest.raises(NumericalError, match="'image' is not finite at sample 7"):
            quantize_static(residual, {"image": spoiled})


def test_calibration_that_does_not_fit_is_refused(
    residual: Student, encoder_student: Student, texts: dict[str, np.ndarray]
) -> None:
    with pytest.raises(DataError, match="takes"):
        quantize_static(residual, {"image": np.zeros((4, 1, 8, 8), np.float32)})
    with pytest.raises(DataError, match="at least one"):
        quantize_static(residual, {"image": np.zeros((0, 3, 8, 8), np.float32)})
    with pytest.raises(DataError, match="ids has 30, mask has 29"):
        quantize_static(encoder_student, {"ids": texts["ids"], "mask": texts["mask"][:29]})


def test_weights_and_outputs_that_are_not_finite_are_refused(images: dict[str, np.ndarray]) -> None:
    net = nn.Conv2d(3, 2, 1)
    with torch.no_grad():
        net.weight[0, 0] = torch.nan
    student = student_of(net.eval(), torch.zeros(1, 3, 8, 8))
    with pytest.raises(NumericalError, match="weight 'weight' is not finite"):
        quantize_weights(student)
    with pytest.raises(NumericalError, match="weight 'weight' is not finite"):
        quantize_static(student, images)
    with torch.no_grad():
        net.weight[:] = 3e38
    with pytest.raises(NumericalError, match=r"outputs for calibration samples 0\.\.31 are not finite"):
        quantize_static(student_of(net, torch.zeros(1, 3, 8, 8)), images)


def test_a_student_without_weights_to_quantize_is_refused() -> None:
    net = nn.Sequential(nn.LayerNorm(4), nn.GELU())
    student = student_of(net.eval(), torch.zeros(1, 4))
    with pytest.raises(UsageError, match="'net' has none; keep it in fp32"):
        quantize_weights(student)
    with pytest.raises(UsageError, match="'net' has none; keep it in fp32"):
        quantize_static(student, {"x": np.ones((2, 4), np.float32)})
    half = student_of(nn.Linear(4, 2).half().eval(), torch.zeros(1, 4, dtype=torch.float16))
    with pytest.raises(UsageError, match="w8 quantizes float32 weights"):
        quantize_weights(half)


def test_cards_are_replaced_not_changed(residual: Student) -> None:
    before = replace(residual.card)
    quantize_weights(residual)
    assert residual.card == before


def test_what_is_padded_by_hand_stays_in_integers(images: dict[str, np.ndarray]) -> None:
    """torch.nn.functional.pad is exported as an operator of its own, which the quantizer did not know: a pool behind it
    stayed in float."""

    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = nn.functional.pad(torch.relu(self.first(x)), (0, 1, 0, 1))
            return self.second(nn.functional.avg_pool2d(x, 2, 1))

    torch.manual_seed(0)
    student = quantize_static(student_of(Padded().eval(), torch.zeros(1, 3, 8, 8)), images)
    nodes = {str(node.target): node for node in student.program.graph.nodes}

    for name in ("aten.constant_pad_nd.default", "aten.avg_pool2d.default"):
        (user,) = nodes[name].users
        source = nodes[name].args[0]
        assert "dequantize_per_tensor" in str(source.target)
        assert "quantize_per_tensor" in str(user.target)
        assert user.args[1:3] == source.args[1:3]  # one scale before and behind

"""Packages that edgekd did not make: every operator set, image inputs, compressed weights, Apple's own blobs."""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edgekd.errors import DataError, ExportError, ModelFileError
from edgekd.exporters._mil_blob import WeightFile, unpack_bits
from edgekd.exporters._mil_package import model_proto
from edgekd.exporters.coreml import load

# Not importorskip: importing coremltools takes seconds, which collecting the tests should not.
pytestmark = pytest.mark.skipif(find_spec("coremltools") is None, reason="coremltools is not installed")

COMPRESSIONS = (
    "int8",
    "int8 of iOS 18",
    "int4 blocks",
    "palette",
    "palettes of groups",
    "sparse",
    "sparse of iOS 18",
)


@pytest.fixture(scope="module")
def network() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(3, 32, 3, stride=2),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3),
        nn.GELU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 64),
        nn.Softmax(-1),
    ).eval()
    return module, torch.rand(1, 3, 16, 16)


def converted(network: tuple[nn.Module, Tensor], opset: str, **options: Any) -> Any:
    import coremltools as ct

    module, example = network
    options.setdefault("inputs", [ct.TensorType("image", example.shape)])
    options.setdefault("compute_precision", ct.precision.FLOAT32)
    return ct.convert(
        torch.jit.trace(module, example),
        minimum_deployment_target=getattr(ct.target, opset),
        skip_model_load=True,
        **options,
    )


def answer(model: Any, path: Path, image: Tensor) -> np.ndarray:
    model.save(str(path))
    program = load(path)
    return program({program.inputs[0].name: image.numpy()})[program.outputs[0].name]


@pytest.mark.parametrize("opset", ["iOS15", "iOS16", "iOS17", "iOS18"])
def test_packages_of_every_operator_set_are_evaluated(opset: str, network: Any, tmp_path: Path) -> None:
    module, image = network
    found = answer(converted(network, opset), tmp_path / "model.mlpackage", image)
    np.testing.assert_allclose(found, module(image).detach().numpy(), atol=1e-6)


def test_half_precision_inputs_and_outputs_are_kept(network: Any, tmp_path: Path) -> None:
    import coremltools as ct

    module, image = network
    model = converted(
        network,
        "iOS17",
        inputs=[ct.TensorType("image", image.shape, dtype=np.float16)],
        outputs=[ct.TensorType(dtype=np.float16)],
        compute_precision=ct.precision.FLOAT16,
    )
    model.save(str(tmp_path / "model.mlpackage"))
    program = load(tmp_path / "model.mlpackage")
    assert [spec.dtype for spec in (*program.inputs, *program.outputs)] == ["float16", "float16"]
    found = program({"image": image.numpy()})[program.outputs[0].name]
    assert found.dtype == np.float16
    np.testing.assert_allclose(found, module(image).detach().numpy(), atol=1e-3)


def test_scale_and_bias_of_an_image_input_are_applied(network: Any, tmp_path: Path) -> None:
    import coremltools as ct

    module, image = network
    pixels = torch.round(image * 255)
    model = converted(
        network,
        "iOS16",
        inputs=[ct.ImageType("image", image.shape, scale=1 / 127.5, bias=[-1.0, -0.5, 0.25])],
        classifier_config=ct.ClassifierConfig([f"class {i}" for i in range(64)]),
    )
    model.save(str(tmp_path / "model.mlpackage"))
    outputs = load(tmp_path / "model.mlpackage")({"image": pixels.numpy()})
    prepared = pixels / 127.5 + torch.tensor([-1.0, -0.5, 0.25]).reshape(1, 3, 1, 1)
    wanted = module(prepared).detach().numpy()
    np.testing.assert_allclose(outputs["classLabel_probs"], wanted[0], atol=1e-6)
    assert outputs["classLabel"].tolist() == [f"class {wanted.argmax()}"]


def _compressions() -> dict[str, tuple[str, Callable[[Any], Any], str]]:
    """Name to operator set, compression, and the operator that it must leave in the package."""

    import coremltools as ct

    optimize = ct.optimize.coreml

    def with_config(function: Any, config: Any) -> Callable[[Any], Any]:
        return lambda model: function(model, optimize.OptimizationConfig(global_config=config))

    palette = optimize.OpPalettizerConfig(mode="uniform", nbits=4, weight_threshold=64)
    groups = optimize.OpPalettizerConfig(
        mode="uniform", nbits=2, weight_threshold=64, granularity="per_grouped_channel", group_size=16
    )
    linear = optimize.OpLinearQuantizerConfig(mode="linear", weight_threshold=64)
    blocks = optimize.OpLinearQuantizerConfig(
        mode="linear_symmetric", dtype="int4", granularity="per_block", block_size=16, weight_threshold=64
    )
    sparse = optimize.OpMagnitudePrunerConfig(target_sparsity=0.7, weight_threshold=64)
    return {
        "int8": ("iOS16", with_config(optimize.linear_quantize_weights, linear), "constexpr_affine_dequantize"),
        "int8 of iOS 18": (
            "iOS18",
            with_config(optimize.linear_quantize_weights, linear),
            "constexpr_blockwise_shift_scale",
        ),
        "int4 blocks": (
            "iOS18",
            with_config(optimize.linear_quantize_weights, blocks),
            "constexpr_blockwise_shift_scale",
        ),
        "palette": ("iOS16", with_config(optimize.palettize_weights, palette), "constexpr_lut_to_dense"),
        "palettes of groups": ("iOS18", with_config(optimize.palettize_weights, groups), "constexpr_lut_to_dense"),
        "sparse": ("iOS16", with_config(optimize.prune_weights, sparse), "constexpr_sparse_to_dense"),
        "sparse of iOS 18": ("iOS18", with_config(optimize.prune_weights, sparse), "constexpr_sparse_to_dense"),
    }


@pytest.mark.parametrize("name", COMPRESSIONS)
def test_compressed_weights_are_those_that_coremltools_decompresses(name: str, network: Any, tmp_path: Path) -> None:
    import coremltools as ct

    opset, compress, operator = _compressions()[name]
    _, image = network
    small = compress(converted(network, opset))
    dense = ct.optimize.coreml.decompress_weights(small)
    function = small.get_spec().mlProgram.functions["main"]
    assert operator in {op.type for op in function.block_specializations[function.opset].operations}
    found = answer(small, tmp_path / "small.mlpackage", image)
    wanted = answer(dense, tmp_path / "dense.mlpackage", image)
    np.testing.assert_allclose(found, wanted, atol=1e-7)
    assert not np.allclose(found, answer(converted(network, opset), tmp_path / "plain.mlpackage", image), atol=1e-6)


# The weight file ----------------------------------------------------------------------------------------------------


def test_blobs_are_those_that_apple_writes(tmp_path: Path) -> None:
    storage = pytest.importorskip("coremltools.libmilstoragepython")
    path = tmp_path / "weight.bin"
    random = np.random.default_rng(0)
    numbers = random.integers(0, 2**32, 1001, dtype=np.uint64)
    writer = storage._BlobStorageWriter(str(path))
    signed4 = (numbers % 16).astype(np.int8) - 8
    written: list[tuple[int, np.ndarray]] = [
        (writer.write_float_data(numbers.astype(np.float32)), numbers.astype(np.float32)),
        (writer.write_int8_data(numbers.astype(np.int8)), numbers.astype(np.int8)),
        (writer.write_uint8_data(numbers.astype(np.uint8)), numbers.astype(np.uint8)),
        (writer.write_int16_data(numbers.astype(np.int16)), numbers.astype(np.int16)),
        (writer.write_uint16_data(numbers.astype(np.uint16)), numbers.astype(np.uint16)),
        (writer.write_int32_data(numbers.astype(np.int32)), numbers.astype(np.int32)),
        (writer.write_uint32_data(numbers.astype(np.uint32)), numbers.astype(np.uint32)),
        (writer.write_int4_data(signed4), signed4),
    ]
    for bits in (1, 2, 3, 4, 6):
        values = (numbers % 2**bits).astype(np.uint8)
        written.append((getattr(writer, f"write_uint{bits}_data")(values), values))
    halves = random.standard_normal(77).astype(np.float16)
    written.append((writer.write_fp16_data(halves.view(np.uint16)), halves))
    del writer
    weights = WeightFile(path)
    for offset, values in written:
        np.testing.assert_array_equal(weights.read(offset, len(values)), values)
    with pytest.raises(ModelFileError, match="has 1001 values at 64; the program declares 1002"):
        weights.read(64, 1002)


def test_packed_values_start_in_the_lowest_bits() -> None:
    data = np.array([0b11_01_00_10, 0b00000001], np.uint8)
    assert unpack_bits(data, 2, 5, signed=False).tolist() == [2, 0, 1, 3, 1]
    assert unpack_bits(data, 4, 3, signed=True).tolist() == [2, -3, 1]
    with pytest.raises(ModelFileError, match="9 values of 2 bits need 3 bytes; there are 2"):
        unpack_bits(data, 2, 9, signed=False)


def test_another_version_of_the_weight_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "weight.bin").write_bytes(b"\1\0\0\0\3\0\0\0" + bytes(64))
    with pytest.raises(ModelFileError, match=r"not MIL blob storage version 2 \(its header says 3\)"):
        WeightFile(tmp_path / "weight.bin")


# What plain converters write ----------------------------------------------------------------------------------------


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.layer = kind(5, 4, num_layers=2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


class Attention(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        mask = torch.ones(6, 6, dtype=torch.bool).tril()
        return torch.nn.functional.scaled_dot_product_attention(x, x + 1, x, attn_mask=mask)


class Scattered(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        x[:, 1:3] = x[:, :2] * 2
        return x.scatter_add(1, torch.tensor([[0, 1], [2, 2]]), torch.ones(2, 2))


class Resized(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        f = torch.nn.functional
        up = f.interpolate(x, scale_factor=2.0, mode="bilinear")
        return up + f.interpolate(x, size=(8, 12), mode="nearest")


@pytest.mark.parametrize("opset", ["iOS15", "iOS16", "iOS17", "iOS18"])
@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (Recurrent(nn.LSTM), (2, 6, 5)),
        (Recurrent(nn.GRU), (2, 6, 5)),
        (Recurrent(nn.RNN), (2, 6, 5)),
        (Attention(), (1, 2, 6, 8)),
        (Scattered(), (2, 5)),
        (Resized(), (1, 4, 4, 6)),
    ],
    ids=["lstm", "gru", "rnn", "attention", "scatter", "resize"],
)
def test_what_coremltools_converts_is_what_pytorch_computes(
    module: nn.Module, shape: tuple[int, ...], opset: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape)
    model = converted((module.eval(), x), opset)
    found = answer(model, tmp_path / "model.mlpackage", x)
    np.testing.assert_allclose(found, module(x).detach().numpy(), atol=1e-5)


def test_integer_labels_of_a_classifier_are_given(network: Any, tmp_path: Path) -> None:
    import coremltools as ct

    module, image = network
    converted(network, "iOS17", classifier_config=ct.ClassifierConfig(list(range(100, 164)))).save(
        str(tmp_path / "model.mlpackage")
    )
    outputs = load(tmp_path / "model.mlpackage")({"image": image.numpy()})
    assert outputs["classLabel"].item() == 100 + int(module(image).argmax())


class Counter(nn.Module):
    """A total that lasts, and a cache that is written a row at a time."""

    total: Tensor
    rows: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros(3))
        self.register_buffer("rows", torch.zeros(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        self.total.add_(x)
        self.rows[1:2] = x.unsqueeze(0)
        return self.total * 2 + self.rows.sum(0)


def test_states_last_from_call_to_call_and_start_at_zero(tmp_path: Path) -> None:
    import coremltools as ct

    x = torch.tensor([1.0, 2.0, 3.0])
    model = ct.convert(
        torch.jit.trace(Counter().eval(), x),
        inputs=[ct.TensorType("x", (3,))],
        states=[ct.StateType(ct.TensorType(shape=(3,)), "total"), ct.StateType(ct.TensorType(shape=(4, 3)), "rows")],
        minimum_deployment_target=ct.target.iOS18,
        skip_model_load=True,
    )
    model.save(str(tmp_path / "model.mlpackage"))
    program = load(tmp_path / "model.mlpackage")
    assert set(program.states) == {"total", "rows"}
    output = program.outputs[0].name
    reference, state = Counter(), program.make_state()
    for step in range(3):
        given = x * (step + 1)
        np.testing.assert_allclose(program({"x": given.numpy()}, state)[output], reference(given).numpy(), atol=1e-2)
    np.testing.assert_allclose(state["total"].value.numpy(), reference.total.numpy())
    fresh = Counter()(x).numpy()  # without a state, every call is the first
    for _ in range(2):
        np.testing.assert_allclose(program({"x": x.numpy()})[output], fresh, atol=1e-2)
    with pytest.raises(DataError, match="has the states"):
        program({"x": x.numpy()}, {})


def test_functions_of_one_package_are_loaded_by_name(network: Any, tmp_path: Path) -> None:
    import coremltools as ct

    module, image = network
    other = nn.Sequential(module, nn.Hardtanh(0.0, 0.01)).eval()
    for name, part in (("first", module), ("second", other)):
        converted((part, image), "iOS18").save(str(tmp_path / f"{name}.mlpackage"))
    several = ct.utils.MultiFunctionDescriptor()
    several.add_function(str(tmp_path / "first.mlpackage"), "main", "plain")
    several.add_function(str(tmp_path / "second.mlpackage"), "main", "clipped")
    several.default_function_name = "plain"
    ct.utils.save_multifunction(several, str(tmp_path / "both.mlpackage"))
    parts: list[tuple[str | None, nn.Module]] = [(None, module), ("plain", module), ("clipped", other)]
    for wanted, part in parts:
        program = load(tmp_path / "both.mlpackage", wanted)
        found = program({"image": image.numpy()})[program.outputs[0].name]
        np.testing.assert_allclose(found, part(image).detach().numpy(), atol=1e-6)
    with pytest.raises(ModelFileError, match="has no function 'third'; there are"):
        load(tmp_path / "both.mlpackage", "third")


def test_flexible_shapes_run_in_every_shape_that_the_package_takes(tmp_path: Path) -> None:
    import coremltools as ct

    module = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1)).eval()
    kinds = {
        "list": (ct.EnumeratedShapes([(1, 3, 8, 8), (1, 3, 8, 12)]), (1, 3, 8, 12), (1, 3, 8, 10)),
        "range": (ct.Shape((ct.RangeDim(1, 4), 3, 8, ct.RangeDim(4, 16))), (3, 3, 8, 5), (5, 3, 8, 8)),
    }
    for name, (shape, taken, refused) in kinds.items():
        path = tmp_path / f"{name}.mlpackage"
        converted((module, torch.zeros(1, 3, 8, 8)), "iOS17", inputs=[ct.TensorType("image", shape)]).save(str(path))
        program = load(path)
        x = torch.randn(taken)
        found = program({"image": x.numpy()})[program.outputs[0].name]
        np.testing.assert_allclose(found, module(x).detach().numpy(), atol=1e-5)
        with pytest.raises(DataError, match=r"takes (one of|sizes of)"):
            program({"image": np.zeros(refused, np.float32)})


def test_an_input_with_a_default_need_not_be_given(tmp_path: Path) -> None:
    import coremltools as ct

    class Sum(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x + y

    example = (torch.zeros(2, 3), torch.zeros(2, 3))
    model = ct.convert(
        torch.jit.trace(Sum(), example),
        inputs=[ct.TensorType("x", (2, 3)), ct.TensorType("y", (2, 3), default_value=np.full((2, 3), 7, np.float32))],
        compute_precision=ct.precision.FLOAT32,
        minimum_deployment_target=ct.target.iOS16,
        skip_model_load=True,
    )
    model.save(str(tmp_path / "model.mlpackage"))
    program = load(tmp_path / "model.mlpackage")
    found = program({"x": np.ones((2, 3), np.float32)})[program.outputs[0].name]
    np.testing.assert_array_equal(found, np.full((2, 3), 8, np.float32))


def test_random_numbers_are_refused_with_the_reason(tmp_path: Path) -> None:
    class Noisy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.randn(2, 3)

    converted((Noisy(), torch.zeros(2, 3)), "iOS17").save(str(tmp_path / "model.mlpackage"))
    with pytest.raises(ExportError, match=r"'random_normal' \(output '\w+'\): its numbers cannot be reproduced"):
        load(tmp_path / "model.mlpackage")


def test_operators_of_a_later_system_than_declared_are_refused(network: Any, tmp_path: Path) -> None:
    path = tmp_path / "model.mlpackage"
    model = converted((Attention(), torch.zeros(1, 2, 6, 8)), "iOS18")
    model.save(str(path))
    file = path / "Data/com.apple.CoreML/model.mlmodel"
    proto = model_proto().Model.FromString(file.read_bytes())
    main = proto.mlProgram.functions["main"]
    main.block_specializations["CoreML7"].CopyFrom(main.block_specializations[main.opset])
    main.opset = "CoreML7"
    file.write_bytes(proto.SerializeToString())
    with pytest.raises(ModelFileError, match=r"'scaled_dot_product_attention'.* is of CoreML8 \(iOS 18\)"):
        load(path)
    main.opset = "CoreML8"
    proto.specificationVersion = 8
    file.write_bytes(proto.SerializeToString())
    with pytest.raises(ModelFileError, match=r"CoreML8 \(iOS 18\), which takes specification version 9"):
        load(path)
    main.opset = "CoreML99"
    file.write_bytes(proto.SerializeToString())
    with pytest.raises(ModelFileError, match="uses the operator set 'CoreML99'; the evaluator knows CoreML5"):
        load(path)


class Overflowing(nn.Module):
    """Finite in single precision; the square of the second layer is beyond what half precision holds."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(torch.tanh(self.first(x)) * 300)
        return torch.softmax(torch.sqrt(y * y + 1), -1)


def test_the_first_operator_that_overflows_in_half_precision_is_named(tmp_path: Path) -> None:
    import coremltools as ct

    torch.manual_seed(0)
    module, x = Overflowing().eval(), torch.randn(1, 4) * 9
    nn.init.constant_(module.second.weight, 1.0)
    model = converted((module, x), "iOS17", compute_precision=ct.precision.FLOAT16)
    model.save(str(tmp_path / "half.mlpackage"))
    program = load(tmp_path / "half.mlpackage")
    line = program.first_overflow({program.inputs[0].name: x.numpy()})
    assert line is not None
    assert re.fullmatch(r"operator 'mul' \(output '\w+'\) reaches [\d.e+]+; float16 ends at 65504", line)
    assert program.first_overflow({program.inputs[0].name: x.numpy() * 1e-3}) is None
    converted((module, x), "iOS17").save(str(tmp_path / "single.mlpackage"))
    single = load(tmp_path / "single.mlpackage")
    assert single.first_overflow({single.inputs[0].name: x.numpy()}) is None

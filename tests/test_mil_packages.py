"""Packages that edgekd did not make: every operator set, image inputs, compressed weights, Apple's own blobs."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edgekd.errors import ModelFileError
from edgekd.exporters._mil_blob import WeightFile, unpack_bits
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

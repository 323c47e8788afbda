"""Every operator of the MIL evaluator against NumPy, through a saved package that coremltools wrote."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgekd.errors import DataError
from edgekd.exporters._mil import MilProgram
from edgekd.exporters._mil_registry import OPERATORS
from edgekd.exporters.coreml import load

sys.path.insert(0, str(Path(__file__).parent))
import mil_cases_nn
from mil_cases import CASES, Case, normal
from mil_cases_nn import KEPT, MASK, attention

Build = Callable[..., Any]
ROOT = Path(__file__).parent.parent


def save_program(path: Path, inputs: dict[str, np.ndarray], build: Build, opset: str) -> Path:
    """A package with one program, written by coremltools itself and without any of its optimizations."""
    import coremltools as ct
    from coremltools.converters.mil import Builder as mb
    from coremltools.converters.mil.mil import types as mil_types

    specs = [
        mb.TensorSpec(a.shape, dtype=mil_types.fp32 if a.dtype == np.float32 else mil_types.int32)
        for a in inputs.values()
    ]

    # coremltools names the inputs of a program after the parameters of its function, so one with theirs is made.
    scope: dict[str, Any] = {"build": build, "mb": mb}
    exec(f"def function({', '.join(inputs)}):\n    return build(mb, {', '.join(inputs)})", scope)
    program = mb.program(input_specs=specs, opset_version=getattr(ct.target, opset))(scope["function"])
    ct.convert(
        program,
        convert_to="mlprogram",
        pass_pipeline=ct.PassPipeline.EMPTY,
        compute_precision=ct.precision.FLOAT32,
        minimum_deployment_target=getattr(ct.target, opset),
        skip_model_load=True,
    ).save(str(path))
    return path


def save_cases(path: Path, cases: list[Case], opset: str) -> tuple[MilProgram, dict[str, list[str]], dict[str, Any]]:
    """All cases in one program, since a conversion costs a fifth of a second."""
    inputs = {f"{case.name}_in{i}": array for case in cases for i, array in enumerate(case.inputs)}
    results: dict[str, list[str]] = {}

    def build(mb: Any, *values: Any) -> list[Any]:
        given = dict(zip(inputs, values, strict=True))
        outputs = []
        for case in cases:
            found = case.build(mb, *[given[f"{case.name}_in{i}"] for i in range(len(case.inputs))])
            named = []
            for i, value in enumerate(found if isinstance(found, tuple | list) else [found]):
                named.append(mb.identity(x=value, name=f"{case.name}_out{i}"))
            results[case.name] = [value.name for value in named]
            outputs += named
        return outputs

    save_program(path, inputs, build, opset)
    return load(path), results, inputs


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> tuple[MilProgram, dict[str, list[np.ndarray]]]:
    pytest.importorskip("coremltools")
    program, names, inputs = save_cases(tmp_path_factory.mktemp("mil") / "cases.mlpackage", CASES, "iOS17")
    values = program.run(inputs)
    return program, {case: [values[name].numpy() for name in found] for case, found in names.items()}


def check(case: Case, results: list[np.ndarray]) -> None:
    assert len(results) == len(case.answers)
    for result, answer in zip(results, case.answers, strict=True):
        assert result.shape == answer.shape
        np.testing.assert_allclose(result, answer, rtol=case.tolerance, atol=case.tolerance)


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_operator_gives_what_its_definition_says(case: Case, evaluated: Any) -> None:
    check(case, evaluated[1][case.name])


# iOS 18 -------------------------------------------------------------------------------------------------------------

Q, K, V = normal(1, 2, 3, 4), normal(1, 2, 5, 4), normal(1, 2, 5, 6)
FLOAT_MASK = normal(3, 5)
DATA = np.arange(-8, 8, dtype=np.int8).reshape(4, 4)
BLOCK_SCALES = np.array([[0.5, 2.0], [1.0, 0.25]], np.float32)
W44 = normal(1, 4, 4)


def _ios18_cases() -> list[Case]:
    from coremltools.converters.mil.mil import types as mil_types

    def of(name: str, values: np.ndarray) -> np.ndarray:
        return values.astype(mil_types.nptype_from_builtin(mil_types.string_to_builtin(name)))

    # The two examples of Apple's description of the operator.
    two_tables = np.array([[[[1], [5], [9], [13]]], [[[2], [10], [18], [26]]]], np.float32)
    two_bits = np.array([[2, 3], [3, 0], [1, 0], [3, 0], [2, 1], [0, 3]], np.uint8)
    looked_up = np.array([[9, 13], [13, 1], [5, 1], [26, 2], [18, 10], [2, 26]], np.float32)
    vectors = np.array([[1, 2, 3], [-1, -2, -3]], np.float32).reshape(1, 1, 1, 2, 3)
    one_bit = np.array([[[0, 0], [1, 0]], [[1, 1], [0, 0]]], np.uint8)
    along_1 = [
        [[1, 1], [2, 2], [3, 3], [-1, 1], [-2, 2], [-3, 3]],
        [[-1, -1], [-2, -2], [-3, -3], [1, 1], [2, 2], [3, 3]],
    ]
    plus = {
        "blockwise": (DATA.astype(np.float32) * np.kron(BLOCK_SCALES, np.ones((2, 2))).astype(np.float32)),
        "offset": ((DATA + 1.0) * np.kron(BLOCK_SCALES, np.ones((2, 2)))).astype(np.float32),
    }
    zero = np.zeros(1, np.float32)
    return [
        Case(
            "attention",
            (Q, K, V),
            lambda mb, q, k, v: mb.scaled_dot_product_attention(query=q, key=k, value=v),
            (attention(Q, K, V, 0.0),),
            1e-5,
        ),
        Case(
            "attention_with_a_float_mask",
            (Q, K, V, FLOAT_MASK),
            lambda mb, q, k, v, m: mb.scaled_dot_product_attention(query=q, key=k, value=v, attn_mask=m),
            (attention(Q, K, V, FLOAT_MASK),),
            1e-5,
        ),
        Case(
            "attention_with_a_boolean_mask",
            (Q, K, V, FLOAT_MASK),
            lambda mb, q, k, v, m: mb.scaled_dot_product_attention(
                query=q, key=k, value=v, attn_mask=mb.greater(x=m, y=-0.5)
            ),
            (attention(Q, K, V, np.where(FLOAT_MASK > -0.5, 0.0, -1e30)),),
            1e-5,
        ),
        Case(
            "blockwise_int4",
            (W44,),
            lambda mb, x: mb.add(x=x, y=mb.constexpr_blockwise_shift_scale(data=of("int4", DATA), scale=BLOCK_SCALES)),
            (W44 + plus["blockwise"],),
        ),
        Case(
            "blockwise_int8_with_offset",
            (W44,),
            lambda mb, x: mb.add(
                x=x,
                y=mb.constexpr_blockwise_shift_scale(
                    data=DATA, scale=BLOCK_SCALES, offset=np.full((2, 2), -1, np.int8)
                ),
            ),
            (W44 + plus["offset"],),
        ),
        Case(
            "table_per_group",
            (zero,),
            lambda mb, x: mb.add(x=x, y=mb.constexpr_lut_to_dense(indices=of("uint2", two_bits), lut=two_tables)),
            (looked_up,),
        ),
        Case(
            "table_of_vectors",
            (zero,),
            lambda mb, x: mb.add(
                x=x,
                y=mb.constexpr_lut_to_dense(indices=of("uint1", one_bit), lut=vectors, vector_axis=np.int32(1)),
            ),
            (np.array(along_1, np.float32),),
        ),
        Case(
            "sparse",
            (zero,),
            lambda mb, x: mb.add(x=x, y=mb.constexpr_sparse_to_dense(nonzero_data=KEPT, mask=of("uint1", MASK))),
            (mil_cases_nn.DENSE,),
        ),
    ]


def test_ios18_operators_give_what_their_definition_says(tmp_path: Path) -> None:
    pytest.importorskip("coremltools")
    cases = _ios18_cases()
    program, names, inputs = save_cases(tmp_path / "ios18.mlpackage", cases, "iOS18")
    values = program.run(inputs)
    assert program.opset == "CoreML8"
    for case in cases:
        check(case, [values[name].numpy() for name in names[case.name]])


def test_negative_indices_count_from_the_end_before_ios17_and_are_refused_after(tmp_path: Path) -> None:
    pytest.importorskip("coremltools")
    inputs = {"indices": np.array([0, -1], np.int32)}
    table = np.arange(6, dtype=np.float32).reshape(3, 2)

    def build(mb: Any, indices: Any) -> Any:
        return mb.gather(x=table, indices=indices, axis=0, name="rows")

    old = load(save_program(tmp_path / "old.mlpackage", inputs, build, "iOS16"))
    np.testing.assert_array_equal(old(inputs)["rows"], table[[0, -1]])
    new = load(save_program(tmp_path / "new.mlpackage", inputs, build, "iOS17"))
    with pytest.raises(DataError, match=r"'gather' \(output 'rows'\): indices -1 to 0"):
        new(inputs)


def test_half_precision_is_rounded_after_every_operator(tmp_path: Path) -> None:
    ct = pytest.importorskip("coremltools")
    from coremltools.converters.mil import Builder as mb

    x, y = normal(1, 64), normal(1, 64)

    @mb.program(input_specs=[mb.TensorSpec((1, 64)), mb.TensorSpec((1, 64))], opset_version=ct.target.iOS17)  # type: ignore[untyped-decorator, unused-ignore]
    def program(x: Any, y: Any) -> Any:
        return mb.add(x=mb.mul(x=x, y=y), y=x, name="sum")

    path = tmp_path / "half.mlpackage"
    ct.convert(
        program,
        convert_to="mlprogram",
        minimum_deployment_target=ct.target.iOS17,
        compute_precision=ct.precision.FLOAT16,
        skip_model_load=True,
    ).save(str(path))
    runner = load(path)
    half = x.astype(np.float16) * y.astype(np.float16) + x.astype(np.float16)
    assert runner.runtime.endswith("(fp16)")
    np.testing.assert_array_equal(next(iter(runner({"x": x, "y": y}).values())), half.astype(np.float32))


def test_a_classifier_gives_its_label_and_its_probabilities(tmp_path: Path) -> None:
    ct = pytest.importorskip("coremltools")
    from coremltools.converters.mil import Builder as mb

    @mb.program(input_specs=[mb.TensorSpec((1, 3))], opset_version=ct.target.iOS17)  # type: ignore[untyped-decorator, unused-ignore]
    def program(x: Any) -> Any:
        return mb.softmax(x=x, axis=-1, name="probabilities")

    path = tmp_path / "classifier.mlpackage"
    ct.convert(
        program,
        convert_to="mlprogram",
        classifier_config=ct.ClassifierConfig(["ant", "bee", "cat"]),
        minimum_deployment_target=ct.target.iOS17,
        compute_precision=ct.precision.FLOAT32,
        skip_model_load=True,
    ).save(str(path))
    runner = load(path)
    outputs = runner({"x": np.array([[0.0, 2.0, 1.0]], np.float32)})
    assert outputs["classLabel"].tolist() == ["bee"]
    exponentials = np.exp([0.0, 2.0, 1.0])
    np.testing.assert_allclose(outputs["classLabel_probs"], exponentials / exponentials.sum(), rtol=1e-6)
    assert {step.operator.name for step in runner.steps} == {"softmax", "classify"}


# The table itself ---------------------------------------------------------------------------------------------------


def test_every_operator_of_the_table_is_tested(evaluated: Any) -> None:
    program, _ = evaluated
    seen = {step.operator.name for step in program.steps}
    seen |= {name for name in OPERATORS if any(case.name.startswith(name) for case in CASES)}  # computed when loaded
    tested_elsewhere = {"classify", "constexpr_blockwise_shift_scale", "scaled_dot_product_attention"}
    assert len(seen) > 100
    assert set(OPERATORS) - seen == tested_elsewhere


def test_defaults_are_those_of_coremltools() -> None:
    pytest.importorskip("coremltools")
    from coremltools.converters.mil.mil import types as mil_types
    from coremltools.converters.mil.mil.ops.registry import SSAOpRegistry

    # Here None stands for what follows from the arguments: ones, zeros, all axes, "not given".
    open_ended = {"strides", "dilations", "pad", "bias", "axes", "value", "on_value", "off_value"}
    compared = 0
    for name, known in OPERATORS.items():
        for definition in SSAOpRegistry.core_ops[name].values():
            operation = definition.__new__(definition)
            operation.x = types.SimpleNamespace(rank=4, dtype=mil_types.fp32, shape=(1, 3, 4, 4))
            operation.weight = types.SimpleNamespace(rank=4, dtype=mil_types.fp32, shape=(3, 3, 2, 2))
            operation._input_vars = {}
            if name == "topk":  # its defaults ask what was given
                operation.return_indices = types.SimpleNamespace(val=True)
            ours = inspect.signature(known.function).parameters
            for key, theirs in operation.default_inputs().items():
                assert key in ours, f"{name} lacks {key}"
                mine = ours[key].default
                if mine is None and (theirs is None or key in open_ended or key == "validate_indices"):
                    continue
                assert mine == pytest.approx(theirs), f"{name}.{key}"
                compared += 1
    assert compared > 100


def test_the_page_lists_exactly_the_operators_of_the_table() -> None:
    page = (ROOT / "docs" / "coreml-evaluator.md").read_text()
    listed = re.search(r"<!-- operators -->\n(.*?)<!-- /operators -->", page, re.DOTALL)
    assert listed is not None
    assert re.findall(r"`(\w+)`", listed[1]) == sorted(OPERATORS)


def test_a_program_can_be_read_without_importing_coremltools() -> None:
    pytest.importorskip("coremltools")
    code = (
        "import sys; from edgekd.exporters._mil_package import model_proto; model_proto().Model();"
        "print('coremltools' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"

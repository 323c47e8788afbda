"""Every operator of the MIL evaluator against NumPy, through a saved package that coremltools wrote."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
import textwrap
import types
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgekd.errors import DataError
from edgekd.exporters._mil import MilProgram
from edgekd.exporters._mil_registry import OPERATORS, OPSETS, REFUSED
from edgekd.exporters._mil_run import Step
from edgekd.exporters.coreml import load

import mil_cases_ios18  # noqa: F401 - each file adds its cases to the table
import mil_cases_more  # noqa: F401
import mil_cases_nn  # noqa: F401
from mil_cases import CASES, Case, normal

Build = Callable[..., Any]
PAGE = Path(__file__).parent.parent / "docs" / "coreml-evaluator.md"


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
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> tuple[set[str], dict[str, list[np.ndarray]]]:
    """Names of the operators that ran, and the results of every case; one program for each operator set."""
    pytest.importorskip("coremltools")
    folder = tmp_path_factory.mktemp("mil")
    seen: set[str] = set()
    results: dict[str, list[np.ndarray]] = {}
    for opset in sorted({case.opset for case in CASES}):
        cases = [case for case in CASES if case.opset == opset]
        program, names, inputs = save_cases(folder / f"{opset}.mlpackage", cases, opset)
        assert OPSETS[program.opset][0] == opset.replace("iOS", "iOS ")
        values = program.run(inputs)
        results |= {case: [values[name].numpy() for name in found] for case, found in names.items()}
        seen |= {step.operator.name for step in _steps(program.steps)}
    return seen, results


def _steps(steps: Iterable[Step]) -> Iterator[Step]:
    for step in steps:
        yield step
        for block in step.blocks:
            yield from _steps(block.steps)


def check(case: Case, results: list[np.ndarray]) -> None:
    assert len(results) == len(case.answers)
    for result, answer in zip(results, case.answers, strict=True):
        assert result.shape == answer.shape
        np.testing.assert_allclose(result, answer, rtol=case.tolerance, atol=case.tolerance)


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_operator_gives_what_its_definition_says(case: Case, evaluated: Any) -> None:
    check(case, evaluated[1][case.name])


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

# What has no case above: run by a test of its own.
ELSEWHERE = {"classify", "read_state", "write_state"}


def test_every_operator_of_the_table_is_tested(evaluated: Any) -> None:
    seen, _ = evaluated
    seen = seen | {name for name in OPERATORS if any(case.name.startswith(name) for case in CASES)}  # run when loaded
    assert len(seen) > 150
    assert set(OPERATORS) - seen == ELSEWHERE


def test_every_operator_of_coremltools_is_evaluated_or_refused_with_a_reason() -> None:
    pytest.importorskip("coremltools")
    from coremltools.converters.mil.mil.ops.registry import SSAOpRegistry

    core = {name for name, versions in SSAOpRegistry.core_ops.items() if versions}
    assert len(core) > 160
    # Not in a file: constants are no operators, and coremltools writes its own state update as two of Core ML's.
    unwritten = {"const", "_const_symbolic"}
    dialect = {name for name in SSAOpRegistry.dialect_ops if name.startswith("coreml_")}
    assert dialect == {"coreml_update_state"}  # written as write_state and read_state
    assert core - unwritten - set(OPERATORS) == set(REFUSED) - {"custom_layer"}
    assert set(OPERATORS) - core == {"write_state"}
    assert not set(OPERATORS) & set(REFUSED)
    assert all(len(reason) > 20 for reason in REFUSED.values())


def test_operators_and_arguments_came_with_the_operator_set_that_coremltools_says() -> None:
    pytest.importorskip("coremltools")
    from coremltools.converters.mil.mil.ops.registry import SSAOpRegistry

    versions = {specification: opset for opset, (_, specification) in OPSETS.items()}
    renamed = {"crop_resize": {"roi"}, "non_maximum_suppression": {"score_threshold"}}  # dropped by iOS 17
    compared = 0
    for name, known in OPERATORS.items():
        if name == "write_state":
            continue
        first: dict[str, str] = {}
        for target, definition in sorted(SSAOpRegistry.core_ops[name].items(), key=lambda item: item[0].value):
            opset = versions[max(target.value, 6)]
            first.setdefault("", opset)
            for key in definition.input_spec.input_types:
                if not key.startswith("_"):
                    first.setdefault(key, opset)
        assert known.since == first.pop(""), name
        assert {k: v for k, v in first.items() if v != known.since} == dict(known.later), name
        extra = set(known.forms) - set(first)
        assert extra <= renamed.get(name, set()) | {"shape"}, f"{name} takes {extra}"
        compared += len(first)
    assert compared > 450


def test_defaults_are_those_of_coremltools() -> None:
    pytest.importorskip("coremltools")
    from coremltools.converters.mil.mil import types as mil_types
    from coremltools.converters.mil.mil.ops.registry import SSAOpRegistry

    # Here None stands for what follows from the arguments: ones, zeros, all axes, "not given".
    open_ended = {
        "strides",
        "dilations",
        "pad",
        "bias",
        "axes",
        "value",
        "on_value",
        "off_value",
        "pad_value",
        "input_bias",
        "box_indices",
    }
    compared = 0
    for name, known in OPERATORS.items():
        for definition in SSAOpRegistry.core_ops[name].values():
            operation = definition.__new__(definition)
            operation.x = types.SimpleNamespace(rank=4, dtype=mil_types.fp32, shape=(1, 3, 4, 4))
            operation.weight = types.SimpleNamespace(rank=4, dtype=mil_types.fp32, shape=(3, 3, 2, 2))
            operation._input_vars = {}
            operation.boxes, operation.box_indices = types.SimpleNamespace(shape=(1, 4)), None
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


def page_lists() -> dict[str, str]:
    """The lists of the documentation, by the name of their place in it."""
    names = ", ".join(f"`{name}`" for name in sorted(OPERATORS))
    return {
        "operators": textwrap.fill(names, 118, break_long_words=False),
        "refused": "\n".join(f"- `{name}`: {reason}" for name, reason in sorted(REFUSED.items())),
    }


def test_the_page_lists_exactly_what_the_tables_hold() -> None:
    page = PAGE.read_text()
    for place, text in page_lists().items():
        listed = re.search(rf"<!-- {place} -->\n(.*?)\n<!-- /{place} -->", page, re.DOTALL)
        assert listed is not None
        assert listed[1] == text, "run: python tests/test_mil_operators.py"


def test_a_program_can_be_read_without_importing_coremltools() -> None:
    pytest.importorskip("coremltools")
    code = (
        "import sys; from edgekd.exporters._mil_package import model_proto; model_proto().Model();"
        "print('coremltools' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"


if __name__ == "__main__":
    text = PAGE.read_text()
    for place, lines in page_lists().items():
        text = re.sub(rf"(<!-- {place} -->\n).*?(<!-- /{place} -->)", rf"\g<1>{lines}\n\g<2>", text, flags=re.DOTALL)
    PAGE.write_text(text)

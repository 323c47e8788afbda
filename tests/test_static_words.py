"""What compression makes with static scales goes into every target's file, number for number."""

from pathlib import Path

import numpy as np
import pytest

from edgekd import plugins
from edgekd.compression.compress import compress
from edgekd.compression.mixed import Budget
from edgekd.exporting.export import Proof, export_student
from edgekd.exporting.parity import run_file
from edgekd.programs.models import run_program
from edgekd.types import Student

CLASSES = 5


@pytest.fixture(scope="module")
def samples() -> dict[str, np.ndarray]:
    return {"input": np.random.default_rng(0).standard_normal((48, 1, 12, 12), dtype=np.float32)}


@pytest.fixture(scope="module")
def students(convnet_student: Student, samples: dict[str, np.ndarray]) -> dict[str, Student]:
    """In 4-bit weights, and in a mix of which one layer at least is float."""
    calibration = {"input": samples["input"][:32]}
    labels = next(iter(run_program(convnet_student.program, samples).values())).argmax(1)
    made = {"w4a8": compress(convnet_student, "w4a8", calibration)}
    budget = Budget(0.5, samples, (labels + 1) % CLASSES)  # labels that fp32 never meets: any mix is good enough
    made["auto"] = compress(convnet_student, "auto", calibration, budget=budget)
    return made


@pytest.mark.parametrize("target", ["onnx", "coreml", "tflite", "coreai", "executorch"])
@pytest.mark.parametrize("precision", ["w4a8", "auto"])
def test_a_file_computes_what_its_program_computes(
    target: str, precision: str, students: dict[str, Student], samples: dict[str, np.ndarray], tmp_path: Path
) -> None:
    if absent := plugins.missing(plugins.load_exporter(target).requires):
        pytest.skip(f"{target} needs {', '.join(absent)}")
    artifact = export_student(students[precision], {}, target, precision, tmp_path / "out", Proof(samples))
    assert artifact.parity.status == "passed"
    assert artifact.precision == precision
    assert artifact.card.calibration is not None
    if precision == "auto":
        assert any("layers stay float" in note for note in artifact.notes)
    else:
        assert any("4-bit" in note for note in artifact.notes)


def test_coreml_holds_w4a8_in_int4_where_the_system_has_it(
    students: dict[str, Student], samples: dict[str, np.ndarray], tmp_path: Path
) -> None:
    exporter = plugins.load_exporter("coreml")
    if absent := plugins.missing(exporter.requires):
        pytest.skip(f"coreml needs {', '.join(absent)}")
    outputs, kinds = {}, {}
    for system in ("iOS17", "iOS18"):
        options = exporter.options.model_validate({"minimum_deployment_target": system})
        exporter.write(students["w4a8"], tmp_path / f"{system}.mlpackage", "w4a8", options)
        weights = exporter.contents(tmp_path / f"{system}.mlpackage").weights
        kinds[system] = {weight.dtype for weight in weights if len(weight.shape) > 1 and "int" in weight.dtype}
        outputs[system] = run_file(exporter.load(tmp_path / f"{system}.mlpackage"), samples)[0]
    assert "int4" not in kinds["iOS17"]
    assert kinds["iOS18"] == {"int4"}
    np.testing.assert_array_equal(outputs["iOS17"], outputs["iOS18"])

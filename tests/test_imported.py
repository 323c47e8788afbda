"""Measurements taken elsewhere come in as JSON, flagged, and only for artifacts of this run."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from edgekd.errors import DataError, UsageError
from edgekd.imported import import_measurement
from edgekd.measurement import Measurement
from edgekd.store import MANIFEST, RunFolder, read_json, write_json
from edgekd.types import Artifact


@pytest.fixture
def run_folder(tmp_path: Path, onnx_file: tuple[Artifact, Path]) -> RunFolder:
    artifact, folder = onnx_file
    target = tmp_path / "run" / "artifacts" / "onnx-fp32"
    target.mkdir(parents=True)
    shutil.copy(folder / artifact.path, target)
    write_json(target / MANIFEST, artifact.to_json())
    return RunFolder(tmp_path / "run")


def written(tmp_path: Path, artifact: Artifact, **changes: Any) -> Path:
    told = {
        "artifact_sha256": artifact.sha256,
        "device": "iphone-16-pro",
        "model": "iPhone17,1",
        "system": "iOS 26.1",
        "taken_with": "Xcode 26.1 performance report",
        "blocks": [{"load_ms": 95.5, "latency_ms": [1.25], "inferences": 50}, {"latency_ms": [1.5, 1.0]}],
    }
    path = tmp_path / "result.json"
    path.write_text(json.dumps(told | changes))
    return path


def test_a_result_is_kept_with_its_origin_and_can_be_gated_by_nobody(
    tmp_path: Path, run_folder: RunFolder, onnx_file: tuple[Artifact, Path]
) -> None:
    path, measurement = import_measurement(written(tmp_path, onnx_file[0]), run_folder)
    assert path == run_folder.measurement("iphone-16-pro", "onnx-fp32")
    assert Measurement.from_json(read_json(path)) == measurement
    assert measurement.device == "iphone-16-pro (iPhone17,1, iOS 26.1)"
    assert {"imported", "few_blocks", "not_converged"} <= set(measurement.flags)
    first = measurement.blocks[0]
    assert (first.model_load_ms, first.latency_ms) == (95.5, (1.25,))
    assert first.conditions["imported"] == "Xcode 26.1 performance report"
    assert first.conditions["inferences"] == "50"
    assert measurement.accuracy is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"artifact_sha256": "0" * 64}, "artifact_sha256 is of no artifact of this run; there are onnx fp32"),
        ({"artifact_sha256": "model.onnx"}, "artifact_sha256: String should match pattern"),
        ({"device": "../../x"}, "device: String should match pattern"),
        ({"blocks": []}, "blocks: Tuple should have at least 1 item"),
        ({"blocks": [{"latency_ms": [-1.0]}]}, r"blocks.0.latency_ms.0: Input should be greater than 0"),
        ({"blocks": [{"latency_ms": [1.0], "p50": 1}]}, r"blocks.0.p50: Extra inputs are not permitted"),
        ({"taken_with": ""}, "taken_with: String should have at least 1 character"),
    ],
)
def test_a_file_that_does_not_fit_is_told_in_one_line(
    tmp_path: Path, run_folder: RunFolder, onnx_file: tuple[Artifact, Path], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message) as caught:
        import_measurement(written(tmp_path, onnx_file[0], **changes), run_folder)
    assert "\n" not in str(caught.value)
    assert not (run_folder.path / "measurements").exists()


def test_no_file_and_no_json_are_told(tmp_path: Path, run_folder: RunFolder) -> None:
    with pytest.raises(UsageError, match="no file"):
        import_measurement(tmp_path / "absent.json", run_folder)
    (tmp_path / "broken.json").write_text('{"device": NaN')
    with pytest.raises(DataError, match=r"broken.json: the file: Invalid JSON"):
        import_measurement(tmp_path / "broken.json", run_folder)

"""Measurements taken elsewhere come in as JSON, flagged, and only for artifacts of this run."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from edgekd.benchmarks.history import History, is_available
from edgekd.console import LineProgress
from edgekd.errors import DataError, UsageError
from edgekd.measurement import Measurement
from edgekd.stages.imported import import_measurement
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


def imported(file: Path, run_folder: RunFolder) -> tuple[Path, Measurement]:
    return import_measurement(file, run_folder, "v3", LineProgress(sys.stderr))


def test_a_result_is_kept_with_its_origin_and_can_be_gated_by_nobody(
    tmp_path: Path, run_folder: RunFolder, onnx_file: tuple[Artifact, Path]
) -> None:
    path, measurement = imported(written(tmp_path, onnx_file[0]), run_folder)
    assert path == run_folder.measurement("iphone-16-pro", "onnx-fp32")
    assert Measurement.from_json(read_json(path)) == measurement
    assert measurement.device == "iphone-16-pro (iPhone17,1, iOS 26.1)"
    assert {"imported", "few_blocks", "not_converged"} <= set(measurement.flags)
    first = measurement.blocks[0]
    assert (first.model_load_ms, first.latency_ms) == (95.5, (1.25,))
    assert first.conditions["imported"] == "Xcode 26.1 performance report"
    assert first.conditions["inferences"] == "50"
    assert measurement.accuracy is None


@pytest.mark.skipif(not is_available(), reason="pip install 'edgekd[history]'")
def test_a_result_goes_into_the_history_as_what_it_is(
    tmp_path: Path, run_folder: RunFolder, onnx_file: tuple[Artifact, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGEKD_HISTORY", f"sqlite:///{tmp_path / 'history.db'}")
    _, measurement = imported(written(tmp_path, onnx_file[0]), run_folder)
    (entry,) = History().entries()
    assert (entry.release, entry.how, entry.model) == ("v3", "import", onnx_file[0].card.name)
    assert entry.measurement == measurement


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
        imported(written(tmp_path, onnx_file[0], **changes), run_folder)
    assert "\n" not in str(caught.value)
    assert not (run_folder.path / "measurements").exists()


def test_no_file_and_no_json_are_told(tmp_path: Path, run_folder: RunFolder) -> None:
    with pytest.raises(UsageError, match="no file"):
        imported(tmp_path / "absent.json", run_folder)
    (tmp_path / "broken.json").write_text('{"device": NaN')
    with pytest.raises(DataError, match=r"broken.json: the file: Invalid JSON"):
        imported(tmp_path / "broken.json", run_folder)

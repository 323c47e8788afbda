"""The gate on the real host, on devices that misbehave, and its reports."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from edgekd.benchmarks import calibrate as calibrating
from edgekd.benchmarks import gate, gate_report
from edgekd.benchmarks.cells import Cell, Comparison, Margins, Pair, Resolution, Samples, exact_cells, value_of
from edgekd.benchmarks.history import History, is_available
from edgekd.benchmarks.rule import Rule
from edgekd.benchmarks.session import TOLD_BY_THE_DEVICE
from edgekd.benchmarks.sides import read_pairs, read_samples
from edgekd.cli.gate import parse_margins
from edgekd.devices.fake import FakeDevice
from edgekd.devices.host import HostDevice
from edgekd.errors import DataError, InconclusiveError, ModelFileError, UsageError
from edgekd.measurement import Block, DeviceStatus, Plan
from edgekd.protocols import Arrays
from edgekd.store import hash_path
from edgekd.types import Artifact

from command import edgekd
from listening import Listening

File = tuple[Artifact, Path]

QUICK = Plan(blocks=1, warmup_runs=3, warmup_s=0.0, min_runs=20, min_s=0.02, max_s=2.0)
SOON = Rule(looks=(8,), confirm_pairs=6)


@dataclass
class Told(FakeDevice):
    """The fake device, as a device that is none would not be: its conditions are those that a test asks for."""

    conditions: Mapping[str, str] | None = None
    targets: tuple[str, ...] = ("onnx",)

    def probe(self) -> DeviceStatus:
        return DeviceStatus(reachable=True, facts={"model": "a test"}, targets=self.targets)

    def run(
        self, artifact: Artifact, folder: Path, inputs: Arrays, plan: Plan
    ) -> tuple[tuple[Block, ...], dict[str, np.ndarray]]:
        blocks, outputs = super().run(artifact, folder, inputs, plan)
        return tuple(replace(block, conditions=dict(self.conditions or {})) for block in blocks), outputs


@pytest.fixture
def images() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((24, 1, 12, 12)).astype(np.float32)


@pytest.fixture
def pair(onnx_file: File) -> Pair:
    """The same file as two precisions, which the fake device tells apart."""
    artifact, folder = onnx_file
    return Pair("onnx", artifact, folder, replace(artifact, precision="w8a8"), folder)


def compared(device: FakeDevice, pair: Pair, images: np.ndarray, **changes: Any) -> Comparison:
    samples = Samples({"image": images})
    return gate.compare([pair], "fake", device, samples, rule=SOON, plan=QUICK, **changes)[0]


def cell(comparison: Comparison, metric: str) -> Cell:
    return next(found for found in comparison.cells if found.metric == metric)


def test_a_file_passes_beside_itself_on_the_real_host(onnx_file: File, images: np.ndarray) -> None:
    artifact, folder = onnx_file
    samples = Samples({"image": images}, labels=np.zeros(24, int), teacher=np.zeros((24, 5), np.float32))
    margins = Margins(latency_floor_ms=5.0, cold_start_floor_ms=1000.0, accuracy=0.2, agreement=0.2)
    comparison, measured = gate.compare(
        [Pair("onnx", artifact, folder, artifact, folder)], "host", HostDevice(), samples, rule=SOON, plan=QUICK,
        margins=margins,
    )  # fmt: skip
    assert comparison.verdict == "pass"
    metrics = [found.metric for found in comparison.cells]
    exact = ["size", "finite", "delegation"]
    assert metrics == ["latency", "cold_start", "peak_memory", "accuracy", "agreement", *exact]
    assert cell(comparison, "latency").pairs == 8
    assert [len(one.blocks) for one in measured] == [8, 8]
    assert all(int(block.conditions["turns"]) > 0 for one in measured for block in one.blocks)
    assert Comparison.from_json(json.loads(json.dumps(comparison.to_json()))) == comparison


def test_a_slower_file_is_a_regression_after_fresh_pairs(pair: Pair, images: np.ndarray) -> None:
    device = Told({"w8a8": 1.08})
    comparison = compared(device, pair, images)
    assert comparison.verdict == "regression"
    found = cell(comparison, "latency")
    assert found.change == pytest.approx(0.08, abs=0.01)
    assert found.again == pytest.approx(0.08, abs=0.01)
    assert device.ran == 2 * (8 + 6)
    assert device.closed == 1


def test_a_faster_file_passes(pair: Pair, images: np.ndarray) -> None:
    assert compared(Told({"w8a8": 0.9}), pair, images).verdict == "pass"


def test_a_device_that_warms_up_slows_both(pair: Pair, images: np.ndarray) -> None:
    comparison = compared(Told(drift=0.005), pair, images)
    assert comparison.verdict == "pass"


def test_a_difference_below_the_floor_is_nothing(pair: Pair, images: np.ndarray) -> None:
    tiny = Told({"fp32": 0.02, "w8a8": 0.022})
    assert compared(tiny, pair, images).verdict == "pass"
    assert compared(tiny, pair, images, margins=Margins(latency_floor_ms=0.0)).verdict == "regression"


@pytest.mark.parametrize("flag", TOLD_BY_THE_DEVICE)
@pytest.mark.parametrize("slower", [0.9, 1.2])
def test_what_forbids_a_claim_leaves_it_open(pair: Pair, images: np.ndarray, flag: str, slower: float) -> None:
    comparison = compared(Told({"w8a8": slower}, conditions={flag: "why"}), pair, images)
    assert comparison.verdict == "inconclusive"
    assert flag in cell(comparison, "latency").why


def test_the_fake_device_proves_nothing(pair: Pair, images: np.ndarray) -> None:
    assert compared(FakeDevice(), pair, images).verdict == "inconclusive"


def test_a_void_block_is_measured_again_with_its_partner_and_told(pair: Pair, images: np.ndarray) -> None:
    device = Told(void={3: "throttled: cap", 4: "throttled: cap"})
    comparison = compared(device, pair, images)
    assert comparison.verdict == "pass"
    assert comparison.void == ("throttled: cap", "throttled: cap")
    assert device.ran == 2 * (8 + 2)
    assert any(
        "2 blocks were void and measured again: throttled: cap" in line for line in gate_report.lines(comparison)
    )


def test_a_device_that_always_throttles_ends_inconclusive(pair: Pair, images: np.ndarray) -> None:
    device = Told(void=dict.fromkeys(range(200), "throttled: hot"))
    comparison = compared(device, pair, images)
    assert comparison.verdict == "inconclusive"
    assert "blocks were void, the last: throttled: hot" in cell(comparison, "latency").why
    assert device.ran < 40


@pytest.mark.parametrize("breaks_at", [0, 5, 18])
def test_a_device_that_goes_away_ends_inconclusive(pair: Pair, images: np.ndarray, breaks_at: int) -> None:
    device = Told({"w8a8": 1.5}, breaks_at=breaks_at)
    comparison = compared(device, pair, images)
    assert comparison.verdict == "inconclusive"
    assert "went away" in cell(comparison, "latency").why
    assert device.closed == 1


def test_a_target_that_the_device_lacks_is_inconclusive_with_the_reason(pair: Pair, images: np.ndarray) -> None:
    comparison = compared(Told(targets=("tflite",)), pair, images)
    assert comparison.verdict == "inconclusive"
    assert "not run: fake (a test) runs tflite; not onnx" in comparison.cells[0].why


def test_an_unreachable_device_is_inconclusive(pair: Pair, images: np.ndarray) -> None:
    class Gone(Told):
        def probe(self) -> DeviceStatus:
            return DeviceStatus(False, "no phone is connected; plug one in")

    with pytest.raises(InconclusiveError, match="fake: no phone is connected; plug one in"):
        compared(Gone(), pair, images)


def test_exact_metrics_need_no_statistics(pair: Pair) -> None:
    larger = replace(pair, new=replace(pair.new, size_bytes=pair.old.size_bytes * 2))
    block = Block(1, 1, 1, (), (1.0,), None, True, {"delegation": "XNNPACK=10 CPU=1"})
    worse = replace(block, conditions={"delegation": "XNNPACK=8 CPU=3"})
    fine, bad = {"y": np.zeros((3, 2))}, {"y": np.array([[0, 0], [np.nan, 0], [np.inf, 0]])}
    found = {c.metric: c for c in exact_cells(larger, (block, worse), (fine, bad), Margins())}
    assert [found[m].verdict for m in ("size", "finite", "delegation")] == ["regression"] * 3
    assert found["delegation"].why == "was XNNPACK=10 CPU=1, is XNNPACK=8 CPU=3"
    assert "2 samples are NaN or infinite" in found["finite"].why
    found = {c.metric: c for c in exact_cells(pair, (block, block), (bad, bad), Margins())}
    assert [found[m].verdict for m in ("size", "finite", "delegation")] == ["pass"] * 3


@pytest.mark.parametrize(
    ("old", "new", "verdict"),
    [
        ("CPUExecutionProvider=12", "CPUExecutionProvider=14", "pass"),
        ("Gpu=30 XNNPACK=9 CPU=2", "Gpu=20 XNNPACK=19 CPU=2", "regression"),
        ("Gpu=30 XNNPACK=9 CPU=2", "XNNPACK=41 CPU=0", "regression"),
        ("XNNPACK=10 CPU=1", "", "inconclusive"),
        ("", "XNNPACK=10 CPU=1", "pass"),
    ],
)
def test_nodes_that_left_the_unit_that_was_asked_for_are_a_regression(
    pair: Pair, old: str, new: str, verdict: str
) -> None:
    blocks = tuple(Block(1, 1, 1, (), (1.0,), None, True, {"delegation": told}) for told in (old, new))
    outputs = {"y": np.zeros((3, 2))}
    found = {c.metric: c for c in exact_cells(pair, (blocks[0], blocks[1]), (outputs, outputs), Margins())}
    assert found["delegation"].verdict == verdict
    assert found["delegation"].why == f"was {old or 'unknown'}, is {new or 'unknown'}"


def test_a_file_that_answers_worse_is_a_regression_however_fast(pair: Pair, images: np.ndarray) -> None:
    class Zeros(Told):
        def _output(self, spec: Any, samples: int) -> np.ndarray:
            logits = np.zeros((samples, 5), np.float32)
            logits[:, 1 if self.ran % 2 else 2] = 1.0  # another class for every file that runs
            return logits

    labels = np.tile([1], 24)
    found = gate.compare(
        [pair], "fake", Zeros({"w8a8": 0.5}), Samples({"image": images}, labels, labels), rule=SOON, plan=QUICK, seed=1
    )[0]
    scores = cell(found, "accuracy"), cell(found, "agreement")
    assert {abs(score.change or 0) for score in scores} == {1.0}
    assert all(score.verdict == ("regression" if (score.change or 0) > 0 else "pass") for score in scores)


@pytest.mark.parametrize("changes", [{"labels": np.full(24, 5)}, {"labels": None, "teacher": np.full(24, 0.5)}])
def test_classes_that_the_file_has_not_are_refused_before_the_rule_looks(
    pair: Pair, images: np.ndarray, changes: dict[str, Any]
) -> None:
    device = Told({"w8a8": 1.0})
    with pytest.raises(DataError, match="a whole number from 0 to 4, is needed"):
        gate.compare([pair], "fake", device, Samples({"image": images}, **changes), rule=SOON, plan=QUICK)

    assert device.ran == 2


def test_what_is_kept_of_a_comparison_tells_of_outputs_that_are_no_numbers(pair: Pair, images: np.ndarray) -> None:
    device = Told(outputs={"logits": np.full((24, 5), np.nan, np.float32)})
    comparison, measured = gate.compare([pair], "fake", device, Samples({"image": images}), rule=SOON, plan=QUICK)
    assert cell(comparison, "finite").verdict == "pass", "no more than before"
    assert all("non_finite_outputs" in one.flags for one in measured)


def test_peak_memory_is_what_came_on_top_of_the_runtime() -> None:
    block = Block(1, 2, 3, (), (1.0, 2.0), 60_000 * 1024, True, {"resident_before_model": "50000 kB"})
    assert value_of(block, "peak_memory") == 10_000 * 1024
    assert value_of(block, "cold_start") == 5
    assert value_of(replace(block, peak_memory_bytes=None), "peak_memory") is None
    assert value_of(replace(block, conditions={"shared_start": "one page"}), "cold_start") is None


def test_a_margin_below_the_resolution_of_the_device_is_refused(pair: Pair, images: np.ndarray) -> None:
    resolution = Resolution("fake (a test)", "m", {"latency": 0.041}, {"latency": 1.0}, 30, 0, "")
    with pytest.raises(UsageError, match=r"3.00% in latency was asked; .* 4.10% apart; --margin latency=4.1% works"):
        compared(Told(), pair, images, resolution=resolution)
    with pytest.raises(UsageError, match=r"^a margin of 0.01% in latency was asked"):
        compared(Told(), pair, images, resolution=resolution, margins=Margins(latency=1e-4, latency_floor_ms=0))
    assert compared(Told(), pair, images, resolution=resolution, margins=Margins(latency=0.05)).verdict == "pass"
    other = replace(resolution, device="another machine")
    assert "the calibration is of another machine: not used" in compared(Told(), pair, images, resolution=other).notes


def test_a_noisier_device_tells_less_apart(onnx_file: File, images: np.ndarray) -> None:
    found = [
        calibrating.calibrate(
            "m", *onnx_file, "fake", Told(noise=noise), Samples({"image": images}), pairs=20, plan=QUICK
        )
        for noise in (0.01, 0.2)
    ]
    assert found[0].smallest["latency"] < 0.02 < found[1].smallest["latency"]
    with pytest.raises(UsageError, match="at least 20 pairs; 19"):
        calibrating.calibrate("m", *onnx_file, "fake", Told(), Samples({"image": images}), pairs=19)
    with pytest.raises(UsageError, match=r"^fake \(a test\) runs tflite; not onnx$"):
        calibrating.calibrate("m", *onnx_file, "fake", Told(targets=("tflite",)), Samples({"image": images}))


def test_an_unchanged_file_passes_at_the_resolution_as_often_as_it_says() -> None:
    from edgekd.benchmarks.rule import decide

    rule, random = Rule(), np.random.default_rng(0)
    smallest = calibrating.resolution_of(random.normal(0, 0.03, 200), rule)
    passed = 0
    for _ in range(300):
        found = decide(
            {0: lambda: 1 + smallest}, lambda names, n: dict.fromkeys(names, random.normal(0, 0.03, n)), rule
        )
        passed += found[0].verdict == "pass"
    assert 0.92 <= passed / 300 <= 1.0


def test_folders_are_compared_file_by_file(onnx_file: File, tmp_path: Path) -> None:
    artifact, folder = onnx_file
    artifact = replace(artifact, sha256=hash_path(folder / artifact.path))
    for release, names in (("old", ("onnx-fp32", "onnx-w8")), ("new", ("onnx-fp32", "onnx-w8", "onnx-fp16"))):
        for name in names:
            place = tmp_path / release / name
            place.mkdir(parents=True)
            shutil.copy(folder / artifact.path, place)
            (place / "manifest.json").write_text(json.dumps(replace(artifact, precision=name[5:]).to_json()))
    heard = Listening()
    assert [p.label for p in read_pairs(tmp_path / "old", tmp_path / "new", heard)] == ["onnx fp32", "onnx w8"]
    assert heard.lines == [f"not compared, since {tmp_path / 'old'} has no such file: onnx-fp16"]
    assert len(read_pairs(tmp_path / "old" / "onnx-w8", tmp_path / "new" / "onnx-fp16")) == 1
    with pytest.raises(UsageError, match="has no onnx-fp16, which"):
        read_pairs(tmp_path / "new", tmp_path / "old")
    with pytest.raises(UsageError, match="there is no"):
        read_pairs(tmp_path / "older", tmp_path / "old")
    with (tmp_path / "new" / "onnx-w8" / artifact.path).open("ab") as file:
        file.write(b"x")
    with pytest.raises(ModelFileError, match="sha256 differs"):
        read_pairs(tmp_path / "old", tmp_path / "new")


def test_files_of_two_targets_are_not_compared(onnx_file: File, tflite_file: File) -> None:
    with pytest.raises(UsageError, match="compare like with like"):
        read_pairs(onnx_file[1] / "model.onnx", tflite_file[1] / "model.tflite")


def test_margins_are_read_as_they_are_typed() -> None:
    margins = parse_margins(["5%", "cold_start=0.2", "latency_floor_ms=0.5"])
    assert (margins.latency, margins.cold_start, margins.latency_floor_ms) == (0.05, 0.2, 0.5)
    for word, fault in (
        ("speed=3%", "nothing is called 'speed'"),
        ("x", "no share"),
        ("300%", "between 0 % and 100 %"),
    ):
        with pytest.raises(UsageError, match=fault):
            parse_margins([word])


def test_the_command_writes_every_report_and_exits_with_the_verdict(
    onnx_file: File, images: np.ndarray, tmp_path: Path
) -> None:
    np.savez(tmp_path / "data.npz", image=images, label=np.zeros(24, int), teacher=np.zeros((24, 5), np.float32))
    state = {"EDGEKD_STATE": str(tmp_path)}
    model = str(onnx_file[1] / "model.onnx")
    done = edgekd(
        "compare", model, model, "--device", "fake", "--inputs", str(tmp_path / "data.npz"),
        "--junit", str(tmp_path / "junit.xml"), "--markdown", str(tmp_path / "table.md"), "--json",
        "--metric", "latency", "--release", "v2", cwd=tmp_path, GITHUB_ACTIONS="true", **state,
    )  # fmt: skip
    found = Comparison.from_json(json.loads(done.stdout))
    assert done.returncode == 3, done.stderr
    assert found.verdict == "inconclusive", "24 samples cannot tell a drop of one point"
    assert cell(found, "latency").why.startswith("emulated: "), "nothing was run"
    assert cell(found, "size").verdict == "pass"
    cases = ElementTree.parse(tmp_path / "junit.xml").getroot().findall(".//testcase")
    assert len(cases) == len(found.cells)
    skipped = [case.get("name") for case in cases if case.find("skipped") is not None]
    assert skipped == ["latency", "accuracy", "agreement"]
    assert "| latency |" in (tmp_path / "table.md").read_text()
    assert "::warning title=onnx accuracy::inconclusive" in done.stderr
    if is_available():
        (entry,) = History(f"sqlite:///{tmp_path / 'history.db'}").entries()
        assert (entry.release, entry.how, entry.measurement.artifact_sha256) == (
            "v2",
            "compare",
            found.files["onnx new"],
        )
    missing = edgekd(
        "compare", model, model, "--inputs", str(tmp_path / "none.npz"), cwd=tmp_path, GITHUB_ACTIONS="", **state
    )
    assert missing.returncode == 2
    assert "no data file" in missing.stderr
    assert edgekd("init", "fresh", cwd=tmp_path).returncode == 0
    uncaptured = edgekd("compare", model, model, cwd=tmp_path / "fresh", GITHUB_ACTIONS="", **state)
    assert uncaptured.returncode == 2, "1 would be a regression"
    assert "run: edgekd capture" in uncaptured.stderr


def test_samples_are_told_from_labels_and_teacher(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.zeros((2, 3)), label=np.zeros(2), teacher=np.zeros((2, 5)))
    samples = read_samples(tmp_path / "a.npz")
    assert list(samples.inputs) == ["x"]
    assert samples.labels is not None
    assert samples.teacher is not None
    np.savez(tmp_path / "b.npz", label=np.zeros(2))
    with pytest.raises(UsageError, match="holds no inputs, only label"):
        read_samples(tmp_path / "b.npz")


def test_reports_escape_what_would_break_them() -> None:
    bad = Cell("a|b <c>", "latency", "regression", "ms", 1.0, 1.1, 0.1, 0.05, 0.15, 0.03, 24, why="100 % worse\nsecond")
    found = Comparison("host", "regression", (bad,), Rule(), Margins(), QUICK, 0, "2026-01-01T00:00:00+00:00")
    assert "a\\|b <c>" in gate_report.markdown(found)
    assert ElementTree.fromstring(gate_report.junit(found).encode()).find(".//failure") is not None
    (line,) = gate_report.github(found)
    assert line.startswith("::error title=a|b <c> latency::")
    assert "%0A" in line
    assert "\n" not in line

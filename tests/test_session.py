"""A sitting at the real host device: interleaving, scores from the same session, and what is not run."""

from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest

from edgekd.benchmarks import session
from edgekd.benchmarks.session import FLAGS, TOLD_BY_THE_DEVICE, measure, measure_many
from edgekd.devices.host import HostDevice
from edgekd.errors import DataError, DeviceError, UsageError
from edgekd.measurement import Block, DeviceStatus, Measurement, Plan
from edgekd.protocols import Arrays
from edgekd.types import Artifact, Card, Parity, TensorSpec

QUICK = Plan(blocks=3, warmup_runs=3, warmup_s=0.0, min_runs=10, min_s=0.0, max_s=2.0)

File = tuple[Artifact, Path]


@dataclass
class Watched:
    """The real host device, which writes down what it was asked for."""

    host: HostDevice = field(default_factory=HostDevice)
    turns: list[tuple[str, int, int]] = field(default_factory=list)

    def probe(self) -> DeviceStatus:
        status: DeviceStatus = self.host.probe()
        return status

    def run(
        self, artifact: Artifact, folder: Path, inputs: Arrays, plan: Plan
    ) -> tuple[tuple[Block, ...], dict[str, np.ndarray]]:
        self.turns.append((artifact.target, plan.blocks, len(next(iter(inputs.values())))))
        blocks, outputs = self.host.run(artifact, folder, inputs, plan)
        return blocks, outputs

    def close(self) -> None:
        self.host.close()


@dataclass
class Told:
    """Progress that remembers."""

    total: int = 0
    done: int = 0
    notes: list[str] = field(default_factory=list)
    finished: bool = False

    def start(self, what: str, total: int, done: int = 0) -> None:
        self.total, self.done = total, done

    def advance(self, steps: int = 1, note: str = "") -> None:
        self.done += steps
        self.notes.append(note)

    def finish(self) -> None:
        self.finished = True

    def say(self, line: str) -> None:
        self.notes.append(line)


@pytest.fixture
def images() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((24, 1, 12, 12)).astype(np.float32)


@pytest.fixture
def top(onnx_file: File, images: np.ndarray) -> np.ndarray:
    """Top classes by ONNX Runtime in this process."""
    import onnxruntime

    runner = onnxruntime.InferenceSession(onnx_file[1] / "model.onnx", providers=["CPUExecutionProvider"])
    return np.array([runner.run(None, {"image": image[None]})[0].argmax() for image in images])


def test_blocks_of_all_files_are_interleaved_and_seeded(onnx_file: File, tflite_file: File, images: np.ndarray) -> None:
    orders, two_rounds = [], replace(QUICK, blocks=2)
    for seed in (0, 0, 1):
        device, told = Watched(), Told()
        found = measure_many(
            [onnx_file, tflite_file], "host", device, {"image": images}, None, None, two_rounds, told, seed=seed
        )
        assert [len(one.blocks) for one in found] == [2, 2]
        assert [one.target for one in found] == ["onnx", "tflite"]
        order = [target for target, _, _ in device.turns]
        assert all({order[turn], order[turn + 1]} == {"onnx", "tflite"} for turn in (0, 2)), "a round holds each once"
        assert all(blocks == 1 for _, blocks, _ in device.turns)
        assert [count for _, _, count in device.turns] == [1, 1, 24, 24], "only the last round sees all inputs"
        assert (told.total, told.done, told.finished) == (4, 4, True)
        orders.append(order)
    assert orders[0] == orders[1]
    assert len({tuple(order) for order in orders}) > 1


def test_scores_come_from_the_outputs_of_the_same_session(
    onnx_file: File, tflite_file: File, images: np.ndarray, top: np.ndarray
) -> None:
    labels = np.where(np.arange(24) < 18, top, (top + 1) % 5)
    for file in (onnx_file, tflite_file):
        found = measure(*file, "host", HostDevice(), {"image": images}, labels, top, replace(QUICK, blocks=1))
        assert found.status == "measured"
        assert found.accuracy == 0.75
        assert found.teacher_agreement == 1.0
        assert found.samples == 24
        assert found.size_bytes == file[0].size_bytes
        assert found.device.startswith("host (")
        assert Measurement.from_json(found.to_json()) == found


def test_without_labels_and_teacher_there_are_no_scores(onnx_file: File, images: np.ndarray) -> None:
    found = measure(*onnx_file, "host", HostDevice(), {"image": images}, None, None, replace(QUICK, blocks=1))
    assert (found.accuracy, found.teacher_agreement, found.samples) == (None, None, 0)


def test_a_target_that_the_device_lacks_is_not_run_with_the_reason(onnx_file: File, images: np.ndarray) -> None:
    artifact, folder = onnx_file
    core_ml = replace(artifact, target="coreml", path="Model.mlpackage")
    other = replace(artifact, target="openvino")
    found = measure_many(
        [(core_ml, folder), (artifact, folder), (other, folder)],
        "host", HostDevice(), {"image": images}, None, None, replace(QUICK, blocks=1),
    )  # fmt: skip
    assert [one.status for one in found] == ["not_run", "measured", "not_run"]
    assert "Apple devices only" in found[0].reason or "no Core ML runner" in found[0].reason
    assert found[0].blocks == ()
    assert found[0].accuracy is None
    assert "not openvino" in found[2].reason


def test_labels_that_do_not_fit_are_refused(onnx_file: File, images: np.ndarray) -> None:
    with pytest.raises(DataError, match=r"24 samples were run; the labels have shape \(3,\)"):
        measure(*onnx_file, "host", HostDevice(), {"image": images}, np.zeros(3), None, replace(QUICK, blocks=1))


def test_inputs_that_do_not_fit_are_refused_before_anything_runs(onnx_file: File) -> None:
    device = Watched()
    with pytest.raises(DataError, match="takes"):
        measure(*onnx_file, "host", device, {"image": np.zeros((4, 3))}, None, None, QUICK)
    assert device.turns == []
    with pytest.raises(UsageError, match="at least 1 block"):
        measure(*onnx_file, "host", device, {"image": np.zeros((4, 3))}, None, None, replace(QUICK, blocks=0))


def test_outputs_that_are_not_finite_are_flagged_and_count_as_wrong(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    node = onnx.helper.make_node("Sqrt", ["x"], ["logits"])
    shape = (onnx.TensorProto.FLOAT, [1, 3])
    graph = onnx.helper.make_graph(
        [node],
        "roots",
        [onnx.helper.make_tensor_value_info("x", *shape)],
        [onnx.helper.make_tensor_value_info("logits", *shape)],
    )
    opset = [onnx.helper.make_opsetid("", 17)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opset, ir_version=9), tmp_path / "roots.onnx")
    spec = TensorSpec("x", (1, 3), "float32")
    outputs = (replace(spec, name="logits"),)
    card, parity = Card("roots", (spec,), outputs), Parity("not_run", "a file for tests of measuring")
    artifact = Artifact("onnx", "fp32", "roots.onnx", "0" * 64, 1, card, (spec,), outputs, {}, "", parity)
    rows = np.array([[1, 4, 9], [9, 4, 1], [-1, -1, -1]], dtype=np.float32)
    found = measure(
        artifact, tmp_path, "host", HostDevice(), {"x": rows}, np.array([2, 0, 0]), None, replace(QUICK, blocks=1)
    )
    assert "non_finite_outputs" in found.flags
    assert found.accuracy == pytest.approx(2 / 3)


def test_an_unreachable_device_says_what_mends_it(onnx_file: File, images: np.ndarray) -> None:
    class Gone(Watched):
        def probe(self) -> DeviceStatus:
            return DeviceStatus(False, "no phone is connected; plug one in")

    with pytest.raises(DeviceError, match="phone: no phone is connected; plug one in"):
        measure(*onnx_file, "phone", Gone(), {"image": images}, None, None, QUICK)


def made_block(**conditions: str) -> Block:
    return Block(1.0, 1.0, 1.0, (1.0,), (1.0,) * 10, None, True, conditions)


def test_each_flag_is_raised_by_its_cause() -> None:
    plan = Plan(min_runs=10)
    calm = {"governor": "performance", "load_average_before": "0.5", "cores": "4", "inferences_per_sample": "1"}
    six = [made_block(**calm)] * 6
    assert session.flags_of(six, plan) == []
    assert session.flags_of(six[:5], plan) == ["few_blocks"]
    assert session.flags_of([*six, replace(six[0], converged=False)], plan) == ["not_converged"]
    assert session.flags_of([*six, replace(six[0], latency_ms=(1.0,) * 9)], plan) == ["few_runs"]
    for changed, flag in (
        ({"governor": "powersave"}, "unpinned"),
        ({"virtual_machine": "yes"}, "virtual_machine"),
        ({"load_average_before": "3.1"}, "busy"),
        ({"inferences_per_sample": "5"}, "batched_timing"),
        *(({name: "the device says why"}, name) for name in TOLD_BY_THE_DEVICE),
    ):
        assert session.flags_of([*six, made_block(**(calm | changed))], plan) == [flag]
    assert session.flags_of([made_block()] * 6, plan) == ["unpinned"], "what can't be read is not held fixed"


def test_every_flag_has_words_in_the_documentation() -> None:
    page = Path(__file__).parents[1] / "docs" / "measuring.md"
    if not page.is_file():
        pytest.skip("tests run without the source tree")
    text = page.read_text(encoding="utf-8")
    assert len(FLAGS) == 15
    for flag, words in FLAGS.items():
        assert f"| `{flag}` | {words} |" in text

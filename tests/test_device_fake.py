"""The fake device: it does what a test asks for, the same each time, and never passes for a device."""

import statistics
from pathlib import Path

import numpy as np
import pytest

from edgekd.benchmarks.session import measure
from edgekd.devices.fake import FakeDevice
from edgekd.errors import DeviceError, UsageError
from edgekd.measurement import Plan
from edgekd.profiles import load_device
from edgekd.types import Artifact

PLAN = Plan(blocks=6, min_runs=50)
INPUTS = {"image": np.zeros((4, 1, 12, 12), np.float32)}

File = tuple[Artifact, Path]


def test_the_same_settings_give_the_same_blocks(onnx_file: File) -> None:
    runs = [FakeDevice(latency_ms={"fp32": 3.0}).run(*onnx_file, INPUTS, PLAN)[0] for _ in range(2)]
    assert runs[0] == runs[1]
    assert runs[0][0] != runs[0][1]
    assert FakeDevice(seed=1).run(*onnx_file, INPUTS, PLAN)[0] != FakeDevice().run(*onnx_file, INPUTS, PLAN)[0]
    medians = [statistics.median(block.latency_ms) for block in runs[0]]
    assert statistics.fmean(medians) == pytest.approx(3.0, rel=0.01)


def test_every_block_and_the_name_say_that_it_is_fake(onnx_file: File) -> None:
    found = measure(*onnx_file, "fake", load_device("fake"), INPUTS, None, None, PLAN)
    assert found.device == "fake (fake (no device; nothing was run))"
    assert "emulated" in found.flags
    assert {block.conditions["emulated"] for block in found.blocks} == {"fake"}


def test_it_breaks_and_spoils_blocks_where_it_is_told_to(onnx_file: File) -> None:
    device = FakeDevice(void={1: "throttled: it was told to"})
    found = measure(*onnx_file, "fake", device, INPUTS, None, None, PLAN)
    assert [block.void for block in found.blocks] == ["", "throttled: it was told to", "", "", "", ""]
    assert "void_blocks" in found.flags
    broken = FakeDevice(breaks_at=2)
    with pytest.raises(DeviceError, match="the device went away at block 2"):
        measure(*onnx_file, "fake", broken, INPUTS, None, None, PLAN)
    assert (broken.ran, broken.closed) == (3, 1), "a sitting is ended however it ends"


def test_a_drift_is_what_was_asked_for(onnx_file: File) -> None:
    blocks, _ = FakeDevice(drift=0.1, noise=0.0).run(*onnx_file, INPUTS, PLAN)
    assert [block.latency_ms[0] for block in blocks] == pytest.approx([1.1**i for i in range(6)])


def test_outputs_are_those_of_the_test_or_zeros(onnx_file: File) -> None:
    wanted = np.arange(20, dtype=np.float32).reshape(4, 5)
    _, outputs = FakeDevice(outputs={"logits": wanted}).run(*onnx_file, INPUTS, PLAN)
    np.testing.assert_array_equal(outputs["logits"], wanted)
    _, outputs = FakeDevice().run(*onnx_file, INPUTS, PLAN)
    assert outputs["logits"].shape == (4, 5)
    assert not outputs["logits"].any()
    with pytest.raises(UsageError, match="takes input 'image'; given are photo"):
        FakeDevice().run(*onnx_file, {"photo": INPUTS["image"]}, PLAN)

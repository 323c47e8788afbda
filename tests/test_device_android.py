"""The android device against real adbd daemons of Debian (not Android), over a real adb client and server.

In place of benchmark_model, tests/stand_ins/benchmark_model.py runs the file in the real LiteRT; nothing here was
measured on a phone.
"""

import contextlib
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest

from edgekd.benchmarks import gate
from edgekd.benchmarks.cells import Margins, Pair, Samples
from edgekd.benchmarks.rule import Rule
from edgekd.benchmarks.session import measure
from edgekd.devices import android
from edgekd.devices._chromium import find_chromium, remove_profile
from edgekd.devices._folders import made
from edgekd.devices._phone_state import is_hot
from edgekd.devices.android import AndroidDevice
from edgekd.errors import DeviceError, UsageError
from edgekd.measurement import Plan, Profile
from edgekd.profiles import device_of, load_device, load_profile
from edgekd.protocols import Side, TakingTurns
from edgekd.stages.watching import minutes_lines, operator_lines
from edgekd.types import Artifact

from adbd import Phones, start_phones, thermal, unpacked
from android_program import benchmark_model
from elsewhere import ENDLESS, meanwhile, measuring_elsewhere, name_of_a_killed_ones, said_during_a_run, wait_for

pytestmark = [
    pytest.mark.skipif(shutil.which("adb") is None, reason="needs adb: apt-get install adb"),
    pytest.mark.skipif(sys.platform != "linux", reason="adbd runs on Linux"),
]

QUICK = Plan(blocks=2, warmup_runs=3, warmup_s=0.0, min_runs=10, min_s=0.0, max_s=2.0)
STAND_IN = Path(__file__).parent / "stand_ins" / "benchmark_model.py"

File = tuple[Artifact, Path]


@pytest.fixture(scope="session")
def root() -> Path:
    try:
        return unpacked()
    except (OSError, subprocess.SubprocessError) as error:
        pytest.skip(f"Debian trixie's adbd cannot be had here: {error}")


@pytest.fixture
def start(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Phones]]:
    """``start(count)`` gives phones that the device under test sees, and no others."""
    started = []

    def start(count: int = 1, small: bool = False) -> Phones:
        folder = tmp_path / "p"
        folder.mkdir()
        try:
            phones = start_phones(folder, root, count, small)
        except OSError as error:
            pytest.skip(f"adbd cannot be started here: {error}")
        started.append(phones)
        monkeypatch.setenv("ADB_SERVER_SOCKET", phones.environment["ADB_SERVER_SOCKET"])
        return phones

    yield start
    for phones in started:
        phones.stop()


def program(folder: Path) -> Path:
    path = folder / "benchmark_model"
    path.write_text(f'#!/bin/sh\necho "$1" >>"$EDGEKD_PHONE/launched"\nexec {sys.executable} -I {STAND_IN} "$@"\n')
    return path


def device_for(phones: Phones, index: int = 0, serial: bool = True, extra: str = "") -> AndroidDevice:
    path = program(phones.folder)
    toml = phones.folder / "phone.toml"
    toml.write_text(
        f'extends = "android"\n[settings]\nbenchmark_model = "{path}"\nfolder = "{phones.storage(index)}"\n'
        f'benchmark_sha256 = "{hashlib.sha256(path.read_bytes()).hexdigest()}"\n'
        + (f'serial = "{phones.serials[index]}"\n' if serial else "")
        + extra
    )
    device = device_of(load_profile(str(toml)))
    assert isinstance(device, AndroidDevice)
    return device


def test_the_probe_says_what_the_phone_is_and_runs(start: Callable[..., Phones]) -> None:
    phones = start()
    status = device_for(phones).probe()
    assert status.reachable, status.reason
    assert status.targets == ("tflite",)
    assert status.facts["model"] == "Debian adbd 0 (not Android)"
    assert "measure it in the phone's browser" in status.not_run["onnx"]
    assert phones.left() == [], "a probe writes nothing"


def test_latency_and_outputs_come_from_one_sitting_and_nothing_is_left(
    start: Callable[..., Phones], tflite_file: File, images: np.ndarray
) -> None:
    phones = start()
    of_another = "edgekd-00000000.1.00000000"
    for name in (name_of_a_killed_ones("edgekd"), of_another):
        (phones.storage() / name).mkdir()
    device = device_for(phones)
    _, expected = load_device("host").run(*tflite_file, {"args_0": images[:3]}, replace(QUICK, blocks=1))
    top = expected["output_0"].argmax(axis=1)
    found = measure(*tflite_file, "phone", device, {"args_0": images[:3]}, None, top, QUICK)
    assert found.teacher_agreement == 1.0
    assert found.device == "phone (Debian adbd 0 (not Android), the test's own machine)"
    assert "void_blocks" not in found.flags
    assert "few_runs" not in found.flags
    first, last = (block.conditions for block in found.blocks)
    assert float(last["differs_from_host"]) < 1e-5
    assert first["temperature_c_before"] == "43.2"
    assert first["thermal_status_after"] == "0"
    assert first["battery_percent_before"] == "87"
    assert first["fixed_performance"] == "yes"
    assert first["inferences"] == "10"
    assert phones.left() == [of_another], "what a killed process of this machine left is gone too"
    commands = (phones.state() / "commands").read_text().splitlines()
    assert commands.count("power set-fixed-performance-mode-enabled true") == 4
    assert commands[-1] == "power set-fixed-performance-mode-enabled false"
    wait_for(lambda: not phones.running(), 10)


def test_the_right_one_of_several_phones_is_taken(
    start: Callable[..., Phones], tflite_file: File, images: np.ndarray
) -> None:
    phones = start(2)
    status = device_for(phones, serial=False).probe()
    assert "2 phones could be phone: localhost:7555, localhost:7556; name one with settings.serial" in status.reason
    identity = '[identity]\n"ro.product.model" = "Debian adbd 1 (not Android)"\n'
    with contextlib.closing(device_for(phones, 1, serial=False, extra=identity)) as device:
        blocks, _ = device.run(*tflite_file, {"args_0": images[:1]}, replace(QUICK, blocks=1))
        assert blocks[0].conditions["serial"] == "localhost:7556"
        assert len(phones.left(1)) == 1
        assert phones.left(0) == []


def test_another_phone_is_not_measured_under_this_ones_name(
    start: Callable[..., Phones], tflite_file: File, images: np.ndarray
) -> None:
    phones = start()
    identity = '[identity]\n"ro.product.model" = "Debian adbd 0"\n'  # as a Pixel 9 Pro is no Pixel 9
    device = device_for(phones, serial=False, extra=identity)
    status = device.probe()
    assert not status.reachable
    assert status.reason.startswith(
        "another phone is attached (localhost:7555: ro.product.model is 'Debian adbd 0 (not"
    )
    with pytest.raises(DeviceError, match="another phone is attached"):
        device.run(*tflite_file, {"args_0": images}, QUICK)
    assert phones.left() == []


def test_a_phone_that_is_swapped_during_a_sitting_is_noticed(
    start: Callable[..., Phones], tflite_file: File, images: np.ndarray
) -> None:
    phones = start()
    device = device_for(phones)
    with contextlib.closing(device):
        device.run(*tflite_file, {"args_0": images[:1]}, replace(QUICK, blocks=1))
        properties = phones.state() / "properties"
        properties.write_text(properties.read_text().replace("debian/trixie/adbd0", "other/phone"))
        with pytest.raises(DeviceError, match="another phone answers as localhost:7555 now"):
            device.run(*tflite_file, {"args_0": images[:1]}, replace(QUICK, blocks=1))


def test_no_phone_no_adb_and_no_program_say_what_is_missing(
    start: Callable[..., Phones], tflite_file: File, images: np.ndarray
) -> None:
    phones = start()
    status = load_device("android").probe()
    assert status.reachable
    assert "settings.benchmark_model and benchmark_sha256 are not set" in status.not_run["tflite"]
    assert "adb is not installed" in device_for(phones, extra='adb = "no-such-adb"\n').probe().reason
    device = device_for(phones)
    program(phones.folder).write_text("#!/bin/sh\necho other\n")
    assert "settings.benchmark_sha256 is" in device.probe().not_run["tflite"]
    with pytest.raises(UsageError, match="has sha256"):
        device.run(*tflite_file, {"args_0": images}, QUICK)
    phones.daemon().kill()
    wait_for(
        lambda: (
            "attached" in load_device("android").probe().reason or "offline" in load_device("android").probe().reason
        )
    )


def test_a_hostile_file_name_is_only_a_name(
    start: Callable[..., Phones], tflite_file: File, images: np.ndarray, tmp_path: Path
) -> None:
    phones = start()
    artifact, folder = tflite_file
    (tmp_path / "models").mkdir()
    with contextlib.closing(device_for(phones)) as device:
        for name in ("$(touch owned).tflite", "a b'; touch owned; '.tflite", "-rf.tflite"):
            shutil.copy(folder / artifact.path, tmp_path / "models" / name)
            blocks, _ = device.run(
                replace(artifact, path=name), tmp_path / "models", {"args_0": images[:1]}, replace(QUICK, blocks=1)
            )
            assert len(blocks) == 1
            assert not list(tmp_path.rglob("owned"))


def test_a_file_that_the_program_cannot_load_is_told(
    start: Callable[..., Phones], tflite_file: File, images: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    phones = start()
    tensors = android.tensors_of(tflite_file[1] / tflite_file[0].path, tflite_file[0])
    monkeypatch.setattr(android, "tensors_of", lambda *_: tensors)
    broken = phones.folder / "model.tflite"
    broken.write_bytes(b"not a model")
    with (
        contextlib.closing(device_for(phones)) as device,
        pytest.raises(
            DeviceError, match=r"model.tflite \(tflite fp32\) on phone: benchmark_model gave no timings: ERROR"
        ),
    ):
        device.run(replace(tflite_file[0], path="model.tflite"), phones.folder, {"args_0": images}, QUICK)
    assert phones.left() == []


def test_blocks_of_a_phone_that_gets_hot_are_void(
    start: Callable[..., Phones], tflite_file: File, images: np.ndarray
) -> None:
    phones = start()

    def heat() -> None:
        wait_for(phones.running)
        (phones.state() / "thermalservice").write_text(thermal(2))

    plan = replace(QUICK, min_s=0.5)
    with meanwhile(heat):
        device = device_for(phones, extra="cool_down_s = 0.0\n")
        found = measure(*tflite_file, "phone", device, {"args_0": images}, None, None, plan)
    assert found.blocks[0].void == "the phone is hot: thermal status 0 (none) before and 2 (moderate) after the block"
    assert found.blocks[1].void.startswith("the phone is hot: thermal status 2 (moderate) before")
    assert "void_blocks" in found.flags


def test_a_hot_phone_is_waited_for(
    start: Callable[..., Phones], tflite_file: File, images: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    phones, looks = start(), list[str]()
    (phones.state() / "thermalservice").write_text(thermal(2))

    def look(state: Mapping[str, str]) -> bool:
        looks.append(state["thermal_status"])
        if len(looks) == 3:
            (phones.state() / "thermalservice").write_text(thermal(0))
        return is_hot(state)

    monkeypatch.setattr(android, "is_hot", look)
    monkeypatch.setattr(android, "LOOK_S", 1.0)
    found = measure(*tflite_file, "phone", device_for(phones), {"args_0": images[:1]}, None, None, QUICK)
    assert looks[:4] == ["2", "2", "2", "0"]
    assert found.blocks[0].conditions["cooled_down_s"] == "3"
    assert "cooled_down_s" not in found.blocks[1].conditions
    assert not any(block.void for block in found.blocks)


def test_each_minute_of_a_sustained_run_is_a_launch(
    start: Callable[..., Phones], tflite_file: File, images: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(android, "MINUTE_S", 0.3)
    plan = replace(QUICK, blocks=1, min_s=0.9, max_s=0.9)
    found = measure(*tflite_file, "phone", device_for(start()), {"args_0": images[:1]}, None, None, plan)
    (block,) = found.blocks
    assert len(block.latency_ms) == 3
    (line,) = minutes_lines(found)
    assert " ms by minute: " + " ".join(f"{median:.3f}" for median in block.latency_ms) in line


def two_sides(tflite_file: File, images: np.ndarray) -> list[Side]:
    """The same file under two names, each with samples of its own."""
    artifact, folder = tflite_file
    other = replace(artifact, sha256="b" * 64)
    return [Side(artifact, folder, {"args_0": images[:2]}), Side(other, folder, {"args_0": images[2:4]})]


def test_a_build_without_a_profile_says_so(start: Callable[..., Phones], tflite_file: File, images: np.ndarray) -> None:
    phones = start()
    plan = replace(QUICK, blocks=1, profile=True)
    found = measure(*tflite_file, "phone", device_for(phones), {"args_0": images[:1]}, None, None, plan)
    (line,) = operator_lines(found)
    assert line.startswith("tflite fp32: not run: benchmark_model gave no profile")
    assert phones.left() == []


def test_files_take_turns_launch_by_launch_and_each_gets_its_own_outputs(
    start: Callable[..., Phones], tflite_file: File, images: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(android, "TURNS", 3)
    phones, sides = start(), two_sides(tflite_file, images)
    device = device_for(phones)
    assert issubclass(AndroidDevice, TakingTurns), "as the gate asks"
    with contextlib.closing(device):
        found = device.run_in_turns(sides, QUICK, seed=0)
    launched = (phones.state() / "launched").read_text().split()[:6]
    rounds = [tuple(launched[begin : begin + 2]) for begin in (0, 2, 4)]
    assert len(set(rounds)) == 2, "in an order drawn for each round"
    assert all(len(set(one)) == 2 for one in rounds)
    _, expected = load_device("host").run(*tflite_file, {"args_0": images}, replace(QUICK, blocks=1))
    for (block, outputs), begin in zip(found, (0, 2), strict=True):
        np.testing.assert_allclose(outputs["output_0"], expected["output_0"][begin : begin + 2], atol=1e-5)
        assert len(block.latency_ms) == 3
        assert block.conditions["launches"] == "3"
        assert block.conditions["inferences"] == "12", "together not fewer than the plan's"
        assert block.conditions["thermal_status_after"] == "0"
    assert phones.left() == []


def test_a_phone_that_is_unplugged_in_its_turns_runs_nothing_on(
    start: Callable[..., Phones], tflite_file: File, images: np.ndarray
) -> None:
    phones = start()
    device = device_for(phones)

    def unplug() -> None:
        wait_for(lambda: measuring(phones))
        phones.daemon().kill()

    with meanwhile(unplug), contextlib.closing(device), pytest.raises(DeviceError) as caught:
        device.run_in_turns(two_sides(tflite_file, images), ENDLESS, seed=0)
    assert str(caught.value).startswith("model.tflite (tflite) and model.tflite (tflite) on phone: localhost:7555")
    wait_for(lambda: not phones.running() and not phones.left(), 20)


@pytest.mark.slow
def test_a_gate_on_a_phone_passes_a_file_that_is_the_same(
    start: Callable[..., Phones], tflite_file: File, images: np.ndarray
) -> None:
    phones = start()
    artifact, folder = tflite_file
    pair = Pair("tflite", artifact, folder, replace(artifact, precision="w8a8", sha256="b" * 64), folder)
    margins = Margins(latency=0.5, cold_start=1.0)
    found, _ = gate.compare(
        [pair], "phone", device_for(phones), Samples({"args_0": images}), margins=margins, plan=replace(QUICK, blocks=1)
    )
    assert found.verdict == "pass", found.cells
    assert phones.left() == []


@pytest.mark.slow
def test_the_real_benchmark_model_is_driven_and_computes_what_the_host_does(
    start: Callable[..., Phones], tflite_file: File, images: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Google's build for Android; on an emulated processor, so its times say nothing."""
    try:
        real = benchmark_model()
    except (OSError, subprocess.SubprocessError, StopIteration) as error:
        pytest.skip(f"no benchmark_model can be had here: {error}")
    monkeypatch.setattr(android, "TURNS", 2)
    phones = start()
    with (phones.state() / "properties").open("a") as properties:
        properties.write("[ro.kernel.qemu]: [1]\n")
    device_for(phones)
    device = device_for_program(phones, Path(shutil.copy(real, program(phones.folder))))
    found = measure(*tflite_file, "phone", device, {"args_0": images[:2]}, None, None, replace(QUICK, max_s=60.0))
    assert "emulated" in found.flags
    assert not {"few_runs", "partial_delegation"} & set(found.flags)
    for block in found.blocks:
        assert block.conditions["delegation"].startswith("TfLiteXNNPackDelegate=")
        assert block.conditions["delegation"].endswith(" CPU=0")
        assert block.conditions["statistic"] == "median of 10 inferences in 1 launches, as benchmark_model reports it"
        assert min(*block.latency_ms, block.first_inference_ms, block.model_load_ms) > 0
    assert float(found.blocks[-1].conditions["differs_from_host"]) < 1e-5
    plan = replace(QUICK, blocks=1, max_s=60.0, profile=True)
    (block,), _ = device.run(*tflite_file, {"args_0": images[:1]}, plan)
    assert any(operator.type.startswith("Convolution") for operator in block.operators)
    assert {operator.unit for operator in block.operators} == {"TfLiteXNNPackDelegate"}
    assert sum(operator.ms for operator in block.operators) > 0
    _, expected = load_device("host").run(*tflite_file, {"args_0": images}, replace(QUICK, blocks=1))
    with contextlib.closing(device):
        pair = device.run_in_turns(two_sides(tflite_file, images), replace(QUICK, max_s=60.0), seed=0)
    for (block, outputs), begin in zip(pair, (0, 2), strict=True):
        np.testing.assert_allclose(outputs["output_0"], expected["output_0"][begin : begin + 2], atol=1e-5)
        assert block.conditions["launches"] == "2"
    assert phones.left() == []


def test_a_gate_on_a_hot_phone_is_inconclusive(
    start: Callable[..., Phones], tflite_file: File, images: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(android, "TURNS", 1)
    phones = start()
    (phones.state() / "thermalservice").write_text(thermal(3))
    artifact, folder = tflite_file
    pair = Pair("tflite", artifact, folder, replace(artifact, precision="w8a8"), folder)
    rule, plan = Rule(looks=(6,), confirm_pairs=6), replace(QUICK, blocks=1)
    monkeypatch.setattr(android, "LOOK_S", 0.1)
    device, samples = device_for(phones, extra="cool_down_s = 0.3\n"), Samples({"args_0": images[:1]})
    found, _ = gate.compare([pair], "phone", device, samples, rule=rule, plan=plan)
    assert found.verdict == "inconclusive"
    assert "blocks were void, the last: the phone is hot: thermal status 3 (severe)" in found.cells[0].why
    assert phones.left() == []


def during_a_run(
    phones: Phones, device: AndroidDevice, file: File, images: np.ndarray, happens: Callable[[], object]
) -> str:
    return said_during_a_run(device, file, images, lambda: measuring(phones), happens)


def measuring(phones: Phones) -> list[psutil.Process]:
    found = []
    for process in phones.running():
        with contextlib.suppress(psutil.Error):
            if str(STAND_IN) in process.cmdline():
                found.append(process)
    return found


def test_a_phone_that_is_unplugged_is_told_and_goes_back_to_its_mode(
    start: Callable[..., Phones], tflite_file: File, images: np.ndarray
) -> None:
    phones = start()
    said = during_a_run(phones, device_for(phones), tflite_file, images, lambda: phones.daemon().kill())
    assert "model.tflite (tflite fp32) on phone: localhost:7555" in said
    assert "is gone" in said or "broke off" in said
    wait_for(lambda: not phones.running() and not phones.left(), 20)  # the phone itself cleans up when nobody listens
    assert (phones.state() / "commands").read_text().splitlines()[-1].endswith("mode-enabled false")


def test_a_program_killed_for_memory_is_told_as_that(
    start: Callable[..., Phones], tflite_file: File, images: np.ndarray
) -> None:
    phones = start()
    said = during_a_run(phones, device_for(phones), tflite_file, images, lambda: measuring(phones)[0].kill())
    assert "the program was ended by SIGKILL, perhaps for lack of memory" in said
    wait_for(lambda: not phones.running(), 10)
    assert phones.left() == []


def test_nothing_runs_on_the_phone_after_the_measuring_process_was_killed(
    start: Callable[..., Phones], tflite_file: File
) -> None:
    phones = start()
    device_for(phones)
    files = phones.folder / "files"
    files.mkdir()
    toml = str(phones.folder / "phone.toml")
    with measuring_elsewhere(toml, tflite_file, phones.folder, {"TMPDIR": str(files)}) as outer:
        outer.wait_for(lambda: measuring(phones))
        time.sleep(0.5)
        outer.end(signal.SIGKILL)
        wait_for(lambda: not phones.running() and not phones.left(), 30)
    assert list(files.iterdir()), "a killed process leaves its folder here"
    made("edgekd-android", files).rmdir()
    assert list(files.iterdir()) == [], "and the next one removes it"
    assert (phones.state() / "commands").read_text().splitlines()[-1].endswith("mode-enabled false")


@pytest.mark.skipif(os.geteuid() != 0, reason="a small disk is mounted by root")
def test_full_storage_on_the_phone_is_told_and_cleaned_up(
    start: Callable[..., Phones], tflite_file: File, images: np.ndarray
) -> None:
    phones = start(small=True)
    with contextlib.closing(device_for(phones)) as device:
        path = program(phones.folder)
        with path.open("a") as file:
            file.write("# " + "x" * 400_000)
        device = device_for_program(phones, path)
        with (
            contextlib.closing(device),
            pytest.raises(
                DeviceError, match=r"bytes could not be written to .*benchmark_model: .*No space left on device"
            ),
        ):
            device.run(*tflite_file, {"args_0": images}, QUICK)
    listed = subprocess.run(
        ["adb", "-s", phones.serials[0], "shell", f"ls {phones.storage()}"],
        env=phones.environment,
        capture_output=True,
        text=True,
    )
    assert listed.stdout == ""


def device_for_program(phones: Phones, path: Path) -> AndroidDevice:
    text = (phones.folder / "phone.toml").read_text()
    lines = [line for line in text.splitlines() if not line.startswith("benchmark_sha256")]
    lines.append(f'benchmark_sha256 = "{hashlib.sha256(path.read_bytes()).hexdigest()}"')
    (phones.folder / "phone.toml").write_text("\n".join([*lines, ""]))
    device = device_of(load_profile(str(phones.folder / "phone.toml")))
    assert isinstance(device, AndroidDevice)
    return device


@pytest.mark.skipif(os.geteuid() != 0, reason="a network of the phone's own needs root")
def test_the_phones_browser_is_measured_over_adb_reverse(
    root: Path, library: Path, tmp_path: Path, onnx_file: File, images: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chromium stands for the phone's browser: in the phone's network, from where only adb's tunnel leads out."""
    chromium = find_chromium()
    if chromium is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    folder = tmp_path / "p"
    folder.mkdir()
    profile = tmp_path / "browser" / "profile"
    # What Android's activity manager does with a VIEW intent; its arguments: start -a ACTION -d LINK PACKAGE
    options = f"--headless=new --no-sandbox --no-first-run --user-data-dir={profile}"
    browser = f'TMPDIR=/tmp setsid {chromium} {options} "$5" </dev/null >/dev/null 2>&1 &'
    am = f'echo "$@" >>"$EDGEKD_PHONE/started"; {browser}'
    phones = start_phones(folder, root, shims={"am": am}, wire="198.18.79")
    port = subprocess.run(["sh", "-c", "shuf -i 20000-29999 -n 1"], capture_output=True, text=True).stdout.strip()
    environment = {"ANDROID_ADB_SERVER_PORT": port, "HOME": str(tmp_path), "TMPDIR": str(tmp_path)}
    environment["XDG_CACHE_HOME"] = str(library.parent.parent)
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    try:
        subprocess.run(["adb", "connect", "198.18.79.2:7555"], check=True, capture_output=True)
        device = device_of(Profile("phone", "browser", settings={"open": "adb", "package": "org.chromium"}))
        found = measure(*onnx_file, "phone", device, {"image": images}, None, None, QUICK)
        left = subprocess.run(["adb", "reverse", "--list"], capture_output=True, text=True).stdout
    finally:
        subprocess.run(["adb", "kill-server"], capture_output=True)
        phones.stop()
        remove_profile(tmp_path / "browser")
    assert found.device == "phone (org.chromium on Debian adbd 0 (not Android), the test's own machine)"
    assert {block.conditions["secure"] for block in found.blocks} == {"true"}
    assert {block.conditions["isolated"] for block in found.blocks} == {"true"}
    assert len(found.blocks) == 2
    assert "org.chromium" in (phones.state() / "started").read_text()
    assert left.strip() == "", "the tunnel is taken down"

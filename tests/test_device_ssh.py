"""The ssh device against a real sshd of the test's own: own keys, own port, own configuration, loopback only."""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import psutil
import pytest

from edgekd.benchmarks import gate
from edgekd.benchmarks.cells import Pair, Samples
from edgekd.benchmarks.rule import Rule
from edgekd.benchmarks.session import measure
from edgekd.devices import _shell, _ssh
from edgekd.devices._ssh import Connection
from edgekd.devices.ssh import SshDevice
from edgekd.errors import DeviceError, UsageError
from edgekd.measurement import Plan
from edgekd.profiles import device_of, load_device, load_profile
from edgekd.protocols import Preparable, Side, TakingTurns
from edgekd.types import Artifact

import debian
from elsewhere import (
    ENDLESS,
    check_turns,
    lay_cable,
    meanwhile,
    measuring_elsewhere,
    name_of_a_killed_ones,
    running_in,
    said_during_a_run,
    wait_for,
)

SSHD = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
pytestmark = [
    pytest.mark.skipif(SSHD is None, reason="needs sshd: apt-get install openssh-server"),
    pytest.mark.skipif(sys.platform != "linux", reason="processes are counted in /proc"),
]

QUICK = Plan(blocks=2, warmup_runs=3, warmup_s=0.0, min_runs=10, min_s=0.0, max_s=2.0)

File = tuple[Artifact, Path]


@dataclass
class Board:
    """A running sshd, and a TOML that reaches it."""

    process: subprocess.Popen[bytes]
    folder: Path
    port: int
    toml: Path

    def device(self, extra: str = "", identity: str = "") -> SshDevice:
        self.toml.with_name("board.toml").write_text(f"{self.toml.read_text()}{extra}\n[identity]\n{identity}\n")
        device = device_of(load_profile(str(self.toml.with_name("board.toml"))))
        assert isinstance(device, SshDevice)
        return device

    def agents(self) -> list[psutil.Process]:
        """Processes that run below the board's folder: agents, their shells and timers."""
        return running_in(self.folder)

    def measuring(self) -> list[psutil.Process]:
        found = []
        for process in self.agents():
            with contextlib.suppress(psutil.Error):
                if "agent.pyz" in process.cmdline() and "python" in process.name():
                    found.append(process)
        return found

    def left(self) -> list[str]:
        runs = self.folder / "edgekd" / "runs"
        return sorted(path.name for path in runs.iterdir()) if runs.is_dir() else []


def start_sshd(
    folder: Path, address: str = "127.0.0.1", inside: tuple[str, ...] = (), more: str = "PIP_NO_INDEX=1"
) -> Board:
    for name in ("host", "user", "other"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
    shutil.copy(folder / "user.pub", folder / "authorized")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (folder / "sshd_config").write_text(
        textwrap.dedent(f"""
        Port {port}
        ListenAddress {address}
        HostKey {folder}/host
        AuthorizedKeysFile {folder}/authorized
        PidFile none
        UsePAM no
        StrictModes no
        PasswordAuthentication no
        SetEnv OMP_WAIT_POLICY=PASSIVE TMPDIR={folder} {more}
        """)
    )
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # where it drops its privileges; Debian's own start makes it
    key = (folder / "host.pub").read_text().split()
    (folder / "known").write_text(f"[{address}]:{port} {key[0]} {key[1]}\n")
    (folder / "strangers").write_text(
        f"[{address}]:{port} {' '.join((folder / 'other.pub').read_text().split()[:2])}\n"
    )
    (folder / "edgekd").mkdir()
    toml = folder / "base.toml"
    toml.write_text(
        f'extends = "ssh"\n[settings]\nhost = "{address}"\nport = {port}\nkey = "{folder}/user"\nconfig = "none"\n'
        f'known_hosts = "{folder}/known"\nfolder = "{folder}/edgekd"\npython = "{sys.executable}"\n'
    )
    log = (folder / "sshd.log").open("wb")
    assert SSHD is not None
    process = subprocess.Popen([*inside, SSHD, "-D", "-e", "-f", str(folder / "sshd_config")], stderr=log)
    wait_for(lambda: "listening" in (folder / "sshd.log").read_text())
    return Board(process, folder, port, toml)


@pytest.fixture
def board(tmp_path: Path) -> Iterator[Board]:
    board = start_sshd(tmp_path)
    yield board
    stop(board)


def stop(board: Board) -> None:
    for process in (*psutil.Process(board.process.pid).children(recursive=True), *board.agents()):
        with contextlib.suppress(psutil.Error):
            process.kill()
    board.process.kill()
    board.process.wait(60)


def test_the_probe_tells_what_the_board_is_and_runs(board: Board) -> None:
    status = board.device().probe()
    assert status.reachable, status.reason
    assert {"onnx", "tflite"} <= set(status.targets)
    assert status.facts["system"].startswith("Linux ")
    assert "Apple" in status.not_run["coreml"]
    assert board.left() == [], "a probe writes nothing"


def test_blocks_and_outputs_are_those_of_the_same_file_on_the_host(
    board: Board, onnx_file: File, images: np.ndarray
) -> None:
    device = board.device()
    (board.folder / "edgekd" / "runs" / name_of_a_killed_ones("run")).mkdir(parents=True)
    blocks, outputs = device.run(*onnx_file, {"image": images}, QUICK)
    again, _ = device.run(*onnx_file, {"image": images[:1]}, replace(QUICK, blocks=1))
    _, expected = load_device("host").run(*onnx_file, {"image": images}, replace(QUICK, blocks=1))
    np.testing.assert_array_equal(outputs["logits"], expected["logits"])
    assert [len(block.latency_ms) for block in (*blocks, *again)] == [10, 10, 10]
    assert blocks[0].latency_ms != blocks[1].latency_ms
    assert blocks[0].conditions["runtime"].startswith("onnxruntime")
    assert len(board.left()) == 1, "the runs of a sitting share a folder; what a killed process left is gone"
    device.close()
    assert board.left() == []
    wait_for(lambda: not board.agents(), 5)


def test_files_take_turns_in_processes_of_their_own_on_the_board(
    board: Board, onnx_file: File, tflite_file: File, images: np.ndarray, tmp_path: Path
) -> None:
    device = board.device()
    assert issubclass(SshDevice, TakingTurns), "as the gate asks"
    sides = [Side(*file, {file[0].inputs[0].name: images}) for file in (onnx_file, tflite_file)]
    plan = replace(QUICK, min_runs=3000, min_s=0.1, max_s=600.0)  # so many do not fit into two turns
    found = device.run_in_turns(sides, plan, seed=0)
    assert len(board.left()) == 1, "they share the folder of the sitting"
    assert check_turns([block for block, _ in found], plan) > 2
    assert [block.conditions["runtime"].split()[0] for block, _ in found] == ["onnxruntime", "ai-edge-litert"]
    for (_, outputs), (artifact, folder) in zip(found, (onnx_file, tflite_file), strict=True):
        _, expected = load_device("host").run(
            artifact, folder, {artifact.inputs[0].name: images}, replace(QUICK, blocks=1)
        )
        for name, output in expected.items():
            np.testing.assert_array_equal(outputs[name], output)
    (tmp_path / "model.onnx").write_bytes(b"not a model")
    broken = Side(replace(onnx_file[0], path="model.onnx", sha256="0" * 64), tmp_path, {"image": images})
    with (
        contextlib.closing(device),
        pytest.raises(
            DeviceError, match=r"model.tflite \(tflite\) and model.onnx \(onnx\) on board: onnxruntime cannot load"
        ),
    ):
        device.run_in_turns([sides[1], broken], QUICK, seed=0)
    wait_for(lambda: not board.agents() and not board.left(), 20)


def test_a_sitting_measures_two_targets_and_leaves_nothing(board: Board, tflite_file: File, images: np.ndarray) -> None:
    labels = np.zeros(6, np.int64)
    found = measure(*tflite_file, "board", board.device(), {"args_0": images}, labels, None, QUICK)
    assert found.status == "measured"
    assert found.accuracy is not None
    assert found.device.startswith("board (")
    assert board.left() == []


def test_a_board_runs_on_the_cores_it_is_told(board: Board, onnx_file: File, images: np.ndarray) -> None:
    with contextlib.closing(board.device("cores = [0]")) as device:
        blocks, _ = device.run(*onnx_file, {"image": images}, replace(QUICK, blocks=1))
    assert blocks[0].conditions["pinned_to_cores"] == "0"
    with (
        contextlib.closing(board.device("cores = [4000]")) as device,
        pytest.raises(DeviceError, match=r"cores \[4000\] were asked for; this process may use \[0"),
    ):
        device.run(*onnx_file, {"image": images}, replace(QUICK, blocks=1))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ('known_hosts = "{folder}/strangers"', "Host key verification failed.; compare the board's fingerprint"),
        ('known_hosts = "{folder}/nobody"', "Host key verification failed.; compare the board's fingerprint"),
        ('key = "{folder}/other"', r"Permission denied \(publickey.*only keys are used: ssh-copy-id"),
        ("port = 1", "Connection refused"),
    ],
)
def test_a_board_that_cannot_be_trusted_or_reached_says_why(board: Board, setting: str, message: str) -> None:
    text = board.toml.read_text()
    key = setting.split(" =")[0]
    kept = [line for line in text.splitlines() if not line.startswith(f"{key} =")]
    board.toml.write_text("\n".join([*kept, setting.format(folder=board.folder), ""]))
    status = board.device().probe()
    assert not status.reachable
    assert re.search(message, status.reason), status.reason
    assert "\n" not in status.reason
    assert "yes" not in (board.folder / "known").read_text(), "no key is learned"


def test_another_board_is_not_measured_under_this_ones_name(board: Board, onnx_file: File, images: np.ndarray) -> None:
    device = board.device(identity='model = "Raspberry Pi 5"')
    status = device.probe()
    assert not status.reachable
    assert "another device answers at 127.0.0.1: model is 'nothing'; board has 'Raspberry Pi 5'" in status.reason
    with contextlib.closing(device), pytest.raises(DeviceError, match="another device answers"):
        device.run(*onnx_file, {"image": images}, QUICK)
    with pytest.raises(DeviceError, match="board: another device answers"):
        measure(*onnx_file, "board", device, {"image": images}, None, None, QUICK)
    assert board.left() == []


def test_without_an_address_it_says_what_to_write() -> None:
    status = load_device("ssh").probe()
    assert not status.reachable
    assert status.reason == 'no address is known; write a TOML with extends = "ssh" and settings.host'
    with pytest.raises(UsageError, match="is no host name for ssh"):
        Connection("-oProxyCommand=touch /tmp/owned")


def test_a_hostile_file_name_is_only_a_name(board: Board, onnx_file: File, images: np.ndarray, tmp_path: Path) -> None:
    artifact, folder = onnx_file
    (tmp_path / "models").mkdir()
    with contextlib.closing(board.device()) as device:
        for name in ("$(touch owned).onnx", "-rf 'é\n.onnx"):
            shutil.copy(folder / artifact.path, tmp_path / "models" / name)
            blocks, _ = device.run(
                replace(artifact, path=name), tmp_path / "models", {"image": images}, replace(QUICK, blocks=1)
            )
            assert len(blocks) == 1
            assert not list(tmp_path.rglob("owned"))


def during_a_run(board: Board, device: SshDevice, file: File, images: np.ndarray, happens: Callable[[], object]) -> str:
    return said_during_a_run(device, file, images, board.measuring, happens)


def test_an_agent_killed_for_memory_is_told_as_that(board: Board, onnx_file: File, images: np.ndarray) -> None:
    said = during_a_run(board, board.device(), onnx_file, images, lambda: board.measuring()[0].kill())
    assert "model.onnx (onnx fp32) on board: the measuring process was ended by SIGKILL, perhaps for lack" in said
    assert board.left() == []
    wait_for(lambda: not board.agents(), 10)


def test_a_killed_sshd_is_a_clear_line_and_nothing_goes_on_running(
    board: Board, onnx_file: File, images: np.ndarray
) -> None:
    said = during_a_run(board, board.device(), onnx_file, images, lambda: stop_sshd_only(board))
    assert "127.0.0.1 cannot be reached or broke off" in said
    wait_for(lambda: not board.agents() and not board.left(), 20)  # the board itself cleans up when nobody listens


def test_a_gate_whose_board_goes_away_is_inconclusive(board: Board, onnx_file: File, images: np.ndarray) -> None:
    artifact, folder = onnx_file
    pair = Pair("onnx", artifact, folder, replace(artifact, precision="w8a8"), folder)

    def unplug() -> None:
        wait_for(board.measuring)
        wait_for(lambda: not board.measuring())  # one block is whole
        stop_sshd_only(board)

    # So many pairs that they are not all measured before the board is gone, however busy this machine is.
    rule, plan = Rule(looks=(200,), confirm_pairs=6), replace(QUICK, blocks=1)
    with meanwhile(unplug):
        found, _ = gate.compare([pair], "board", board.device(), Samples({"image": images}), rule=rule, plan=plan)
    assert found.verdict == "inconclusive"
    assert any("cannot be reached or broke off" in cell.why for cell in found.cells)
    wait_for(lambda: not board.agents(), 20)  # a folder may stay where nothing ran: the next sitting removes it


def stop_sshd_only(board: Board) -> None:
    """The listener and the processes of its sessions; not what these run."""
    daemons = [child for child in psutil.Process(board.process.pid).children(recursive=True) if child.name() == "sshd"]
    for process in daemons:
        process.kill()
    board.process.kill()


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_nothing_outlives_the_one_that_measures(
    board: Board, onnx_file: File, tmp_path: Path, how: signal.Signals
) -> None:
    board.device()
    with measuring_elsewhere(str(board.folder / "board.toml"), onnx_file, tmp_path) as measuring:
        measuring.wait_for(board.measuring)
        time.sleep(0.5)
        sockets = list(Path("/tmp").glob(f"ekd-*.{measuring.process.pid}.*"))
        assert len(sockets) == 1
        measuring.end(how)
        wait_for(lambda: not board.agents() and not board.left(), 20)
    if how == signal.SIGKILL:  # it removes nothing itself: the next connection does
        Connection("127.0.0.1")
    assert not sockets[0].exists()


def test_an_agent_that_takes_too_long_is_ended_on_the_board(
    board: Board, onnx_file: File, images: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgekd.devices._agents.limit_s", lambda plan, samples: 3.0)
    with contextlib.closing(board.device()) as device:
        with pytest.raises(DeviceError, match="no result after 3 s; the process was stopped"):
            device.run(*onnx_file, {"image": images}, ENDLESS)
        assert not board.measuring()


needs_namespaces = pytest.mark.skipif(
    os.geteuid() != 0 or subprocess.run(["unshare", "-n", "true"], capture_output=True).returncode != 0,
    reason="a network of its own needs root and unshare",
)


@needs_namespaces
def test_a_link_that_goes_down_is_told_and_the_board_ends_by_itself(
    onnx_file: File, images: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_shell, "BEAT_S", 1.0)
    monkeypatch.setitem(_ssh.OPTIONS, "ServerAliveInterval", "1")
    monkeypatch.setitem(_ssh.OPTIONS, "ConnectTimeout", "2")
    space = f"edgekd{os.getpid()}"
    ip = shutil.which("ip", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin") or "ip"
    subprocess.run([ip, "netns", "add", space], check=True)
    try:
        near = lay_cable(f"/run/netns/{space}", "198.18.77")
        board = start_sshd(tmp_path, "198.18.77.2", (ip, "netns", "exec", space))
        try:
            down = [ip, "link", "set", near, "down"]
            said = during_a_run(board, board.device(), onnx_file, images, lambda: subprocess.run(down, check=True))
            assert "198.18.77.2 cannot be reached or broke off" in said
            wait_for(lambda: not board.agents() and not board.left(), 30)
        finally:
            stop(board)
    finally:
        subprocess.run([ip, "netns", "delete", space], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="a small disk is mounted by root")
def test_a_full_disk_on_the_board_is_told_and_cleaned_up(board: Board, onnx_file: File, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "none", str(small)]).returncode != 0:
        pytest.skip("mount is not allowed here")
    try:
        text = board.toml.read_text().replace(f'folder = "{board.folder}/edgekd"', f'folder = "{small}"')
        board.toml.write_text(text)
        many = {"image": np.zeros((1000, 1, 12, 12), np.float32)}
        with (
            contextlib.closing(board.device()) as device,
            pytest.raises(DeviceError, match=r"bytes could not be written to .*inputs.npz: .*No space left on device"),
        ):
            device.run(*onnx_file, many, QUICK)
        assert list((small / "runs").iterdir()) == []
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)


def test_preparing_says_what_it_does_and_a_failure_keeps_what_was_there(board: Board) -> None:
    class Said:
        lines: list[str] = []  # noqa: RUF012

        def say(self, line: str) -> None:
            self.lines.append(line)

    device = board.device()
    assert issubclass(SshDevice, Preparable), "as the command asks"
    kept = board.folder / "edgekd" / "venv" / "kept"
    kept.parent.mkdir()
    kept.write_text("was here")
    # PIP_NO_INDEX stands in the board's environment: nothing is downloaded in a test, so the installation fails.
    with contextlib.closing(device), pytest.raises(DeviceError, match=r"nothing was installed: ERROR: .*numpy"):
        device.prepare(Said())
    assert "numpy, onnxruntime==" in Said.lines[0]
    assert "by pip on the board" in Said.lines[0]
    assert kept.read_text() == "was here"


@pytest.fixture(scope="module")
def arm_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An aarch64 Python of Debian with the aarch64 wheel of ONNX Runtime, run by qemu-user."""
    qemu = shutil.which("qemu-aarch64-static")
    if qemu is None:
        pytest.skip("needs qemu-aarch64-static: apt-get install qemu-user-static")
    folder = tmp_path_factory.mktemp("arm")
    try:
        root = debian.arm64()
        wanted = [f"{name}=={version(name)}" for name in ("onnxruntime", "numpy")]
        platforms = [word for year in ("2_28", "2_27", "2014") for word in ("--platform", f"manylinux{year}_aarch64")]
        platforms = [word.replace("manylinux2_", "manylinux_2_") for word in platforms]
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", *platforms]
        command += ["--python-version", "311", "--dest", str(folder), *wanted]
        subprocess.run(command, check=True, capture_output=True, timeout=300)
    except (OSError, subprocess.SubprocessError) as error:
        pytest.skip(f"an aarch64 Python cannot be had here: {error}")
    site = root / "usr" / "lib" / "python3" / "dist-packages"
    site.mkdir(parents=True, exist_ok=True)
    for wheel in folder.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(site)
    path = folder / "python"
    path.write_text(f'#!/bin/sh\nQEMU_CPU=max exec {qemu} -L {root} {root}/usr/bin/python3.11 "$@"\n')
    path.chmod(0o755)
    return path


@pytest.mark.slow
def test_an_aarch64_board_computes_the_same_and_its_times_are_emulated(
    board: Board, onnx_file: File, images: np.ndarray, arm_python: Path
) -> None:
    board.toml.write_text(board.toml.read_text().replace(sys.executable, str(arm_python)))
    device = board.device()
    status = device.probe()
    assert status.reachable, status.reason
    assert status.facts["system"] == "Linux aarch64"
    assert status.facts["emulated"] == "qemu-user"
    found = measure(*onnx_file, "board", device, {"image": images}, None, None, replace(QUICK, max_s=20.0))
    assert "emulated" in found.flags
    with contextlib.closing(device):
        _, outputs = device.run(*onnx_file, {"image": images}, replace(QUICK, blocks=1, max_s=20.0))
    _, expected = load_device("host").run(*onnx_file, {"image": images}, replace(QUICK, blocks=1))
    np.testing.assert_allclose(outputs["logits"], expected["logits"], atol=1e-5)


@pytest.mark.slow
def test_preparing_puts_the_runtimes_of_this_machine_on_the_board(
    onnx_file: File, images: np.ndarray, tmp_path: Path
) -> None:
    """By pip, from the package index: this one needs the network."""

    class Said:
        def say(self, line: str) -> None:
            """Nobody listens."""

    board = start_sshd(tmp_path, more="")
    try:
        lines = [line for line in board.toml.read_text().splitlines() if not line.startswith("python =")]
        board.toml.write_text("\n".join([*lines, ""]))
        device = board.device()
        assert "edgekd devices prepare board" in device.probe().not_run.get("onnx", "edgekd devices prepare board")
        with contextlib.closing(device):
            device.prepare(Said())
        status = device.probe()
        assert {"onnx", "tflite"} <= set(status.targets)
        with contextlib.closing(device):
            blocks, _ = device.run(*onnx_file, {"image": images}, replace(QUICK, blocks=1))
        assert blocks[0].conditions["runtime"] == f"onnxruntime {version('onnxruntime')}"
        assert (board.folder / "edgekd" / "venv" / "bin" / "python").exists()
    finally:
        stop(board)

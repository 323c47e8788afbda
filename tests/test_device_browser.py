"""The browser device in a real headless Chromium, with the real ONNX Runtime Web and LiteRT.js."""

import http.client
import json
import shutil
import signal
import ssl
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from edgekd.benchmarks import gate
from edgekd.benchmarks.cells import Margins, Pair, Samples, delegation_of
from edgekd.benchmarks.session import measure
from edgekd.devices import _page, browser
from edgekd.devices._chromium import Chromium, find_chromium, remove_profile
from edgekd.devices._folders import made
from edgekd.devices.browser import BrowserDevice
from edgekd.errors import DeviceError, UsageError
from edgekd.measurement import Plan, Profile
from edgekd.profiles import device_of, load_device
from edgekd.protocols import Side, TakingTurns
from edgekd.stages.watching import operator_lines
from edgekd.types import Artifact, TensorSpec

from elsewhere import ENDLESS, check_turns, meanwhile, measuring_elsewhere, running_below, still_runs, wait_for

PROGRAM = find_chromium()
needs_chromium = pytest.mark.skipif(PROGRAM is None, reason="needs Chromium: apt-get install chromium")

QUICK = Plan(blocks=1, warmup_runs=3, warmup_s=0.0, min_runs=10, min_s=0.0, max_s=2.0)
SWIFTSHADER = ["--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader"]

OURS = ("edgekd-", "org.chromium.Chromium.")

File = tuple[Artifact, Path]


@pytest.fixture(autouse=True)
def temporary(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of temporary files; nothing of ours may be left. Not ``tmp_path``: a socket's path has 107 bytes."""
    folder = tmp_path_factory.mktemp("t")
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    monkeypatch.setenv("TMPDIR", str(folder))
    yield folder
    assert not browsers(), "a browser was left running"
    assert [path.name for path in folder.iterdir() if path.name.startswith(OURS)] == []


def browsers() -> list[psutil.Process]:
    return running_below("edgekd-browser-")


def made_device(name: str = "here", identity: dict[str, str] | None = None, **settings: Any) -> BrowserDevice:
    device = device_of(Profile(name, "browser", identity=identity or {}, settings=settings))
    assert isinstance(device, BrowserDevice)
    return device


def on_the_host(file: File, images: np.ndarray) -> np.ndarray:
    artifact, folder = file
    _, outputs = load_device("host").run(artifact, folder, {artifact.inputs[0].name: images}, QUICK)
    return outputs[artifact.outputs[0].name]


@needs_chromium
def test_a_sitting_in_the_browser_gives_the_hosts_outputs(library: Path, file: File, images: np.ndarray) -> None:
    device = load_device("browser")
    top = on_the_host(file, images).argmax(axis=1)
    found = measure(*file, "browser", device, {file[0].inputs[0].name: images}, None, top, replace(QUICK, blocks=2))
    assert found.teacher_agreement == 1.0
    assert "headless" in found.device
    assert not {"emulated", "not_isolated", "void_blocks"} & set(found.flags)
    for block in found.blocks:
        assert len(block.latency_ms) == 10
        assert min(*block.latency_ms, block.first_inference_ms, block.model_load_ms, block.runtime_load_ms) > 0
        assert block.conditions["isolated"] == "true"
        assert block.conditions["timed_to"] == "outputs read back"
        units = delegation_of(block)
        assert list(units) == (["CPUExecutionProvider"] if file[0].target == "onnx" else ["XNNPACK", "CPU"])
        assert next(iter(units.values())) == sum(units.values()) > 2, "all nodes are where they were asked for"
    assert found.blocks[0].conditions["runtime"].startswith(("onnxruntime-web 1.", "@litertjs/core 2."))


@needs_chromium
def test_a_software_gpu_computes_the_same_and_is_told_as_emulated(
    library: Path, file: File, images: np.ndarray
) -> None:
    device = made_device(accelerator="webgpu", flags=SWIFTSHADER)
    blocks, outputs = device.run(*file, {file[0].inputs[0].name: images}, QUICK)
    np.testing.assert_allclose(outputs[file[0].outputs[0].name], on_the_host(file, images), atol=1e-4)
    assert blocks[0].conditions["accelerator"] == "webgpu"
    assert "software GPU" in blocks[0].conditions["emulated"]
    units = delegation_of(blocks[0])
    unit = "WebGpuExecutionProvider" if file[0].target == "onnx" else "WebGPU"
    assert next(iter(units)) == unit
    assert units[unit] == sum(units.values()) > 2
    assert not {"partial_delegation", "delegation_unknown"} & set(blocks[0].conditions)


@needs_chromium
@pytest.mark.parametrize(
    ("settings", "unit"),
    [
        ({}, "CPUExecutionProvider"),
        ({"accelerator": "webgpu", "flags": SWIFTSHADER}, "WebGpuExecutionProvider"),
    ],
    ids=["wasm", "webgpu"],
)
def test_a_profile_times_every_operator_that_onnx_runtime_web_runs(
    library: Path, onnx_file: File, images: np.ndarray, settings: dict[str, Any], unit: str
) -> None:
    plan = replace(QUICK, profile=True)
    found = measure(*onnx_file, "browser", made_device(**settings), {"image": images}, None, None, plan)
    operators = found.blocks[0].operators
    assert sum("Conv" in operator.type for operator in operators) >= 1
    assert {operator.unit for operator in operators} == {unit}
    assert len({operator.name for operator in operators}) == len(operators) > 2
    assert sum(operator.ms for operator in operators) > 0  # whose times they are: tests/test_agent.py
    assert f"{unit}={len(operators)}" in operator_lines(found)[0]


@needs_chromium
def test_litert_js_gives_no_profile_and_the_line_says_so(library: Path, tflite_file: File, images: np.ndarray) -> None:
    found = measure(*tflite_file, "browser", made_device(), {"x": images}, None, None, replace(QUICK, profile=True))
    (line,) = operator_lines(found)
    assert "@litertjs/core 2." in line
    assert "gave no profile; nodes by unit: XNNPACK=" in line


def onnx_with_det(folder: Path) -> Path:
    """A MatMul, a Sigmoid and a Mul, and a Det, which ONNX Runtime's WebGPU provider does not have."""
    onnx = pytest.importorskip("onnx")
    node, whole = onnx.helper.make_node, onnx.helper.make_tensor_value_info
    nodes = [node("MatMul", ["x", "w"], ["a"]), node("Sigmoid", ["a"], ["b"])]
    nodes += [node("Det", ["b"], ["c"]), node("Mul", ["b", "c"], ["y"])]
    weight = onnx.numpy_helper.from_array(np.eye(8, dtype=np.float32), "w")
    ends = [[whole(name, onnx.TensorProto.FLOAT, [1, 8, 8])] for name in "xy"]
    graph = onnx.helper.make_graph(nodes, "with_det", *ends, [weight])
    opset = [onnx.helper.make_opsetid("", 17)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opset, ir_version=8), folder / "part.onnx")
    return folder / "part.onnx"


def tflite_in_six_dimensions(folder: Path) -> Path:
    """A layer, and five operators in six dimensions: LiteRT's WebGPU delegate stops at four, XNNPACK does not."""
    torch, litert_torch = pytest.importorskip("torch"), pytest.importorskip("litert_torch")

    class Turned(torch.nn.Module):  # type: ignore[name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(8, 8)

        def forward(self, x: Any) -> Any:
            turned = self.layer(x).reshape(1, 2, 4, 2, 2, 2).permute(5, 4, 3, 2, 1, 0)
            return torch.sigmoid(turned + 1).reshape(1, 8, 8)

    litert_torch.convert(Turned().eval(), (torch.zeros(1, 8, 8),)).export(str(folder / "part.tflite"))
    return folder / "part.tflite"


@needs_chromium
@pytest.mark.parametrize(
    ("target", "make", "ends", "delegation"),
    [
        ("onnx", onnx_with_det, ("x", "y"), "WebGpuExecutionProvider=3 CPUExecutionProvider=1"),
        ("tflite", tflite_in_six_dimensions, ("args_0", "output_0"), "WebGPU=1 CPU=5"),
    ],
)
def test_nodes_that_the_gpu_lacks_are_counted_and_forbid_a_claim(
    library: Path,
    onnx_file: File,
    tmp_path: Path,
    target: str,
    make: Callable[[Path], Path],
    ends: tuple[str, str],
    delegation: str,
) -> None:
    inputs, outputs = ((TensorSpec(name, (1, 8, 8), "float32"),) for name in ends)
    file = replace(onnx_file[0], target=target, path=make(tmp_path).name, inputs=inputs, outputs=outputs), tmp_path
    device = made_device(accelerator="webgpu", flags=SWIFTSHADER)
    images = np.random.default_rng(0).standard_normal((2, 8, 8)).astype(np.float32)
    found = measure(*file, "browser", device, {ends[0]: images}, None, None, QUICK)
    assert found.blocks[0].conditions["delegation"] == delegation
    assert "partial_delegation" in found.flags


@needs_chromium
@pytest.mark.parametrize(
    ("accelerator", "message"), [("webgpu", "WebGPU but no adapter"), ("webnn", "has no WebNN|WebNN")]
)
def test_an_accelerator_that_the_browser_lacks_is_told_and_not_replaced(
    library: Path, onnx_file: File, images: np.ndarray, accelerator: str, message: str
) -> None:
    with pytest.raises(DeviceError, match=message) as caught:
        made_device(accelerator=accelerator).run(*onnx_file, {"image": images}, QUICK)
    assert "\n" not in str(caught.value)


@needs_chromium
def test_threads_are_the_plans_in_an_isolated_page(library: Path, onnx_file: File, images: np.ndarray) -> None:
    blocks, outputs = made_device().run(*onnx_file, {"image": images}, replace(QUICK, threads=2))
    assert blocks[0].conditions["threads"] == "2"
    assert list(delegation_of(blocks[0])) == ["CPUExecutionProvider"], "threads write to the same console"
    np.testing.assert_allclose(outputs["logits"], on_the_host(onnx_file, images), atol=1e-5)


@needs_chromium
def test_a_page_that_is_not_isolated_says_so_and_refuses_threads(
    library: Path, onnx_file: File, images: np.ndarray
) -> None:
    device = made_device()
    device.isolated = False
    found = measure(*onnx_file, "browser", device, {"image": images}, None, None, QUICK)
    assert "not_isolated" in found.flags
    assert int(found.blocks[0].conditions["timer_step_ns"]) >= 90_000
    with pytest.raises(DeviceError, match="2 threads need a page that is isolated"):
        device.run(*onnx_file, {"image": images}, replace(QUICK, threads=2))


@needs_chromium
def test_a_slowed_browser_that_poses_as_a_phone_is_emulated(library: Path, onnx_file: File, images: np.ndarray) -> None:
    device = made_device(
        cpu_slowdown=4, screen=[412, 915], user_agent="Mozilla/5.0 (Linux; Android 15) Chrome/150.0 Mobile"
    )
    found = measure(*onnx_file, "posing", device, {"image": images}, None, None, QUICK)
    assert "emulated" in found.flags
    conditions = found.blocks[0].conditions
    assert conditions["emulated"] == "posing as a phone, slowed 4 times (a desktop's browser)"
    assert conditions["screen"] == "412x915"
    assert "Android 15" in conditions["user_agent"]
    assert "posing as a phone, slowed 4 times" in found.device


@needs_chromium
def test_another_browser_is_not_measured_under_this_ones_name(
    library: Path, onnx_file: File, images: np.ndarray
) -> None:
    with pytest.raises(DeviceError, match=r"another browser opened the page: .*HeadlessChrome.*; here has 'Firefox'"):
        made_device(identity={"user_agent": "Firefox"}).run(*onnx_file, {"image": images}, QUICK)


def during_a_run(device: BrowserDevice, file: File, images: np.ndarray, happens: Callable[[Chromium], object]) -> Any:
    """What the run gives or raises when something happens while the page measures."""

    def then() -> None:
        wait_for(lambda: device.chromium is not None)
        time.sleep(3.0)
        assert device.chromium is not None, "it was over too soon"
        happens(device.chromium)

    with meanwhile(then):
        try:
            return device.run(*file, {"image": images}, replace(ENDLESS, min_s=4.0, max_s=4.0))
        except DeviceError as error:
            return error


@needs_chromium
def test_a_block_during_which_the_page_was_hidden_is_void(library: Path, onnx_file: File, images: np.ndarray) -> None:
    blocks, _ = during_a_run(made_device(), onnx_file, images, lambda chromium: chromium.open_tab())
    assert blocks[0].void == "the page was hidden: browsers slow down what is not seen"


@needs_chromium
def test_a_page_that_crashes_is_told_at_once(library: Path, onnx_file: File, images: np.ndarray) -> None:
    def crash(chromium: Chromium) -> None:
        for child in psutil.Process(chromium.pid).children(recursive=True):
            if "--type=renderer" in child.cmdline():
                child.kill()

    began = time.monotonic()
    error = during_a_run(made_device(), onnx_file, images, crash)
    assert "its page crashed before it had answered, perhaps for lack of memory" in str(error)
    assert time.monotonic() - began < 40


@needs_chromium
def test_a_browser_that_never_answers_is_ended(
    library: Path, onnx_file: File, images: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(browser, "limit_s", lambda plan, samples: 4.0)
    with pytest.raises(DeviceError, match="the browser gave no result in 4 s"):
        made_device().run(*onnx_file, {"image": images}, ENDLESS)


def test_a_browser_that_never_opens_the_page_is_told(
    library: Path, onnx_file: File, images: np.ndarray, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stuck = tmp_path / "stuck"
    stuck.write_text('#!/bin/sh\n[ "$1" = --version ] && echo Stuck 1.0 && exit\necho it is stuck >&2\nexec sleep 60\n')
    stuck.chmod(0o755)
    monkeypatch.setattr("edgekd.devices._chromium.ANSWER_S", 1.0)
    with pytest.raises(DeviceError, match=r"the browser did not answer Target.createTarget in 1 s"):
        made_device(browser=str(stuck)).run(*onnx_file, {"image": images}, QUICK)
    broken = tmp_path / "broken"
    broken.write_text('#!/bin/sh\n[ "$1" = --version ] && echo Broken 1.0 && exit\necho it is broken >&2\n')
    broken.chmod(0o755)
    with pytest.raises(DeviceError, match="the browser ended: it is broken"):
        made_device(browser=str(broken)).run(*onnx_file, {"image": images}, QUICK)


@needs_chromium
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_no_browser_and_no_folder_outlives_the_process_that_measures(
    library: Path, onnx_file: File, tmp_path: Path, temporary: Path, how: signal.Signals
) -> None:
    with measuring_elsewhere("browser", onnx_file, tmp_path) as measuring:
        measuring.wait_for(lambda: len(browsers()) > 3)
        running = browsers()
        measuring.wait_for(lambda: list(temporary.glob("org.chromium.Chromium.*")))
        measuring.end(how)
        wait_for(lambda: not any(still_runs(one) for one in running), 20)
    if how == signal.SIGKILL:  # a killed process removes nothing: the next one does
        assert list(temporary.iterdir())
        made("edgekd-browser", remove=remove_profile).rmdir()


@needs_chromium
def test_files_take_turns_in_one_page(library: Path, onnx_file: File, tflite_file: File, images: np.ndarray) -> None:
    sides = [Side(*one, {one[0].inputs[0].name: images}) for one in (onnx_file, tflite_file)]
    device = made_device()
    assert issubclass(BrowserDevice, TakingTurns), "as the gate asks"
    plan = replace(QUICK, min_runs=1000, min_s=0.1, max_s=600.0)  # so many do not fit into two turns
    found = device.run_in_turns(sides, plan, seed=0)
    names = [block.conditions["runtime"].partition(" ")[0] for block, _ in found]
    assert names == ["onnxruntime-web", "@litertjs/core"]
    assert check_turns([block for block, _ in found], plan) > 2
    for (_, outputs), file in zip(found, (onnx_file, tflite_file), strict=True):
        np.testing.assert_allclose(outputs[file[0].outputs[0].name], on_the_host(file, images), atol=1e-5)


@needs_chromium
@pytest.mark.slow
def test_a_gate_in_the_browser_passes_a_file_that_is_the_same(
    library: Path, onnx_file: File, images: np.ndarray
) -> None:
    artifact, folder = onnx_file
    pair = Pair("onnx fp32", artifact, folder, replace(artifact, precision="w8a8"), folder)
    samples = Samples({"image": images})
    found, _ = gate.compare([pair], "browser", made_device(), samples, margins=Margins(latency=0.2))
    told = {cell.metric: cell for cell in found.cells}
    assert "cold_start" not in told, "one page loads both, and the first pays for the second"
    assert found.verdict == "pass", told
    assert abs(told["latency"].change or 0) < 0.1


@needs_chromium
@pytest.mark.parametrize("name", ["$(touch owned)'é\n.onnx"])
def test_a_hostile_file_name_is_only_a_name(
    library: Path, onnx_file: File, images: np.ndarray, tmp_path: Path, name: str
) -> None:
    (tmp_path / "models" / "deep").mkdir(parents=True)
    shutil.copy(onnx_file[1] / onnx_file[0].path, tmp_path / "models" / "deep" / name)
    blocks, _ = made_device().run(
        replace(onnx_file[0], path=name), tmp_path / "models" / "deep", {"image": images}, QUICK
    )
    assert len(blocks) == 1
    assert not list(tmp_path.rglob("owned"))


def test_what_it_cannot_run_or_find_is_told(
    onnx_file: File, images: np.ndarray, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=r"here runs onnx, tflite; not 'coreml'"):
        made_device().run(replace(onnx_file[0], target="coreml"), onnx_file[1], {"image": images}, QUICK)
    assert "no browser 'no-such-browser' is installed" in made_device(browser="no-such-browser").probe().reason
    with pytest.raises(UsageError, match=r"settings.accelerator: Input should be 'wasm', 'webgpu' or 'webnn'"):
        made_device(accelerator="npu")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    if PROGRAM:
        assert "the page's runtimes are not installed; edgekd devices prepare here" in made_device().probe().reason
        with pytest.raises(DeviceError, match="nothing is installed; edgekd devices prepare here"):
            made_device().run(*onnx_file, {"image": images}, QUICK)


def test_the_lock_file_pins_every_package_by_its_hash() -> None:
    packages = json.loads(_page._lock())["packages"]
    assert len(packages) > 10
    assert all(value["integrity"].startswith("sha512-") for key, value in packages.items() if key)
    wanted = packages[""]["dependencies"]
    assert {name: packages[f"node_modules/{name}"]["version"] for name in wanted} == wanted


# The link that a person opens.


def ask(server: _page.PageServer, path: str, method: str = "GET", **headers: str) -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    connection.request(method, path, headers=headers)
    return connection.getresponse()


@pytest.fixture
def server() -> Iterator[_page.PageServer]:
    server = _page.PageServer()
    yield server
    server.close()


def test_a_link_works_once_and_only_for_the_browser_that_opened_it(server: _page.PageServer) -> None:
    assert ask(server, "/").status == 403
    assert ask(server, "/?token=wrong").status == 410
    path = server.link.removeprefix(server.origin)
    first = ask(server, path)
    assert (first.status, first.headers["Location"]) == (303, "/")
    cookie = first.headers["Set-Cookie"].partition(";")[0]
    assert {"HttpOnly", "SameSite=Strict"} <= set(first.headers["Set-Cookie"].split("; "))
    assert ask(server, path).status == 410, "the link works once"
    assert ask(server, "/", Cookie=cookie).status == 200
    assert ask(server, "/run.js", Cookie="edgekd=other").status == 403
    assert ask(server, "/result", "POST").status == 403


def test_the_page_serves_its_own_files_and_no_others(server: _page.PageServer) -> None:
    first = ask(server, server.link.removeprefix(server.origin))
    cookie = first.headers["Set-Cookie"].partition(";")[0]
    page = ask(server, "/", Cookie=cookie)
    assert page.headers["Cross-Origin-Opener-Policy"] == "same-origin"
    assert page.headers["Cross-Origin-Embedder-Policy"] == "require-corp"
    for path in ("/../host.py", "/library/../../x", "/page/run.js", "/library/ort/", "/etc/passwd", "//etc/passwd"):
        assert ask(server, path, Cookie=cookie).status == 404, path
    assert ask(server, "/", Cookie=cookie, Host="evil.example").status == 421, "another site may resolve to us"


def test_only_this_machine_is_served_unless_an_address_is_named(server: _page.PageServer) -> None:
    listening = [one for one in psutil.Process().net_connections("tcp") if one.laddr and one.laddr[1] == server.port]
    assert {one.laddr[0] for one in listening if one.status == psutil.CONN_LISTEN} == {"127.0.0.1"}
    with pytest.raises(DeviceError, match="is every network; name the one that the phone is in"):
        made_device(open="link", address="0.0.0.0")._certificate()


@needs_chromium
def test_a_browser_that_opens_the_link_over_tls_is_measured_block_by_block(
    library: Path, onnx_file: File, images: np.ndarray
) -> None:
    """127.0.0.2 stands for an address in the local network: it is not the loopback name, so TLS is used."""
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl")
    device = made_device("phone", open="link", address="127.0.0.2")
    said: list[str] = []
    device.say = said.append
    started: list[Chromium] = []

    def person() -> None:
        wait_for(lambda: said)
        link = next(word for word in said[0].split() if word.startswith("https://127.0.0.2:"))
        assert PROGRAM is not None
        started.append(Chromium(PROGRAM, ("--ignore-certificate-errors",)))
        started[0].call("Page.navigate", {"url": link}, started[0].open_tab())

    try:
        with meanwhile(person):
            found = measure(*onnx_file, "phone", device, {"image": images}, None, None, replace(QUICK, blocks=2))
    finally:
        for one in started:
            one.close()
    assert len(found.blocks) == 2
    assert "not_isolated" not in found.flags
    assert {block.conditions["secure"] for block in found.blocks} == {"true"}
    assert found.blocks[0].latency_ms != found.blocks[1].latency_ms
    assert "the link works once" in said[0]


def test_nobody_who_opens_the_link_is_a_clear_line(
    library: Path, onnx_file: File, images: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(browser, "PATIENCE_S", 0.3)
    device = made_device("phone", open="link")
    device.say = lambda _: None
    with pytest.raises(DeviceError, match=r"nobody opened http://localhost:\d+ in 0 s"):
        device.run(*onnx_file, {"image": images}, QUICK)


def test_a_certificate_of_our_own_names_the_address(tmp_path: Path) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl")
    certificate, key = _page.self_signed(tmp_path, "192.0.2.7")
    told = ssl._ssl._test_decode_cert(str(certificate))  # type: ignore[attr-defined]
    assert told["subjectAltName"] == (("IP Address", "192.0.2.7"),)
    assert key.stat().st_mode & 0o077 == 0

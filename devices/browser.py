"""A browser: the page in ``page/`` runs the file with ONNX Runtime Web or LiteRT.js, timed to the outputs read back.

Three ways to open it: headless here, in a phone's Chrome over ``adb reverse``, or by a link that any browser can open.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field

from edgekd.errors import DataError, DeviceError
from edgekd.measurement import Block, DeviceStatus, Plan, Profile
from edgekd.plugins import missing
from edgekd.protocols import Arrays, Progress, Settings, Side
from edgekd.types import Artifact, Json

from . import _adb, _page
from ._agents import APPLE_ONLY, both, checked_inputs, limit_s, told_of
from ._chromium import Chromium, find_chromium
from ._folders import made, remove
from ._page_job import made_job
from ._placement import operators_in, placement
from .agent.machine import describe_machine, read_state, throttled
from .agent.operators import operator_times

__all__ = ["DEVICE", "BrowserDevice"]

TARGETS = ("onnx", "tflite")
NOT_RUN = {**APPLE_ONLY, "executorch": "no runtime of ExecuTorch for browsers is published"}
HELLO_S = 60.0  # for a browser that we start
PATIENCE_S = 300.0  # for a person who opens a link
EXACT_GPU_CLOCK = ("--enable-webgpu-developer-features",)  # else its timestamps are rounded to 0.1 ms
ANY_ADDRESS = ("0.0.0.0", "::")


class BrowserSettings(Settings):
    accelerator: Literal["wasm", "webgpu", "webnn"] = "wasm"
    open: Literal["headless", "adb", "link"] = Field("headless", description="How the page is opened.")
    browser: str = Field("", description="headless: the program; by default the first Chromium or Chrome.")
    flags: tuple[str, ...] = Field((), description="headless: more of its flags.")
    cpu_slowdown: float = Field(1.0, ge=1.0, description="headless: slow the page down; the numbers are emulated.")
    screen: tuple[int, int] | None = Field(None, description="headless: emulate a phone's screen.")
    user_agent: str = Field("", description="headless: emulate another browser's name.")
    adb: str = Field("adb", description="adb: the client.")
    serial: str = Field("", description="adb: of the phone, where several are attached.")
    package: str = Field("com.android.chrome", description="adb: the browser to open.")
    address: str = Field("127.0.0.1", description="link: of this machine in the local network; TLS is used then.")
    is_elsewhere: bool = Field(False, description="link: the browser is on another device than this.")
    port: int = Field(0, description="link: any free one when 0.")
    certificate: str = Field("", description="link: PEM file that the phone trusts; else one is made, and it asks.")
    certificate_key: str = Field("", description="link: its key.")


class BrowserDevice:
    """Fulfils ``edgekd.protocols.Device``, ``TakingTurns`` and ``Preparable``.

    Attributes:
        say: Told the link and its QR code, where a person must open the page.
        isolated: False serves the page without the headers that isolate it: one thread, and a coarse clock.
        chromium: The browser of the block that runs now.
    """

    def __init__(self, profile: Profile, settings: BrowserSettings) -> None:
        self._profile, self._settings = profile, settings
        self._server: _page.PageServer | None = None
        self._phone: _adb.Phone | None = None
        self._facts: dict[str, str] = {}
        self._folder: Path | None = None
        self.say: Callable[[str], object] = lambda text: sys.stderr.write(f"{text}\n")
        self.isolated = True
        self.chromium: Chromium | None = None

    def probe(self) -> DeviceStatus:
        """Look for the browser or the phone, and the page's runtimes; nothing is started."""
        try:
            facts = self._look()
        except DeviceError as error:
            return DeviceStatus(reachable=False, reason=str(error))
        if not _page.installed():
            return DeviceStatus(
                reachable=False,
                reason=f"the page's runtimes are not installed; edgekd devices prepare {self._profile.name}",
                facts=facts,
            )
        return DeviceStatus(reachable=True, facts=self._profile.facts | facts, targets=TARGETS, not_run=dict(NOT_RUN))

    def run(
        self, artifact: Artifact, folder: Path, inputs: Arrays, plan: Plan
    ) -> tuple[tuple[Block, ...], dict[str, np.ndarray]]:
        """See ``edgekd.protocols.Device``; a block is a fresh browser here, a fresh load of the page on a phone.

        Raises:
            DeviceError: The browser does not open the page, broke off, or its runtime failed.
            UsageError: The browser does not run the target, or the plan has no block.
        """
        what = f"{artifact.path} ({artifact.target} {artifact.precision}) on {self._profile.name}"
        side = Side(artifact, folder, checked_inputs(self._profile.name, artifact, inputs, plan, TARGETS))
        with told_of(what):
            ends = [index == plan.blocks - 1 for index in range(plan.blocks)]
            found = [self._measure([side], plan, wants_outputs=is_last, seed=0)[0] for is_last in ends]
        return tuple(block for block, _ in found), found[-1][1]

    def run_in_turns(
        self, sides: Sequence[Side], plan: Plan, seed: int
    ) -> tuple[tuple[Block, dict[str, np.ndarray]], ...]:
        """See ``edgekd.protocols.TakingTurns``; errors as in ``run``.

        One page holds all files, since of several pages all but one would be hidden; each has its own session.
        """
        name = self._profile.name
        given = [
            replace(side, inputs=checked_inputs(name, side.artifact, side.inputs, plan, TARGETS)) for side in sides
        ]
        with told_of(f"{both(sides)} on {name}"):
            return self._measure(given, plan, wants_outputs=True, seed=seed)

    def close(self) -> None:
        """Stop serving; the phone's page is told that it is done."""
        if self._phone is not None and self._server is not None:
            with contextlib.suppress(DeviceError):
                _adb.reverse(self._phone, self._server.port, remove=True)
        if self._server is not None:
            self._server.close()
        if self._folder is not None:
            remove(self._folder)
        self._server = self._phone = self._folder = None

    def prepare(self, progress: Progress) -> None:
        """Install the page's runtimes with npm into the user's cache.

        Raises:
            DeviceError: npm is missing or fails.
        """
        told = ", ".join(f"{name} {_page.versions()[name]}" for name in ("onnxruntime-web", "@litertjs/core"))
        progress.say(f"{told} into {_page.library()}, by npm ci --ignore-scripts")
        _page.install()

    @property
    def _is_headless(self) -> bool:
        return self._settings.open == "headless"

    def _look(self) -> dict[str, str]:
        """What the browser is.

        Raises:
            DeviceError: It is not there.
        """
        settings = self._settings
        if settings.open == "link":
            if settings.is_elsewhere and settings.address == "127.0.0.1":
                raise DeviceError(
                    f'write a TOML with extends = "{self._profile.name}" and settings.address, '
                    "this machine's address in the local network"
                )
            return {"model": "a browser that opens a link", "opens": "when a person opens the link that is shown"}
        if settings.open == "adb":
            identity = {key: value for key, value in self._profile.identity.items() if key.startswith("ro.")}
            _, properties = _adb.choose(settings.adb, self._profile.name, settings.serial, identity)
            model = properties.get("ro.product.model", "phone")
            return {"model": f"{settings.package} on {model}", "processor": properties.get("ro.soc.model", "")}
        program = find_chromium(settings.browser)
        if program is None:
            raise DeviceError(
                f"no browser {settings.browser!r} is installed"
                if settings.browser
                else "no Chromium or Chrome is installed; apt-get install chromium, or settings.browser"
            )
        try:
            told = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=30)
        except (OSError, subprocess.TimeoutExpired):
            raise DeviceError(f"{program} --version does not answer") from None
        name = " ".join(word for word in told.stdout.split() if not word.startswith("built"))
        machine = describe_machine()
        kept = ("processor", "system", "cores", "governor", "virtual_machine", "emulated")
        facts = {key: machine[key] for key in kept if key in machine}
        emulation = self._emulation()
        return facts | {"model": f"{name}, headless{f', {emulation}' if emulation else ''}"}

    def _emulation(self) -> str:
        settings = self._settings
        slowed = f"slowed {settings.cpu_slowdown:g} times" if settings.cpu_slowdown > 1 else ""
        phone = "posing as a phone" if settings.screen or settings.user_agent else ""
        return ", ".join(word for word in (phone, slowed) if word)

    def _measure(
        self, sides: Sequence[Side], plan: Plan, wants_outputs: bool, seed: int
    ) -> tuple[tuple[Block, dict[str, np.ndarray]], ...]:
        """A block of each side, in one load of the page, and the outputs where they are wanted."""
        if not _page.installed():
            raise DeviceError(f"nothing is installed; edgekd devices prepare {self._profile.name}")
        job = made_job(sides, plan, self._settings.accelerator, wants_outputs, seed)
        blocks = self._here(job, plan) if self._is_headless else self._there(job, plan)
        found = []
        for number, (side, block) in enumerate(zip(sides, blocks, strict=True)):
            names = [spec.name for spec in side.artifact.outputs] if wants_outputs else []
            came = [index for index in range(len(names)) if (number, index) in job.outputs]
            if len(came) != len(names):
                raise DataError(f"{side.artifact.path}: the page sent {len(came)} of {len(names)} outputs")
            found.append((block, {names[index]: job.outputs[number, index] for index in came}))
        return tuple(found)

    def _here(self, job: _page.Job, plan: Plan) -> list[Block]:
        """The blocks of a job in a fresh browser with a fresh profile, which ends with it."""
        settings = self._settings
        facts = self._look()
        program = find_chromium(settings.browser)
        assert program is not None
        server = _page.PageServer(isolated=self.isolated)
        before = read_state()
        try:
            flags = (*settings.flags, *(EXACT_GPU_CLOCK if plan.profile else ()))
            chromium = self.chromium = Chromium(program, flags)
            try:
                tab = chromium.open_tab()
                if settings.cpu_slowdown > 1:
                    chromium.call("Emulation.setCPUThrottlingRate", {"rate": settings.cpu_slowdown}, tab)
                if settings.user_agent:
                    chromium.call("Emulation.setUserAgentOverride", {"userAgent": settings.user_agent}, tab)
                if settings.screen:
                    width, height = settings.screen
                    screen = {"width": width, "height": height, "deviceScaleFactor": 2, "mobile": True}
                    chromium.call("Emulation.setDeviceMetricsOverride", screen, tab)
                chromium.call("Page.navigate", {"url": server.link}, tab)
                if not server.wait_for_hello(HELLO_S):
                    raise DeviceError(f"the browser did not open the page in {HELLO_S:.0f} s: {chromium.last_words()}")
                blocks = self._answer(server, job, plan, lambda: chromium.is_running)
            finally:
                chromium.close()
                self.chromium = None
        finally:
            server.close()
        around = {f"{key}_before": value for key, value in before.items()}
        around |= {f"{key}_after": value for key, value in read_state().items()}
        slowed = throttled(around.get("throttle_before", ""), around.get("throttle_after", ""))
        emulation, found = self._emulation(), []
        for block in blocks:
            conditions = facts | block.conditions | around
            if emulation:
                emulated = (conditions.get("emulated", ""), f"{emulation} (a desktop's browser)")
                conditions["emulated"] = "; ".join(word for word in emulated if word)
            found.append(replace(block, conditions=_without_empty(conditions), void=block.void or slowed))
        return found

    def _there(self, job: _page.Job, plan: Plan) -> list[Block]:
        """The blocks of a job in the browser that a person or a phone opened; it stays open for the next."""
        blocks = self._answer(self._serve(), job, plan, lambda: True)
        return [replace(block, conditions=_without_empty(self._facts | block.conditions)) for block in blocks]

    def _answer(
        self, server: _page.PageServer, job: _page.Job, plan: Plan, is_alive: Callable[[], bool]
    ) -> list[Block]:
        """The page's answer to a job, with what the page told of itself."""
        self._recognize(server.facts)
        limit = sum(limit_s(plan, side["batches"]) for side in job.told["sides"])
        result = server.run(job, limit, is_alive)
        if result is None and not is_alive():
            raise DeviceError("the browser or its page crashed before it had answered, perhaps for lack of memory")
        if result is None:
            raise DeviceError(f"the browser gave no result in {limit:.0f} s")
        if "error" in result:
            raise DeviceError(" ".join(str(result["error"]).split())[:500])
        told = {f"browser_{key}" if key == "cores" else key: value for key, value in server.facts.items()}
        found = []
        for side, model, block in zip(job.told["sides"], job.models, result["blocks"], strict=True):
            target, operators = side["target"], operators_in(model) if side["target"] == "tflite" else 0
            placed = placement(target, job.told["accelerator"], block.pop("placement"), operators)
            whole = Block.from_json(block | {"operators": _operators(block.pop("profile"))})
            found.append(replace(whole, conditions=told | whole.conditions | placed))
        return found

    def _recognize(self, facts: dict[str, str]) -> None:
        wanted = self._profile.identity.get("user_agent", "")
        if wanted and wanted not in facts.get("user_agent", ""):
            raise DeviceError(
                f"another browser opened the page: {facts.get('user_agent', '')!r}; "
                f"{self._profile.name} has {wanted!r} in its name"
            )

    def _serve(self) -> _page.PageServer:
        """The server of this sitting, once a browser has opened its page."""
        if self._server is not None:
            return self._server
        settings = self._settings
        self._facts = self._look()
        if settings.open == "adb":
            server = self._server = _page.PageServer(isolated=self.isolated)
            identity = {key: value for key, value in self._profile.identity.items() if key.startswith("ro.")}
            phone, _ = _adb.choose(settings.adb, self._profile.name, settings.serial, identity)
            self._phone = phone
            _adb.reverse(phone, server.port)
            _adb.view(phone, server.link, settings.package)
            if not server.wait_for_hello(HELLO_S):
                self.close()
                raise DeviceError(f"{settings.package} on {phone.serial} did not open the page in {HELLO_S:.0f} s")
            return server
        server = self._server = _page.PageServer(
            settings.address, settings.port, self._certificate(), isolated=self.isolated
        )
        self.say(_invitation(server.link))
        if not server.wait_for_hello(PATIENCE_S):
            self.close()
            raise DeviceError(f"nobody opened {server.origin} in {PATIENCE_S:.0f} s")
        return server

    def _certificate(self) -> tuple[Path, Path] | None:
        """TLS wherever the page leaves this machine: without it a browser gives neither threads nor WebGPU."""
        settings = self._settings
        if settings.address in ANY_ADDRESS:
            raise DeviceError(
                f"settings.address {settings.address} is every network; name the one that the phone is in"
            )
        if settings.certificate:
            return Path(settings.certificate).expanduser(), Path(settings.certificate_key).expanduser()
        if settings.address in ("127.0.0.1", "localhost"):
            return None
        self._folder = made("edgekd-page")
        return _page.self_signed(self._folder, settings.address)


def _without_empty(conditions: dict[str, str]) -> dict[str, str]:
    return {key: value for key, value in conditions.items() if value}


def _operators(told: Json) -> list[Json]:
    """What the page heard of ONNX Runtime Web's profile, an event a line; a GPU's times are those of its timestamps.

    Raises:
        DeviceError: The file could not be loaded with a profile.
    """
    if "error" in told:
        raise DeviceError(f"the operators could not be timed: {told['error']}")
    return operator_times([json.loads(line.rstrip().removesuffix(",")) for line in told["lines"]])


def _invitation(link: str) -> str:
    """The link, and a QR code of it where segno is installed."""
    text = f"open this on the device, within {PATIENCE_S:.0f} s; the link works once:\n{link}"
    if missing(("segno",)):
        return f"{text}\n(pip install 'edgekd[browser]' shows it as a QR code too)"
    import io

    import segno

    drawn = io.StringIO()
    segno.make(link, error="l").terminal(drawn, compact=True)
    return f"{text}\n{drawn.getvalue()}"


class _Browser:
    settings = BrowserSettings

    def __call__(self, profile: Profile, settings: BrowserSettings) -> BrowserDevice:
        return BrowserDevice(profile, settings)


DEVICE = _Browser()

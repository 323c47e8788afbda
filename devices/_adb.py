"""Phones by the ``adb`` client: which are attached, commands on one of them, files to and from it."""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from edgekd.errors import DeviceError

from ._shell import GRACE_S, Ended, run_beating

__all__ = ["Phone", "attached", "choose", "reverse", "view"]

ANSWER_S = 60
COPY_S = 600
INSTALL = "adb is not installed: apt-get install adb, or Android's platform-tools"

STATES = {
    "unauthorized": "unlock it and allow this computer",
    "offline": "it does not answer; plug it in again",
    "no permissions": "the system does not let you at its USB port; see https://developer.android.com/tools/device",
}


@dataclass(frozen=True)
class Phone:
    """One attached phone.

    Attributes:
        adb: The client.
        serial: As ``adb devices`` has it; every command names it.
    """

    adb: str
    serial: str

    def run(self, script: str, data: bytes | None = None, limit_s: float = ANSWER_S) -> Ended:
        """Run a script in the phone's shell.

        Raises:
            DeviceError: The phone does not answer, or is gone.
        """
        return self._ended(_adb(self.adb, ["-s", self.serial, "shell", "-T", script], data, limit_s))

    def run_watched(self, script: str, limit_s: float) -> Ended:
        """Run a script of ``_shell.watched``.

        Raises:
            DeviceError: The phone does not answer, or is gone.
        """
        try:
            return self._ended(run_beating([self.adb, "-s", self.serial, "shell", "-T", script], limit_s))
        except subprocess.TimeoutExpired:
            raise DeviceError(f"{self.serial} did not answer in {limit_s + GRACE_S:.0f} s") from None

    def push(self, source: Path, path: str) -> None:
        """Copy a file to the phone.

        Raises:
            DeviceError: The storage is full, or the phone is gone.
        """
        done = _adb(self.adb, ["-s", self.serial, "push", str(source.resolve()), path], None, COPY_S)
        if done.code != 0:
            size = source.stat().st_size
            raise DeviceError(f"{self.serial}: {size:,} bytes could not be written to {path}: {_last(done)}")

    def pull(self, path: str, target: Path) -> None:
        """Copy a file from the phone.

        Raises:
            DeviceError: It is not there, or the phone is gone.
        """
        done = _adb(self.adb, ["-s", self.serial, "pull", path, str(target.resolve())], None, COPY_S)
        if done.code != 0:
            raise DeviceError(f"{self.serial}: {path} could not be read: {_last(done)}")

    def properties(self) -> dict[str, str]:
        """What ``getprop`` tells, by key."""
        found = {}
        for line in self.run("getprop").out.decode(errors="replace").splitlines():
            key, middle, value = line.strip().partition("]: [")
            if middle:
                found[key.removeprefix("[")] = value.removesuffix("]")
        return found

    def _ended(self, done: Ended) -> Ended:
        """The client's own failures have exit code 1 as well, but a line of its own."""
        if done.code < 0 or (done.code != 0 and _last(done).startswith(("error:", "adb: error:", "adb: device"))):
            raise DeviceError(f"{self.serial} is gone: {_last(done)}")
        if done.code == 255:  # the shell protocol broke off before it told an exit code
            raise DeviceError(f"{self.serial} broke off: {_last(done)}")
        return done


def attached(adb: str) -> dict[str, str]:
    """Serials of all attached phones, and the state of each: ``device`` when it can be used.

    Raises:
        DeviceError: adb is not installed, or its server does not answer.
    """
    done = _adb(adb, ["devices"], None, ANSWER_S)
    if done.code != 0:
        raise DeviceError(f"adb devices failed: {_last(done)}")
    lines = [line for line in done.out.decode(errors="replace").splitlines() if "\t" in line]
    return {serial: state.strip() for serial, _, state in (line.partition("\t") for line in lines)}


def choose(adb: str, name: str, serial: str, identity: Mapping[str, str]) -> tuple[Phone, dict[str, str]]:
    """The one attached phone that is meant, and its properties.

    Args:
        name: Of the device, for the messages.
        serial: The one to take; when empty, the one whose properties are those of ``identity``.
        identity: Properties: ``ro.product.model`` ….

    Raises:
        DeviceError: None or several are meant, or the one that is meant cannot be used.
    """
    states = attached(adb)
    if serial:
        if serial not in states:
            raise DeviceError(f"no phone {serial} is attached; there are {', '.join(states) or 'none'}")
        states = {serial: states[serial]}
    if not states:
        raise DeviceError("no phone is attached; connect one with USB debugging on, and see adb devices")
    ready = [one for one, state in states.items() if state == "device"]
    if not ready:
        one, state = next(iter(states.items()))
        hint = next((mend for word, mend in STATES.items() if state.startswith(word)), "see adb devices")
        raise DeviceError(f"phone {one} is {state}: {hint}")
    phones = [(Phone(adb, one), Phone(adb, one).properties()) for one in ready]
    meant = [one for one in phones if not _differs(one[1], identity)]
    if len(meant) == 1:
        return meant[0]
    if meant:
        serials = ", ".join(phone.serial for phone, _ in meant)
        raise DeviceError(f"{len(meant)} phones could be {name}: {serials}; name one with settings.serial")
    seen = "; ".join(f"{phone.serial}: {_differs(properties, identity)}" for phone, properties in phones)
    raise DeviceError(f"another phone is attached ({seen})")


def reverse(phone: Phone, port: int, remove: bool = False) -> None:
    """Let the phone's own localhost lead to a port of this machine; such an address is a secure context there.

    Raises:
        DeviceError: The phone refuses, or is gone.
    """
    what = ["reverse", "--remove", f"tcp:{port}"] if remove else ["reverse", f"tcp:{port}", f"tcp:{port}"]
    done = _adb(phone.adb, ["-s", phone.serial, *what], None, ANSWER_S)
    if done.code != 0:
        raise DeviceError(f"{phone.serial}: adb {what[0]} failed: {_last(done)}")


def view(phone: Phone, link: str, package: str) -> None:
    """Open a link in a browser of the phone.

    Raises:
        DeviceError: The phone has no such browser, or is gone.
    """
    script = f"am start -a android.intent.action.VIEW -d {shlex.quote(link)} {shlex.quote(package)}"
    done = phone.run(script)
    said = done.out.decode(errors="replace") + done.err
    if done.code != 0 or "Error:" in said:
        raise DeviceError(f"{phone.serial}: {package} cannot open the page: {_last(done)}")


def _differs(properties: Mapping[str, str], identity: Mapping[str, str]) -> str:
    for key, wanted in identity.items():
        if properties.get(key, "") != wanted:  # a Pixel 9 Pro is no Pixel 9
            return f"{key} is {properties.get(key, '')!r}, not {wanted!r}"
    return ""


def _adb(adb: str, arguments: Sequence[str], data: bytes | None, limit_s: float) -> Ended:
    try:
        done = subprocess.run([adb, *arguments], input=data or b"", capture_output=True, timeout=limit_s)
    except FileNotFoundError:
        raise DeviceError(INSTALL) from None
    except subprocess.TimeoutExpired:
        raise DeviceError(f"adb {arguments[0]} did not answer in {limit_s:.0f} s") from None
    return Ended(done.returncode, done.stdout, done.stderr.decode(errors="replace"))


def _last(done: Ended) -> str:
    text = f"{done.out.decode(errors='replace')}\n{done.err}"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if "error:" in line]  # a summary of what was copied may follow it
    return (errors or lines or ["the connection ended"])[-1]

"""A headless Chromium with a fresh profile, told what to do over a pipe; it ends when the pipe does."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

from edgekd.errors import DeviceError
from edgekd.types import Json

from ._folders import made, remove

__all__ = ["Chromium", "find_chromium", "remove_profile"]

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "microsoft-edge")
PLACES = (
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
    "/Applications/Chromium.app/Contents/MacOS/Chromium",
)
FLAGS = (
    "--headless=new",
    "--remote-debugging-pipe",
    "--no-first-run",
    "--no-default-browser-check",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-default-apps",
    "--disable-extensions",
    "--disable-sync",
    "--metrics-recording-only",
    "--password-store=basic",
    "--use-mock-keychain",
)
ANSWER_S = 30.0


def find_chromium(named: str = "") -> str | None:
    """The browser that is named, or the first that is installed; None when there is none."""
    if named:
        return shutil.which(named) or (named if Path(named).is_file() else None)
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    return found or next((place for place in PLACES if Path(place).is_file()), None)


def remove_profile(folder: Path) -> None:
    """The folder of a browser that has ended, and what it made beside it.

    A browser that is killed leaves the folder of its socket among the temporary files; the profile has a link to it
    (Chromium's process_singleton_posix.cc).
    """
    with contextlib.suppress(OSError):
        beside = (folder / "profile" / "SingletonSocket").readlink().parent
        if "org.chromium.Chromium" in beside.name:
            remove(beside)
    remove(folder)


class Chromium:
    """One run of the browser. ``close`` ends it and removes its profile; so does the end of this process.

    Commands are those of the DevTools protocol: https://chromedevtools.github.io/devtools-protocol/
    """

    def __init__(self, program: str, flags: tuple[str, ...] = ()) -> None:
        self._folder = made("edgekd-browser", remove=remove_profile)
        log = self._folder / "stderr.txt"
        arguments = [program, *FLAGS, f"--user-data-dir={self._folder}/profile", *flags, "about:blank"]
        if os.geteuid() == 0:
            arguments.insert(1, "--no-sandbox")  # Chromium's sandbox refuses root
        inner_read, self._write = os.pipe()
        self._read, inner_write = os.pipe()
        # The browser reads commands from descriptor 3 and answers on 4.
        high = [fcntl.fcntl(one, fcntl.F_DUPFD, 20) for one in (inner_read, inner_write)]
        actions = [
            (os.POSIX_SPAWN_DUP2, high[0], 3),
            (os.POSIX_SPAWN_DUP2, high[1], 4),
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0),
            (os.POSIX_SPAWN_OPEN, 2, str(log), os.O_WRONLY | os.O_CREAT, 0o600),
        ]
        environment = {**os.environ, "HOME": str(self._folder)}
        try:
            self.pid = os.posix_spawn(program, arguments, environment, file_actions=actions, setpgroup=0)
        except OSError as error:
            remove(self._folder)
            raise DeviceError(f"{program} cannot be started: {error.strerror}") from None
        finally:
            for one in (inner_read, inner_write, *high):
                os.close(one)
        self._number = 0
        self._answers: dict[int, Json] = {}
        self._changed = threading.Condition()
        self._ended = False
        self.has_crashed = False
        threading.Thread(target=self._listen, daemon=True).start()

    @property
    def is_running(self) -> bool:
        """False once the browser has ended, or the page in it has crashed."""
        return not self._ended and not self.has_crashed

    def open_tab(self) -> str:
        """A tab of its own, in front of the others.

        Returns:
            Its session, for ``call``.
        """
        target = self.call("Target.createTarget", {"url": "about:blank"})["targetId"]
        session: str = self.call("Target.attachToTarget", {"targetId": target, "flatten": True})["sessionId"]
        self.call("Inspector.enable", session=session)  # tells when the page crashes
        return session

    def call(self, method: str, parameters: Json | None = None, session: str | None = None) -> Any:
        """One command of the protocol, and its answer.

        Raises:
            DeviceError: The browser ended, does not answer, or refuses.
        """
        with self._changed:
            self._number += 1
            number = self._number
        message: Json = {"id": number, "method": method, "params": parameters or {}}
        if session is not None:
            message["sessionId"] = session
        try:
            os.write(self._write, json.dumps(message).encode() + b"\0")
        except OSError:
            raise DeviceError(f"the browser ended: {self.last_words()}") from None
        with self._changed:
            self._changed.wait_for(lambda: number in self._answers or self._ended, ANSWER_S)
            answer = self._answers.pop(number, None)
        if answer is None:
            why = f"ended: {self.last_words()}" if self._ended else f"did not answer {method} in {ANSWER_S:.0f} s"
            raise DeviceError(f"the browser {why}")
        if "error" in answer:
            raise DeviceError(f"the browser refused {method}: {answer['error'].get('message', '')}")
        return answer["result"]

    def last_words(self) -> str:
        with contextlib.suppress(OSError):
            text = (self._folder / "stderr.txt").read_text(errors="replace")
            lines = [line.strip() for line in text.splitlines() if line.strip()]
            if lines:
                return lines[-1]
        return "it said nothing"

    def close(self) -> None:
        """End the browser with all its processes, and remove its profile."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.pid, 0)
        with contextlib.suppress(OSError):
            os.close(self._write)
        end = time.monotonic() + 5
        while self._folder.exists() and time.monotonic() < end:  # its last processes may still write
            remove_profile(self._folder)

    def _listen(self) -> None:
        rest = b""
        while chunk := os.read(self._read, 1 << 16):
            *messages, rest = (rest + chunk).split(b"\0")
            with self._changed:
                for message in messages:
                    told = json.loads(message)
                    if "id" in told:
                        self._answers[told["id"]] = told
                    elif told["method"] == "Inspector.targetCrashed":
                        self.has_crashed = True
                self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()
        os.close(self._read)

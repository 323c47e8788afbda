"""One connection to a machine by the OpenSSH client: the user's own keys, configuration and known hosts are used."""

from __future__ import annotations

import shlex
import subprocess
import weakref
from dataclasses import dataclass, field
from pathlib import Path

from edgekd.errors import DeviceError, UsageError

from ._folders import made, remove
from ._shell import GRACE_S, Ended, run_beating

__all__ = ["Connection"]

ANSWER_S = 60  # for a command that only looks
COPY_S = 600  # for one file

# An unknown host key is refused, not learned; nothing is asked on a terminal; nothing of ours is lent to the board.
OPTIONS = {
    "BatchMode": "yes",
    "StrictHostKeyChecking": "yes",
    "PasswordAuthentication": "no",
    "KbdInteractiveAuthentication": "no",
    "ForwardAgent": "no",
    "ForwardX11": "no",
    "ClearAllForwardings": "yes",
    "PermitLocalCommand": "no",
    "ConnectTimeout": "10",
    "ServerAliveInterval": "5",
    "ServerAliveCountMax": "3",
    "ControlMaster": "auto",
    "ControlPersist": "60",
    "LogLevel": "ERROR",
}


@dataclass
class Connection:
    """Commands over one shared connection (ControlMaster), which ``close`` ends.

    Attributes:
        host: Name or address, or an alias of the user's ``~/.ssh/config``.
        options: More of OpenSSH's options.
        config: Configuration to read instead of the user's; ``none`` for none.
    """

    host: str
    options: dict[str, str] = field(default_factory=dict)
    config: str | None = None

    def __post_init__(self) -> None:
        if not self.host or self.host.startswith("-"):
            raise UsageError(f"{self.host!r} is no host name for ssh")
        # A socket's path may have 104 bytes: the folder of temporary files may be too deep, and %C has 40.
        self._sockets = made("ekd", Path("/tmp") if Path("/tmp").is_dir() else None)
        weakref.finalize(self, remove, self._sockets)

    def run(self, script: str, data: bytes | None = None, limit_s: float = ANSWER_S) -> Ended:
        """Run a script in the machine's sh.

        Raises:
            DeviceError: The machine does not answer, or broke off.
        """
        try:
            done = subprocess.run(self._call(script), input=data or b"", capture_output=True, timeout=limit_s)
        except subprocess.TimeoutExpired:
            raise DeviceError(f"{self.host} did not answer in {limit_s:.0f} s") from None
        return self._ended(Ended(done.returncode, done.stdout, done.stderr.decode(errors="replace")))

    def run_watched(self, script: str, limit_s: float) -> Ended:
        """Run a script of ``_shell.watched``.

        Raises:
            DeviceError: The machine does not answer, or broke off.
        """
        try:
            return self._ended(run_beating(self._call(script), limit_s))
        except subprocess.TimeoutExpired:
            raise DeviceError(f"{self.host} did not answer in {limit_s + GRACE_S:.0f} s") from None

    def put(self, content: bytes, path: str) -> None:
        """Write a file, whole or not at all.

        Raises:
            DeviceError: The disk is full, or the machine broke off.
        """
        partial, final = shlex.quote(f"{path}.partial"), shlex.quote(path)
        done = self.run(f"cat >{partial} && mv {partial} {final} || {{ rm -f {partial}; exit 1; }}", content, COPY_S)
        if done.code != 0:
            raise DeviceError(f"{self.host}: {len(content):,} bytes could not be written to {path}: {_last(done.err)}")

    def get(self, path: str) -> bytes:
        """A file's content.

        Raises:
            DeviceError: It is not there, or the machine broke off.
        """
        done = self.run(f"cat {shlex.quote(path)}", limit_s=COPY_S)
        if done.code != 0:
            raise DeviceError(f"{self.host}: {path} could not be read: {_last(done.err)}")
        return done.out

    def close(self) -> None:
        """End the shared connection; no error when there is none."""
        if any(self._sockets.iterdir()):
            call = self._call("")
            subprocess.run([*call[:-2], "-O", "exit", *call[-2:-1]], capture_output=True, timeout=ANSWER_S)

    def _call(self, script: str) -> list[str]:
        options = OPTIONS | {"ControlPath": f"{self._sockets}/%C"} | self.options
        words = [word for key, value in options.items() for word in ("-o", f"{key}={value}")]
        config = ["-F", self.config] if self.config else []
        return ["ssh", "-T", *config, *words, self.host, f"exec sh -c {shlex.quote(script)}"]

    def _ended(self, done: Ended) -> Ended:
        if done.code == 255 or done.code < 0:  # 255 is ssh's own; below 0 the client was killed
            raise DeviceError(f"{self.host} cannot be reached or broke off: {_last(done.err)}{self._hint(done.err)}")
        return done

    def _hint(self, said: str) -> str:
        if "Host key verification failed" in said or "host key is known" in said:
            return f"; compare the board's fingerprint, then: ssh-keyscan {self.host} >> ~/.ssh/known_hosts"
        if "Permission denied" in said:
            return f"; only keys are used: ssh-copy-id {self.host}"
        return ""


def _last(said: str) -> str:
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    return lines[-1] if lines else "the connection ended"

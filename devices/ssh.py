"""A Linux board or machine over OpenSSH: every block is a fresh process of the agent, there.

Nothing is installed but by ``edgekd devices prepare``. A sitting keeps its files in a folder of its own and removes it.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path

import numpy as np
from pydantic import Field

from edgekd.errors import DataError, DeviceError
from edgekd.measurement import Block, DeviceStatus, Plan, Profile
from edgekd.protocols import Arrays, Progress, Settings, Side
from edgekd.types import Artifact, Json

from ._agents import (
    AGENT,
    NOT_RUN,
    RUNTIMES,
    WITH_OUTPUTS,
    both,
    checked_inputs,
    in_turns,
    jobs_of,
    last_words,
    limit_s,
    make_job,
    packed_agent,
    samples_in,
    told_of,
    write_inputs,
)
from ._folders import new_name, own_folder, stale
from ._shell import safe_name, watched
from ._ssh import Connection
from .agent.runtimes import DECODERS

__all__ = ["DEVICE", "SshDevice"]

PYTHON = "venv/bin/python"  # below the folder
TARGETS = ("onnx", "ort", "tflite")  # what prepare installs: ExecuTorch's runtime for Python brings all of PyTorch
INSTALL_S = 1800
STALE_MINUTES = 24 * 60  # a folder of a sitting this old belongs to nobody, whichever machine made it


class SshSettings(Settings):
    host: str = Field("", description="Name, address, or an alias of ~/.ssh/config.")
    port: int | None = Field(None, description="By default ssh's own configuration.")
    user: str | None = Field(None, description="The same.")
    key: str | None = Field(None, description="File of the private key; by default ssh's own choice.")
    known_hosts: str | None = Field(None, description="File of host keys instead of ~/.ssh/known_hosts.")
    config: str | None = Field(None, description="Configuration file instead of ~/.ssh/config; 'none' for none.")
    folder: str = Field("~/.edgekd", description="Of edgekd on the board.")
    python: str = Field("", description="Interpreter there that has the runtimes; by default what prepare installs.")
    cores: tuple[int, ...] = Field((), description="Processors to run on; all when empty.")


@dataclass
class _Sitting:
    """What the runs of one sitting leave for one another.

    Attributes:
        folder: On the board.
        sent: Names of files there, to the digest of what they hold.
    """

    folder: str
    python: str
    sent: dict[str, str] = field(default_factory=dict)


class SshDevice:
    """Fulfils ``edgekd.protocols.Device``, ``TakingTurns`` and ``Preparable``."""

    def __init__(self, profile: Profile, settings: SshSettings) -> None:
        self._profile, self._settings = profile, settings
        self._connection: Connection | None = None
        self._sitting: _Sitting | None = None

    def probe(self) -> DeviceStatus:
        """Ask the machine what it is and which runtimes it has; nothing is written there."""
        if not self._settings.host:
            return DeviceStatus(
                reachable=False,
                reason=f'no address is known; write a TOML with extends = "{self._profile.name}" and settings.host',
            )
        try:
            found = self._look()
        except DeviceError as error:
            return DeviceStatus(reachable=False, reason=str(error))
        finally:
            if self._sitting is None:
                self.close()
        not_run = dict(NOT_RUN)
        targets = []
        for target, packages in RUNTIMES.items():
            if packages.module in found["modules"]:
                targets.append(target)
            elif target in TARGETS:
                not_run[target] = f"{packages.module} is not on the board; edgekd devices prepare {self._profile.name}"
            else:
                not_run[target] = f"{packages.module} is not on the board; settings.python may name one that has it"
        facts = self._profile.facts | found["facts"]
        decodes = tuple(target for target in targets if target in DECODERS)
        return DeviceStatus(reachable=True, facts=facts, targets=tuple(targets), not_run=not_run, decodes=decodes)

    def run(
        self, artifact: Artifact, folder: Path, inputs: Arrays, plan: Plan
    ) -> tuple[tuple[Block, ...], dict[str, np.ndarray]]:
        """See ``edgekd.protocols.Device``; the process of the last block computes the outputs, after its timing.

        Raises:
            DeviceError: The board is away, is another one, or a process failed; with its last words.
            UsageError: The board does not run the target, or the plan has no block.
        """
        what = f"{artifact.path} ({artifact.target} {artifact.precision}) on {self._profile.name}"
        inputs = checked_inputs(self._profile.name, artifact, inputs, plan, tuple(RUNTIMES))
        with told_of(what):
            return self._run(artifact, folder, inputs, plan)

    def run_in_turns(
        self, sides: Sequence[Side], plan: Plan, seed: int
    ) -> tuple[tuple[Block, dict[str, np.ndarray]], ...]:
        """See ``edgekd.protocols.TakingTurns``; errors as in ``run``."""
        name = self._profile.name
        given = [checked_inputs(name, side.artifact, side.inputs, plan, tuple(RUNTIMES)) for side in sides]
        with told_of(f"{both(sides)} on {name}"):
            sitting = self._sit()
            folders = [f"{sitting.folder}/{index}" for index in range(len(sides))]
            self._open().run(f"mkdir -p {shlex.join(folders)}")
            for index, (side, inputs) in enumerate(zip(sides, given, strict=True)):
                job = self._send_files(sitting, side.artifact, side.folder, inputs, plan, f"{index}/") | WITH_OUTPUTS
                self._send(sitting, f"{index}/job.json", json.dumps(job).encode())
            jobs = [f"{index}/job.json" for index in range(len(sides))]
            samples = sum(map(samples_in, given))
            self._process(sitting, in_turns(jobs, plan, seed), len(sides) * limit_s(plan, samples))
            return tuple((self._read_block(folder), self._read_outputs(folder)) for folder in folders)

    def close(self) -> None:
        """Remove the sitting's folder and end the connection; no error when the board is away."""
        if self._connection is None:
            return
        with contextlib.suppress(DeviceError):
            if self._sitting is not None:
                self._connection.run(f"rm -rf {shlex.quote(self._sitting.folder)}")
        self._connection.close()
        self._connection = self._sitting = None

    def prepare(self, progress: Progress) -> None:
        """Make a virtual environment on the board, with the runtimes in the versions that are installed here.

        Raises:
            DeviceError: It failed; an environment that was there before still is.
        """
        connection = self._open()
        folder = _last_line(connection.run(f"mkdir -p {_path(self._settings.folder)} && {self._cd()} && pwd").out)
        if not folder:
            raise DeviceError(f"{self._settings.host}: {self._settings.folder} cannot be made")
        names = dict.fromkeys(name for target in TARGETS for name in RUNTIMES[target].names)
        wanted = ["numpy", *_pinned(tuple(names))]
        progress.say(f"{self._settings.host}: {', '.join(wanted)} into {folder}/venv, by pip on the board")
        new, final = shlex.quote(f"{folder}/venv.new"), shlex.quote(f"{folder}/venv")
        # A virtual environment cannot be moved, so the old one steps aside until the new one is whole.
        done = connection.run(
            f"rm -rf {new}; mv {final} {new} 2>/dev/null; "
            f"python3 -m venv {final} && {final}/bin/python -m pip install --quiet {shlex.join(wanted)} "
            f"&& rm -rf {new} || {{ rm -rf {final}; mv {new} {final} 2>/dev/null; exit 1; }}",
            limit_s=INSTALL_S,
        )
        if done.code != 0:
            lines = [line for line in done.err.splitlines() if line.strip() and "notice" not in line]
            raise DeviceError(f"{self._settings.host}: nothing was installed: {lines[-1] if lines else 'pip failed'}")

    def _run(
        self, artifact: Artifact, folder: Path, inputs: Arrays, plan: Plan
    ) -> tuple[tuple[Block, ...], dict[str, np.ndarray]]:
        sitting = self._sit()
        job = self._send_files(sitting, artifact, folder, inputs, plan)
        blocks = []
        for asked, timeout_s in jobs_of(job, plan, inputs):
            self._send(sitting, "job.json", json.dumps(asked).encode())
            self._process(sitting, ["job.json"], timeout_s)
            blocks.append(self._read_block(sitting.folder))
        return tuple(blocks), self._read_outputs(sitting.folder)

    def _send_files(
        self, sitting: _Sitting, artifact: Artifact, folder: Path, inputs: Arrays, plan: Plan, below: str = ""
    ) -> Json:
        """The model into the sitting's folder, and its inputs too, or below; the job for them, without outputs."""
        model = safe_name(artifact.sha256)
        path = folder / artifact.path
        if not path.is_file():
            raise DeviceError(f"no file at {path}")
        self._send(sitting, model, path.read_bytes(), artifact.sha256)
        with own_folder("edgekd-ssh") as work:
            write_inputs(work, artifact, inputs)
            for name in ("sample.npz", "inputs.npz"):
                self._send(sitting, f"{below}{name}", (work / name).read_bytes())
        job = make_job(artifact, f"{sitting.folder}/{model}", plan)
        return job | {"cores": list(self._settings.cores)}

    def _process(self, sitting: _Sitting, arguments: Sequence[str], limit: float) -> None:
        """One process of the agent there, from its start to its end."""
        # -I: of the board's Python and nothing of its user's.
        command = (sitting.python, "-I", AGENT, *arguments)
        # What a runtime leaves among the temporary files goes with the folder.
        script = watched(command, sitting.folder, limit, environment={"TMPDIR": sitting.folder})
        folder = shlex.quote(sitting.folder)
        done = self._open().run_watched(f"rm -f {folder}/block.json {folder}/*/block.json; {script}", limit)
        if done.code == 124:
            raise DeviceError(f"no result after {limit:.0f} s; the process was stopped")
        if done.code != 0:
            self._sitting = None if done.code == 97 else self._sitting  # the folder is gone
            raise DeviceError(last_words(done.code, done.err))

    def _read_block(self, folder: str) -> Block:
        return Block.from_json(json.loads(self._open().get(f"{folder}/block.json")))

    def _read_outputs(self, folder: str) -> dict[str, np.ndarray]:
        content = self._open().get(f"{folder}/{WITH_OUTPUTS['outputs']}")
        try:
            with np.load(io.BytesIO(content), allow_pickle=False) as outputs:
                return {name: outputs[name] for name in outputs.files}
        except (ValueError, OSError) as error:
            raise DataError(f"the outputs of {self._profile.name} cannot be read: {error}") from None

    def _sit(self) -> _Sitting:
        """The sitting's folder; made, and the board recognized, by its first run."""
        if self._sitting is None:
            found = self._look()
            runs, name = f"{_path(self._settings.folder)}/runs", new_name("run")
            done = self._open().run(
                f"mkdir -p {runs} && cd {runs} && "
                f"find . -maxdepth 1 -name 'run-*' -mmin +{STALE_MINUTES} -exec rm -rf {{}} + ; "
                f"ls; umask 077; mkdir {name} && cd {name} && pwd"
            )
            if done.code != 0:
                raise DeviceError(f"no folder can be made in {self._settings.folder}: {last_words(1, done.err)}")
            if left := stale(done.out.decode(errors="replace").split(), "run"):
                self._open().run(f"cd {runs} && rm -rf {shlex.join(left)}")
            self._sitting = _Sitting(_last_line(done.out), found["python"])
            self._send(self._sitting, AGENT, packed_agent())
        return self._sitting

    def _send(self, sitting: _Sitting, name: str, content: bytes, digest: str = "") -> None:
        """A file into the sitting's folder, unless it is there."""
        digest = digest or hashlib.sha256(content).hexdigest()
        if sitting.sent.get(name) != digest:
            sitting.sent.pop(name, None)
            self._open().put(content, f"{sitting.folder}/{name}")
            sitting.sent[name] = digest

    def _look(self) -> Json:
        """What the machine is, by the agent's own words, and which runtimes its Python has.

        Raises:
            DeviceError: It does not answer, has no Python, or is another one than the profile's.
        """
        connection = self._open()
        python = f"{_path(self._settings.folder)}/{PYTHON}"
        if self._settings.python:
            python = _path(self._settings.python)
        source = (files("edgekd.devices.agent") / "machine.py").read_text(encoding="utf-8")
        modules = {packages.module for packages in RUNTIMES.values()} | {"numpy"}
        asked = (
            f"import importlib.util, json\nspace = {{'__name__': 'machine'}}\nexec({source!r}, space)\n"
            "facts = space['describe_machine']()\n"
            f"modules = [name for name in {sorted(modules)!r} if importlib.util.find_spec(name)]\n"
            "print(json.dumps({'facts': facts, 'modules': modules}))\n"
        )
        done = connection.run(
            f'p={python}; [ -x "$p" ] || p=$(command -v python3); echo "$p"; exec "$p" -I -', asked.encode()
        )
        if done.code != 0:
            raise DeviceError(
                f"{self._settings.host} has no Python of 3.10 or newer: {last_words(done.code, done.err)}"
            )
        # What was started, not what it thinks it is: an emulated interpreter knows its guest's name only.
        found: Json = json.loads(_last_line(done.out)) | {"python": done.out.decode().strip().splitlines()[-2]}
        self._recognize(found["facts"])
        if "numpy" not in found["modules"]:
            found["modules"] = []
        return found

    def _recognize(self, facts: dict[str, str]) -> None:
        """Raises DeviceError when the machine says of itself that it is another one."""
        for key, wanted in self._profile.identity.items():
            is_there = facts.get(key, "nothing")
            if not is_there.startswith(wanted):
                raise DeviceError(
                    f"another device answers at {self._settings.host}: {key} is {is_there!r}; "
                    f"{self._profile.name} has {wanted!r}"
                )

    def _open(self) -> Connection:
        if self._connection is None:
            settings, options = self._settings, {}
            for option, value in (("Port", settings.port), ("User", settings.user)):
                if value is not None:
                    options[option] = str(value)
            for option, value in (("IdentityFile", settings.key), ("UserKnownHostsFile", settings.known_hosts)):
                if value is not None:
                    options[option] = f'"{Path(value).expanduser()}"'
            if settings.key is not None:
                options["IdentitiesOnly"] = "yes"
            self._connection = Connection(settings.host, options, settings.config)
        return self._connection

    def _cd(self) -> str:
        return f"cd {_path(self._settings.folder)}"


def _path(path: str) -> str:
    """Quoted for sh, with a leading ``~/`` as the home folder there."""
    return f'"$HOME"/{shlex.quote(path[2:])}' if path.startswith("~/") else shlex.quote(path)


def _pinned(names: tuple[str, ...]) -> list[str]:
    """As installed here, so that host and board run the same runtime; newest where it is not installed here."""
    pinned = []
    for name in names:
        try:
            pinned.append(f"{name}=={version(name)}")
        except PackageNotFoundError:
            pinned.append(name)
    return pinned


def _last_line(out: bytes) -> str:
    """A login shell may greet before it."""
    lines = out.decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else ""


class _Ssh:
    settings = SshSettings

    def __call__(self, profile: Profile, settings: SshSettings) -> SshDevice:
        return SshDevice(profile, settings)


DEVICE = _Ssh()

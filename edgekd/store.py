"""Everything that touches the disk: where things lie, hashes, atomic writes, what need not be done again.

A run folder::

    runs/<name>/
      cache/{train,validation,test}/      teacher outputs: manifest.json + shards
      students/<arm>-<seed>/              student.pt2, card.json, result.json, assets
      checkpoints/<…>.pt                  trainings that have not come to their end
      answers/<arm>-<seed>.npz            what it answers on the test split
      sweep/<arm>.db, sweep/judged/       trials of a sweep, and scores of those that are compared in the end
      pruned/                             as a student: the shipped one with fewer weights, if the recipe prunes
      decoder/                            of language models: the same with caches of keys and values
      compressed/<precision>/             the same, quantized
      artifacts/<target>-<precision>/     model file, manifest.json, assets
      artifacts/<…>.failed/               a file that did not prove itself
      measurements/<device>/<…>.json      raw samples
      stages/<stage>.json                 fingerprint of what went in, hashes of what came out
      report.json, report.html
      lock                                held by the process that works here
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgekd.errors import ModelFileError, StorageError, UsageError
from edgekd.types import Artifact, Card, Json

__all__ = [
    "RunFolder",
    "atomic_folder",
    "atomic_write",
    "fingerprint",
    "hash_path",
    "load_artifact",
    "load_card",
    "read_json",
    "replace_folder",
    "staging_folder",
    "state_folder",
    "write_json",
]

MANIFEST = "manifest.json"


def state_folder() -> Path:
    """Calibrations of devices and the history: ``EDGEKD_STATE``, by default ``~/.local/state/edgekd``."""
    return Path(os.environ.get("EDGEKD_STATE") or Path.home() / ".local" / "state" / "edgekd")


# ── hashes ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def fingerprint(value: Any) -> str:
    """Sixteen hex digits of anything JSON can hold; the order of keys does not matter."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def hash_path(path: Path) -> str:
    """sha256 of a file; of a folder: over the sorted relative names and contents of its files.

    Raises:
        StorageError: It is not there or cannot be read.
    """
    digest = hashlib.sha256()
    with _told(path):
        if path.is_file():
            _feed(digest, path)
        else:
            for file in sorted(p for p in path.rglob("*") if p.is_file()):
                name = file.relative_to(path).as_posix().encode()
                digest.update(len(name).to_bytes(8, "little") + name + file.stat().st_size.to_bytes(8, "little"))
                _feed(digest, file)
    return digest.hexdigest()


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    return path.stat().st_size if path.is_file() else sum(p.stat().st_size for p in path.rglob("*") if p.is_file())


def _feed(digest: hashlib._Hash, path: Path) -> None:
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)


# ── writing ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def atomic_write(path: Path, content: bytes) -> None:
    """Write a whole file or nothing; what stood there before survives a failure.

    Raises:
        StorageError: The disk is full or the folder cannot be written.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    with _told(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with part.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)


def write_json(path: Path, value: Any, indent: int | None = 2) -> None:
    """Write JSON atomically and with a stable order; without an indent for what nobody reads by eye."""
    atomic_write(path, (json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False) + "\n").encode())


def read_json(path: Path) -> Any:
    """Read JSON.

    Raises:
        ModelFileError: It is missing or not JSON.
    """
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ModelFileError(f"no {path.name} in {path.parent}") from None
    except (OSError, ValueError) as error:
        raise ModelFileError(f"{path} cannot be read as JSON: {error}") from None


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A folder to fill; it takes its place only when the block ends well, and then replaces what stood there.

    Raises:
        StorageError: The disk is full or the folder cannot be written.
    """
    with staging_folder(path) as part:
        yield part
        replace_folder(part, path)


@contextlib.contextmanager
def staging_folder(path: Path) -> Iterator[Path]:
    """A folder beside ``path`` to fill; gone when the block ends, unless ``replace_folder`` moved it.

    Raises:
        StorageError: The disk is full or the folder cannot be written.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    with _told(path):
        _recover(path)
        part.mkdir(parents=True)
        try:
            yield part
        finally:
            shutil.rmtree(part, ignore_errors=True)


def replace_folder(new: Path, path: Path) -> None:
    """Put a finished folder in the place of another; killed in between, the next writer restores the old one."""
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    if path.exists():
        path.rename(old)
    new.rename(path)
    shutil.rmtree(old, ignore_errors=True)


def _recover(path: Path) -> None:
    """Tidy up after a process that was killed while it replaced this folder: keep the old one if no new one stands."""
    for old in path.parent.glob(f".{path.name}.*.old"):
        if path.exists():
            shutil.rmtree(old)
        else:
            old.rename(path)
    for part in path.parent.glob(f".{path.name}.*.part"):
        shutil.rmtree(part)


@contextlib.contextmanager
def _told(path: Path) -> Iterator[None]:
    """Say a failing disk in one line."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageError(
                f"the disk is full: {path} was not written; what was there before is unchanged"
            ) from error
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.ENOENT):
            raise StorageError(f"{path}: {error.strerror}") from error
        raise


# ── cards and artifacts ───────────────────────────────────────────────────────────────────────────────────────────────


def load_card(folder: Path) -> Card:
    """The card of a saved student, without its program.

    Raises:
        ModelFileError: There is none, or it is of another version.
    """
    path = folder / "card.json"
    try:
        return Card.from_json(read_json(path))
    except TypeError as error:
        raise ModelFileError(f"{path} is not a card that this version reads: {error}") from None


def load_artifact(folder: Path) -> Artifact:
    """The manifest of an artifact folder.

    Raises:
        ModelFileError: There is none, or it is of another version.
    """
    try:
        return Artifact.from_json(read_json(folder / MANIFEST))
    except TypeError as error:
        raise ModelFileError(f"{folder / MANIFEST} is not a manifest that this version reads: {error}") from None


# ── the run folder ────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class RunFolder:
    """Where one recipe keeps what it made.

    Attributes:
        path: ``runs/<name>`` beside the recipe.
    """

    path: Path

    def cache(self, split: str) -> Path:
        return self.path / "cache" / split

    def arm(self, arm: str, seed: int) -> Path:
        return self.path / "students" / f"{arm.replace(':', '.')}-{seed}"

    def checkpoint(self, arm: str, seed: int) -> Path:
        return self.path / "checkpoints" / f"{arm.replace(':', '.')}-{seed}.pt"

    def answers(self, arm: str, seed: int) -> Path:
        return self.path / "answers" / f"{arm.replace(':', '.')}-{seed}.npz"

    def study(self, arm: str) -> Path:
        return self.path / "sweep" / f"{arm.replace(':', '.')}.db"

    def scores(self, arm: str, key: str) -> Path:
        return self.path / "sweep" / "judged" / f"{arm.replace(':', '.')}-{key}.npy"

    def compressed(self, precision: str) -> Path:
        return self.path / "compressed" / precision

    @property
    def pruned(self) -> Path:
        return self.path / "pruned"

    @property
    def decoder(self) -> Path:
        return self.path / "decoder"

    def artifact(self, target: str, precision: str) -> Path:
        return self.path / "artifacts" / f"{target}-{precision}"

    def artifacts(self) -> tuple[Path, ...]:
        """Folders of all finished artifacts, by name."""
        root = self.path / "artifacts"
        return (
            tuple(sorted(p.parent for p in root.glob("*/" + MANIFEST) if not p.parent.name.startswith(".")))
            if root.is_dir()
            else ()
        )

    def measurement(self, device: str, artifact: str) -> Path:
        return self.path / "measurements" / device / f"{artifact}.json"

    @property
    def report_json(self) -> Path:
        return self.path / "report.json"

    @property
    def report_html(self) -> Path:
        return self.path / "report.html"

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run folder; two processes that write the same student would spoil it.

        Raises:
            StorageError: Another process holds it.
        """
        import fcntl

        with _told(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            with (self.path / "lock").open("a") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system frees it when the process ends
                except BlockingIOError:
                    raise StorageError(f"another edgekd is at work in {self.path}; wait for it, or stop it") from None
                yield

    def _stage(self, stage: str) -> Path:
        return self.path / "stages" / f"{stage}.json"

    def is_done(self, stage: str, inputs: Json) -> bool:
        """Whether a stage was finished for the same inputs and all it wrote is still there, unchanged."""
        record = self._stage(stage)
        if not record.is_file():
            return False
        done = read_json(record)
        return done["fingerprint"] == fingerprint(inputs) and all(
            (self.path / name).exists() and hash_path(self.path / name) == digest
            for name, digest in done["outputs"].items()
        )

    def done_with(self, stage: str) -> Json:
        """What a stage was last done with; empty when it never was."""
        record = self._stage(stage)
        inputs: Json = read_json(record)["inputs"] if record.is_file() else {}
        return inputs

    def finish(self, stage: str, inputs: Json, outputs: Iterable[Path]) -> None:
        """Record that a stage is done; call it last."""
        hashes = {path.relative_to(self.path).as_posix(): hash_path(path) for path in outputs}
        write_json(self._stage(stage), {"fingerprint": fingerprint(inputs), "inputs": inputs, "outputs": hashes})

    def require(self, path: Path, command: str) -> Path:
        """The path, if a stage has written it.

        Raises:
            UsageError: It is not there; the message has the command that makes it.
        """
        if not path.exists():
            raise UsageError(f"{path.relative_to(self.path.parent)} is not there yet; run: edgekd {command}")
        return path

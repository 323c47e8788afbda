"""Atomic writes, hashes, and the record of what is done."""

import contextlib
import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from edgekd.errors import ModelFileError, StorageError, UsageError
from edgekd.programs.student_files import load_student, save_student
from edgekd.store import RunFolder, atomic_folder, atomic_write, fingerprint, hash_path
from edgekd.types import Student


def test_fingerprint_does_not_depend_on_the_order_of_keys() -> None:
    assert fingerprint({"a": 1, "b": [2]}) == fingerprint({"b": [2], "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})


def test_hash_of_a_folder_sees_names_and_contents(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").write_bytes(b"1")
    before = hash_path(tmp_path / "a")
    (tmp_path / "a" / "x").rename(tmp_path / "a" / "y")
    renamed = hash_path(tmp_path / "a")
    (tmp_path / "a" / "y").write_bytes(b"2")

    assert len({before, renamed, hash_path(tmp_path / "a")}) == 3


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "f"
    atomic_write(path, b"old")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="the disk is full"):
        atomic_write(path, b"new")

    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_really_full_disk_is_one_line(tmp_path: Path) -> None:
    """A file system of its own with no room left: no mock."""
    mount = tmp_path / "small"
    mount.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(mount)], capture_output=True)
    if mounted.returncode:
        pytest.skip("this user may not mount a tmpfs")
    try:
        atomic_write(mount / "old", b"kept")
        with pytest.raises(StorageError, match="the disk is full"):
            atomic_write(mount / "big", b"x" * 1_000_000)
        assert [p.name for p in mount.iterdir()] == ["old"]
    finally:
        subprocess.run(["umount", str(mount)], check=True)


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with atomic_folder(target) as part:
        (part / "a").write_text("1")
    with contextlib.suppress(RuntimeError), atomic_folder(target) as part:
        (part / "a").write_text("2")
        raise RuntimeError

    assert (target / "a").read_text() == "1"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_process_killed_while_it_replaces_a_folder_loses_nothing(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with atomic_folder(target) as part:
        (part / "a").write_text("old")
    script = f"""
import os, signal, pathlib
from edgekd import store
rename = pathlib.Path.rename
def dying(self, to):
    result = rename(self, to)
    if str(to).endswith('.old'):
        os.kill(os.getpid(), signal.SIGKILL)
    return result
pathlib.Path.rename = dying
with store.atomic_folder(pathlib.Path({str(target)!r})) as part:
    (part / 'a').write_text('new')
"""
    assert subprocess.run([sys.executable, "-c", script]).returncode == -9
    assert not target.exists()
    with pytest.raises(RuntimeError), atomic_folder(target):
        raise RuntimeError

    assert (target / "a").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_student_comes_back_as_it_was_saved(tmp_path: Path, convnet_student: Student) -> None:
    save_student(tmp_path / "s", convnet_student, {})
    loaded, assets = load_student(tmp_path / "s")
    again, _ = load_student(tmp_path / "s" / "student.pt2")

    assert loaded.card == convnet_student.card == again.card
    assert assets == {}


def test_saving_twice_gives_the_same_bytes(tmp_path: Path, convnet_student: Student) -> None:
    save_student(tmp_path / "a", convnet_student, {})
    save_student(tmp_path / "b", convnet_student, {})

    assert hash_path(tmp_path / "a") == hash_path(tmp_path / "b")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 not really", b"\x80\x04K\x01."])
def test_a_foreign_or_truncated_model_is_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.pt2"
    path.write_bytes(content)

    with pytest.raises(ModelFileError, match=r"model\.pt2") as caught:
        load_student(path)
    assert "\n" not in str(caught.value)


def test_a_truncated_student_is_one_line(tmp_path: Path, convnet_student: Student) -> None:
    save_student(tmp_path / "s", convnet_student, {})
    path = tmp_path / "s" / "student.pt2"
    path.write_bytes(path.read_bytes()[:-200])

    with pytest.raises(ModelFileError, match="truncated"):
        load_student(path)


def test_a_stage_is_done_only_for_the_same_inputs_and_untouched_outputs(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    (tmp_path / "out").write_text("1")
    folder.finish("stage", {"a": 1}, [tmp_path / "out"])

    assert folder.is_done("stage", {"a": 1})
    assert not folder.is_done("stage", {"a": 2})
    assert not folder.is_done("other", {"a": 1})
    (tmp_path / "out").write_text("2")
    assert not folder.is_done("stage", {"a": 1})
    (tmp_path / "out").unlink()
    assert not folder.is_done("stage", {"a": 1})


def test_what_is_missing_names_the_command_that_makes_it(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")

    with pytest.raises(UsageError, match="edgekd distill"):
        folder.require(folder.arm("kd", 0), "distill")


def test_two_processes_do_not_work_in_one_run_folder(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    script = "import sys; from pathlib import Path; from edgekd.store import RunFolder\n" + (
        f"with RunFolder(Path({str(folder.path)!r})).locked(): print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        try:
            assert holder.stdout.readline() == "held\n"
            with pytest.raises(StorageError, match="another edgekd is at work"), folder.locked():
                pass
        finally:
            holder.kill()
    with folder.locked():
        pass

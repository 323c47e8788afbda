"""Folders that processes make for a while: none is left, however the process ends."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from edgekd.devices._folders import made, new_name, own_folder, stale

from elsewhere import name_of_a_killed_ones, wait_for

HOLDS = "import time\nfrom edgekd.devices._folders import own_folder\nwith own_folder('edgekd-x'): time.sleep(60)\n"


@pytest.mark.parametrize("ends", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_a_folder_goes_with_the_work_in_it_however_that_ends(
    ends: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def work() -> None:
        with own_folder("edgekd-x") as folder:
            (folder / "file").touch()
            raise ends

    with pytest.raises(ends):
        work()
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_is_swept_by_the_next_and_no_other_folder(tmp_path: Path) -> None:
    (tmp_path / "edgekd-xy-00000000.1.00000000").mkdir()
    (tmp_path / "edgekd-x-mine").mkdir()
    process = subprocess.Popen([sys.executable, "-c", HOLDS], env={"TMPDIR": str(tmp_path)})
    try:
        wait_for(lambda: len(list(tmp_path.iterdir())) == 3)
        (theirs,) = tmp_path.glob("edgekd-x-*.*")
        own = made("edgekd-x", tmp_path)
        assert theirs.exists(), "its process runs"
        process.send_signal(signal.SIGKILL)
        wait_for(lambda: stale([theirs.name], "edgekd-x"))  # dead, though nobody has asked for its exit code
        assert theirs.exists(), "a killed process removes nothing"
        made("edgekd-x", tmp_path)
    finally:
        process.kill()
        process.wait(60)
    assert not theirs.exists()
    assert own.exists()
    assert {"edgekd-xy-00000000.1.00000000", "edgekd-x-mine"} <= {path.name for path in tmp_path.iterdir()}


def test_of_other_machines_processes_nothing_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    ended = name_of_a_killed_ones("run")
    assert stale([new_name("run"), ended, "notes"], "run") == [ended]
    assert stale([ended], "runs") == []
    monkeypatch.setattr("platform.node", lambda: "another")
    assert stale([ended], "run") == []

"""Progress: lines for logs, a bar on a terminal, never on stdout."""

import io
import os
import pty
import subprocess
import sys

import pytest

from edgekd.console import LineProgress, progress_for


def test_lines_say_when_work_starts_ends_and_how_long_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 5.0, 12.0, 14.0, 20.0])
    monkeypatch.setattr("edgekd.console.time.monotonic", lambda: next(clock))
    stream = io.StringIO()
    progress = LineProgress(stream)
    progress.start("train", 40)
    progress.advance(10)  # 5 s: too soon for a line
    progress.advance(10, "loss 0.5")
    progress.advance(20)  # the last step is told by finish
    progress.finish()

    assert stream.getvalue().splitlines() == [
        "train: started",
        "train: 20/40, about 12 s left, loss 0.5",
        "train: done in 20.0 s",
    ]


def test_work_that_was_begun_before_says_so_and_is_not_taken_for_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 10.0])
    monkeypatch.setattr("edgekd.console.time.monotonic", lambda: next(clock))
    stream = io.StringIO()
    progress = LineProgress(stream)
    progress.start("capture", 100, 60)
    progress.advance(20)

    assert stream.getvalue().splitlines() == ["capture: 60 of 100 done before", "capture: 80/100, about 10 s left"]


def test_a_log_gets_lines() -> None:
    assert isinstance(progress_for(io.StringIO()), LineProgress)


def test_a_terminal_gets_a_bar_with_the_time_left() -> None:
    """In a real pseudo-terminal."""
    script = """
from edgekd.console import progress_for
progress = progress_for()
progress.start("training", 4)
for _ in range(4):
    progress.advance(1, "loss 0.5")
progress.finish()
"""
    master, slave = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    done = subprocess.run(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=slave, env=environment, check=True
    )
    os.close(slave)
    shown = os.read(master, 100_000).decode()
    os.close(master)

    assert "training" in shown
    assert "4/4" in shown
    assert "left" in shown
    assert done.stdout == b""

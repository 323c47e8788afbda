"""How long work speaks: a bar with the time left on a terminal, plain lines elsewhere; always on stderr."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, TextIO

from edgekd import processes

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress

__all__ = ["BarProgress", "LineProgress", "SilentProgress", "progress_for"]


def progress_for(stream: TextIO | None = None) -> BarProgress | LineProgress | SilentProgress:
    """A bar where somebody looks at it, else lines; of several processes only the main one speaks."""
    if not processes.is_main():
        return SilentProgress()
    stream = stream or sys.stderr
    return BarProgress() if stream.isatty() else LineProgress(stream)


class BarProgress:
    """Fulfils ``edgekd.protocols.Progress`` on a terminal."""

    def __init__(self) -> None:
        self._bar: RichProgress | None = None

    def start(self, what: str, total: int, done: int = 0) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        self._bar = Progress(
            TextColumn("{task.description:<28}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=Console(stderr=True),
        )
        self._bar.start()
        self._bar.add_task(what, total=total, completed=done, note="")

    def advance(self, steps: int = 1, note: str = "") -> None:
        if self._bar is not None:
            task = self._bar.tasks[0]
            self._bar.update(task.id, advance=steps, note=note or task.fields["note"])

    def finish(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def say(self, line: str) -> None:
        from rich.console import Console

        Console(stderr=True, highlight=False).print(line, markup=False)


class LineProgress:
    """Fulfils ``edgekd.protocols.Progress`` for logs: a line at the start, then at most one every ten seconds."""

    EVERY_S = 10.0

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._what, self._total, self._before, self._done = "", 0, 0, 0
        self._began = self._spoke = 0.0

    def start(self, what: str, total: int, done: int = 0) -> None:
        self._what, self._total, self._before, self._done = what, total, done, done
        self._began = self._spoke = time.monotonic()
        self.say(f"{what}: {done} of {total} done before" if done else f"{what}: started")

    def advance(self, steps: int = 1, note: str = "") -> None:
        self._done += steps
        now = time.monotonic()
        if now - self._spoke >= self.EVERY_S and self._before < self._done < self._total:
            self._spoke = now
            left = (now - self._began) / (self._done - self._before) * (self._total - self._done)
            self.say(f"{self._what}: {self._done}/{self._total}, about {left:.0f} s left{', ' + note if note else ''}")

    def finish(self) -> None:
        self.say(f"{self._what}: done in {time.monotonic() - self._began:.1f} s")

    def say(self, line: str) -> None:
        print(line, file=self._stream, flush=True)


class SilentProgress:
    """Fulfils ``edgekd.protocols.Progress`` for all processes but the main one."""

    def start(self, what: str, total: int, done: int = 0) -> None: ...

    def advance(self, steps: int = 1, note: str = "") -> None: ...

    def finish(self) -> None: ...

    def say(self, line: str) -> None: ...

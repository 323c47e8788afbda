"""A progress that keeps what is said, for the tests of stages."""

from edgekd.console import SilentProgress


class Listening(SilentProgress):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)

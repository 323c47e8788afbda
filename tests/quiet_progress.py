"""Progress that nobody sees, and what it was told at the start of the last piece of work."""


class Quiet:
    """Fulfils ``edgekd.protocols.Progress``."""

    total = done_before = 0

    def start(self, what: str, total: int, done: int = 0) -> None:
        self.total, self.done_before = total, done

    def advance(self, steps: int = 1, note: str = "") -> None: ...

    def finish(self) -> None: ...

    def say(self, line: str) -> None: ...

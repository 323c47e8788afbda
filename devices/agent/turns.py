"""Several jobs, each in a process of its own, that take turns: docs/decisions/0007-turns.md."""

from __future__ import annotations

import os
import random
import subprocess
import sys

from .cores import draw_cores, pin_cores
from .errors import AgentError
from .parent import told_parent


class Turns:
    """One process's end of the rope: it says whether it has enough samples, and waits until it may go on.

    Attributes:
        taken: How many turns it had.
    """

    def __init__(self) -> None:
        # What a runtime prints must not be taken for a word of ours.
        self._say = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self.taken = 0

    def wait(self, is_enough: bool) -> bool:
        """Give the turn away; False when there will be no further one."""
        self._say.write("enough\n" if is_enough else "more\n")
        self._say.flush()
        answer = sys.stdin.readline().strip()
        if answer not in ("go", "stop"):
            raise AgentError("whoever gives the turns is gone")
        self.taken += answer == "go"
        return answer == "go"


class _EndedError(Exception):
    """A process that should take turns is gone; its exit code says why."""


def give_turns(jobs: list[str], threads: int, seed: int) -> int:
    """A process for each job, each in the folder of its job; one works at a time, in an order drawn for each round.

    They start one after the other, so that no start is disturbed, and end one after the other. All are kept on the same
    cores, drawn for each call: what works beside one core, or beside the thread that shares it, then slows all alike.

    Args:
        threads: Cores for them, where a job does not name its own.

    Returns:
        0 when all results were written; else the exit code of the one that failed, which has said why on stderr.
    """
    drawn = random.Random(seed)
    pin_cores(draw_cores(threads, drawn))
    processes: list[subprocess.Popen[str]] = []
    try:
        for job in drawn.sample(jobs, len(jobs)):
            processes.append(_start_in_turns(job))
            _ask(processes[-1], "")
        while "more" in [_ask(process, "go\n") for process in drawn.sample(processes, len(processes))]:
            pass
        for process in processes:
            process.communicate("stop\n")
    except _EndedError as error:
        error.args[0].wait(10)
    finally:
        codes = [process.poll() for process in processes]
        for process in processes:
            process.kill()  # nothing, when it has ended
            process.wait()
    failed = [code for code in codes if code]
    return (failed[0] if failed[0] > 0 else 128 - failed[0]) if failed else int(len(codes) < len(jobs) or None in codes)


def _start_in_turns(job: str) -> subprocess.Popen[str]:
    command = sys.orig_argv[1 : -len(sys.argv[1:])]  # as this process was started: the same flags, the same agent
    return subprocess.Popen(
        [sys.executable, *command, "--in-turns", job],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=told_parent(),
    )


def _ask(process: subprocess.Popen[str], words: str) -> str:
    """Say something to a process, and wait until it gives its turn away.

    Raises:
        _EndedError: It has ended instead.
    """
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(words)
        process.stdin.flush()
    except BrokenPipeError:
        raise _EndedError(process) from None
    answer = process.stdout.readline().strip()
    if answer not in ("more", "enough"):
        raise _EndedError(process)
    return answer

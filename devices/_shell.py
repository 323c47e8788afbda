"""A command on another machine that never outlives the connection to it. For POSIX sh, mksh and toybox alike."""

from __future__ import annotations

import contextlib
import shlex
import subprocess
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

__all__ = ["BEAT_S", "Ended", "run_beating", "safe_name", "watched"]

BEAT_S = 10.0  # a line goes over the connection this often; after two to three silent spans the command is ended
GRACE_S = 20.0  # what ending may take beyond the limit that the other machine keeps itself


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit code (a shell's ``128 + signal`` for a signal), and what it printed."""

    code: int
    out: bytes
    err: str


def watched(
    command: Sequence[str],
    folder: str,
    limit_s: float,
    environment: Mapping[str, str] | None = None,
    undo: str = "true",
) -> str:
    """A script that runs a command in a folder and ends it when it takes too long or nobody listens any more.

    Whoever starts it sends a line every ``BEAT_S`` (``run_beating``). When the lines stop, or the connection closes,
    the command is ended and the folder removed: a pulled cable leaves nothing that runs. ``undo`` is run last, always.
    """
    words = shlex.join(f"{key}={value}" for key, value in (environment or {}).items())
    silent_s = max(1, round(2 * BEAT_S))
    # toybox's timeout does not pass a signal on, so the command leaves its own number. ``end`` ignores TERM: the outer
    # shell would else end it halfway, as soon as the command is gone. PIPE would end the outer shell when it says
    # "Terminated" to nobody.
    return f"""
cd {shlex.quote(folder)} || exit 97
exec 3<&0
touch beat
{words} timeout -k 2 {max(1, round(limit_s))} sh -c 'echo $$ >pid; exec "$@"' run {shlex.join(command)} </dev/null &
child=$!
trap '' PIPE
end() {{
  trap '' TERM
  kill -TERM $child $(cat pid); sleep 1; kill -KILL $child $(cat pid)
  {undo}
  cd /; rm -rf {shlex.quote(folder)}
}}
( while read line; do touch beat; done; end ) <&3 >/dev/null 2>&1 &
reader=$!
( trap 'kill $nap; exit' TERM
  while :; do sleep {silent_s} & nap=$!; wait $nap; [ -e beat ] || break; rm -f beat; done; end ) >/dev/null 2>&1 3<&- &
clock=$!
wait $child
code=$?
kill $reader $clock 2>/dev/null
rm -f beat pid 2>/dev/null
{undo}
exit $code
"""


def run_beating(arguments: Sequence[str], limit_s: float, environment: Mapping[str, str] | None = None) -> Ended:
    """Run a client (ssh, adb) whose other end is ``watched``.

    Raises:
        subprocess.TimeoutExpired: The other end kept its limit and did not say so: the connection hangs.
    """
    process = subprocess.Popen(
        list(arguments), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    )
    ended = threading.Event()
    assert process.stdin is not None
    stdin, process.stdin = process.stdin, None  # ``communicate`` would close it at once

    def beat() -> None:
        while not ended.wait(BEAT_S):
            try:
                stdin.write(b"\n")
                stdin.flush()
            except OSError:  # it ended between two beats
                return

    beating = threading.Thread(target=beat, daemon=True)
    beating.start()
    try:
        out, err = process.communicate(timeout=limit_s + GRACE_S)
    finally:
        ended.set()
        process.kill()  # nothing, when it has ended
        process.wait()
        beating.join()
        with contextlib.suppress(OSError):
            stdin.close()
    return Ended(process.returncode, out, err.decode(errors="replace"))


def safe_name(digest: str) -> str:
    """A model's name on the other machine: from its hash, so that no file name of a user's reaches a shell."""
    return f"model-{''.join(letter for letter in digest if letter in '0123456789abcdef')[:16] or 'file'}"

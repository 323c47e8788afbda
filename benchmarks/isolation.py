"""Work in a process of its own, with limits on time and memory: a crash or a hang is a result, not the end."""

from __future__ import annotations

import multiprocessing
import os
import re
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil

from edgekd.errors import EdgekdError

__all__ = ["isolated", "one_line"]

_LARGEST_BYTES = 6 * 2**30


def isolated(
    work: Callable[..., dict[str, Any]], *arguments: Any, longest_s: float = 180.0, patience_s: float = 1200.0
) -> dict[str, Any]:
    """Run a function in a forked process; what happened to it is the result, whatever it was.

    Args:
        longest_s: Of processor time.
        patience_s: Of the clock's, for what hangs.

    Returns:
        What the function returns, or ``status`` (``failed``) and a ``reason`` in one line; with them ``seconds`` of
        processor time and ``peak_mb`` of resident memory, in 10^6 bytes.
    """
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    with tempfile.NamedTemporaryFile() as said:
        process = context.Process(target=_child, args=(sender, said.name, work, arguments))
        start, peak, busy, answer = time.monotonic(), 0, 0.0, None
        process.start()
        sender.close()
        watched = psutil.Process(process.pid)
        while answer is None:
            if receiver.poll(0.1):
                try:
                    answer = receiver.recv()
                except EOFError:  # it died without a word
                    process.join()
                    break
            try:
                peak, busy = max(peak, watched.memory_info().rss), sum(watched.cpu_times()[:2])
            except psutil.NoSuchProcess:
                continue
            if peak > _LARGEST_BYTES:
                answer = {"status": "failed", "reason": f"takes more than {_LARGEST_BYTES / 2**30:.0f} GiB of memory"}
            elif busy > longest_s or time.monotonic() - start > patience_s:
                limit = longest_s if busy > longest_s else patience_s
                answer = {"status": "failed", "reason": f"takes longer than {limit:.0f} s"}
        process.kill()  # it has nothing more to do
        process.join()
        if answer is None:
            words = one_line(Path(said.name).read_text(errors="replace")[-300:])
            answer = {"status": "failed", "reason": f"the process died with {process.exitcode}: {words}"}
    return answer | {"seconds": round(busy, 1), "peak_mb": peak // 10**6}


def _child(sender: Any, said: str, work: Callable[..., dict[str, Any]], arguments: Sequence[Any]) -> None:
    descriptor = os.open(said, os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    try:
        answer = work(*arguments)
    except EdgekdError as error:
        answer = {"status": "failed", "reason": one_line(str(error))}
    except BaseException as error:  # noqa: BLE001 - a crash is a result
        frame = traceback.extract_tb(error.__traceback__)[-1]
        words = f"{type(error).__name__}: {error}"
        answer = {
            "status": "failed",
            "reason": f"crash, {one_line(words)} ({Path(frame.filename).name}:{frame.lineno})",
        }
    sender.send(answer)
    sender.close()
    os._exit(0)  # no exit handlers of the parent


def one_line(text: str) -> str:
    """At most 300 characters, and no paths that differ from run to run."""
    text = " ".join(text.split())
    text = re.sub(r"failed its proof and is kept in \S+: ", "parity: ", text)
    text = re.sub(r"(?<!\S)/\S+/", "", text)
    return text if len(text) <= 300 else text[:297] + "..."

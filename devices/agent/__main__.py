"""Run a job: its block, or the turns of several."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from .block import measure
from .errors import AgentError, first_line
from .job import Replaced, read_job
from .parent import die_with_parent
from .turns import Turns, give_turns


def main(arguments: list[str]) -> int:
    """Run one job, or several in turns; the exit code says how it went."""
    die_with_parent()
    match arguments:
        case ["--seed", seed, "--threads", threads, *jobs] if jobs:
            return give_turns(jobs, int(threads), int(seed))
        case ["--in-turns", job]:
            os.chdir(Path(job).parent)
            return _run(Path(job).name, Turns())
        case [job]:
            return _run(job, None)
    sys.stderr.write("usage: agent.pyz job.json, or agent.pyz --seed 0 --threads 1 a/job.json b/job.json\n")
    return 2


def _run(name: str, turns: Turns | None) -> int:
    try:
        job = read_job(Path(name))
    except (OSError, ValueError, KeyError, TypeError) as error:
        sys.stderr.write(f"{name}: {first_line(error)}\n")
        return 2
    try:
        block = measure(job, turns)
        with Replaced(Path(job["result"])) as path:
            path.write_text(json.dumps(block), encoding="utf-8")
    except (AgentError, OSError, MemoryError) as error:
        sys.stderr.write(f"{first_line(error)}\n")
        sys.stderr.flush()
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # LiteRT speaks as it goes, and the last line is taken for why
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""A stage whose inputs' fingerprint is unchanged, and whose outputs are still as it left them, is not done again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from edgekd import processes
from edgekd.protocols import Progress
from edgekd.stages.workspace import Workspace
from edgekd.types import Json

__all__ = ["once"]


def once(
    work: Workspace, stage: str, inputs: Json, make: Callable[[], list[Path]], progress: Progress, force: bool
) -> bool:
    """Do a stage unless it is done; one that wrote nothing is tried again the next time.

    Returns:
        Whether what it writes is there, for these inputs.
    """
    if processes.found_by_main(lambda: not force and work.folder.is_done(stage, inputs)):
        progress.say(f"{stage}: unchanged, not done again")
        return True
    outputs = make()
    if outputs and processes.is_main():
        work.folder.finish(stage, inputs, outputs)
    return bool(outputs)

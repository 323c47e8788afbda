"""One training on many processes and machines: who speaks, who writes, and what all of them know.

``torchrun -m edgekd distill`` and ``accelerate launch -m edgekd distill`` start the same command many times and say by
environment variables which process is which. The main one (rank 0) holds the run folder, writes and speaks; what it
finds on the disk is told to the others, who only need to read the recipe, the data and the teacher cache.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from edgekd.errors import UsageError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = [
    "added_up",
    "agreed",
    "collected",
    "count",
    "device",
    "fails_first",
    "found_by_main",
    "gathered",
    "is_main",
    "joined",
    "on_this_machine",
    "rank",
    "require_one",
    "share_of",
]

T = TypeVar("T")

PATIENCE = timedelta(hours=6)
"""How long the others wait while the main process exports and evaluates a student."""


def count() -> int:
    """Processes of this training, on all machines."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Which of them this is; 0 is the main one."""
    return int(os.environ.get("RANK", "0"))


def is_main() -> bool:
    return rank() == 0


def on_this_machine() -> int:
    """Processes that share this machine's cores."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def require_one(command: str | None) -> None:
    """Refuse, on many processes, a command that is for one, and what a launcher was told that a recipe says.

    Raises:
        UsageError: There are several, and the command does not train students; or ``accelerate launch`` was told how,
            or of several and started them one by one.
    """
    if os.environ.get("ACCELERATE_MIXED_PRECISION", "no") != "no":
        raise UsageError("accelerate launch --mixed_precision is not heard; the recipe says it: [distill] precision")
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        raise UsageError("accelerate launch --use_fsdp is not heard; the recipe says it: [distill] shard = true")
    if os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower() != "no":
        raise UsageError(
            "accelerate launch --dynamo_backend is not heard; the recipe says it: [distill] compile = true"
        )
    if "ACCELERATE_USE_CPU" in os.environ and "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ:
        # accelerate launch --cpu --num_processes 2 starts one process, unless it is given hosts for MPI. A MASTER_ADDR
        # that was there before looks the same.
        raise UsageError(
            "accelerate launch was told of several processes (MASTER_ADDR is set) and has not joined them; "
            "with --multi_gpu it does, also on CPUs, and so does torchrun --nproc-per-node; "
            "for one process, unset MASTER_ADDR"
        )
    if count() > 1 and command != "distill":
        raise UsageError(f"edgekd {command} is for one process, and {count()} were started; only distill takes several")


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Hold the connection to the other processes; nothing with one process."""
    if count() == 1:
        yield
        return
    from accelerate import PartialState
    from torch import distributed

    PartialState(timeout=PATIENCE)
    yield
    distributed.destroy_process_group()  # not after an error: the others may hang in a collective


def device() -> torch.device:
    """Where this process trains."""
    from accelerate import PartialState

    found: torch.device = PartialState().device
    return found


def found_by_main(ask: Callable[[], T]) -> T:
    """What the main process finds, told to all; the others do not ask."""
    found: T = agreed(ask() if is_main() else None)  # type: ignore[assignment]
    return found


def agreed(value: T) -> T:
    """The value that the main process has."""
    if count() == 1:
        return value
    from torch import distributed

    box: list[Any] = [value]
    distributed.broadcast_object_list(box, src=0)
    found: T = box[0]
    return found


def collected(value: T) -> list[T]:
    """The values of all processes, by rank."""
    if count() == 1:
        return [value]
    from torch import distributed

    values: list[Any] = [None] * count()
    distributed.all_gather_object(values, value)
    return values


def fails_first() -> bool:
    """Whether no other process has failed before: the one that says why. The launcher then ends all."""
    if count() == 1:
        return True
    from torch import distributed

    if not distributed.is_initialized():
        return is_main()
    store = distributed.distributed_c10d._get_default_store()
    try:
        return bool(store.add("edgekd/failed", 1) == 1)
    except RuntimeError:  # the machine that holds the store is gone
        return True


def share_of(samples: int) -> tuple[slice, list[int]]:
    """This process's part of a batch, and how many samples each process has.

    The parts in the order of their ranks are the batch. A process that would have none gets the first sample, to keep
    step with the others; its size says 0, and it must not count.
    """
    sizes = [samples // count() + (number < samples % count()) for number in range(count())]
    start = sum(sizes[: rank()])
    return (slice(start, start + sizes[rank()]) if sizes[rank()] else slice(0, 1)), sizes


def gathered(mine: Tensor, sizes: Sequence[int]) -> Tensor:
    """The rows of all processes in the order of their ranks, as if one had made them.

    The gradient flows into this process's own rows. All compute the same from the result, so the sum of their
    gradients by the weights is that of one process.

    Args:
        mine: (rows, …); rows beyond this process's size are left out.
        sizes: Rows of each process.
    """
    own = mine[: sizes[rank()]]
    if count() == 1:
        return own
    import torch
    from torch import distributed

    padded = mine.new_zeros((max(sizes), *mine.shape[1:]))
    padded[: len(own)] = own.detach()
    parts = [torch.empty_like(padded) for _ in sizes]
    distributed.all_gather(parts, padded)
    rows = [part[:size] for part, size in zip(parts, sizes, strict=True)]
    rows[rank()] = own
    return torch.cat(rows)


def added_up(values: Mapping[str, float]) -> dict[str, float]:
    """Sums over all processes, by name."""
    everywhere = collected(dict(values))
    return {name: sum(one[name] for one in everywhere) for name in values}

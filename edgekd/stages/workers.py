"""A capture on several workers and machines, by Ray Data: workers make whole shards, this process alone writes them.

A worker reads recipe, data and teacher itself, from the same paths on every machine, and makes nothing before it has
found the same :class:`CaptureKey`. A shard whose worker is killed is made again by another.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from edgekd import errors, plugins
from edgekd.errors import EdgekdError, MissingToolchainError, UsageError, first_line
from edgekd.store import fingerprint
from edgekd.types import Json

if TYPE_CHECKING:
    from edgekd.recipes.recipe import Recipe
    from edgekd.stages.workspace import Workspace
    from edgekd.teachers.shards import Maker, Part, Shard
    from edgekd.teachers.teacher_cache import CaptureKey

__all__ = ["Crew", "hired"]

RETRIES = 3
"""How often a shard is tried again whose worker died: one that kills every worker must end."""


@dataclass(frozen=True)
class Crew:
    """Workers at hand.

    Attributes:
        workers: How many run at once.
        threads: Of each; the teacher adds up in their order.
    """

    workers: int
    threads: int

    def maker(self, recipe: Recipe, split: str, key: CaptureKey) -> Maker:
        """Who captures a split.

        Raises:
            EdgekdError: What a worker met; or workers died again and again.
        """

        def make(parts: Sequence[Part]) -> Iterator[Shard]:
            import ray
            from ray.exceptions import RayError

            if not parts:
                return
            told = {"recipe": recipe, "split": split, "key": key, "threads": self.threads}
            numbers = ray.data.from_items([asdict(part) for part in parts], override_num_blocks=len(parts))
            pool = ray.data.TaskPoolStrategy(size=self.workers)
            made = numbers.map(_make, compute=pool, fn_kwargs=told, num_cpus=self.threads, max_retries=RETRIES)
            try:
                for row in made.iter_rows():
                    yield _shard_of(row)
            except RayError as error:
                raise EdgekdError(
                    f"capture: workers were lost ({first_line(error)}); finished shards stay, edgekd capture goes on"
                ) from error

        return make


@contextlib.contextmanager
def hired(workers: int | None, address: str | None) -> Iterator[Crew]:
    """Workers of this machine, or of a Ray cluster.

    Args:
        workers: By default one for each machine. They share its cores evenly.
        address: ``host:port`` of the cluster's head; None starts one on this machine, and ends it.

    Raises:
        MissingToolchainError: Ray is not installed.
        UsageError: There is no cluster at that address, or more workers were asked for than cores.
    """
    if absent := plugins.missing(("ray", "pandas", "pyarrow")):
        raise MissingToolchainError("capture on several workers", ", ".join(absent), "ray")
    if address is not None:
        _require_reachable(address)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray would send statistics, and nobody was asked
    import ray

    own: dict[str, Any] = {"include_dashboard": False} if address is None else {}
    try:
        ray.init(address or "local", log_to_driver=False, logging_level=logging.ERROR, **own)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise UsageError(f"Ray does not start on {address or 'this machine'}: {first_line(error)}") from None
    try:
        _hush()
        yield _crew(workers, [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]])
    finally:
        ray.shutdown()


def _require_reachable(address: str) -> None:
    """Ray itself knocks for minutes before it says that nobody is there."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise UsageError(f"--cluster {address}: the head of a Ray cluster is named as host:port, such as 10.0.0.1:6379")
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as error:
        raise UsageError(f"no Ray cluster at {address}: {first_line(error)}; ray start --head starts one") from None


def _crew(workers: int | None, cores: Sequence[int]) -> Crew:
    """Workers over machines, by the cores of each; all have as many threads, so that all make the same bytes."""
    able = [count for count in cores if count]
    asked = workers or len(able)
    if asked > sum(able):
        raise UsageError(f"--workers {asked}: there are {sum(able)} cores on {len(able)} machines")
    threads = max(able)
    while sum(count // threads for count in able) < asked:
        threads -= 1
    return Crew(asked, threads)


def _hush() -> None:
    """Ray's own bars and logs; ours are enough."""
    import ray

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # Retries are told in a way that Ray means to end with 2.64, and names no other: without them it retries for ever.
    warnings.filterwarnings("ignore", category=ray.util.annotations.RayDeprecationWarning)
    logging.getLogger("ray.data").setLevel(logging.ERROR)


def _make(row: Json, recipe: Recipe, split: str, key: CaptureKey, threads: int) -> Json:
    """On a worker: one shard as a row of Ray Data, or why it could not be made."""
    import torch

    from edgekd.teachers.shards import Part, make_shard

    torch.set_num_threads(threads)
    part = Part(**{name: int(value) for name, value in row.items()})
    try:
        work = _at_work(recipe, split, key)
        shard = make_shard(part, work.split(split), work.teacher, key, work.views_of(split), lambda records: None)
    except Exception as error:  # noqa: BLE001 - whatever it is: the one who asked must hear it, and no retry would help
        kind = type(error).__name__
        known = isinstance(error, EdgekdError)
        words = str(error) if known else f"{kind} on {socket.gethostname()}: {first_line(error)}"
        return {**row, "content": b"", "facts": "", "fault": json.dumps([kind if known else "EdgekdError", words])}
    facts = json.dumps({"classes": shard.classes, "layout": dict(shard.layout), "beside": dict(shard.beside)})
    return {**row, "content": shard.content, "facts": facts, "fault": ""}


def _shard_of(row: Json) -> Shard:
    from edgekd.teachers.shards import Part, Shard

    if row["fault"]:
        kind, words = json.loads(row["fault"])
        found = getattr(errors, kind)
        raise (UsageError if issubclass(found, UsageError) else found)(words)
    part = Part(int(row["number"]), int(row["start"]), int(row["stop"]))
    return Shard(part, row["content"], **json.loads(row["facts"]))


_AT_WORK: dict[tuple[str, str], Workspace] = {}
"""Of this worker, by recipe and split: data and teacher are loaded once."""


def _at_work(recipe: Recipe, split: str, key: CaptureKey) -> Workspace:
    """The recipe on this worker, once it is known to be the same here.

    Raises:
        DataError: Teacher, data, augmentation or mixing are others here.
    """
    from edgekd.errors import DataError
    from edgekd.stages.workspace import Workspace

    told = fingerprint([recipe.model_dump(mode="json"), str(recipe.folder)])
    if (told, split) not in _AT_WORK:
        work = next((known for (same, _), known in _AT_WORK.items() if same == told), Workspace(recipe))
        here, there = work.capture_key(split).to_json(), key.to_json()
        if other := [name for name, value in there.items() if here.get(name) != value]:
            raise DataError(f"{socket.gethostname()} has another {', '.join(other)}; all machines need the same files")
        _AT_WORK[told, split] = work
    return _AT_WORK[told, split]

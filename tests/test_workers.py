"""A capture on several workers: the bytes of one process, whoever makes a shard and whoever is killed on the way."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgekd.errors import UsageError
from edgekd.stages.workers import _crew, hired

RECIPE = """
name = "shared"
labels = ["a", "b", "c"]
[data]
train = "train.npz"
test = "test.npz"
augment = "models:shake"
views = 2
mix = "mixup"
[teacher]
model = "models:teacher"
[student]
model = "models:teacher"
"""

MODELS = """
import os, signal, time
from pathlib import Path

import torch
from torch import nn

HERE = Path(__file__).parent


class Mortal(nn.Sequential):
    \"\"\"Kills its process in the middle of a shard, once, where a file called 'deadly' lies.\"\"\"

    calls = 0

    def forward(self, x):
        Mortal.calls += 1
        if (HERE / "slow").exists():
            time.sleep(0.2)
        if Mortal.calls > 6 and (HERE / "deadly").exists():
            (HERE / "deadly").unlink()
            (HERE / "died").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if (HERE / "sick").exists():
            return super().forward(x) * float("nan")
        return super().forward(x)


def teacher():
    torch.manual_seed(int(os.environ.get("SEED_OF_TEACHER", "0")))
    return Mortal(nn.Linear(6, 32), nn.GELU(), nn.Linear(32, 3)).eval()


def shake(sample, generator):
    return {"x": sample["x"] + 0.1 * torch.randn(6, generator=generator)}
"""

CAPTURE = """
import sys
import edgekd.teachers.capture, edgekd.cli.app
edgekd.teachers.capture.RECORDS_PER_SHARD = 64
sys.argv = ["edgekd", "capture", *sys.argv[1:]]
edgekd.cli.app.main()
"""


def recipe_in(folder: Path) -> Path:
    random = np.random.default_rng(0)
    folder.mkdir()
    for name, count in (("train", 500), ("test", 40)):
        x = random.normal(size=(count, 6)).astype(np.float32)
        np.savez(folder / f"{name}.npz", x=x, label=(x[:, 0] > 0).astype(int) + (x[:, 1] > 1))
    (folder / "edgekd.toml").write_text(RECIPE)
    (folder / "models.py").write_text(MODELS)
    return folder


def start(folder: Path, *words: str, **environment: str) -> subprocess.Popen[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, "-c", CAPTURE, *words]
    return subprocess.Popen(command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def captured(folder: Path, *words: str) -> dict[str, bytes]:
    """All files of the caches, once that capture ended well."""
    running = start(folder, *words)
    told = running.communicate(timeout=240)[1]
    assert running.returncode == 0, told
    cache = folder / "runs" / "shared" / "cache"
    return {str(path.relative_to(cache)): path.read_bytes() for path in cache.rglob("*") if path.is_file()}


def shards_of(folder: Path) -> list[Any]:
    manifest = folder / "runs" / "shared" / "cache" / "train.part" / "manifest.json"
    return list(json.loads(manifest.read_text())["shards"]) if manifest.is_file() else []


def test_workers_share_the_cores_evenly() -> None:
    """All have as many threads, also where machines differ."""
    found = {(asked, cores): _crew(asked, cores) for asked in (None, 3) for cores in ((8,), (8, 4), (2, 2))}

    assert {key: (crew.workers, crew.threads) for key, crew in found.items()} == {
        (None, (8,)): (1, 8),
        (None, (8, 4)): (2, 4),
        (None, (2, 2)): (2, 2),
        (3, (8,)): (3, 2),
        (3, (8, 4)): (3, 4),
        (3, (2, 2)): (3, 1),
    }
    with pytest.raises(UsageError, match="--workers 5: there are 4 cores on 2 machines"):
        _crew(5, (2, 2))


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What one process captures."""
    return captured(recipe_in(tmp_path_factory.mktemp("alone") / "recipe"))


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of a Ray cluster of two node processes with a core each."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        nodes.add_node(num_cpus=1)
        nodes.wait_for_nodes()
        yield nodes.address
    finally:
        nodes.shutdown()


@pytest.mark.slow
def test_a_worker_killed_midway_on_two_nodes_loses_nothing(
    tmp_path: Path, cluster: str, alone: dict[str, bytes]
) -> None:
    folder = recipe_in(tmp_path / "recipe")
    (folder / "deadly").touch()

    assert captured(folder, "--cluster", cluster) == alone
    assert (folder / "died").exists()


@pytest.mark.slow
def test_a_worker_killed_midway_on_this_machine_loses_nothing(tmp_path: Path, alone: dict[str, bytes]) -> None:
    """As many workers as cores, so that each has one thread, as the one process had."""
    pytest.importorskip("ray")
    folder = recipe_in(tmp_path / "recipe")
    (folder / "deadly").touch()

    assert captured(folder, "--workers", str(os.cpu_count())) == alone
    assert (folder / "died").exists()


@pytest.mark.slow
def test_a_capture_whose_driver_was_killed_goes_on(tmp_path: Path, cluster: str, alone: dict[str, bytes]) -> None:
    folder = recipe_in(tmp_path / "recipe")
    (folder / "slow").touch()
    running = start(folder, "--cluster", cluster)
    try:
        while len(shards_of(folder)) < 3:
            assert running.poll() is None, running.communicate()[1]
            time.sleep(0.02)
    finally:
        running.kill()
    running.wait(60)
    before = shards_of(folder)
    (folder / "slow").unlink()

    assert 3 <= len(before) < 15
    assert captured(folder) == alone  # one process goes on where workers stopped


@pytest.mark.slow
def test_a_machine_with_another_teacher_is_refused(tmp_path: Path, cluster: str) -> None:
    """What the teacher is depends on a variable that only this process has."""
    running = start(recipe_in(tmp_path / "recipe"), "--cluster", cluster, SEED_OF_TEACHER="1")
    told = running.communicate(timeout=120)[1]

    assert running.returncode == 1
    assert told.splitlines()[-1].endswith("has another teacher; all machines need the same files")


@pytest.mark.slow
def test_what_a_worker_meets_is_one_line(tmp_path: Path, cluster: str) -> None:
    folder = recipe_in(tmp_path / "recipe")
    captured(folder)
    (folder / "sick").touch()
    running = start(folder, "--cluster", cluster, "--force")
    told = running.communicate(timeout=120)[1]

    assert running.returncode == 1
    assert "edgekd: the teacher gives NaN or infinity for 64 samples, first id" in told.splitlines()[-1]


def test_a_cluster_that_is_not_there_is_one_line() -> None:
    pytest.importorskip("ray")
    refused = pytest.raises(UsageError, match=r"no Ray cluster at 127\.0\.0\.1:1: .*; ray start --head starts one")

    with refused, hired(None, "127.0.0.1:1"):
        pass
    with pytest.raises(UsageError, match="named as host:port"), hired(None, "auto"):
        pass

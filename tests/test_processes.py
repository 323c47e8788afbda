"""Training on many processes (torchrun, gloo): what is learned does not depend on how many there are."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

TEAM = Path(__file__).parent / "stand_ins" / "team.py"
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]


def start(out: Path, processes: int, options: dict[str, Any], *words: str) -> subprocess.CompletedProcess[str]:
    launcher = [*TORCHRUN, str(processes)] if processes > 1 else []
    command = [sys.executable, *launcher, str(TEAM), str(out), json.dumps(options), *words]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)


def trained(folder: Path, name: str, processes: int, options: dict[str, Any], *words: str) -> dict[str, Any]:
    out = folder / f"{name}.json"
    ended = start(out, processes, options, *words)
    assert ended.returncode == 0, ended.stderr[-2000:]
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def assert_same(one: dict[str, Any], other: dict[str, Any], shares: bool = True) -> None:
    """Loss curves and weights, to the rounding of sums in another order."""
    for ours, theirs in zip(one["history"], other["history"], strict=True):
        for key in ours:
            if shares or not key.startswith("gradient share"):
                assert ours[key] == pytest.approx(theirs[key], abs=2e-5), key
    for key, value in one["weights"].items():
        np.testing.assert_allclose(value, other["weights"][key], atol=1e-4, err_msg=key)


def test_two_processes_learn_what_one_does(tmp_path: Path) -> None:
    """Batch norm, DIST (which relates the samples of a batch), samples without a label, a last batch of five."""
    one = trained(tmp_path, "one", 1, {}, "dist", "unlabelled")

    assert_same(one, trained(tmp_path, "two", 2, {}, "dist", "unlabelled"))
    assert len(one["history"]) == 3


@pytest.mark.slow
def test_a_student_in_shards_learns_what_a_whole_one_does(tmp_path: Path) -> None:
    one = trained(tmp_path, "one", 1, {}, "dist")

    assert_same(one, trained(tmp_path, "shards", 2, {"shard": True}, "dist"))


@pytest.mark.slow
def test_a_last_batch_smaller_than_the_processes_counts_once(tmp_path: Path) -> None:
    """101 samples in batches of 50: the last has one, and three processes."""
    one = trained(tmp_path, "one", 1, {"batch_size": 50, "norm": False})

    assert_same(one, trained(tmp_path, "three", 3, {"batch_size": 50, "norm": False}))


def test_a_batch_in_pieces_is_the_same_batch(tmp_path: Path) -> None:
    one = trained(tmp_path, "one", 1, {"norm": False}, "unlabelled")

    assert_same(one, trained(tmp_path, "pieces", 1, {"norm": False, "accumulate": 3}, "unlabelled"), shares=False)


@pytest.mark.slow
@pytest.mark.parametrize(("dies", "options"), [(1, {}), (5, {"accumulate": 3}), (9, {"shard": True})])
def test_a_team_that_was_killed_goes_on_bit_for_bit(tmp_path: Path, dies: int, options: dict[str, Any]) -> None:
    """SIGKILL of one of two, with dropout: mid-epoch and across its edge (7 steps)."""
    options = {"dropout": 0.3, **options}
    whole = trained(tmp_path, "whole", 2, dict(options))
    killed = start(tmp_path / "cut.json", 2, {**options, "dies": dies})
    assert killed.returncode != 0
    assert not (tmp_path / "cut.json").exists()
    resumed = trained(tmp_path, "cut", 2, dict(options))

    assert resumed["done_before"] in (dies - 1, dies)  # the step in which it died may have been written by the other
    assert resumed["weights"] == whole["weights"]
    assert resumed["history"] == whole["history"]


def test_a_command_for_one_process_refuses_several(tmp_path: Path) -> None:
    command = [sys.executable, *TORCHRUN, "2", "-m", "edgekd", "run"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)

    lines = [line for line in ended.stderr.splitlines() if line.startswith("edgekd:")]
    assert lines == ["edgekd: edgekd run is for one process, and 2 were started; only distill takes several"]

"""Training on many processes (torchrun, gloo): what is learned does not depend on how many there are."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import nn

from edgekd.distillation.parallel import spread
from edgekd.errors import UsageError

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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dies", "options", "words"),
    [
        (1, {}, ()),
        (5, {"accumulate": 3}, ()),
        (9, {"shard": True}, ()),
        (9, {"compile": True}, ("dist",)),
        (9, {"shard": True, "precision": "fp16"}, ()),
        (9, {}, ("features", "unlabelled")),
        (9, {}, ("mixed", "dist")),
        (9, {"norm": False, "precision": "fp16", "accumulate": 2}, ("windows",)),
    ],
)
def test_a_team_that_was_killed_goes_on_bit_for_bit(
    tmp_path: Path, dies: int, options: dict[str, Any], words: tuple[str, ...]
) -> None:
    """SIGKILL of one of two, with dropout: mid-epoch and across its edge (7 steps)."""
    options = {"dropout": 0.3, **options}
    whole = trained(tmp_path, "whole", 2, dict(options), *words)
    killed = start(tmp_path / "cut.json", 2, {**options, "dies": dies}, *words)
    assert killed.returncode != 0
    assert not (tmp_path / "cut.json").exists()
    resumed = trained(tmp_path, "cut", 2, dict(options), *words)

    assert resumed["done_before"] in (dies - 1, dies)  # the step in which it died may have been written by the other
    assert resumed["weights"] == whole["weights"]
    assert resumed["history"] == whole["history"]


@pytest.mark.slow
@pytest.mark.parametrize("words", [("mixed", "dist"), ("features", "unlabelled"), ("windows",)])
def test_two_processes_learn_mixed_samples_features_and_windows_as_one_does(
    tmp_path: Path, words: tuple[str, ...]
) -> None:
    """The windows of one process have other numbers of tokens that count than those of the other."""
    options = {"norm": "windows" not in words}
    one = trained(tmp_path, "one", 1, dict(options), *words)

    assert_same(one, trained(tmp_path, "two", 2, dict(options), *words), shares=words[0] == "mixed")


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("options", [{"precision": "bf16"}, {"precision": "fp16"}, {"compile": True}])
def test_fewer_bits_and_compiled_kernels_follow_the_plain_curve(
    tmp_path: Path, processes: int, options: dict[str, Any]
) -> None:
    plain = trained(tmp_path, "plain", 1, {}, "dist")["history"]
    other = trained(tmp_path, "other", processes, options, "dist")["history"]

    assert [epoch["loss"] for epoch in other] == pytest.approx([epoch["loss"] for epoch in plain], rel=0.05)
    assert other != plain or options == {"compile": True}


def start_two_machines(out: Path, port: int, options: dict[str, Any], *words: str) -> list[int]:
    """Two launchers that meet at an address, each with a node rank and a process of its own; their exit codes."""
    launcher = ["-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", "--master-addr", "127.0.0.1"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    work = [str(TEAM), str(out), json.dumps(options), *words]
    nodes = [
        subprocess.Popen([sys.executable, *launcher, "--master-port", str(port), "--node-rank", rank, *work], env=env)
        for rank in ("0", "1")
    ]
    return [node.wait(timeout=300) for node in nodes]


@pytest.mark.slow
def test_two_machines_learn_what_one_does_also_when_one_of_them_is_lost(tmp_path: Path) -> None:
    """SIGKILL of all that runs on the second, in the middle of the second epoch, with dropout: bit for bit."""
    one = trained(tmp_path, "one", 1, {}, "dist")
    assert start_two_machines(tmp_path / "two.json", 29631, {}, "dist") == [0, 0]
    assert_same(one, json.loads((tmp_path / "two.json").read_text()))

    options = {"dropout": 0.3}
    assert start_two_machines(tmp_path / "whole.json", 29633, options, "dist") == [0, 0]
    first, second = start_two_machines(tmp_path / "cut.json", 29635, {**options, "dies": 9}, "dist", "with-its-machine")
    assert first > 0
    assert second == -signal.SIGKILL
    assert not (tmp_path / "cut.json").exists()
    assert start_two_machines(tmp_path / "cut.json", 29637, options, "dist") == [0, 0]
    whole, resumed = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("whole", "cut"))
    assert resumed["done_before"] in (8, 9)
    assert resumed["weights"] == whole["weights"]
    assert resumed["history"] == whole["history"]


@pytest.mark.slow
def test_accelerate_launch_starts_the_same(tmp_path: Path) -> None:
    one = trained(tmp_path, "one", 1, {}, "dist")
    launcher = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--mixed_precision", "no"]
    command = [sys.executable, *launcher, str(TEAM), str(tmp_path / "two.json"), json.dumps({}), "dist"]
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    ended = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)

    assert ended.returncode == 0, ended.stderr[-2000:]
    assert_same(one, json.loads((tmp_path / "two.json").read_text()))


def test_a_command_for_one_process_refuses_several(tmp_path: Path) -> None:
    """As torchrun starts them: the main one says it, the other nothing."""
    told = []
    for rank in ("0", "1"):
        env = {**os.environ, "WORLD_SIZE": "2", "RANK": rank}
        command = [sys.executable, "-m", "edgekd", "run"]
        ended = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
        assert ended.returncode == 2
        told += ended.stderr.splitlines()

    assert told == ["edgekd: edgekd run is for one process, and 2 were started; only distill takes several"]


def test_a_student_in_shards_on_one_process_says_how_several_are_started(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    told = r"distill.shard = true .*; torchrun --nproc-per-node 2 -m edgekd distill starts two"
    with pytest.raises(UsageError, match=told):
        spread(nn.Linear(2, 2), shard=True, compiled=False)


def test_what_accelerate_launch_was_told_is_not_heard_in_silence(tmp_path: Path) -> None:
    env = {**os.environ, "ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}
    command = [sys.executable, "-m", "edgekd", "distill"]
    ended = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)

    assert ended.stderr == (
        "edgekd: accelerate launch --dynamo_backend is not heard; the recipe says it: [distill] compile = true\n"
    )


def test_processes_that_accelerate_launch_has_not_joined_are_not_taken_for_one(tmp_path: Path) -> None:
    """As ``accelerate launch --cpu --num_processes 2`` starts its one process."""
    env = {**os.environ, "ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1"}
    command = [sys.executable, "-m", "edgekd", "distill"]
    ended = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)

    assert ended.returncode == 2
    assert ended.stderr.startswith(
        "edgekd: accelerate launch was told of several processes (MASTER_ADDR is set) and has"
    )


@pytest.mark.slow
def test_accelerate_launch_says_what_we_take_for_several_processes(tmp_path: Path) -> None:
    """Its own environment, which it may change: of one process nothing is refused."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_machines", "1", "--num_processes"]
    told = []
    for processes in ("1", "2"):
        command = [*launcher, processes, "--mixed_precision", "no", "-m", "edgekd", "distill"]
        told.append(subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120).stderr)

    assert "edgekd: no edgekd.toml" in told[0]
    assert "edgekd: accelerate launch was told of several processes" in told[1]

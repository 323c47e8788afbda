"""Drift: the same data raises no more alarms than promised, a real shift is found and named."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from edgekd.distillation.shift import Described, compare, describe, holm, ks_test, mmd_test
from edgekd.errors import DataError

from command import edgekd

sklearn_datasets = pytest.importorskip("sklearn.datasets")
LABELS = [str(number) for number in range(10)]


@pytest.fixture(scope="module")
def digits() -> tuple[np.ndarray, np.ndarray, Callable[[np.ndarray], Described]]:
    """Digits that a small teacher was not trained on, their classes, and what it makes of images."""
    data = sklearn_datasets.load_digits()
    images, classes = (data.images / 16).astype(np.float32)[:, None], data.target
    order = np.random.default_rng(0).permutation(len(images))
    images, classes = images[order], classes[order]
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(60):
        loss = nn.functional.cross_entropy(net(torch.from_numpy(images[:700])), torch.from_numpy(classes[:700]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def described(shown: np.ndarray) -> Described:
        with torch.no_grad():
            hidden = net[:3](torch.from_numpy(shown))
            return describe({"image": shown}, net[3](hidden).numpy(), {"hidden": hidden.numpy()})

    assert (described(images[700:]).top == classes[700:]).mean() > 0.9
    return images[700:], classes[700:], described


def part(whole: Described, rows: np.ndarray) -> Described:
    return Described(
        {name: values[rows] for name, values in whole.statistics.items()},
        whole.top[rows],
        [vectors[rows] for vectors in whole.vectors],
    )


def test_two_halves_of_the_same_data_raise_no_more_false_alarms_than_promised(
    digits: tuple[np.ndarray, np.ndarray, Callable[[np.ndarray], Described]],
) -> None:
    images, _, described = digits
    whole, alarms, smallest = described(images), 0, []
    for seed in range(200):
        order = np.random.default_rng(seed).permutation(len(images))
        found = compare(part(whole, order[:200]), part(whole, order[200:400]), LABELS, alpha=0.05)
        alarms += found.drifted
        smallest.append(min(finding.p for finding in found.findings))

    # Of 200, a rate of 5 % gives more than 20 once in a hundred times; the tests are not dead either.
    assert alarms <= 20
    assert min(smallest) < 0.2


def test_real_shifts_are_found_and_named(
    digits: tuple[np.ndarray, np.ndarray, Callable[[np.ndarray], Described]],
) -> None:
    images, classes, described = digits
    known, rest, labels = described(images[:500]), images[500:], classes[500:]
    noise = rest + np.random.default_rng(0).normal(0, 0.3, rest.shape).astype(np.float32)
    many = np.concatenate([np.flatnonzero(labels == 3), np.flatnonzero(labels != 3)[:60]])
    shifts = {"noise": noise, "inverted": 1 - rest, "imbalance": rest[many], "darker": rest * 0.6}
    found = {name: compare(known, described(shown), LABELS) for name, shown in shifts.items()}
    drifted = {name: {f.what for f in shift.findings if f.drifted} for name, shift in found.items()}

    assert all("outputs" in what for what in drifted.values()), drifted
    assert {"confidence", "contrast of image"} <= drifted["noise"]
    assert "brightness of image" in drifted["inverted"]
    assert drifted["imbalance"] >= {"top class"}
    told = {name: " ".join(shift.sentences()) for name, shift in found.items()}
    assert "The teacher is less sure of its top class: on average" in told["noise"]
    assert "Input image is brighter: on average" in told["inverted"]
    assert "Input image is darker: on average" in told["darker"]
    assert "The teacher's top class has other shares: 3 " in told["imbalance"]
    assert not compare(known, described(rest), LABELS).drifted


def test_kolmogorov_smirnov_is_scipys() -> None:
    stats = pytest.importorskip("scipy.stats")
    random = np.random.default_rng(0)
    for shift in (0.0, 0.1, 0.3):
        first, second = random.normal(size=400), random.normal(shift, size=300)
        assert ks_test(first, second) == pytest.approx(stats.ks_2samp(first, second).pvalue, rel=0.15, abs=1e-4)


def test_the_kernel_test_is_uniform_under_no_shift_and_small_under_one() -> None:
    random = np.random.default_rng(0)
    same = [mmd_test([random.normal(size=(40, 3))], [random.normal(size=(50, 3))], 99) for _ in range(100)]

    assert 0.4 < np.mean(same) < 0.6
    assert np.mean(np.array(same) < 0.1) < 0.2
    assert mmd_test([random.normal(size=(80, 3))], [random.normal(size=(80, 3)) * 2], 99) == 0.01


def test_holm_is_the_example() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_too_few_samples_are_refused() -> None:
    few = describe({"x": np.zeros((5, 2), np.float32)}, np.zeros((5, 3)), {})
    with pytest.raises(DataError, match="5 served samples against 5 are too few; 20 of each"):
        compare(few, few)


def test_the_command_says_what_drifted_and_exits_with_one(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for name, count, further in (("train", 300, 0.0), ("test", 300, 0.0), ("same", 200, 0.0), ("moved", 200, 0.8)):
        x = (random.normal(size=(count, 4)) + further).astype(np.float32)
        label = {} if name in ("same", "moved") else {"label": (x.sum(1) > 0).astype(int)}
        np.savez(tmp_path / f"{name}.npz", x=x, **label)
    (tmp_path / "m.py").write_text(
        "import torch\n"
        "def teacher():\n    net = torch.nn.Linear(4, 2, bias=False)\n"
        "    net.weight.data = torch.tensor([[-1.0] * 4, [1.0] * 4])\n    return net\n"
        "def student():\n    return torch.nn.Linear(4, 2)\n"
    )
    (tmp_path / "edgekd.toml").write_text(
        'name = "x"\nlabels = ["low", "high"]\n[data]\ntrain = "train.npz"\ntest = "test.npz"\n'
        '[teacher]\nmodel = "m:teacher"\n[student]\nmodel = "m:student"\n'
    )

    same = edgekd("check", "--shift", "same.npz", cwd=tmp_path)
    moved = edgekd("check", "--shift", "moved.npz", "--json", cwd=tmp_path)

    assert same.returncode == 0, same.stderr
    assert same.stdout.startswith("No drift can be told (200 served samples against 300 of the recipe's)")
    assert moved.returncode == 1, moved.stderr
    told = json.loads(moved.stdout)
    assert told["drifted"]
    assert any("high" in sentence and "other shares" in sentence for sentence in told["sentences"])

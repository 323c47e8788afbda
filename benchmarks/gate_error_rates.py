"""How often the gate cries wolf and how often it finds one, on this machine.

``python -m edgekd.benchmarks.gate_error_rates record --name busy --minutes 15`` runs a small network against itself, in
turns and one block after the other, and keeps of each block what rules look at: ``results/gate_<name>.json``.
``simulate`` draws comparisons from the recordings, injects slower files, and asks this gate and other tools' rules;
``real`` lets the gate judge networks with more layers. Both write ``results/gate_error_rates.json``. The page about
it: docs/gate.md.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgekd.measurement import Block, Plan
from edgekd.plugins import load_exporter
from edgekd.protocols import Side
from edgekd.store import hash_path, write_json
from edgekd.types import Artifact, Card, Parity

from .cells import FAST
from .gate import GATE_PLAN
from .rule import Rule, decide

__all__ = ["Recording", "error_rates", "load_recording", "others_table", "peers", "rates_table", "simulate"]

RESULTS = Path(__file__).parent / "results"
LAYERS = 40
SLOWER = (0.0, 0.03, 0.05, 0.08)
TRIALS = 2000
MARGIN = 0.03
TURN_MS = 10.0  # a sample of asv: the mean of what it runs in sample_time = 10 ms
SAMPLES_OF_ASV = 10  # from each of its two processes
STATISTICS = ("p10", "p50", "min", "mean")


class Recording:
    """A file against itself, pair by pair.

    Attributes:
        values: By ``turns/p10`` …, (pairs, 2): milliseconds of each block.
        samples: By ``turns`` …, (pairs, 2, 10): means over 10 ms each.
        about: Where and how it was recorded.
    """

    def __init__(self, content: Mapping[str, Any]) -> None:
        self.about = {key: value for key, value in content.items() if not isinstance(value, list)}
        self.values = {key: np.array(value) for key, value in content.items() if "/" in key and "samples" not in key}
        self.samples = {key.partition("/")[0]: np.array(v) for key, v in content.items() if key.endswith("/samples")}


def load_recording(path: Path) -> Recording:
    return Recording(json.loads(path.read_text(encoding="utf-8")))


def summary_of(block: Block) -> dict[str, Any]:
    """What rules look at, of one block."""
    samples = np.array(block.latency_ms)
    ends = np.cumsum(samples)
    chunks = [samples[(ends > begin) & (ends <= begin + TURN_MS)] for begin in np.arange(0, ends[-1], TURN_MS)]
    means = [float(chunk.mean()) for chunk in chunks if len(chunk)]
    picked = np.linspace(0, len(means) - 1, SAMPLES_OF_ASV).round().astype(int)
    return {
        "p10": float(np.quantile(samples, FAST)),
        "p50": float(np.median(samples)),
        "min": float(samples.min()),
        "mean": float(samples.mean()),
        "samples": [means[index] for index in picked],
    }


def recorded(rows: Sequence[Mapping[str, Sequence[Block]]], about: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a recording's file, from pairs of blocks by ``turns`` and ``alone``."""
    content = dict(about)
    for how in rows[0]:
        kept = [[summary_of(block) for block in row[how]] for row in rows]
        for name in (*STATISTICS, "samples"):
            content[f"{how}/{name}"] = _rounded([[block[name] for block in pair] for pair in kept])
    return content


def _rounded(value: Any) -> Any:
    return [_rounded(item) for item in value] if isinstance(value, list) else float(f"{value:.5g}")


def simulate(
    logs: np.ndarray, slower: float, rule: Rule, trials: int = TRIALS, margin: float = MARGIN, seed: int = 0
) -> dict[str, float]:
    """Shares of verdicts over so many comparisons with a file that is slower by a share, and the mean number of pairs.

    Each begins at a random place of the recording and goes on in its order, so drift stays drift; which of a pair is
    the old file is drawn, as the gate draws it; the confirming sitting follows on.

    Args:
        logs: Logarithm of second over first of a file with itself, (pairs,).
    """
    random, verdicts, pairs = np.random.default_rng(seed), list[str](), 0
    for _ in range(trials):
        drawn = np.roll(logs, -int(random.integers(len(logs)))) * random.choice((-1.0, 1.0), len(logs))
        source = _Source(np.tile(drawn, 2) + np.log1p(slower))
        verdicts.append(decide({0: lambda: 1 + margin}, source, rule)[0].verdict)
        pairs += source.used
    shares = {word: verdicts.count(word) / trials for word in ("regression", "pass", "inconclusive")}
    return shares | {"pairs": pairs / trials}


class _Source:
    def __init__(self, logs: np.ndarray) -> None:
        self.logs, self.used = logs, 0

    def __call__(self, names: Collection[int], count: int) -> dict[int, np.ndarray]:
        found = dict.fromkeys(names, self.logs[self.used : self.used + count])
        self.used += count
        return found


def logs_of(recording: Recording, how: str, statistic: str) -> np.ndarray:
    values = recording.values[f"{how}/{statistic}"]
    return np.asarray(np.log(values[:, 1] / values[:, 0]))


def peers(recording: Recording, slower: float, trials: int = TRIALS, seed: int = 0) -> dict[str, float]:
    """How often others' rules would have called a file slower, on the same blocks.

    ``pytest-benchmark``: one process each, ``--benchmark-compare-fail=min:5%`` and ``mean:5%``. ``asv``: two processes
    each, Mann-Whitney over the samples at p < 0.002 and a factor of 1.1 (its defaults), and of 1.03. ``mean``: the
    means of 12 blocks each, one file after the other, differ by more than 3 %.
    """
    from scipy.stats import mannwhitneyu

    random, count = np.random.default_rng(seed), len(recording.samples["alone"])
    found = dict.fromkeys(
        ("pytest-benchmark min 5 %", "pytest-benchmark mean 5 %", "asv factor 1.1", "asv factor 1.03", "mean 3 %"), 0
    )
    alone = {name: recording.values[f"alone/{name}"].reshape(-1) for name in ("min", "mean")}
    samples = recording.samples["alone"].reshape(2 * count, -1)
    for _ in range(trials):
        old, new = random.choice(2 * count, 2, replace=False)
        for name in ("min", "mean"):
            found[f"pytest-benchmark {name} 5 %"] += alone[name][new] * (1 + slower) > 1.05 * alone[name][old]
        start = int(random.integers(2 * count))
        before = samples[np.arange(start, start + 2) % (2 * count)].reshape(-1)
        after = samples[np.arange(start + 2, start + 4) % (2 * count)].reshape(-1) * (1 + slower)
        differs = mannwhitneyu(before, after).pvalue < 0.002
        for factor in (1.1, 1.03):
            found[f"asv factor {factor}"] += bool(differs and np.median(after) > factor * np.median(before))
        first = alone["mean"][np.arange(start, start + 12) % (2 * count)].mean()
        second = alone["mean"][np.arange(start + 12, start + 24) % (2 * count)].mean() * (1 + slower)
        found["mean 3 %"] += second > 1.03 * first
    return {name: int(value) / trials for name, value in found.items()}


RULES: Mapping[str, tuple[str, str, Rule]] = {
    "this gate: in turns, fast tenth, 12 and 24 pairs": ("turns", "p10", Rule()),
    "in turns, median": ("turns", "p50", Rule()),
    "in turns, minimum": ("turns", "min", Rule()),
    "one after the other, fast tenth": ("alone", "p10", Rule()),
    "one after the other, median": ("alone", "p50", Rule()),
    "one after the other, median, 10 and 20 pairs at 97.5 %, not confirmed": (
        "alone", "p50", Rule((10, 20), alpha=0.025, confirm_pairs=0),
    ),
}  # fmt: skip
"""By name: how it was recorded, the statistic of a block, the rule."""


def error_rates(recording: Recording, trials: int = TRIALS) -> dict[str, Any]:
    """For every rule and every slowdown the shares of verdicts; for other tools' rules the share of alarms."""
    ours = {
        name: {f"{slower:+.0%}": simulate(logs_of(recording, how, word), slower, rule, trials) for slower in SLOWER}
        for name, (how, word, rule) in RULES.items()
    }
    theirs: dict[str, dict[str, float]] = {}
    for slower in SLOWER:
        for name, share in peers(recording, slower, trials).items():
            theirs.setdefault(name, {})[f"{slower:+.0%}"] = share
    return {"about": recording.about, "pairs": len(logs_of(recording, "turns", "p10")), "rules": ours, "others": theirs}


def network(layers: int, folder: Path) -> Artifact:
    """A stack of equal convolutions, about a millisecond: each layer more is one part in ``layers`` slower."""
    import torch
    from torch import nn

    from edgekd.programs.models import input_specs, output_specs
    from edgekd.programs.tracing import export_program
    from edgekd.types import Student

    torch.manual_seed(0)
    body: list[nn.Module] = [nn.Conv2d(3, 16, 3, padding=1), nn.ReLU()]
    for _ in range(layers):
        body += [nn.Conv2d(16, 16, 3, padding=1), nn.ReLU()]
    net = nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)).eval()
    program = export_program(net, [torch.zeros(1, 3, 20, 20)])
    card = Card(f"stack {layers}", input_specs(program), output_specs(program))
    exporter = load_exporter("onnx")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"stack{layers}{exporter.suffix}"
    exporter.write(Student(program, card), path, "fp32", exporter.options())
    runner, parity = exporter.load(path), Parity("not_run", "a network for measuring the gate")
    size = path.stat().st_size
    return Artifact(
        "onnx", "fp32", path.name, hash_path(path), size, card, runner.inputs, runner.outputs, {}, "", parity
    )


INPUTS = {"x": np.random.default_rng(0).standard_normal((1, 3, 20, 20)).astype(np.float32)}


def record(folder: Path, minutes: float, plan: Plan = GATE_PLAN) -> dict[str, Any]:
    """Pairs of a network with itself for so long: in turns, then one block after the other, and again."""
    from edgekd.devices.host import HostDevice
    from edgekd.programs.models import bind_inputs

    artifact, device = network(LAYERS, folder), HostDevice()
    inputs = bind_inputs(artifact.inputs, INPUTS)
    rows, began = list[dict[str, list[Block]]](), time.monotonic()
    while time.monotonic() - began < minutes * 60:
        turns = [block for block, _ in device.run_in_turns([Side(artifact, folder, inputs)] * 2, plan, len(rows))]
        alone = [device.run(artifact, folder, inputs, plan)[0][0] for _ in range(2)]
        rows.append({"turns": turns, "alone": alone})
    return recorded(rows, about_of([block for row in rows for block in row["turns"]], plan))


def about_of(blocks: Sequence[Block], plan: Plan) -> dict[str, Any]:
    first = blocks[0].conditions
    load = [float(block.conditions["load_average_before"]) for block in blocks]
    return {
        "processor": first["processor"],
        "cores": first["cores"],
        "runtime": first["runtime"],
        "model": f"{LAYERS} convolutions of 16 channels at 20 x 20, onnx fp32",
        "plan": plan.to_json(),
        "load_average": f"{np.median(load):.1f} ({min(load):.1f} to {max(load):.1f})",
    }


def real(folder: Path, layers: int, times: int, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """The gate's verdicts on a network with more layers, measured for real, each time with another seed."""
    from edgekd.devices.host import HostDevice

    from .cells import Pair, Samples
    from .gate import compare

    old, new = network(LAYERS, folder), network(layers, folder)
    found = []
    for seed in range(times):
        began = time.monotonic()
        comparison, _ = compare(
            [Pair("stack", old, folder, new, folder)], "host", HostDevice(), Samples(INPUTS), seed=seed,
            metrics=("latency",),
        )  # fmt: skip
        cell = next(cell for cell in comparison.cells if cell.metric == "latency")
        row = {
            "layers": layers,
            "seed": seed,
            "verdict": cell.verdict,
            "change": cell.change,
            "again": cell.again,
            "pairs": cell.pairs,
            "seconds": round(time.monotonic() - began, 1),
        }
        say(json.dumps(row))
        found.append(row)
    return found


def rates_table(results: Mapping[str, Any], name: str = "busy") -> str:
    """Shares of regressions by rule, for docs/gate.md; then what the gate found for real."""
    rules = results["simulated"][name]["rules"]
    shown = list(next(iter(rules.values())))
    lines = ["| rule | " + " | ".join(f"alarms at {s}" if s in ("+0%", "+3%") else f"{s} found" for s in shown) + " |"]
    lines += ["|---" * (1 + len(shown)) + "|"]
    for rule, by_share in rules.items():
        lines.append(f"| {rule} | " + " | ".join(f"{by_share[s]['regression']:.1%}" for s in shown) + " |")
    gate = next(iter(rules.values()))
    told = "; ".join(f"{gate[s]['pass']:.1%} at {s} with {gate[s]['pairs']:.1f} pairs" for s in shown[:2])
    lines += ["", f"Passed by this gate: {told}."]
    if "real" not in results:
        return "\n".join(lines)
    lines += [""]
    lines += ["| measured for real | comparisons | pass | regression | inconclusive | change | seconds |"]
    lines += ["|---" * 7 + "|"]
    for layers, rows in results["real"][name].items():
        verdicts = [row["verdict"] for row in rows]
        changes, seconds = [row["change"] for row in rows], [row["seconds"] for row in rows]
        counts = " | ".join(str(verdicts.count(word)) for word in ("pass", "regression", "inconclusive"))
        what = "the same file" if int(layers) == LAYERS else f"{layers} convolutions instead of {LAYERS}"
        lines.append(
            f"| {what} | {len(rows)} | {counts} | {min(changes):+.1%} to {max(changes):+.1%} | "
            f"{min(seconds):.0f} to {max(seconds):.0f} |"
        )
    return "\n".join(lines)


def others_table(results: Mapping[str, Any], name: str = "busy") -> str:
    """Shares of alarms by tool, for docs/measuring.md."""
    found = results["simulated"][name]
    gate = {s: verdicts["regression"] for s, verdicts in next(iter(found["rules"].values())).items()}
    rows = {"edgekd compare, a margin of 3 %": gate, **found["others"]}
    lines = ["| rule | " + " | ".join(s.replace("%", " %") for s in gate) + " |", "|---" * (1 + len(gate)) + "|"]
    return "\n".join(
        lines + [f"| {rule} | " + " | ".join(f"{by[s]:.1%}" for s in gate) + " |" for rule, by in rows.items()]
    )


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("record", "simulate", "real"))
    parser.add_argument("--name", default="busy", help="of the recording")
    parser.add_argument("--minutes", type=float, default=15.0)
    parser.add_argument(
        "--layers", type=int, action="append", help="of the new network, for real; 40 are the old one's"
    )
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--models", type=Path, default=Path("gate_models"), help="folder for the networks")
    options = parser.parse_args(arguments)
    out = RESULTS / "gate_error_rates.json"
    results: dict[str, Any] = json.loads(out.read_text(encoding="utf-8")) if out.is_file() else {}
    if options.what == "record":
        write_json(RESULTS / f"gate_{options.name}.json", record(options.models, options.minutes), indent=None)
        return
    if options.what == "simulate":
        recording = load_recording(RESULTS / f"gate_{options.name}.json")
        results.setdefault("simulated", {})[options.name] = error_rates(recording)
    else:
        for layers in options.layers or (LAYERS, 42, 43):
            rows = real(options.models, layers, options.times, print)
            results.setdefault("real", {}).setdefault(options.name, {})[str(layers)] = rows
    write_json(out, results)


if __name__ == "__main__":
    main(sys.argv[1:])

"""How long an export takes beside the bare converter of the same toolchain, and how much memory it needs.

``python -m edgekd.benchmarks.export_time`` prints the table and writes ``benchmarks/results/export_time.json``. Both
sides start from the same module in a fresh process, turn about on one core, and end with an fp32 file on disk; edgekd's
proof comes after that and is not part of either. Toolchains are imported before the clock starts.

Two ratios, and the bar holds for both: of the conversion, from a traced program to the file, and of the whole, with the
trace. edgekd traces once, with an open batch, for all targets and keeps that program; a bare converter traces for one
file, with a fixed batch, which is faster (MiniLM: 0.5 s instead of 0.75). litert-torch traces inside; that is timed
there.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from edgekd import plugins
from edgekd.exporting.export import write_file
from edgekd.programs.models import input_specs, output_specs
from edgekd.programs.tracing import export_program
from edgekd.quiet import quiet
from edgekd.store import read_json, write_json
from edgekd.types import Card, Student

RESULTS = Path(__file__).parent / "results" / "export_time.json"
SIDES = ("edgekd", "bare")
BAR = 1.15


class Logits(nn.Module):
    """One of transformers' models with its first output alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self.model(*inputs, return_dict=False)[0]


def resnet_18() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    import transformers

    config = transformers.ResNetConfig(depths=[2, 2, 2, 2], hidden_sizes=[64, 128, 256, 512], layer_type="basic")
    return transformers.ResNetForImageClassification(config), (torch.zeros(1, 3, 224, 224),)


def mobilenet_v2() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    import transformers

    model = transformers.MobileNetV2ForImageClassification(transformers.MobileNetV2Config())
    return model, (torch.zeros(1, 3, 224, 224),)


def minilm() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    import transformers

    config = transformers.BertConfig(
        hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
    )
    ids = torch.zeros(1, 128, dtype=torch.int64)
    return transformers.BertModel(config, add_pooling_layer=False), (ids, torch.ones_like(ids))


MODELS: Mapping[str, Callable[[], tuple[nn.Module, tuple[torch.Tensor, ...]]]] = {
    "resnet-18": resnet_18,
    "mobilenet-v2": mobilenet_v2,
    "minilm": minilm,
}
"""By name, in their published sizes; what the weights are does not matter here, so they are random."""


def bare_onnx(program: ExportedProgram, path: Path) -> None:
    torch.onnx.export(program, f=path, dynamo=True, opset_version=20, external_data=False, verbose=False)


def bare_coreml(program: ExportedProgram, path: Path) -> None:
    import coremltools as ct

    model = ct.convert(
        program.run_decompositions({}),
        convert_to="mlprogram",
        minimum_deployment_target=ct.target.iOS17,
        compute_precision=ct.precision.FLOAT32,
        skip_model_load=True,
    )
    model.save(str(path))


BARE: Mapping[str, Callable[[ExportedProgram, Path], None]] = {"onnx": bare_onnx, "coreml": bare_coreml}
TARGETS = (*BARE, "tflite")


def one_export(model: str, target: str, side: str) -> dict[str, float]:
    """Seconds from the module to the program and to the file, and the process's largest resident memory in bytes."""
    torch.manual_seed(0)
    made, inputs = MODELS[model]()
    module = Logits(made).eval()
    exporter = plugins.load_exporter(target)
    for name in exporter.requires:
        __import__(name)
    with tempfile.TemporaryDirectory() as folder, quiet():
        path = Path(folder) / f"model{exporter.suffix}"
        start = time.perf_counter()
        if side == "edgekd":
            program = export_program(module, list(inputs))
            traced = time.perf_counter()
            card = Card(model, input_specs(program), output_specs(program))
            write_file(exporter, Student(program, card), path, "fp32", exporter.options())
        elif target in BARE:
            program = torch.export.export(module, inputs)
            traced = time.perf_counter()
            BARE[target](program, path)
        else:
            import litert_torch

            with timed_traces() as seconds_of:
                litert_torch.convert(module, inputs).export(str(path))
            traced = start + sum(seconds_of)
        seconds = time.perf_counter() - start
    return {
        "trace": traced - start,
        "seconds": seconds,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


@contextlib.contextmanager
def timed_traces() -> Iterator[list[float]]:
    """Seconds of each ``torch.export.export`` within."""
    export, found = torch.export.export, []

    def timed(*arguments: Any, **options: Any) -> ExportedProgram:
        began = time.perf_counter()
        try:
            return export(*arguments, **options)
        finally:
            found.append(time.perf_counter() - began)

    torch.export.export = timed
    try:
        yield found
    finally:
        torch.export.export = export


def measure(models: tuple[str, ...], rounds: int) -> list[dict[str, Any]]:
    """Every model and target, both sides in turn; on one core, since another may be a quarter slower at that moment."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    rows = []
    for model in models:
        for target in TARGETS:
            found: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
            for turn in range(rounds):
                if cores:
                    os.sched_setaffinity(0, {cores[turn % len(cores)]})
                for side in SIDES if turn % 2 else reversed(SIDES):
                    command = [sys.executable, "-m", __spec__.name, "--one", model, target, side]
                    done = subprocess.run(command, capture_output=True, text=True)
                    if done.returncode:
                        raise SystemExit(f"{model} to {target}, {side}: {done.stderr.strip().splitlines()[-1]}")
                    found[side].append(json.loads(done.stdout.splitlines()[-1]))
            both = list(zip(*(found[side] for side in SIDES), strict=True))
            rows.append(
                {
                    "model": model,
                    "target": target,
                    **{f"{side}_s": [one["seconds"] for one in found[side]] for side in SIDES},
                    **{f"{side}_trace_s": [one["trace"] for one in found[side]] for side in SIDES},
                    "conversion_ratio": statistics.median(
                        _converting(ours) / _converting(theirs) for ours, theirs in both
                    ),
                    "ratio": statistics.median(ours["seconds"] / theirs["seconds"] for ours, theirs in both),
                    "edgekd_peak_bytes": max(one["peak_bytes"] for one in found["edgekd"]),
                    "bare_peak_bytes": max(one["peak_bytes"] for one in found["bare"]),
                }
            )
            print(line(rows[-1]), flush=True)
    return rows


def _converting(one: Mapping[str, float]) -> float:
    """Seconds of the conversion, without the trace."""
    return one["seconds"] - one["trace"]


def line(row: Mapping[str, Any]) -> str:
    ours, theirs = statistics.median(row["edgekd_s"]), statistics.median(row["bare_s"])
    peaks = f"{row['edgekd_peak_bytes'] / 1e6:.0f} MB against {row['bare_peak_bytes'] / 1e6:.0f} MB"
    times = f"{row['conversion_ratio']:.2f}×, with the trace {row['ratio']:.2f}× ({ours:.2f} s against {theirs:.2f} s)"
    verdict = "" if max(row["conversion_ratio"], row["ratio"]) <= BAR else f"  above {BAR}"
    return f"{row['model']:<14} {row['target']:<7} {times}  {peaks}{verdict}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=[*MODELS], help=", ".join(MODELS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--one", nargs=3, metavar=("MODEL", "TARGET", "SIDE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(one_export(*arguments.one)))
        return
    kept = [row for row in read_json(RESULTS)["rows"] if row["model"] not in arguments.models]
    rows = [*kept, *measure(tuple(arguments.models), arguments.rounds)]
    write_json(RESULTS, {"torch": torch.__version__, "rows": rows})


if __name__ == "__main__":
    main()

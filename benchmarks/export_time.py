"""How long an export takes beside the bare converter of the same toolchain, and how much memory it needs.

``python -m edgekd.benchmarks.export_time`` prints the table and writes ``benchmarks/results/export_time.json``. Both
sides start from the same module in a fresh process, turn about, and end with an fp32 file on disk; edgekd's proof comes
after that and is not part of either. Toolchains are imported before the clock starts.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from edgekd import plugins
from edgekd.models import input_specs, output_specs
from edgekd.quiet import quiet
from edgekd.store import write_json
from edgekd.tracing import export_program
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


def bare_onnx(module: nn.Module, inputs: tuple[torch.Tensor, ...], path: Path) -> None:
    torch.onnx.export(module, inputs, path, dynamo=True, opset_version=20, external_data=False, verbose=False)


def bare_coreml(module: nn.Module, inputs: tuple[torch.Tensor, ...], path: Path) -> None:
    import coremltools as ct

    program = torch.export.export(module, inputs).run_decompositions({})
    model = ct.convert(
        program,
        convert_to="mlprogram",
        minimum_deployment_target=ct.target.iOS17,
        compute_precision=ct.precision.FLOAT32,
        skip_model_load=True,
    )
    model.save(str(path))


def bare_tflite(module: nn.Module, inputs: tuple[torch.Tensor, ...], path: Path) -> None:
    import litert_torch

    litert_torch.convert(module, inputs).export(str(path))


BARE: Mapping[str, Callable[[nn.Module, tuple[torch.Tensor, ...], Path], None]] = {
    "onnx": bare_onnx,
    "coreml": bare_coreml,
    "tflite": bare_tflite,
}


def one_export(model: str, target: str, side: str) -> dict[str, float]:
    """Seconds from the module to the file, and the process's largest resident memory in bytes."""
    torch.manual_seed(0)
    made, inputs = MODELS[model]()
    module = Logits(made).eval()
    exporter = plugins.load_exporter(target)
    for name in exporter.requires:
        __import__(name)
    with tempfile.TemporaryDirectory() as folder, quiet():
        path = Path(folder) / f"model{exporter.suffix}"
        start = time.perf_counter()
        if side == "bare":
            BARE[target](module, inputs, path)
        else:
            program = export_program(module, list(inputs))
            card = Card(model, input_specs(program), output_specs(program))
            exporter.write(Student(program, card), path, "fp32", exporter.options())
        seconds = time.perf_counter() - start
    return {"seconds": seconds, "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def measure(models: tuple[str, ...], rounds: int) -> list[dict[str, Any]]:
    """Every model and target, both sides in turn."""
    rows = []
    for model in models:
        for target in BARE:
            found: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
            for turn in range(rounds):
                for side in SIDES if turn % 2 else reversed(SIDES):
                    command = [sys.executable, "-m", __spec__.name, "--one", model, target, side]
                    done = subprocess.run(command, capture_output=True, text=True)
                    if done.returncode:
                        raise SystemExit(f"{model} to {target}, {side}: {done.stderr.strip().splitlines()[-1]}")
                    found[side].append(json.loads(done.stdout.splitlines()[-1]))
            ours, theirs = ([one["seconds"] for one in found[side]] for side in SIDES)
            rows.append(
                {
                    "model": model,
                    "target": target,
                    "edgekd_s": ours,
                    "bare_s": theirs,
                    "ratio": statistics.median(a / b for a, b in zip(ours, theirs, strict=True)),
                    "edgekd_peak_bytes": max(one["peak_bytes"] for one in found["edgekd"]),
                    "bare_peak_bytes": max(one["peak_bytes"] for one in found["bare"]),
                }
            )
            print(line(rows[-1]), flush=True)
    return rows


def line(row: Mapping[str, Any]) -> str:
    ours, theirs = statistics.median(row["edgekd_s"]), statistics.median(row["bare_s"])
    peaks = f"{row['edgekd_peak_bytes'] / 1e6:.0f} MB against {row['bare_peak_bytes'] / 1e6:.0f} MB"
    times = f"{ours:6.2f} s against {theirs:6.2f} s: {row['ratio']:.2f}×"
    verdict = "" if row["ratio"] <= BAR else f"  above {BAR}"
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
    rows = measure(tuple(arguments.models), arguments.rounds)
    write_json(RESULTS, {"torch": torch.__version__, "rows": rows})


if __name__ == "__main__":
    main()

"""Where ``[distill] compile = true`` pays on one process of a CPU: a step compiled and not, and what compiling takes.

``python -m edgekd.benchmarks.compile_speed`` prints the table and writes ``benchmarks/results/compile_speed.json``.
Both sides train the same network on the same batch with AdamW, one thread, and take turns of ten steps. A step is told
as processor time, which a busy machine stretches far less than the clock; compiling as the clock has it, with the
kernels built anew (g++ works in processes of its own).
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch._inductor import config as inductor
from torch.nn import functional as F

from edgekd.distillation.parallel import spread
from edgekd.store import write_json
from edgekd.types import Json

RESULTS = Path(__file__).parent / "results" / "compile_speed.json"
STEPS, WARMUP = 10, 5

Network = tuple[nn.Module, Tensor]
"""A student, and a batch for it."""


def two_layers() -> Network:
    return nn.Sequential(nn.Linear(784, 128), nn.GELU(), nn.Linear(128, 10)), torch.randn(128, 784)


def convolutions() -> Network:
    layers: list[nn.Module] = []
    for inner, outer, stride in ((1, 16, 1), (16, 32, 2), (32, 32, 1), (32, 64, 2)):
        layers += [nn.Conv2d(inner, outer, 3, stride, 1, bias=False), nn.BatchNorm2d(outer), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)), torch.randn(128, 1, 28, 28)


class Encoder(nn.Module):
    """Four blocks of 128 over 64 tokens."""

    def __init__(self) -> None:
        super().__init__()
        block = nn.TransformerEncoderLayer(128, 4, 512, 0.0, activation="gelu", batch_first=True)
        self.words = nn.Embedding(2000, 128)
        self.blocks = nn.TransformerEncoder(block, 4, enable_nested_tensor=False)
        self.out = nn.Linear(128, 10)

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(self.blocks(self.words(ids)).mean(1))


def encoder() -> Network:
    return Encoder(), torch.randint(0, 2000, (32, 64))


class Decoder(nn.Module):
    """A Llama of the Brown example's shape, with a small vocabulary."""

    def __init__(self) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        super().__init__()
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
        self.model = LlamaForCausalLM(
            LlamaConfig(vocab_size=2000, hidden_size=256, num_hidden_layers=4, intermediate_size=704, **heads)
        )
        self.model.config.use_cache = False

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids).logits.flatten(0, 1)


def decoder() -> Network:
    return Decoder(), torch.randint(0, 2000, (2, 128))


NETWORKS: Mapping[str, Callable[[], Network]] = {
    "two layers, 784 to 128 to 10, batch 128": two_layers,
    "four convolutions with batch norm, 28×28, batch 128": convolutions,
    "Transformer of 4 blocks of 128, 64 tokens, batch 32": encoder,
    "Llama of 4 blocks of 256, 128 tokens, batch 2": decoder,
}


def step_of(make: Callable[[], Network], compiled: bool) -> Callable[[], None]:
    """A step of training, of the same start whether compiled or not."""
    torch.manual_seed(0)
    student, batch = make()
    student.train()
    trained, called = spread(student, False, compiled)
    labels = torch.randint(0, 10, (len(student(batch)),))
    optimizer = torch.optim.AdamW(trained.parameters(), 1e-3)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(called(batch), labels).backward()
        optimizer.step()

    return step


def measured(make: Callable[[], Network], rounds: int) -> Json:
    """Milliseconds of a step on both sides, seconds of compiling, and after how many steps these are won back."""
    steps = {name: step_of(make, name == "compiled") for name in ("plain", "compiled")}
    steps["plain"]()
    began = time.perf_counter()
    steps["compiled"]()
    compiling_s = time.perf_counter() - began
    cpu_ms: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        for _ in range(WARMUP):
            step()
    for _ in range(rounds):
        for name, step in steps.items():
            cpu = time.process_time()
            for _ in range(STEPS):
                step()
            cpu_ms[name].append((time.process_time() - cpu) / STEPS * 1e3)
    plain, compiled = (statistics.median(cpu_ms[name]) for name in steps)
    return {
        "cpu_ms_a_step": cpu_ms,
        "compiled_to_plain": round(compiled / plain, 3),
        "compiling_s": round(compiling_s, 1),
        "won_back_after_steps": round(compiling_s * 1e3 / (plain - compiled)) if compiled < plain else None,
    }


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    inductor.force_disable_caches, inductor.compile_threads = True, 1
    torch.set_num_threads(1)
    found = {name: measured(make, options.rounds) for name, make in NETWORKS.items()}
    write_json(
        options.out,
        {
            "networks": found,
            "conditions": f"1 thread, CPU time, turns of {STEPS} steps, {options.rounds} rounds",
            "environment": {
                "torch": torch.__version__,
                "python": platform.python_version(),
                "machine": platform.machine(),
            },
        },
    )
    for name, row in found.items():
        plain, compiled = (statistics.median(times) for times in row["cpu_ms_a_step"].values())
        sys.stdout.write(
            f"{name}: {plain:.2f} ms plain, {compiled:.2f} ms compiled ({row['compiled_to_plain']}); compiling "
            f"{row['compiling_s']} s, won back after {row['won_back_after_steps']} steps\n"
        )


if __name__ == "__main__":
    main()

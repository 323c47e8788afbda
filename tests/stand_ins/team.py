"""A training that ``torchrun`` starts once or several times: what test_processes.py looks at.

``python team.py OUT '{"norm": true, …}'``: trains a small network on fixed data, and the main process writes the
history and the weights to OUT.
"""

import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import edgekd.train
from edgekd import processes
from edgekd.capture import capture
from edgekd.data import Split, split_from_arrays
from edgekd.losses import Term, dist, soft_target_kl, weighted
from edgekd.outputs import StudentOutputs, TeacherOutputs
from edgekd.sources import Answer, Teacher
from edgekd.teacher_cache import CaptureKey, TeacherCache, open_cache
from edgekd.train import TrainingPlan, train
from edgekd.truth import NO_LABEL, Truth
from edgekd.views import Views

KEY = CaptureKey("t", "d", "", 2, 0)


class Silent:
    """A progress that may kill its process, as the system would."""

    def __init__(self, dies_after: int | None = None) -> None:
        self.left = dies_after

    def start(self, what: str, total: int, done: int = 0) -> None:
        self.done_before = done

    def advance(self, steps: int = 1, note: str = "") -> None:
        if self.left is not None:
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    def finish(self) -> None: ...

    def say(self, line: str) -> None: ...


def network(norm: bool, dropout: float) -> nn.Module:
    torch.manual_seed(0)
    middle = [nn.Sequential(nn.Linear(32, 32), nn.GELU()) for _ in range(2)]
    start: list[nn.Module] = [
        nn.Linear(6, 32, bias=not norm),
        nn.BatchNorm1d(32) if norm else nn.LayerNorm(32),
        nn.ReLU(),
    ]
    return nn.Sequential(*start, nn.Dropout(dropout), *middle, nn.Linear(32, 3))


def split() -> Split:
    """101 samples: with batches of 16 the last has five; nine have no label."""
    x = np.random.default_rng(0).normal(size=(101, 6)).astype(np.float32)
    label = (x[:, 0] * x[:, 1] > 0).astype(int) + (x[:, 2] > 1)
    found = split_from_arrays({"x": x, "label": label}, labels=("a", "b", "c"))
    if "unlabelled" in sys.argv:
        label[:9] = NO_LABEL
    return replace(found, labels=label)


def cache(folder: Path) -> TeacherCache:
    """Captured by the first that asks."""
    if not folder.exists():
        teacher = Teacher(lambda arrays: Answer(np.tanh(arrays["x"][:, :3]) * 3), "t", 0, None, 0)
        capture(folder, split(), teacher, KEY, Views(), Silent())
    return open_cache(folder, KEY)


def objective(student: StudentOutputs, teacher: TeacherOutputs, truth: Truth) -> dict[str, Tensor]:
    terms = [Term("kd", 1.0, soft_target_kl), Term("dist", 1.0, dist)] if "dist" in sys.argv else []
    return weighted(student.logits, teacher.classes, truth, terms or [Term("kd", 1.0, soft_target_kl)], 2.0, 0.3)


def main() -> None:
    out, options = Path(sys.argv[1]), json.loads(sys.argv[2])
    torch.set_num_threads(1)
    dies = options.pop("dies", None)
    student = network(options.pop("norm", True), options.pop("dropout", 0.0))
    plan = TrainingPlan(3, options.pop("batch_size", 16), 1e-2, 1e-4, 0.1, 3, **options)
    edgekd.train.CHECKPOINT_EVERY_S = 0.0 if dies or out.with_suffix(".state").exists() else 1e9
    progress = Silent(dies if processes.rank() == processes.count() - 1 else None)
    with processes.joined():
        processes.found_by_main(lambda: len(cache(out.parent / "cache")))
        captured = cache(out.parent / "cache")
        history = train(student, split(), captured, Views(), objective, plan, out.with_suffix(".state"), progress, "x")
        if processes.is_main():
            weights = {name: value.tolist() for name, value in student.state_dict().items()}
            found = {"history": history, "weights": weights, "done_before": progress.done_before}
            out.write_text(json.dumps(found))


if __name__ == "__main__":
    main()

"""A training that ``torchrun`` starts once or several times: what test_processes.py looks at.

``python team.py OUT '{"norm": true, …}'``: trains a small network on fixed data, and the main process writes the
history and the weights to OUT. Words behind say what is learned: ``dist``, ``unlabelled``, ``mixed``, ``features``,
``windows``; ``with-its-machine``: what dies takes its launcher along.
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

import edgekd.distillation.train
from edgekd import processes
from edgekd.data.mixing import mixup
from edgekd.data.samples import split_from_arrays
from edgekd.data.split import Split
from edgekd.data.truth import NO_LABEL, Truth
from edgekd.data.views import Views
from edgekd.distillation.feature_losses import feature_mse
from edgekd.distillation.features import with_features
from edgekd.distillation.losses import Term, dist, soft_target_kl, weighted
from edgekd.distillation.train import TrainingPlan, train
from edgekd.protocols import Arrays
from edgekd.recipes.recipe_models import Feature
from edgekd.teachers.capture import capture
from edgekd.teachers.outputs import StudentOutputs, TeacherOutputs
from edgekd.teachers.teacher_cache import CaptureKey, TeacherCache, open_cache
from edgekd.teaching import Answer, Teacher

WORDS = 11
HINT = Feature(teacher="0", student="4")
"""What the middle of the student learns of the teacher, through a projector."""


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
                if "with-its-machine" in sys.argv:
                    os.kill(os.getppid(), signal.SIGKILL)  # the launcher
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
    if "windows" in sys.argv:
        start = [nn.Embedding(WORDS, 32), nn.LayerNorm(32)]
    return nn.Sequential(*start, nn.Dropout(dropout), *middle, nn.Linear(32, WORDS if "windows" in sys.argv else 3))


def split() -> Split:
    """101 samples: with batches of 16 the last has five; nine have no label."""
    random = np.random.default_rng(0)
    if "windows" in sys.argv:
        tokens = random.integers(0, WORDS, (101, 9))
        labels = np.where(np.arange(8) < random.integers(1, 9, (101, 1)), (tokens[:, :-1] * 3 + 1) % WORDS, -1)
        return split_from_arrays({"x": tokens[:, :-1], "label": labels})
    x = random.normal(size=(101, 6)).astype(np.float32)
    label = (x[:, 0] * x[:, 1] > 0).astype(int) + (x[:, 2] > 1)
    found = split_from_arrays({"x": x, "label": label}, labels=("a", "b", "c"))
    if "unlabelled" in sys.argv:
        label[:9] = NO_LABEL
    return replace(found, labels=label)


def answer(arrays: Arrays) -> Answer:
    """Of the teacher."""
    if "windows" in sys.argv:
        near = np.cos(0.7 * (arrays["x"][..., None] * 3 + 1 - np.arange(WORDS)))
        return Answer((near * 3).astype(np.float32))
    logits = np.tanh(arrays["x"][:, :3]) * 3
    return Answer(logits, {HINT.stored: np.sin(arrays["x"])} if "features" in sys.argv else {})


def cache(folder: Path) -> TeacherCache:
    """Captured by the first that asks."""
    if not folder.exists():
        capture(folder, split(), Teacher(answer, "t", 0, None, 0), key(), views(), Silent())
    return open_cache(folder, key())


def key() -> CaptureKey:
    mixed, kept = "mixed" if "mixed" in sys.argv else "", (HINT.stored,) if "features" in sys.argv else ()
    codec = "top4" if "windows" in sys.argv else "dense-f16"
    return CaptureKey("t", "d", "", 2, 0, codec, mixed, kept)


def views() -> Views:
    return Views(mix=mixup) if "mixed" in sys.argv else Views()


def objective(student: StudentOutputs, teacher: TeacherOutputs, truth: Truth) -> dict[str, Tensor]:
    terms = [Term("kd", 1.0, soft_target_kl), Term("dist", 1.0, dist)] if "dist" in sys.argv else []
    parts = weighted(student.logits, teacher.classes, truth, terms or [Term("kd", 1.0, soft_target_kl)], 2.0, 0.3)
    if "features" in sys.argv:
        parts["hint"] = feature_mse(student.features["hint"], teacher.features[HINT.stored])
    return parts


def main() -> None:
    out, options = Path(sys.argv[1]), json.loads(sys.argv[2])
    torch.set_num_threads(1)
    dies = options.pop("dies", None)
    student = network(options.pop("norm", True), options.pop("dropout", 0.0))
    if "features" in sys.argv:
        student = with_features(student, {"hint": HINT}, {HINT.stored: [6]}, {"x": torch.zeros(2, 6)}, 0)
    plan = TrainingPlan(3, options.pop("batch_size", 16), 1e-2, 1e-4, 0.1, 3, **options)
    edgekd.distillation.train.CHECKPOINT_EVERY_S = 0.0 if dies or out.with_suffix(".state").exists() else 1e9
    progress = Silent(dies if processes.rank() == processes.count() - 1 else None)
    with processes.joined():
        processes.found_by_main(lambda: len(cache(out.parent / "cache")))
        captured = cache(out.parent / "cache")
        state = out.with_suffix(".state")
        history = train(student, split(), captured, views(), objective, plan, state, progress, "x")
        if processes.is_main():
            weights = {name: value.tolist() for name, value in student.state_dict().items()}
            found = {"history": history, "weights": weights, "done_before": progress.done_before}
            out.write_text(json.dumps(found))


if __name__ == "__main__":
    main()

"""What training after compression wins back: Fashion-MNIST, a deep narrow depthwise student, three seeds.

    python -m edgekd.benchmarks.recovery       # from a checkout: data and teacher are those of examples/fashion

Writes ``benchmarks/results/recovery.json``. For every seed: accuracy on the 10,000 test images of the float student
(distilled with kd); of each compression without training; after a training from the teacher cache; and after the same
training from labels alone. Compressions: static ``w4a8`` (also without the corrections that help), pruning 2:4, a
quarter of the channels removed. ``float_longer`` is the float student after the same training, uncompressed: what a
longer schedule alone is worth. The learning rates are those of ``edgekd compress``; no run chooses anything on the test
split. The net was chosen among seven narrow ones by what ``w4a8`` loses; the schedule is the second, since the first
(12 epochs of 12,000 images, also mirrored) left the float student at 74.5 %.
"""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from edgekd import plugins
from edgekd.compression.compress import quantize_static
from edgekd.compression.prune import parse_pruning, prune
from edgekd.compression.qat import train_quantized
from edgekd.console import progress_for
from edgekd.data.samples import split_from_arrays
from edgekd.data.split import Split
from edgekd.data.truth import Truth
from edgekd.data.views import Views
from edgekd.distillation.losses import LABELS, LOSSES, Term, weighted
from edgekd.distillation.train import Objective, TrainingPlan, train
from edgekd.metrics import accuracy
from edgekd.programs.models import count_parameters, input_specs, output_specs, run_program
from edgekd.programs.tracing import export_program
from edgekd.protocols import Progress
from edgekd.stages.recovery import PRUNE_RATE, QAT_RATE
from edgekd.store import write_json
from edgekd.teachers.capture import capture
from edgekd.teachers.outputs import StudentOutputs, TeacherOutputs
from edgekd.teachers.sources import load_teacher
from edgekd.teachers.teacher_cache import CaptureKey, TeacherCache
from edgekd.types import Card, Json, Student

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples" / "fashion"
RESULTS = ROOT / "benchmarks" / "results" / "recovery.json"
SEEDS = (0, 1, 2)
PRECISION = "w4a8"
PRUNINGS = ("2:4", "channels:0.25")
TRAINING_SAMPLES = 20_000  # of 55,000, to keep it under an hour
VIEWS = 4
FLOAT_PLAN = {"epochs": 16, "batch_size": 128, "learning_rate": 8e-3, "weight_decay": 1e-3, "warmup_share": 0.1}
QUANTIZED_PLAN = {**FLOAT_PLAN, "epochs": 6, "learning_rate": 8e-3 * QAT_RATE}
PRUNED_PLAN = {**FLOAT_PLAN, "epochs": 6, "learning_rate": 8e-3 * PRUNE_RATE}


def block(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    """Depthwise, then pointwise convolution, each with batch norm and relu6."""
    return nn.Sequential(
        nn.Conv2d(inputs, inputs, 3, stride, 1, groups=inputs, bias=False),
        nn.BatchNorm2d(inputs),
        nn.ReLU6(),
        nn.Conv2d(inputs, outputs, 1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU6(),
    )


class Narrow(nn.Module):
    """Twenty-five convolutions of 6 to 21 channels: rounding errors add up, and no channel can stand in for another."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 6, 3, 2, 1, bias=False), nn.BatchNorm2d(6), nn.ReLU6())
        channels = [6, *(6 + 3 * (number // 2) for number in range(12))]
        shapes = itertools.pairwise(channels)
        self.features = nn.Sequential(*(block(*shape, 2 if at in (1, 4) else 1) for at, shape in enumerate(shapes)))
        self.classifier = nn.Linear(channels[-1], 10)

    def forward(self, image: Tensor) -> Tensor:
        return self.classifier(self.features(self.stem(image)).mean((2, 3)))


def labels_only(student: StudentOutputs, teacher: TeacherOutputs, truth: Truth) -> dict[str, Tensor]:
    return {LABELS: truth.cross_entropy(student.logits)}


def distilled(student: StudentOutputs, teacher: TeacherOutputs, truth: Truth) -> dict[str, Tensor]:
    return weighted(student.logits, teacher.classes, truth, [Term("kd", 1.0, LOSSES["kd"])], 6.0, 0.1)


def one_seed(data: tuple[Split, Split], views: Views, cache: TeacherCache, seed: int, work: Path) -> Json:
    """All accuracies of one seed."""
    learned, tested = data
    progress = progress_for()

    def fit(module: nn.Module, objective: Objective, plan: Json, name: str) -> None:
        checkpoint = work / f"{name}-{seed}.pt"
        train(module, learned, cache, views, objective, TrainingPlan(**plan, seed=seed), checkpoint, progress, name)
        checkpoint.unlink(missing_ok=True)

    def score(student: Student) -> float:
        assert tested.labels is not None
        return accuracy(next(iter(run_program(student.program, tested.arrays()).values())), tested.labels)

    torch.manual_seed(seed)
    module = Narrow()
    fit(module, distilled, FLOAT_PLAN, "float")
    program = export_program(module.eval(), [torch.zeros(1, 1, 28, 28)])
    student = Student(
        program, Card("narrow", input_specs(program), output_specs(program), parameters=count_parameters(module))
    )
    found: Json = {"seed": seed, "float": score(student)}
    arms = {"teacher": distilled, "labels": labels_only}

    def longer(plan: Json, step: str) -> float:
        copied = copy.deepcopy(module)  # the program shares its weights with the module
        fit(copied, distilled, plan, f"{step} longer")
        return score(replace(student, program=export_program(copied.eval(), [torch.zeros(1, 1, 28, 28)])))

    def fits(plan: Json, step: str) -> dict[str, Callable[[nn.Module], None]]:
        return {
            name: functools.partial(fit, objective=arm, plan=plan, name=f"{step.replace(':', '.')} {name}")
            for name, arm in arms.items()
        }

    calibration = learned.take(np.argsort(learned.ids)[:256]).arrays()
    plain = quantize_static(student, calibration, precision=PRECISION, corrections=())
    training = list(fits(QUANTIZED_PLAN, PRECISION).values())
    static, trained = train_quantized(student, PRECISION, calibration, training)
    assert static.card.calibration is not None
    found[PRECISION] = {
        "float_longer": longer(QUANTIZED_PLAN, "quantized"),
        "without_corrections": score(plain),
        "corrections": list(static.card.calibration.corrections),
        "untrained": score(static),
        **dict(zip(arms, map(score, trained), strict=True)),
    }
    pruned_longer = longer(PRUNED_PLAN, "pruned")
    for word in PRUNINGS:
        pruning = parse_pruning(word)
        smaller = prune(student, pruning)
        found[word] = {
            "float_longer": pruned_longer,
            "parameters": smaller.card.parameters,
            "untrained": score(smaller),
            **{name: score(prune(student, pruning, train_it)) for name, train_it in fits(PRUNED_PLAN, word).items()},
        }
    return found


def experiment(progress: Progress) -> Json:
    """All seeds, and the share of the loss that comes back."""
    torch.set_num_threads(1)
    names = [str(number) for number in range(10)]
    train_part, test_part, augment = (
        plugins.load_function(f"fashion:{n}", EXAMPLE) for n in ("train", "test", "nudge")
    )
    everything, tested = (split_from_arrays(part(), labels=names) for part in (train_part, test_part))
    learned, views = everything.take(np.arange(TRAINING_SAMPLES)), Views(augment)
    teacher = load_teacher("fashion:teacher", EXAMPLE, learned.arrays(np.arange(1)))
    with tempfile.TemporaryDirectory() as folder:
        key = CaptureKey(teacher.fingerprint, learned.fingerprint, "shift", VIEWS, 0)
        cache = capture(Path(folder) / "cache", learned, teacher, key, views, progress)
        rows = []
        for seed in SEEDS:
            rows.append(one_seed((learned, tested), views, cache, seed, Path(folder)))
            progress.say(str(rows[-1]))
    return {
        "task": f"Fashion-MNIST, {len(learned):,} training and {len(tested):,} test images",
        "plans": {"float": FLOAT_PLAN, "quantized": QUANTIZED_PLAN, "pruned": PRUNED_PLAN},
        "teacher": accuracy(teacher.logits(tested.arrays()), tested.labels) if tested.labels is not None else None,
        "seeds": rows,
        "mean": {step: summary(rows, step) for step in (PRECISION, *PRUNINGS)},
        "torch": torch.__version__,
    }


def summary(rows: Sequence[Json], step: str) -> Json:
    """Means over the seeds, and the share of what a compression lost that each training won back."""
    start = statistics.fmean(row["float"] for row in rows)
    numbers = [key for key, value in rows[0][step].items() if isinstance(value, float)]
    mean = {key: statistics.fmean(row[step][key] for row in rows) for key in numbers}
    shares = {}
    for name, reference in (("share_recovered", start), ("share_recovered_of_float_longer", mean["float_longer"])):
        lost = reference - mean["untrained"]
        won = {arm: (mean[arm] - mean["untrained"]) / lost for arm in ("teacher", "labels")} if lost > 0 else None
        shares[name] = won
    return {"float": start, **mean, **shares}


def main() -> None:
    """Run it and write the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS)
    out = parser.parse_args().out
    found = experiment(progress_for())
    write_json(out, found)
    for step, mean in found["mean"].items():
        progress_for().say(f"{step}: {mean}")


if __name__ == "__main__":
    main()

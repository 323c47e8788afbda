"""What a step from the teacher cache costs beside the same student's plain step, and beside a live teacher's.

``python -m edgekd.benchmarks.distill_speed`` prints the table and writes ``benchmarks/results/distill_speed.json``. All
sides train the same student on the same samples with the same augmentation, batch size and optimizer, on one thread:

- ``plain``: a loop of its own, labels only, the views made as edgekd makes them, and no cache; buffers are kept and the
  channels last, as in edgekd, and once more with the channels first, as in torch;
- ``cache``: :func:`edgekd.distillation.train.train`, as ``edgekd distill`` runs it, with KD from the teacher cache;
- ``torchdistill``: its ``DistillationBox`` with KD from a teacher that runs at every step, and torch's own loader; the
  teacher has ten times the student's parameters, or is that of the example. ``pip install --no-deps --target DIR
  torchdistill torchvision`` and ``PYTHONPATH=DIR``.

They take turns of 25 steps. What is timed is the processor time of the process, which a busy machine stretches far
less than the clock; what is told are ratios. Decoding of image files is measured alone.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import importlib.util
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import nn

from edgekd import plugins
from edgekd.console import progress_for
from edgekd.data.files import ImageFiles
from edgekd.data.mixing import mixup
from edgekd.data.order import Order
from edgekd.data.samples import split_from_arrays
from edgekd.data.split import Split
from edgekd.data.views import Views, view_batch, view_seeds
from edgekd.programs.models import count_macs, count_parameters
from edgekd.programs.tracing import export_program
from edgekd.protocols import Progress
from edgekd.recipes.recipe import ImageData
from edgekd.store import write_json
from edgekd.teachers.capture import capture
from edgekd.teachers.records import record_bytes
from edgekd.teachers.targets import Top, codec_of
from edgekd.teachers.teacher_cache import CaptureKey
from edgekd.teaching import Answer, Teacher
from edgekd.types import Json

from .distill_steps import BATCH, STEPS, Case, Network, Side, augment, cached_step, plain_step, torchdistill_step

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "distill_speed.json"
VIEWS = 2
BARS = {"cache to plain, at most": 1.05, "torchdistill to cache, at least": 3.0, "bytes a view at k = 10, at most": 60}


def cases(folder: Path, progress: Progress) -> Iterator[Case]:
    """Fashion-MNIST with a dense cache, and a thousand classes with the ten largest kept."""
    fashion = ROOT / "examples" / "fashion"
    names = [str(number) for number in range(10)]
    images = split_from_arrays(plugins.load_function("fashion:train", fashion)(), labels=names)
    own: nn.Module = plugins.load_function("fashion:Teacher", fashion)()
    part = images.take(np.arange(0, len(images), 8))
    yield _case("fashion 1×28×28, 10 classes", part, 10, folder, progress, {"teacher of the example": own})
    random = np.random.default_rng(0)
    noise: dict[str, np.ndarray] = {
        "image": random.standard_normal((1024, 3, 48, 48), dtype=np.float32),
        "label": random.integers(0, 1000, 1024),
    }
    thousand = split_from_arrays(noise, labels=[str(number) for number in range(1000)])
    yield _case("noise 3×48×48, 1,000 classes", thousand, 1000, folder, progress)


def _case(
    name: str,
    split: Split,
    classes: int,
    folder: Path,
    progress: Progress,
    others: Mapping[str, nn.Module] | None = None,
) -> Case:
    codec = "dense-f16" if classes <= 256 else "top10"
    torch.manual_seed(1)
    teacher = Network(split.inputs["image"].shape[1], classes, 10**0.5).eval()

    def answer(arrays: Mapping[str, np.ndarray]) -> Answer:
        with torch.no_grad():
            return Answer(teacher(torch.from_numpy(arrays["image"])).numpy())

    key = CaptureKey("teacher", split.fingerprint, "shift", VIEWS, 0, codec)
    source = Teacher(answer, "teacher", None, None, 0)
    cache = capture(folder / name.split()[0], split, source, key, Views(augment), progress)
    return Case(name, split, cache, classes, {"teacher of 10 times": teacher, **(others or {})})


def measured(case: Case, rounds: int, progress: Progress) -> Json:
    """All sides in turns, each round in another order."""
    first = functools.partial(plain_step, layout=torch.contiguous_format)
    sides: dict[str, Side] = {"plain": plain_step, "plain, channels first": first, "cache": cached_step}
    if importlib.util.find_spec("torchdistill") is not None:
        for name in case.teachers:
            sides[f"torchdistill, {name}"] = functools.partial(torchdistill_step, teacher=name)
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    progress.start(case.name, rounds * len(sides))
    for number in range(rounds):
        for name in list(sides)[:: 1 if number % 2 else -1]:
            seconds[name].append(sides[name](case))
            progress.advance()
    progress.finish()
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    models = {"student": case.student(), **case.teachers}
    found: Json = {
        "case": case.name,
        "batch": BATCH,
        "codec": case.cache.codec.name,
        "models": {name: _size(case, model) for name, model in models.items()},
        "cpu_ms_a_step": {name: round(value * 1e3, 3) for name, value in medians.items()},
        "samples_ms": {name: [round(value * 1e3, 3) for value in values] for name, values in seconds.items()},
        "cache_to_plain": _ratio(seconds, "cache", "plain"),
    }
    live = {name: _ratio(seconds, name, "cache") for name in sides if name.startswith("torchdistill")}
    return found | {"live_to_cache": live or "not_run: torchdistill is not installed"}


def _ratio(seconds: Mapping[str, list[float]], above: str, below: str) -> Json:
    """Of the medians; and the median of the ratios within a round, which a load that comes and goes moves less."""
    pairs = [one / other for one, other in zip(seconds[above], seconds[below], strict=True)]
    quartiles = statistics.quantiles(pairs, n=4)
    return {
        "of_medians": round(statistics.median(seconds[above]) / statistics.median(seconds[below]), 3),
        "paired": round(statistics.median(pairs), 3),
        "quartiles": [round(quartiles[0], 3), round(quartiles[2], 3)],
    }


def _size(case: Case, model: nn.Module) -> Json:
    example = [torch.zeros(1, *case.split.inputs["image"].shape[1:])]
    return {
        "parameters": count_parameters(model),
        "macs": count_macs(export_program(model.eval(), example, dynamic_batch=False)),
    }


def sizes() -> Json:
    """Bytes of a view at k = 10 of 1,000 classes: as a record, and on disk with manifest and ids."""
    codec = codec_of("top10")
    assert isinstance(codec, Top)
    split = split_from_arrays({"x": np.random.default_rng(0).random((4096, 4), np.float32)})
    teacher = Teacher(lambda arrays: Answer(np.tile(arrays["x"], 250)), "teacher", None, None, 0)
    views = Views(mix=mixup)
    key = CaptureKey("teacher", split.fingerprint, "", 8, 0, "top10", mix="mixup")
    with tempfile.TemporaryDirectory() as folder:
        capture(Path(folder) / "c", split, teacher, key, views, progress_for())
        stored = sum(path.stat().st_size for path in (Path(folder) / "c").iterdir())
    return {
        "record": record_bytes(codec, 1000),
        "record_with_partner": record_bytes(codec, 1000, mixed=True),
        "on_disk_with_partner_8_views": round(stored / (4096 * 8), 2),
    }


def decoding(folder: Path, images: int = 256, rounds: int = 5) -> Json:
    """A folder of JPEG files, 400×300 crops of scikit-learn's photographs, decoded to 96 pixels.

    Returns:
        CPU milliseconds a view, by how many views share a decoding.
    """
    from PIL import Image
    from sklearn.datasets import load_sample_images

    photographs, random = load_sample_images().images, np.random.default_rng(0)
    files = []
    for number in range(images):
        photograph = photographs[number % len(photographs)]
        top, left = random.integers(0, photograph.shape[0] - 300), random.integers(0, photograph.shape[1] - 400)
        path = folder / f"{number}.jpg"
        Image.fromarray(photograph[top : top + 300, left : left + 400]).save(path, quality=90)
        files.append({"bytes": None, "path": str(path)})
    column = ImageFiles(files, ImageData(size=96))
    split = Split({"image": column}, np.zeros(images, np.int64), column.ids(), "jpeg")
    seconds: dict[int, list[float]] = {1: [], 2: [], 4: [], 8: []}
    for _ in range(rounds):
        for beside, values in seconds.items():
            order = Order(np.arange(images), split.ids, 8, beside, 0)
            began = time.process_time()
            for step in range(2):
                positions, turns = order.draws(step * BATCH, (step + 1) * BATCH)
                view_batch(split, positions, view_seeds(split.ids[positions], turns, 0), Views(augment))
            values.append((time.process_time() - began) / (2 * BATCH))
    return {str(beside): round(statistics.median(values) * 1e3, 3) for beside, values in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    progress = progress_for()
    with tempfile.TemporaryDirectory() as folder:
        found = [measured(case, options.rounds, progress) for case in cases(Path(folder), progress)]
        decoded = decoding(Path(folder))
    packages = ("torch", "numpy", "accelerate", "torchdistill")
    installed = {d.metadata["Name"] for d in importlib.metadata.distributions()}
    result = {
        "bars": BARS,
        "cases": found,
        "bytes_a_view": sizes(),
        "cpu_ms_a_view_by_views_per_decode": decoded,
        "conditions": f"1 thread, CPU time, turns of {STEPS} steps, {options.rounds} rounds, a busy shared machine",
        "environment": {name: importlib.metadata.version(name) for name in packages if name in installed}
        | {"python": platform.python_version(), "machine": platform.machine()},
    }
    write_json(options.out, result)
    lines = [
        f"{row['case']}: {row['cpu_ms_a_step']} ms of CPU a step\n"
        f"  cache / plain {row['cache_to_plain']}\n  live / cache {row['live_to_cache']}"
        for row in found
    ]
    lines.append(f"bytes a view at k = 10: {result['bytes_a_view']}")
    lines.append(f"CPU ms a view of a JPEG file, by views a decoding: {decoded}")
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()

"""Train the Fashion-MNIST teacher: about 45 minutes on one core. Stopped at any moment, it goes on at the last epoch.

Twelve epochs on shifted, mirrored and erased images, then two with a small learning rate on images that are whole, as
those of the test are.

Cross-entropy without label smoothing: smoothing erases how alike two wrong classes are, which is what a student learns
from a teacher (Müller et al. 2019, "When does label smoothing help?").
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from fashion import HERE, WEIGHTS, Teacher, test, train, validation
from safetensors.torch import save_file
from torch import Generator, Tensor, nn
from torch.optim import SGD
from torch.optim.lr_scheduler import OneCycleLR

from edgekd.buffers import buffers_kept

CHECKPOINT = HERE / "teacher.checkpoint.pt"
BATCH = 128


@dataclass(frozen=True)
class Phase:
    """Some epochs with one cycle of the learning rate, of which this is the peak."""

    epochs: int
    learning_rate: float
    erase: bool


PHASES = (Phase(12, 0.1, erase=True), Phase(2, 0.02, erase=False))


def augment_batch(images: Tensor, generator: Generator, erase: bool) -> Tensor:
    """Shift by up to two pixels, mirror half, if asked erase a rectangle of half; images (batch, 1, 28, 28)."""
    count = len(images)
    offsets = torch.randint(0, 5, (2, count, 1), generator=generator) + torch.arange(28)
    padded = nn.functional.pad(images[:, 0], (2, 2, 2, 2))
    samples = torch.arange(count)[:, None, None]
    shifted = padded[samples, offsets[0][:, :, None], offsets[1][:, None, :]]
    mirrored = torch.rand(count, 1, 1, generator=generator) < 0.5
    shifted = torch.where(mirrored, shifted.flip(2), shifted)
    if not erase:
        return shifted[:, None]
    sizes = torch.randint(4, 15, (2, count, 1), generator=generator)
    starts = (torch.rand(2, count, 1, generator=generator) * (29 - sizes)).long()
    inside = (torch.arange(28) >= starts) & (torch.arange(28) < starts + sizes)
    erased = inside[0][:, :, None] & inside[1][:, None, :] & (torch.rand(count, 1, 1, generator=generator) < 0.5)
    return shifted.masked_fill(erased, 0.0)[:, None]


@torch.no_grad()
def accuracy(model: nn.Module, data: dict[str, np.ndarray]) -> float:
    """Share of right classes."""
    model.eval()
    images, labels = torch.from_numpy(data["image"]), torch.from_numpy(data["label"])
    right = sum(
        int((model(part).argmax(1) == label).sum())
        for part, label in zip(images.split(500), labels.split(500), strict=True)
    )
    return right / len(labels)


def replace(path: Path, save: object) -> None:
    """Write beside, then rename: a kill leaves the old file or the new one, never half of one."""
    beside = path.with_suffix(".partial")
    save(beside)  # type: ignore[operator]
    beside.replace(path)


def make_optimizer(model: nn.Module, phase: Phase, steps: int) -> tuple[SGD, OneCycleLR]:
    """SGD whose learning rate goes up and down once within the phase; norms and biases do not decay."""
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 5e-4},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = SGD(groups, lr=phase.learning_rate, momentum=0.9, nesterov=True)
    return optimizer, OneCycleLR(optimizer, phase.learning_rate, phase.epochs * steps, pct_start=0.2)


@buffers_kept()
def main() -> None:
    """Train, print an accuracy for each epoch, write teacher.safetensors."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)

    data, held_out = train(), validation()
    images, labels = torch.from_numpy(data["image"]), torch.from_numpy(data["label"])
    model = Teacher().to(memory_format=torch.channels_last)
    steps = len(images) // BATCH
    state = torch.load(CHECKPOINT, weights_only=True) if CHECKPOINT.is_file() else {"done": 0, "seed": options.seed}
    if state["seed"] != options.seed:
        raise SystemExit(f"{CHECKPOINT.name} is of seed {state['seed']}, not {options.seed}; remove it to start anew")
    if state["done"]:
        model.load_state_dict(state["model"])
        print(f"going on after epoch {state['done']}")

    total_epochs, begin = sum(phase.epochs for phase in PHASES), 0
    for phase in PHASES:
        end = begin + phase.epochs
        optimizer, schedule = make_optimizer(model, phase, steps)
        if begin < state["done"] < end:
            optimizer.load_state_dict(state["optimizer"])
            schedule.load_state_dict(state["schedule"])
        for epoch in range(max(begin, state["done"]), end):
            started = time.monotonic()
            generator = Generator().manual_seed(options.seed * 1_000 + epoch)
            model.train()
            total = 0.0
            for rows in torch.randperm(len(images), generator=generator)[: steps * BATCH].split(BATCH):
                views = augment_batch(images[rows], generator, phase.erase)
                loss = nn.functional.cross_entropy(
                    model(views.contiguous(memory_format=torch.channels_last)), labels[rows]
                )
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                total += loss.item()
            state = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "schedule": schedule.state_dict(),
                "done": epoch + 1,
                "seed": options.seed,
            }
            replace(CHECKPOINT, lambda path, state=state: torch.save(state, path))
            print(
                f"epoch {epoch + 1}/{total_epochs}: loss {total / steps:.4f}, "
                f"validation {accuracy(model, held_out):.2%}, {time.monotonic() - started:.0f} s",
                flush=True,
            )
        begin = end

    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    replace(WEIGHTS, lambda path: save_file(weights, path))
    CHECKPOINT.unlink()
    print(f"test {accuracy(model, test()):.2%}; wrote {WEIGHTS.name}")


if __name__ == "__main__":
    main()

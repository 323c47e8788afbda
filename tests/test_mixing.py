"""mixup and CutMix against their papers, replayed bit for bit by the cache, and bound to it."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Generator, Tensor, nn

from edgekd.console import SilentProgress
from edgekd.data.mixing import MIXINGS, cutmix, mixup
from edgekd.data.samples import split_from_arrays
from edgekd.data.split import Split
from edgekd.data.truth import Truth
from edgekd.data.views import Views, view_batch, view_partners, view_seeds
from edgekd.distillation.train import TrainingPlan, train
from edgekd.errors import CacheError, DataError
from edgekd.recipes.reading import MIXINGS as KNOWN
from edgekd.teachers.capture import capture, verify_cache
from edgekd.teachers.outputs import StudentOutputs, TeacherOutputs
from edgekd.teachers.records import record_bytes
from edgekd.teachers.targets import Top
from edgekd.teachers.teacher_cache import CaptureKey, open_cache
from edgekd.teaching import Answer, Teacher


def noise(sample: Mapping[str, Tensor], generator: Generator) -> dict[str, Tensor]:
    return {"x": sample["x"] + 0.1 * torch.randn(sample["x"].shape, generator=generator)}


def make_split(count: int = 60) -> Split:
    x = np.random.default_rng(0).normal(size=(count, 2, 6, 8)).astype(np.float32)
    return split_from_arrays({"x": x, "label": (x.mean((1, 2, 3)) > 0).astype(int)}, labels=("no", "yes"))


class Recording:
    """A teacher that keeps every input it saw, in order."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.net, self.seen = nn.Sequential(nn.Flatten(), nn.Linear(96, 2)).eval(), list[np.ndarray]()

    def logits(self, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
        self.seen.append(arrays["x"].copy())
        with torch.no_grad():
            return self.net(torch.from_numpy(arrays["x"])).numpy()

    def teacher(self) -> Teacher:
        return Teacher(lambda arrays: Answer(self.logits(arrays)), "teacher", 0, None, 0)


def key_of(split: Split, views: Views, count: int = 3) -> CaptureKey:
    names = views.augmentation_fingerprint(split), views.mix_fingerprint(split)
    return CaptureKey("teacher", split.fingerprint, names[0], count, 7, mix=names[1])


def pair() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    return {"x": torch.ones(2, 6, 8)}, {"x": torch.zeros(2, 6, 8)}


@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
def test_mixup_adds_both_by_a_share_from_beta(alpha: float) -> None:
    generator = Generator().manual_seed(0)
    shares = []
    for _ in range(2000):
        mixed, share = mixup(*pair(), generator, alpha)
        assert mixed["x"].unique().tolist() == pytest.approx([share])
        shares.append(share)

    assert np.mean(shares) == pytest.approx(0.5, abs=0.04)
    assert np.var(shares) == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.1)


def test_cutmix_pastes_a_box_and_its_share_is_what_is_left() -> None:
    generator = Generator().manual_seed(0)
    for _ in range(300):
        mixed, share = cutmix(*pair(), generator, 1.0)
        pasted = mixed["x"][0] == 0
        rows, columns = pasted.any(1), pasted.any(0)

        assert float(mixed["x"].mean()) == pytest.approx(share)
        assert int(pasted.sum()) == int(rows.sum()) * int(columns.sum())  # one whole box
        assert mixed["x"][0].equal(mixed["x"][1])


def test_what_cannot_be_mixed_is_one_line() -> None:
    ids = {"ids": torch.ones(4, dtype=torch.int32)}
    for mixing, wanted in ((mixup, "mixes floats, and ids is int32"), (cutmix, r"images .*not ids \(4,\)")):
        with pytest.raises(DataError, match=wanted):
            mixing(ids, ids, Generator(), 1.0)


def test_partners_are_any_sample_and_as_often() -> None:
    seeds = view_seeds(np.arange(40_000), np.zeros(40_000), 0)
    counts = np.bincount(view_partners(seeds, 20), minlength=20)

    assert counts.min() > 1800
    assert counts.max() < 2200


@pytest.mark.parametrize("name", list(MIXINGS))
def test_a_mixed_view_is_replayed_bit_for_bit(tmp_path: Path, name: str) -> None:
    split, views, recording = make_split(), Views(noise, MIXINGS[name], 1.0), Recording()
    capture(tmp_path / "c", split, recording.teacher(), key_of(split, views), views, SilentProgress())
    seen = np.concatenate(recording.seen)  # all views of the first sample, then of the second …
    cache = open_cache(tmp_path / "c", key_of(split, views))
    rows, turns = np.array([5, 59, 5, 0]), np.array([0, 2, 1, 1])
    stored = cache.read(rows, turns)
    assert stored.partners is not None
    shown = view_batch(split, rows, stored.seeds, views, stored.partners)

    assert (shown.inputs[0].numpy() == seen[rows * 3 + turns]).all()
    assert shown.shares is not None
    plain = view_batch(split, rows, stored.seeds, Views(noise)).inputs[0]
    assert (plain.numpy() != seen[rows * 3 + turns]).any(axis=(1, 2, 3)).all()


@pytest.mark.parametrize("name", list(MIXINGS))
def test_a_student_sees_what_the_teacher_saw_with_labels_mixed_alike(tmp_path: Path, name: str) -> None:
    split, views, recording = make_split(), Views(noise, MIXINGS[name], 1.0), Recording()
    cache = capture(tmp_path / "c", split, recording.teacher(), key_of(split, views), views, SilentProgress())
    by_teacher = {row.tobytes(): number for number, row in enumerate(np.concatenate(recording.seen))}
    shown: list[Tensor] = []
    student = nn.Sequential(nn.Flatten(), nn.Linear(96, 2))
    student.register_forward_pre_hook(lambda _, inputs: shown.append(inputs[0].clone()))
    labels, truths = split.labels, list[Truth]()
    assert labels is not None

    def objective(student: StudentOutputs, teacher: TeacherOutputs, truth: Truth) -> dict[str, Tensor]:
        truths.append(truth)
        return {"labels": truth.cross_entropy(student.logits)}

    plan = TrainingPlan(3, 16, 1e-3, 0.0, 0.0, seed=1)
    train(student, split, cache, views, objective, plan, tmp_path / "p.pt", SilentProgress(), "x")

    numbers = [by_teacher[row.numpy().tobytes()] for batch in shown for row in batch]
    assert sorted(numbers) == list(range(180))  # every view of every sample, once in three epochs
    rows = np.array(numbers) // 3
    stored = cache.read(rows, np.array(numbers) % 3)
    assert stored.partners is not None
    assert (torch.cat([truth.classes for truth in truths]).numpy() == labels[rows]).all()
    partners = torch.cat([truth.partners for truth in truths if truth.partners is not None])
    assert (partners.numpy() == labels[stored.partners]).all()


def test_verification_replays_the_mixing(tmp_path: Path) -> None:
    split, views, recording = make_split(), Views(noise, mixup, 1.0), Recording()
    cache = capture(tmp_path / "c", split, recording.teacher(), key_of(split, views), views, SilentProgress())
    turned = split.take(np.arange(60)[::-1].copy())

    assert verify_cache(cache, split, recording.teacher(), views).top1_differs == 0
    assert verify_cache(cache, turned, recording.teacher(), views).max_relative < 1e-3  # partners are found by id
    assert verify_cache(cache, split, recording.teacher(), dataclasses.replace(views, alpha=0.1)).max_relative > 0.01


def test_another_mix_is_another_cache(tmp_path: Path) -> None:
    split, views = make_split(), Views(noise, mixup, 1.0)
    capture(tmp_path / "c", split, Recording().teacher(), key_of(split, views), views, SilentProgress())

    for other in (dataclasses.replace(views, alpha=0.5), dataclasses.replace(views, mix=cutmix), Views(noise)):
        with pytest.raises(CacheError, match="captured with another mix; run: edgekd capture"):
            open_cache(tmp_path / "c", key_of(split, other))


def test_ten_classes_of_a_thousand_with_a_partner_take_sixty_bytes() -> None:
    assert record_bytes(Top(10), 1000, mixed=True) == 60
    assert record_bytes(Top(10), 1000) == 56


def test_the_recipe_knows_the_mixings_without_importing_torch() -> None:
    assert tuple(MIXINGS) == KNOWN

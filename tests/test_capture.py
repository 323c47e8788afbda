"""TeacherCache: exact replay, resume after a kill, and damage that is found."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Generator, Tensor, nn

import edgekd.teachers.capture
from edgekd.console import SilentProgress
from edgekd.data.samples import split_from_arrays
from edgekd.data.split import Split
from edgekd.data.views import Views, view_batch, view_seeds
from edgekd.errors import CacheError, NumericalError
from edgekd.store import hash_path
from edgekd.teachers.capture import capture, verify_cache
from edgekd.teachers.shards import Maker, Part, Shard, make_shard
from edgekd.teachers.targets import DenseTargets
from edgekd.teachers.teacher_cache import FORMAT, CaptureKey, open_cache
from edgekd.teaching import Answer, Teacher


class Quiet(SilentProgress):
    def start(self, what: str, total: int, done: int = 0) -> None:
        self.done_before = done


def noise(sample: Mapping[str, Tensor], generator: Generator) -> dict[str, Tensor]:
    return {"x": sample["x"] + torch.randn(sample["x"].shape, generator=generator)}


def make_split(count: int = 50) -> Split:
    random = np.random.default_rng(0)
    x = random.normal(size=(count, 3)).astype(np.float32)
    return split_from_arrays({"x": x, "label": (x.sum(1) > 0).astype(int)}, labels=("no", "yes"))


def teacher_of(logits: Callable[[Mapping[str, np.ndarray]], np.ndarray]) -> Teacher:
    return Teacher(lambda arrays: Answer(logits(arrays)), "teacher", 8, None, 32)


def make_teacher() -> Teacher:
    torch.manual_seed(0)
    net = nn.Linear(3, 2).eval()

    def logits(arrays: Mapping[str, np.ndarray]) -> np.ndarray:
        with torch.no_grad():
            return net(torch.from_numpy(arrays["x"])).numpy()

    return teacher_of(logits)


KEY = CaptureKey("teacher", "data", "noise", 3, 7)


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edgekd.teachers.capture, "RECORDS_PER_SHARD", 40)


@pytest.mark.usefixtures("small_shards")
def test_a_replayed_view_is_the_view_that_the_teacher_saw(tmp_path: Path) -> None:
    split, teacher = make_split(), make_teacher()
    cache = capture(tmp_path / "c", split, teacher, KEY, Views(noise), Quiet())
    positions = np.array([3, 44, 0, 17])
    views = np.array([0, 2, 1, 2])
    stored = cache.read(cache.rows(split.ids[positions]), views)
    shown = view_batch(split, positions, stored.seeds, Views(noise))
    fresh = teacher.logits({"x": shown.inputs[0].numpy()})

    assert stored.partners is None
    assert isinstance(stored.outputs.classes, DenseTargets)
    np.testing.assert_allclose(stored.outputs.classes.logits, fresh - fresh.max(1, keepdims=True), atol=2e-3)
    assert len(cache.manifest["shards"]) == 4


def test_views_of_a_sample_differ_and_do_not_depend_on_its_place() -> None:
    split = make_split()
    shuffled = split.take(np.arange(len(split))[::-1].copy())
    a = view_seeds(split.ids, np.zeros(50), 7)
    b = view_seeds(shuffled.ids, np.zeros(50), 7)

    assert (a == b[::-1]).all()
    assert (a != view_seeds(split.ids, np.ones(50), 7)).all()
    assert (a != view_seeds(split.ids, np.zeros(50), 8)).all()


@pytest.mark.usefixtures("small_shards")
def test_a_capture_that_broke_off_goes_on_and_gives_the_same_bytes(tmp_path: Path) -> None:
    split, teacher = make_split(), make_teacher()
    capture(tmp_path / "whole", split, teacher, KEY, Views(noise), Quiet())
    calls = 0

    def dying(arrays: Mapping[str, np.ndarray]) -> np.ndarray:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return teacher.logits(arrays)

    broken = teacher_of(dying)
    with pytest.raises(KeyboardInterrupt):
        capture(tmp_path / "c", split, broken, KEY, Views(noise), Quiet())
    assert not (tmp_path / "c").exists()
    progress = Quiet()
    capture(tmp_path / "c", split, teacher, KEY, Views(noise), progress)

    assert progress.done_before == 80
    assert hash_path(tmp_path / "c") == hash_path(tmp_path / "whole")


@pytest.mark.usefixtures("small_shards")
def test_shards_in_any_order_and_twice_are_the_same_bytes_and_those_that_are_there_stay(tmp_path: Path) -> None:
    split, teacher = make_split(), make_teacher()
    asked: list[list[int]] = []

    def backwards(only: int) -> Maker:
        def make(parts: Sequence[Part]) -> Iterator[Shard]:
            asked.append([part.number for part in parts])
            for part in [*reversed(parts), parts[-1]][:only]:
                yield make_shard(part, split, teacher, KEY, Views(noise), lambda records: None)

        return make

    capture(tmp_path / "whole", split, teacher, KEY, Views(noise), Quiet())
    with pytest.raises(CacheError, match="2 of 4 shards were not made; edgekd capture goes on from the others"):
        capture(tmp_path / "c", split, teacher, KEY, Views(noise), Quiet(), backwards(2))
    capture(tmp_path / "c", split, teacher, KEY, Views(noise), progress := Quiet(), backwards(9))

    assert asked == [[0, 1, 2, 3], [0, 1]]
    assert progress.done_before == 70
    assert hash_path(tmp_path / "c") == hash_path(tmp_path / "whole")


def test_a_capture_that_was_killed_goes_on_and_gives_the_same_bytes(tmp_path: Path) -> None:
    """SIGKILL for real, in a process of its own."""
    script = f"""
import os, pathlib, signal, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import edgekd.teachers.capture as c
import test_capture as t
c.RECORDS_PER_SHARD = 40
teacher, calls = t.make_teacher(), []
def dying(arrays):
    calls.append(1)
    if len(calls) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return teacher.logits(arrays)
teacher_that_dies = t.teacher_of(dying)
c.capture(pathlib.Path({str(tmp_path / "c")!r}), t.make_split(), teacher_that_dies, t.KEY, t.Views(t.noise), t.Quiet())
"""
    killed = subprocess.run([sys.executable, "-c", script], capture_output=True, env=dict(os.environ))
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()[-500:]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(edgekd.teachers.capture, "RECORDS_PER_SHARD", 40)
        progress = Quiet()
        capture(tmp_path / "c", make_split(), make_teacher(), KEY, Views(noise), progress)
        capture(tmp_path / "whole", make_split(), make_teacher(), KEY, Views(noise), Quiet())

    assert progress.done_before == 80
    assert hash_path(tmp_path / "c") == hash_path(tmp_path / "whole")


def test_verification_finds_nothing_with_the_same_teacher_and_something_with_another(tmp_path: Path) -> None:
    split, teacher = make_split(), make_teacher()
    cache = capture(tmp_path / "c", split, teacher, KEY, Views(noise), Quiet())
    other = teacher_of(lambda arrays: -teacher.logits(arrays))

    assert verify_cache(cache, split, teacher, Views(noise)).top1_differs == 0
    assert verify_cache(cache, split, teacher, Views(noise)).max_relative < 1e-3
    assert verify_cache(cache, split, other, Views(noise)).top1_differs > 0.5


@pytest.mark.parametrize("victim", ["shard-00000.bin", "ids.bin"])
def test_a_flipped_bit_is_found(tmp_path: Path, victim: str) -> None:
    capture(tmp_path / "c", make_split(), make_teacher(), KEY, Views(noise), Quiet())
    path = tmp_path / "c" / victim
    content = bytearray(path.read_bytes())
    content[5] ^= 1
    path.write_bytes(content)

    with pytest.raises(CacheError, match=f"{victim}.*damaged.*edgekd capture") as caught:
        open_cache(tmp_path / "c", KEY)
    assert "\n" not in str(caught.value)


def test_a_cache_of_another_teacher_is_refused(tmp_path: Path) -> None:
    capture(tmp_path / "c", make_split(), make_teacher(), KEY, Views(noise), Quiet())

    with pytest.raises(CacheError, match="another teacher"):
        open_cache(tmp_path / "c", dataclasses.replace(KEY, teacher="else"))


def test_a_damaged_manifest_and_a_missing_cache_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="run: edgekd capture"):
        open_cache(tmp_path / "c")
    capture(tmp_path / "c", make_split(), make_teacher(), KEY, Views(noise), Quiet())
    (tmp_path / "c" / "manifest.json").write_text(json.dumps({"format": FORMAT}))
    with pytest.raises(CacheError, match=r"manifest\.json is damaged"):
        open_cache(tmp_path / "c")


def test_nan_in_the_teacher_names_the_sample_and_keeps_the_old_cache(tmp_path: Path) -> None:
    split, teacher = make_split(), make_teacher()
    capture(tmp_path / "c", split, teacher, KEY, Views(noise), Quiet())
    before = hash_path(tmp_path / "c")

    def sick(arrays: Mapping[str, np.ndarray]) -> np.ndarray:
        logits = teacher.logits(arrays)
        logits[4, 0] = np.nan  # three views of each sample: the second sample
        return logits

    with pytest.raises(NumericalError, match=f"first id {split.ids[1]}"):
        capture(
            tmp_path / "c",
            split,
            teacher_of(sick),
            dataclasses.replace(KEY, seed=1),
            Views(noise),
            Quiet(),
        )
    assert hash_path(tmp_path / "c") == before


def test_samples_that_were_never_captured_are_named(tmp_path: Path) -> None:
    cache = capture(tmp_path / "c", make_split(), make_teacher(), KEY, Views(noise), Quiet())

    with pytest.raises(CacheError, match="1 samples are not in the cache, first id 5"):
        cache.logits(np.array([5], np.uint64))


@pytest.mark.parametrize("codec", ["dense-f16", "dense-u8", "top1"])
def test_every_codec_is_captured_verified_and_found_out(tmp_path: Path, codec: str) -> None:
    split, teacher, key = make_split(), make_teacher(), dataclasses.replace(KEY, codec=codec)
    cache = capture(tmp_path / "c", split, teacher, key, Views(noise), Quiet())
    good = verify_cache(cache, split, teacher, Views(noise))
    other = teacher_of(lambda arrays: teacher.logits(arrays)[:, ::-1])
    bad = verify_cache(open_cache(tmp_path / "c", key), split, other, Views(noise))

    assert good.top1_differs == 0
    assert good.max_relative < 2e-3
    assert bad.top1_differs == 1


def test_a_cache_of_the_top_classes_has_no_logits_of_all(tmp_path: Path) -> None:
    cache = capture(
        tmp_path / "c", make_split(), make_teacher(), dataclasses.replace(KEY, codec="top1"), Views(noise), Quiet()
    )

    with pytest.raises(CacheError, match="top1 and does not hold the logits of all classes"):
        cache.logits(cache.ids)

"""Windows of tokens in the teacher cache: every position as if it were a sample, and none that does not count."""

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import edgekd.teachers.capture
from edgekd.console import SilentProgress
from edgekd.data.samples import split_from_arrays
from edgekd.data.split import Split
from edgekd.data.views import Views
from edgekd.data.windows import counted_positions
from edgekd.errors import CacheError, DataError, NumericalError
from edgekd.teachers.capture import capture, verify_cache
from edgekd.teachers.records import record_bytes
from edgekd.teachers.targets import TopTargets, codec_of
from edgekd.teachers.teacher_cache import CaptureKey, TeacherCache, open_cache
from edgekd.teaching import Answer, Teacher

WORDS, LENGTH = 90, 6


class Quiet(SilentProgress):
    def start(self, what: str, total: int, done: int = 0) -> None:
        self.done_before = done


def make_split(count: int = 10) -> Split:
    """Windows of random tokens; the first two positions are a prompt, and every third window has padding."""
    tokens = np.random.default_rng(0).integers(0, WORDS, (count, LENGTH + 1))
    mask, labels = np.ones((count, LENGTH), np.int32), tokens[:, 1:].copy()
    labels[:, :2] = -1
    labels[::3, 4:], mask[::3, 5:] = -1, 0
    return split_from_arrays({"input_ids": tokens[:, :-1], "attention_mask": mask, "label": labels})


def teacher_of(logits: Callable[[Mapping[str, np.ndarray]], np.ndarray]) -> Teacher:
    return Teacher(lambda arrays: Answer(logits(arrays)), "teacher", None, None, 0)


def make_teacher() -> Teacher:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(WORDS, 8), nn.Linear(8, WORDS)).eval()

    def logits(arrays: Mapping[str, np.ndarray]) -> np.ndarray:
        with torch.no_grad():
            return net(torch.from_numpy(arrays["input_ids"])).numpy() * 3

    return teacher_of(logits)


def key(codec: str) -> CaptureKey:
    return CaptureKey("teacher", "data", "", 1, 7, codec)


def captured(folder: Path, codec: str, split: Split) -> TeacherCache:
    return capture(folder, split, make_teacher(), key(codec), Views(), Quiet())


@pytest.mark.parametrize("codec", ["dense-f16", "top10", "sampled50"])
def test_the_targets_of_a_batch_are_those_of_its_counted_positions_in_a_row(tmp_path: Path, codec: str) -> None:
    split = make_split()
    assert split.labels is not None
    cache = captured(tmp_path / "c", codec, split)
    chosen = np.array([7, 0, 3])
    counted = counted_positions(split.labels[chosen])
    outputs = cache.read(cache.rows(split.ids[chosen]), np.zeros(3), counted).outputs
    targets = outputs.classes
    fresh = make_teacher().logits(split.arrays(chosen))[counted]

    assert len(targets.top_class()) == counted.sum() == 4 + 2 + 2
    if codec != "sampled50":
        assert (targets.top_class().numpy() == fresh.argmax(1)).all()
    assert float(targets.errors(torch.from_numpy(fresh - fresh.max(1, keepdims=True))).max()) < 2e-3


def test_the_teachers_log_probability_of_the_next_token_is_kept(tmp_path: Path) -> None:
    split = make_split()
    assert split.labels is not None
    cache = captured(tmp_path / "c", "sampled50", split)
    counted = counted_positions(split.labels)
    logits = torch.from_numpy(make_teacher().logits(split.arrays())[counted])
    expected = torch.log_softmax(logits, 1).gather(1, torch.from_numpy(split.labels[counted])[:, None])[:, 0]
    found = cache.label_log_probabilities(cache.rows(split.ids), np.zeros(len(split)), counted)

    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)


def test_a_window_of_128_tokens_takes_38_bytes_a_token() -> None:
    assert record_bytes(codec_of("sampled50"), 49_152, 128) == 128 * 38 + 4


def test_a_capture_of_windows_goes_on_after_a_kill_and_gives_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(edgekd.teachers.capture, "RECORDS_PER_SHARD", 3 * LENGTH)
    split, calls = make_split(), 0
    captured(tmp_path / "whole", "sampled50", split)

    def dying(arrays: Mapping[str, np.ndarray]) -> np.ndarray:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return make_teacher().logits(arrays)

    with pytest.raises(KeyboardInterrupt):
        capture(tmp_path / "c", split, teacher_of(dying), key("sampled50"), Views(), Quiet())
    progress = Quiet()
    capture(tmp_path / "c", split, make_teacher(), key("sampled50"), Views(), progress)
    shards = sorted(path.name for path in (tmp_path / "whole").glob("shard-*"))

    assert progress.done_before == 6
    assert len(shards) == 4
    assert all((tmp_path / "c" / n).read_bytes() == (tmp_path / "whole" / n).read_bytes() for n in shards)


@pytest.mark.parametrize("codec", ["top10", "sampled50"])
def test_verification_draws_again_and_finds_another_teacher(tmp_path: Path, codec: str) -> None:
    split, teacher = make_split(), make_teacher()
    cache = captured(tmp_path / "c", codec, split)
    other = teacher_of(lambda arrays: -teacher.logits(arrays))

    same = verify_cache(cache, split, teacher, Views())
    assert (same.records, same.top1_differs) == (10, 0.0)
    assert same.max_relative < 2e-3
    assert verify_cache(cache, split, other, Views()).top1_differs > 0.5


def test_what_does_not_count_may_be_nan_and_what_counts_may_not(tmp_path: Path) -> None:
    split, teacher = make_split(), make_teacher()

    def spoilt(position: int) -> Teacher:
        def logits(arrays: Mapping[str, np.ndarray]) -> np.ndarray:
            found = teacher.logits(arrays).copy()
            found[:, position, 0] = np.nan
            return found

        return teacher_of(logits)

    cache = capture(tmp_path / "prompt", split, spoilt(1), key("top10"), Views(), Quiet())
    assert isinstance(cache.codec.decode(cache._shards[0]["positions"][:, 2]), TopTargets)
    with pytest.raises(NumericalError, match="for 10 samples"):
        capture(tmp_path / "text", split, spoilt(3), key("top10"), Views(), Quiet())


def test_a_teacher_of_samples_is_no_teacher_of_windows(tmp_path: Path) -> None:
    flat = teacher_of(lambda arrays: make_teacher().logits(arrays)[:, 0])

    with pytest.raises(DataError, match=r"\(10, 90\).*\(windows, positions, vocabulary\)"):
        capture(tmp_path / "c", make_split(), flat, key("top10"), Views(), Quiet())


def test_a_token_beyond_the_vocabulary_of_the_teacher_is_said(tmp_path: Path) -> None:
    small = teacher_of(lambda arrays: make_teacher().logits(arrays)[..., :50])

    with pytest.raises(DataError, match="the teacher's vocabulary only 50"):
        capture(tmp_path / "c", make_split(), small, key("top10"), Views(), Quiet())


def test_logits_of_all_positions_are_not_handed_out(tmp_path: Path) -> None:
    cache = captured(tmp_path / "c", "dense-f16", make_split())

    with pytest.raises(CacheError, match="windows of tokens"):
        open_cache(tmp_path / "c").logits(cache.ids)

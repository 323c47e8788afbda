"""How good a language model is: token by token over the counted positions of windows, beside its teacher."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

from edgekd.data.split import Split
from edgekd.data.windows import counted_positions
from edgekd.errors import CacheError
from edgekd.metrics import Quality, calibration_gap
from edgekd.programs.decoder import caches_of
from edgekd.programs.models import input_specs, run_program
from edgekd.protocols import Decoding
from edgekd.teachers.targets import DenseTargets, Targets, TopTargets
from edgekd.teachers.teacher_cache import TeacherCache
from edgekd.types import Student

__all__ = [
    "JudgedWindows",
    "Tokens",
    "judge_decoder",
    "judge_student",
    "judge_teacher",
    "quality_of_tokens",
    "tokens_of",
]

POSITIONS_AT_ONCE = 2048


@dataclass(frozen=True)
class Tokens:
    """What a model made of some tokens, one value for each.

    Attributes:
        right: Whether its likeliest token is the next one.
        agrees: Whether it is the teacher's likeliest.
        confidence: What it gave its likeliest, 0 to 1.
        loss: Negative log-likelihood of the next token, nats.
        kl: Divergence from the teacher's distribution, nats; over the classes that the cache knows, the rest as one.
    """

    right: np.ndarray
    agrees: np.ndarray
    confidence: np.ndarray
    loss: np.ndarray
    kl: np.ndarray


def tokens_of(logits: torch.Tensor, labels: torch.Tensor, teacher: Targets) -> Tokens:
    """From a student's logits, (tokens, vocabulary), the next tokens, (tokens,), and the teacher's word on them."""
    log_p = F.log_softmax(logits, dim=1)
    best = log_p.max(dim=1)
    own, wanted, _ = teacher.paired(logits, labels, 1.0)
    kl = F.kl_div(F.log_softmax(own, 1), F.log_softmax(wanted, 1), reduction="none", log_target=True).sum(1)
    return Tokens(
        (best.indices == labels).numpy(),
        (best.indices == teacher.top_class()).numpy(),
        best.values.exp().numpy(),
        -log_p.gather(1, labels[:, None])[:, 0].numpy(),
        kl.numpy(),
    )


def quality_of_tokens(tokens: Tokens, in_window: np.ndarray) -> Quality:
    """All of it as numbers.

    Args:
        in_window: How many of the tokens each window holds, in their order.
    """
    ends = np.cumsum(in_window)[:-1]
    return Quality(
        samples=len(tokens.right),
        accuracy=float(tokens.right.mean()),
        teacher_agreement=float(tokens.agrees.mean()),
        kl=float(tokens.kl.mean(dtype=np.float64)),
        ece=calibration_gap(tokens.confidence, tokens.right),
        classes=(),
        perplexity=math.exp(float(tokens.loss.mean(dtype=np.float64))),
        window_losses=tuple(round(float(part.sum(dtype=np.float64)), 3) for part in np.split(tokens.loss, ends)),
    )


@dataclass(frozen=True)
class JudgedWindows:
    """Windows with their next tokens, and what the teacher said there.

    Attributes:
        split: With labels, (windows, positions).
        cache: Of the split that they are from.
    """

    split: Split
    cache: TeacherCache


def judge_student(student: Student, split: Split, cache: TeacherCache) -> Quality:
    """A program on windows, some at a time: the logits of all would not fit."""
    judged = JudgedWindows(split, cache)
    if student.card.decoder is not None:
        module = student.program.module(check_guards=False)
        empty = [torch.zeros(spec.shape) for spec in caches_of(input_specs(student.program))]

        def read(ids: np.ndarray) -> np.ndarray:
            places = torch.arange(len(ids), dtype=torch.int32)[None]
            with torch.no_grad():
                logits: np.ndarray = module(torch.from_numpy(ids)[None], places, *empty)[0][0].numpy()
            return logits

        return _judge(judged, 1, lambda rows: _one_window(judged, rows, read))
    step = max(1, POSITIONS_AT_ONCE // cache.positions)
    return _judge(judged, step, lambda rows: next(iter(run_program(student.program, split.arrays(rows)).values())))


def judge_decoder(decoder: Decoding, judged: JudgedWindows) -> Quality:
    """A file on windows as an app runs it: each token is read after the ones before it, which are in the caches."""

    def read(ids: np.ndarray) -> np.ndarray:
        return np.stack([decoder.read([token], place) for place, token in enumerate(ids.tolist())])

    return _judge(judged, 1, lambda rows: _one_window(judged, rows, read))


def _one_window(judged: JudgedWindows, rows: np.ndarray, read: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Logits of a window of which nothing is read after the last position that counts, (1, positions, vocabulary)."""
    (ids,) = next(iter(judged.split.arrays(rows).values())).astype(np.int32)  # the tokens come first
    assert judged.split.labels is not None
    end = int(np.flatnonzero(counted_positions(judged.split.labels[rows][0]))[-1]) + 1
    found = read(ids[:end])
    return np.pad(found, ((0, len(ids) - end), (0, 0)))[None]


def _judge(judged: JudgedWindows, step: int, logits_of: Callable[[np.ndarray], np.ndarray]) -> Quality:
    """Quality over the counted positions.

    Args:
        step: Windows at a time.
        logits_of: From rows of the split, (windows, positions, vocabulary).
    """
    split, cache, parts = judged.split, judged.cache, []
    assert split.labels is not None
    for start in range(0, len(split), step):
        rows = np.arange(start, min(start + step, len(split)))
        counted = counted_positions(split.labels[rows])
        logits = logits_of(rows)[counted]
        teacher = cache.read(cache.rows(split.ids[rows]), np.zeros(len(rows), np.int64), counted).outputs.classes
        parts.append(tokens_of(torch.from_numpy(logits), torch.from_numpy(split.labels[rows][counted]), teacher))
    columns = {name: np.concatenate([getattr(part, name) for part in parts]) for name in Tokens.__annotations__}
    return quality_of_tokens(Tokens(**columns), counted_positions(split.labels).sum(axis=1))


def judge_teacher(split: Split, cache: TeacherCache) -> Quality:
    """The teacher on the windows that it was captured on; it is not run again."""
    assert split.labels is not None
    counted = counted_positions(split.labels)
    rows, views = cache.rows(split.ids), np.zeros(len(split), np.int64)
    targets = cache.read(rows, views, counted).outputs.classes
    top = targets.top_class().numpy()
    right = top == split.labels[counted]
    if isinstance(targets, TopTargets):
        confidence = (targets.logits[:, 0] - targets.log_sums[1.0]).exp().numpy()
    elif isinstance(targets, DenseTargets):
        confidence = F.softmax(targets.logits, dim=1).amax(1).numpy()
    else:
        raise CacheError(f"a cache of {cache.codec.name} does not tell how sure the teacher was; judge by top50")
    loss = -cache.label_log_probabilities(rows, views, counted)
    return quality_of_tokens(
        Tokens(right, np.ones(len(top), bool), confidence, loss, np.zeros(len(top), np.float32)), counted.sum(axis=1)
    )

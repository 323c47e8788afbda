"""What a recipe's files are proven with and judged on: samples of its test split."""

from __future__ import annotations

import numpy as np

from edgekd.data.split import Split
from edgekd.data.windows import counted_positions
from edgekd.distillation.perplexity import JudgedWindows
from edgekd.exporting.export import Proof
from edgekd.exporting.generation import NEW_TOKENS, PROMPT_TOKENS, PROMPTS
from edgekd.programs.decoder import TOKENS
from edgekd.recipes.recipe import Export
from edgekd.stages.workspace import Workspace
from edgekd.teachers.teacher_cache import TeacherCache

__all__ = ["prompts_of", "proof_of"]


def proof_of(work: Workspace) -> Proof:
    """Held-out samples from the test split, with labels and the teacher's logits."""
    test = work.splits.test
    order = np.argsort(test.ids)  # by id: a stable random choice
    if work.is_language_model:
        return _windows_proof(test.take(order), work.cache("test"), work.recipe.export)
    parity = test.arrays(order[: work.recipe.export.samples])
    task = test.take(order[: work.recipe.export.accuracy_samples])
    if work.recipe.teacher.embeds:
        return Proof(parity, task.arrays())
    return Proof(parity, task.arrays(), task.labels, work.cache("test").logits(task.ids))


def _windows_proof(test: Split, cache: TeacherCache, export: Export) -> Proof:
    """Prompts whose answers have ``samples`` tokens (four at least), and windows with ``accuracy_samples`` next tokens.

    Args:
        test: In the order in which windows are taken.
        export: Of the recipe.
    """
    assert test.labels is not None
    length = max(1, min(PROMPT_TOKENS, test.labels.shape[1] // 2))  # a context holds a window: half is left to answer
    prompts = prompts_of(test, max(PROMPTS, -(-export.samples // NEW_TOKENS)), length)
    counts = np.cumsum(counted_positions(test.labels).sum(axis=1))
    windows = min(len(test), int(np.searchsorted(counts, export.accuracy_samples)) + 1)
    judged = JudgedWindows(test.take(np.arange(windows)), cache)
    note = ""
    if windows < len(test):
        note = f"judged on {counts[windows - 1]:,} of the {counts[-1]:,} next tokens of the test split"
    return Proof({TOKENS: prompts}, note=note, windows=judged)


def prompts_of(test: Split, prompts: int, length: int) -> np.ndarray:
    """The first tokens of windows, int32 (prompts, length); windows that are too short are put together."""
    assert test.labels is not None
    tokens = next(iter(test.arrays().values())).astype(np.int32)  # the tokens come first
    counted = counted_positions(test.labels)
    ends = counted.shape[1] - counted[:, ::-1].argmax(axis=1)
    whole = np.flatnonzero(ends >= length)
    if len(whole):
        return tokens[whole[np.arange(prompts) % len(whole)], :length]
    text = np.concatenate([row[:end] for row, end in zip(tokens, ends, strict=True)])
    return np.resize(text, (prompts, length))

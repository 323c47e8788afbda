"""Text from a language model with caches, whatever runs it, and whether a file gives the same as its program."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from edgekd.errors import DataError, UsageError
from edgekd.exporting.parity import compare
from edgekd.programs.decoder import caches_of
from edgekd.programs.models import input_specs
from edgekd.protocols import Decoding, Runner
from edgekd.types import LOGITS, Generation, Parity, Student, TensorSpec, Tolerance

__all__ = [
    "GREEDY",
    "NEW_TOKENS",
    "PROMPTS",
    "PROMPT_TOKENS",
    "ProgramDecoder",
    "Sampling",
    "Told",
    "generate",
    "proof_prompts",
    "prove_generation",
    "tell",
]

PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 4, 16, 64
"""Of a proof, where nothing else is given."""

_ROUNDING = 1e-3  # largest relative tolerance of files that compute with the program's own numbers

_TEXT = """\
The old lighthouse at the end of the harbour had not been lit for thirty years, and nobody in the village could say who
had closed its door. Every recipe starts with the same question: what do you have at home, and how much time is there
before the guests arrive? In mathematics, a prime number is a whole number greater than one that cannot be written as a
product of two smaller ones. Dear Sir or Madam, thank you for your letter of the third of May, in which you ask about
the delivery of two tables and eight chairs."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: 0 takes the most likely token; else logits are divided by it and one is drawn.
        top_k: Draw among so many of the most likely; 0 among all.
        seed: Of the draws.
    """

    temperature: float = 0.0
    top_k: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if not (self.temperature >= 0 and self.top_k >= 0):
            raise UsageError(f"temperature and top_k are at least 0; they are {self.temperature} and {self.top_k}")


GREEDY = Sampling()


def generate(
    decoder: Decoding,
    prompt: Sequence[int],
    new_tokens: int,
    sampling: Sampling = GREEDY,
    end_tokens: Collection[int] = (),
) -> list[int]:
    """New tokens after a prompt, at most ``new_tokens``; an end token is the last one.

    Raises:
        DataError: The prompt is empty, or prompt and answer do not fit the context.
    """
    if not prompt or len(prompt) + new_tokens > decoder.context:
        raise DataError(
            f"{len(prompt)} tokens of prompt and {new_tokens} new ones; the model takes at least one of prompt, and "
            f"{decoder.context} together"
        )
    draws = np.random.default_rng(sampling.seed)
    answer: list[int] = []
    logits = decoder.read(prompt, 0)
    while len(answer) < new_tokens:
        answer.append(_choose(logits, sampling, draws))
        if answer[-1] in end_tokens or len(answer) == new_tokens:
            break
        logits = decoder.read(answer[-1:], len(prompt) + len(answer) - 1)
    return answer


def _choose(logits: np.ndarray, sampling: Sampling, draws: np.random.Generator) -> int:
    if sampling.temperature == 0:
        return int(logits.argmax())
    scaled = logits.astype(np.float64) / sampling.temperature
    if 0 < sampling.top_k < len(scaled):
        scaled[scaled < np.partition(scaled, -sampling.top_k)[-sampling.top_k]] = -np.inf
    shares = np.exp(scaled - scaled.max())
    return int(draws.choice(len(shares), p=shares / shares.sum()))


class ProgramDecoder:
    """A program of ``edgekd.programs.decoder`` in PyTorch; see :class:`edgekd.protocols.Decoding`."""

    def __init__(self, student: Student) -> None:
        assert student.card.decoder is not None
        self.context = student.card.decoder.context
        self._module = student.program.module(check_guards=False)  # the guards would refuse a single token
        specs = caches_of(input_specs(student.program))
        self._caches = [torch.zeros(spec.shape, dtype=getattr(torch, spec.dtype)) for spec in specs]

    def read(self, tokens: Sequence[int], start: int) -> np.ndarray:
        positions = torch.arange(start, start + len(tokens), dtype=torch.int32)[None]
        with torch.no_grad():
            logits, *self._caches = self._module(
                torch.tensor([list(tokens)], dtype=torch.int32), positions, *self._caches
            )
        array: np.ndarray = logits[0, -1].numpy()
        return array


def proof_prompts(tokenizer: bytes | None, vocabulary: int, context: int) -> np.ndarray:
    """Prompts for a proof, int32 (prompts, length): English where there is a tokenizer, else random tokens.

    Args:
        tokenizer: Content of a ``tokenizer.json``.
        vocabulary: How many tokens there are.
        context: Of the model; half of it is left for the answers.
    """
    length = max(1, min(PROMPT_TOKENS, context // 2))
    if tokenizer is None:
        return np.random.default_rng(0).integers(0, vocabulary, (PROMPTS, length)).astype(np.int32)
    from tokenizers import Tokenizer

    tokens = Tokenizer.from_str(tokenizer.decode()).encode(_TEXT, add_special_tokens=False).ids
    starts = np.linspace(0, len(tokens) - length, PROMPTS).astype(int)
    return np.array([tokens[start : start + length] for start in starts], np.int32)


@dataclass(frozen=True)
class Told:
    """An answer of a program, and what it thought of each token.

    Attributes:
        answer: Tokens.
        logits: From which each token of the answer was chosen, (new tokens, vocabulary).
    """

    answer: tuple[int, ...]
    logits: np.ndarray


def tell(decoder: Decoding, prompt: Sequence[int], answer: Sequence[int] | None = None) -> Told:
    """An answer of the most likely tokens (it does not end before its time), with all logits.

    Args:
        answer: Takes the place of what the decoder would choose, so that two see the same tokens.
    """
    wanted = min(NEW_TOKENS, decoder.context - len(prompt)) if answer is None else len(answer)
    tokens: list[int] = []
    rows = [decoder.read(prompt, 0)]
    while True:
        tokens.append(int(rows[-1].argmax()) if answer is None else answer[len(tokens)])
        if len(tokens) == wanted:
            return Told(tuple(tokens), np.stack(rows))
        rows.append(decoder.read(tokens[-1:], len(prompt) + len(tokens) - 1))


def prove_generation(student: Student, runner: Runner, prompts: np.ndarray, tolerance: Tolerance) -> Parity:
    """A file's logits and tokens against its program's, over answers to prompts.

    Both are given the program's tokens, so that one different token does not make all that follow different; where the
    two first disagree is where their answers would part.

    Args:
        prompts: Tokens, (prompts, length).
        tolerance: Of the logits. Where they may be off by more than rounding, other tokens are told and not a failure.
    """
    if not isinstance(runner, Decoding):
        raise UsageError(f"{runner.runtime} runs no language model with caches")
    reference = ProgramDecoder(student)
    pairs = []
    for prompt in prompts.tolist():
        told = tell(reference, prompt)
        pairs.append((told, tell(runner, prompt, told.answer)))
    wanted, found = (np.concatenate([pair[side].logits for pair in pairs]) for side in (0, 1))
    spec = TensorSpec(LOGITS, (-1, wanted.shape[1]), "float32", LOGITS)
    if tolerance.relative is None or tolerance.relative > _ROUNDING:
        tolerance = replace(tolerance, agreement=0.0)
    parity = compare([spec], [wanted], [found], tolerance, runner.runtime)
    generation = _generation(prompts, pairs)
    return replace(parity, generation=generation)


def _generation(prompts: np.ndarray, pairs: Sequence[tuple[Told, Told]]) -> Generation:
    differs = [program.logits.argmax(1) != file.logits.argmax(1) for program, file in pairs]
    first = [int(row.argmax()) for row in differs if row.any()]
    return Generation(
        prompts=len(prompts),
        prompt_tokens=prompts.shape[1],
        new_tokens=len(pairs[0][0].answer),
        same=len(pairs) - len(first),
        first_difference=min(first, default=None),
        agreement=float(1 - np.mean(differs)),
    )

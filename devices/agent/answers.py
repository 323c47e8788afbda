"""A language model with caches: the time to the first token of an answer, and that of each token after it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Protocol

from .errors import AgentError

FEWEST = 5  # answers whose first token is timed in a block


class Decoder(Protocol):
    """A loaded language model whose caches stay where they are."""

    def read(self, tokens: Sequence[int], start: int) -> Any:
        """Put tokens at positions ``start``, ``start + 1`` … into the caches; logits of the next one, (vocabulary,)."""


class Answers:
    """Answers of the likeliest tokens to one prompt, again and again; every token is timed.

    A time goes from tokens handed over to the next one chosen, as an app waits for it. End tokens do not end an
    answer: each is of the same length.

    Attributes:
        first_token_ms: Of every answer that was begun since ``begin_again``.
        tokens: Of the answer so far.
    """

    def __init__(self, decoder: Decoder, prompt: Sequence[int], new_tokens: int) -> None:
        self._decoder, self._prompt, self._new_tokens = decoder, prompt, new_tokens
        self.tokens: list[int] = []
        self.first_token_ms: list[float] = []

    def time_first(self) -> float:
        """Begin an answer; milliseconds until its first token."""
        began = time.perf_counter_ns()
        first = int(self._decoder.read(self._prompt, 0).argmax())
        self.first_token_ms.append((time.perf_counter_ns() - began) / 1e6)
        self.tokens = [first]
        return self.first_token_ms[-1]

    def time_token(self, *_: Any) -> float:
        """Milliseconds of one further token; where the answer is whole, another is begun before."""
        if not 0 < len(self.tokens) < self._new_tokens:
            self.time_first()
        place = len(self._prompt) + len(self.tokens) - 1
        began = time.perf_counter_ns()
        token = int(self._decoder.read(self.tokens[-1:], place).argmax())
        spent = (time.perf_counter_ns() - began) / 1e6
        self.tokens.append(token)
        return spent

    def whole(self) -> list[int]:
        """One answer from its first token to its last."""
        self.time_first()
        while len(self.tokens) < self._new_tokens:
            self.time_token()
        return self.tokens

    def begin_again(self) -> None:
        """The next token is one after a first; what was timed so far was warm-up."""
        self.tokens, self.first_token_ms = [], []

    def enough(self) -> list[float]:
        """First tokens of at least as many answers as a block needs."""
        while len(self.first_token_ms) < FEWEST:
            self.time_first()
        return self.first_token_ms


def checked_lengths(job: dict[str, Any], prompt_tokens: int) -> int:
    """How many new tokens an answer has.

    Raises:
        AgentError: Prompt and answer do not fit the caches.
    """
    context, new_tokens = int(job["decoder"]["context"]), int(job["decoder"]["new_tokens"])
    if prompt_tokens < 1 or new_tokens < 2 or prompt_tokens + new_tokens > context:
        raise AgentError(f"{prompt_tokens} tokens of prompt and {new_tokens} new ones; the caches hold {context}")
    return new_tokens

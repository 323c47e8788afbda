"""Asking an endpoint with OpenAI's interface for log-probabilities, T = 1: of an answer's first token or of a text."""

from __future__ import annotations

import http.client
import json
import os
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from edgekd.errors import DataError, EdgekdError, UsageError

__all__ = ["Endpoint"]

FIRST_WAIT_S = 0.5
LONGEST_WAIT_S = 60.0
PASSING = (408, 409, 429, 500, 502, 503, 504)
"""Status codes after which the same request may succeed."""


_Asked = TypeVar("_Asked")
_Answer = TypeVar("_Answer")


class _Staying(urllib.request.HTTPRedirectHandler):
    """A redirect would take the key to another address."""

    def redirect_request(self, *arguments: Any, **named: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_Staying)


@dataclass(frozen=True)
class Endpoint:
    """Where and how is asked.

    Attributes:
        url: Up to ``/v1``.
        api: ``chat`` or ``completions``, for first tokens.
        key_variable: Environment variable that holds the key; none is sent where it is not set.
        top: Tokens whose log-probabilities are asked for.
        parallel: Requests at the same time.
        retries: After each of :data:`PASSING`, no answer in time, or a broken connection; waits double from
            ``FIRST_WAIT_S``, or are what ``Retry-After`` says.
    """

    url: str
    model: str
    api: str
    key_variable: str
    top: int
    parallel: int
    timeout_s: float
    retries: int

    def first_tokens(self, prompts: Sequence[str]) -> list[dict[str, float]]:
        """Log-probabilities by token of the answer's first token, for each prompt in order.

        Raises:
            UsageError: The key or the address is refused; asking again would not help.
            DataError: No answer after all retries, or one without log-probabilities.
        """
        return self._each(self._first_token, prompts)

    def next_tokens(self, windows: Sequence[Sequence[int]]) -> list[list[dict[int, float]]]:
        """Log-probabilities of the next token by its id, at each position of each window of token ids.

        Those of the text itself are asked for (``echo``): ``top`` of them, and the token that comes next. Tokens must
        come back as ids, since a text can be several tokens (``return_tokens_as_token_ids`` of vLLM,
        https://docs.vllm.ai/en/latest/serving/openai_compatible_server.html).

        Raises:
            UsageError, DataError: See :meth:`first_tokens`.
        """
        return self._each(self._next_tokens, windows)

    def _each(self, ask: Callable[[_Asked, threading.Event], _Answer], all_asked: Sequence[_Asked]) -> list[_Answer]:
        given_up = threading.Event()  # where one failed, the others need not be asked
        failed: list[Exception] = []

        def one(asked: _Asked) -> _Answer:
            try:
                return ask(asked, given_up)
            except Exception as error:
                failed.append(error)
                given_up.set()
                raise

        try:
            with ThreadPoolExecutor(self.parallel) as pool:
                return list(pool.map(one, all_asked))
        except (EdgekdError, CancelledError):
            raise failed[0] from None  # the cause; it may not be the first in the order of what was asked

    def _next_tokens(self, window: Sequence[int], given_up: threading.Event) -> list[dict[int, float]]:
        told = {"echo": True, "max_tokens": 1, "temperature": 1, "top_p": 1, "return_tokens_as_token_ids": True}
        content = {"model": self.model, "prompt": list(window), "logprobs": self.top, **told}
        answer = self._posted("completions", content, given_up)
        try:
            listed = answer["choices"][0]["logprobs"]
            # Nothing stands before the first token, and one token was made behind the last.
            tokens, values, tops = (listed[key][1:] for key in ("tokens", "token_logprobs", "top_logprobs"))
            if len(tokens) != len(window):
                raise IndexError
            lists = zip(tokens, values, tops, strict=True)
            found = [{**_by_id(top), **_by_id({token: value})} for token, value, top in lists]
        except (KeyError, IndexError, TypeError, AttributeError):
            raise DataError(
                f"{self.url} returned no log-probabilities of the text's own tokens for {self.model!r}: "
                f"{json.dumps(answer)[:120]}; it must know echo with logprobs"
            ) from None
        except ValueError:
            raise DataError(
                f"{self.url} returned tokens as text, as {tokens[-1]!r}, of which no ids are known; "
                "an endpoint with return_tokens_as_token_ids (vLLM) works"
            ) from None
        return found

    def _first_token(self, prompt: str, given_up: threading.Event) -> dict[str, float]:
        # Nothing is sampled from what comes back; 1 is the temperature at which the probabilities are meant.
        common: dict[str, Any] = {"model": self.model, "max_tokens": 1, "temperature": 1, "top_p": 1}
        if self.api == "chat":
            message = {"role": "user", "content": prompt}
            answer = self._posted(
                "chat/completions",
                {**common, "messages": [message], "logprobs": True, "top_logprobs": self.top},
                given_up,
            )
        else:
            answer = self._posted("completions", {**common, "prompt": prompt, "logprobs": self.top}, given_up)
        try:
            listed = answer["choices"][0]["logprobs"]
            entries = (
                listed["top_logprobs"][0].items()
                if self.api == "completions"
                else [(entry["token"], entry["logprob"]) for entry in listed["content"][0]["top_logprobs"]]
            )
            return _by_token([(str(token), float(value)) for token, value in entries])
        except (KeyError, IndexError, TypeError, AttributeError):
            raise DataError(
                f"{self.url} returned no log-probabilities for {self.model!r} ({self.api}): "
                f"{json.dumps(answer)[:120]}; a teacher needs them"
            ) from None

    def _posted(self, path: str, content: Any, given_up: threading.Event) -> Any:
        headers = {"Content-Type": "application/json"}
        key = os.environ.get(self.key_variable, "")
        if key:
            headers["Authorization"] = f"Bearer {key}"
        address = f"{self.url.rstrip('/')}/{path}"
        request = urllib.request.Request(address, json.dumps(content).encode(), headers, method="POST")
        reason = ""
        for attempt in range(self.retries + 1):
            if given_up.is_set():
                raise CancelledError  # another failed, and says why
            wait_s = min(LONGEST_WAIT_S, FIRST_WAIT_S * 2**attempt)
            try:
                with _OPENER.open(request, timeout=self.timeout_s) as response:
                    return json.loads(response.read())
            except urllib.error.HTTPError as error:
                reason = f"{error.code} {error.reason}"
                if error.code not in PASSING:
                    said = " ".join(error.read(200).decode(errors="replace").split())
                    if key:
                        said = said.replace(key, "…")
                    hint = f"; the key is read from {self.key_variable}" if error.code in (401, 403) else ""
                    raise UsageError(f"{address} refuses: {reason}: {said}{hint}") from None
                wait_s = _told_wait(error.headers.get("Retry-After"), wait_s)
            except (OSError, http.client.HTTPException, json.JSONDecodeError) as error:
                reason = str(getattr(error, "reason", error)) or type(error).__name__
            if attempt < self.retries:
                given_up.wait(wait_s)
        tries = "1 try" if self.retries == 0 else f"{self.retries + 1} tries"
        raise DataError(f"{address} gave no answer in {tries}: {reason}; what was captured stays: run it again")


def _by_id(listed: Mapping[str, float]) -> dict[int, float]:
    """From ``token_id:123``."""
    return {int(token.removeprefix("token_id:")): float(value) for token, value in listed.items()}


def _by_token(listed: Sequence[tuple[str, float]]) -> dict[str, float]:
    """The same text may be listed twice (as other bytes): the larger counts."""
    found: dict[str, float] = {}
    for token, value in listed:
        found[token] = max(value, found.get(token, value))
    return found


def _told_wait(header: str | None, usual_s: float) -> float:
    """Seconds to wait: as the server says, where it says a number."""
    try:
        return min(LONGEST_WAIT_S, max(0.0, float(header or "")))
    except ValueError:
        return usual_s

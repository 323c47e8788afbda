"""``openai:URL#model``: an endpoint with OpenAI's interface that returns log-probabilities (vLLM, llama.cpp, OpenAI …).

A sample's text goes into a prompt, and the first token of the answer is not sampled, but looked at: a class has the
probability of the tokens that begin its word (``top_logprobs`` of
https://platform.openai.com/docs/api-reference/chat/create). What the teacher says of the classes is that, given that it
names one of them. What is not among the listed tokens has no number, but a bound: at most the smallest that is listed,
at most what is missing to one. The bound is taken, and how much of the answer it makes up is kept beside it.

With ``api = "tokens"`` it is the teacher of a language model: the next tokens at each position of a window.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import Field

from edgekd.errors import DataError, UsageError
from edgekd.protocols import Arrays, ModelRequest, OriginOptions

if TYPE_CHECKING:
    from edgekd.teachers.endpoint import Endpoint
    from edgekd.teaching import Answer, Teacher

__all__ = ["BOUNDED", "ORIGIN", "UNLISTED", "UNNAMED", "Named", "named_classes"]

PROMPT = "{text}\n\nWhich of these is it: {labels}? Answer with one word.\nAnswer:"

UNNAMED = "mass on answers that name no class"
BOUNDED = "share of the classes that is a bound"
UNLISTED = "mass outside the tokens that are listed"
"""What is kept beside the log-probabilities of each sample, 0 to 1; of a window, its mean over the positions."""

PER_SHARD = 256
"""Answers that are lost at most when a capture is killed."""


class OpenAiOptions(OriginOptions):
    """What an endpoint is told."""

    prompt: str = Field(PROMPT, description="With {text}, and {labels} for the words in a row.")
    words: tuple[str, ...] = Field((), description="A word for each class, in order; by default the labels.")
    api: Literal["chat", "completions", "tokens"] = Field(
        "chat", description="How classes are asked for; tokens is for windows of a language model."
    )
    vocabulary: Annotated[int, Field(ge=2)] | None = Field(
        None, description="Of a language model; by default that of the tokenizer."
    )
    key_variable: str = Field(
        "OPENAI_API_KEY",
        description="Environment variable that holds the key, if one is needed; it is written nowhere.",
    )
    tokenizer: str | None = Field(None, description="tokenizer.json beside the recipe that turns input_ids into text.")
    top: Annotated[int, Field(ge=1)] = Field(20, description="Tokens whose log-probabilities are asked for.")
    parallel: Annotated[int, Field(ge=1)] = Field(4, description="Requests at the same time.")
    timeout_s: Annotated[float, Field(gt=0)] = 60.0
    retries: Annotated[int, Field(ge=0)] = Field(6, description="After a full rate limit (429), 5xx, or no answer.")


class _OpenAi:
    requires: tuple[str, ...] = ()
    extra = ""
    options = OpenAiOptions

    def fault(self, place: str, folder: Path) -> str:
        url, hash_sign, model = place.rpartition("#")
        known = url.startswith(("http://", "https://")) and hash_sign and model
        return "" if known else f"{place!r} is not URL#model, as http://localhost:8000/v1#my-model"

    def teacher(self, asked: ModelRequest, example: Arrays) -> Teacher:
        """It takes an input ``text`` (an array of str, from a preprocessing), or ``input_ids`` and a tokenizer."""
        from edgekd.store import fingerprint
        from edgekd.teaching import Answer, Teacher

        options: OpenAiOptions = asked.options
        if asked.taps:
            raise UsageError(
                f"{asked.reference} gives log-probabilities alone; feature {asked.taps[0]!r} is not to be had"
            )
        if options.api == "tokens":
            return self._of_windows(asked, options)
        words = options.words or asked.labels
        if len(words) < 2 or (asked.labels and len(words) != len(asked.labels)):
            raise UsageError(f"{asked.reference}: {len(words)} words for {len(asked.labels)} labels; each needs one")
        if "{text}" not in options.prompt:
            raise UsageError(f"{asked.reference}: the prompt has no {{text}}: {options.prompt!r}")
        _check_words(words)
        endpoint = _endpoint(asked)
        prompt = options.prompt.replace("{labels}", ", ".join(words))
        texts_of = _texts_of(asked, options)
        has_named = False

        def outputs(arrays: Arrays) -> Answer:
            nonlocal has_named
            tops = endpoint.first_tokens([prompt.replace("{text}", text) for text in texts_of(arrays)])
            found = [named_classes(top, words) for top in tops]
            has_named = has_named or any(one.bounded < 1 for one in found)
            if not has_named:  # later on, one odd sample is told by how much of it is a bound
                first = ", ".join(repr(token) for token in list(tops[0])[:5])
                raise DataError(
                    f"{asked.reference} answers with {first} …, none of {', '.join(words)}; mend the prompt"
                )
            beside = {
                UNNAMED: np.asarray([one.unnamed for one in found], np.float32),
                BOUNDED: np.asarray([one.bounded for one in found], np.float32),
            }
            return Answer(np.stack([one.log_probabilities for one in found]).astype(np.float32), beside)

        # Its weights cannot be seen: what is asked stands for them.
        said = [endpoint.url, endpoint.model, options.api, options.prompt, list(words), options.top]
        whole = fingerprint(said)
        lineage = (f"teacher: {whole}", f"of {asked.reference}: its top {options.top} log-probabilities, T = 1")
        return Teacher(outputs, whole, None, None, 0, lineage, (UNNAMED, BOUNDED), PER_SHARD)

    def _of_windows(self, asked: ModelRequest, options: OpenAiOptions) -> Teacher:
        """A language model's next tokens at each position of ``input_ids``."""
        from edgekd.store import fingerprint
        from edgekd.teachers.listed import window_logits
        from edgekd.teaching import Answer, Teacher

        tokenizer, endpoint = _tokenizer(asked, options), _endpoint(asked)
        vocabulary = options.vocabulary or (None if tokenizer is None else tokenizer.get_vocab_size())
        if vocabulary is None:
            raise UsageError(
                f'{asked.reference} with api = "tokens" needs a tokenizer or a vocabulary beside its model'
            )

        def outputs(arrays: Arrays) -> Answer:
            if "input_ids" not in arrays:
                raise DataError(
                    f"{asked.reference} takes windows of tokens, input_ids; the data has {', '.join(arrays)}"
                )
            ids = arrays["input_ids"]
            mask = arrays.get("attention_mask", np.ones_like(ids)) != 0
            tops = endpoint.next_tokens([row[kept].tolist() for row, kept in zip(ids, mask, strict=True)])
            made = [window_logits(top, ids.shape[1], vocabulary) for top in tops]
            return Answer(
                np.stack([logits for logits, _ in made]), {UNLISTED: np.asarray([rest for _, rest in made], np.float32)}
            )

        whole = fingerprint([endpoint.url, endpoint.model, "tokens", options.top, vocabulary])
        lineage = (f"teacher: {whole}", f"of {asked.reference}: its top {options.top} log-probabilities, T = 1")
        return Teacher(outputs, whole, None, None, 0, lineage, (UNLISTED,), None, options.top)


def _endpoint(asked: ModelRequest) -> Endpoint:
    from edgekd.teachers.endpoint import Endpoint

    url, _, model = asked.place.rpartition("#")
    o: OpenAiOptions = asked.options
    return Endpoint(url, model, o.api, o.key_variable, o.top, o.parallel, o.timeout_s, o.retries)


@dataclass(frozen=True)
class Named:
    """What an answer's first token says of the classes.

    Attributes:
        log_probabilities: float64, (classes,); they sum to what is left of one by other answers.
        unnamed: Mass on answers that name no class, 0 to 1.
        bounded: How much of the classes' mass is a bound and no number, 0 to 1; 1 where no class was named.
    """

    log_probabilities: np.ndarray
    unnamed: float
    bounded: float


def named_classes(top: Mapping[str, float], words: Sequence[str]) -> Named:
    """Classes from the log-probabilities of an answer's first token.

    Args:
        top: Log-probability by token, as listed.
        words: One for each class. A token counts for the only word that it begins; case, spaces and punctuation do not
            matter.
    """
    found: list[list[float]] = [[] for _ in words]
    for token, value in top.items():
        bare = _bare(token)
        begun = [index for index, word in enumerate(words) if bare and _bare(word).startswith(bare)]
        if len(begun) == 1:
            found[begun[0]].append(value)
    missing = max(1e-9, 1 - float(np.exp(list(top.values())).sum()))
    bound = min(min(top.values(), default=0.0), float(np.log(missing)))
    values = np.asarray([np.logaddexp.reduce(some) if some else bound for some in found])
    listed = np.asarray([bool(some) for some in found])
    masses = np.exp(values)
    return Named(values, max(0.0, 1 - float(masses[listed].sum())), float(masses[~listed].sum() / masses.sum()))


def _check_words(words: Sequence[str]) -> None:
    """Words must be told apart by how they begin."""
    bare = [_bare(word) for word in words]
    for index, word in enumerate(bare):
        for other in bare[index + 1 :]:
            if not word or not other or word.startswith(other) or other.startswith(word):
                raise UsageError(f'words {word!r} and {other!r} begin alike; words = ["A", "B", …] in the prompt works')


def _bare(text: str) -> str:
    return text.strip(" \t\n▁Ġ\"'.,:;!*").lower()


def _tokenizer(asked: ModelRequest, options: OpenAiOptions) -> Any:
    if options.tokenizer is None:
        return None
    from edgekd.data.tokens import load_tokenizer

    return load_tokenizer(asked.folder / options.tokenizer, repr(asked.reference))


def _texts_of(asked: ModelRequest, options: OpenAiOptions) -> Callable[[Arrays], list[str]]:
    """From samples to their text."""
    tokenizer = _tokenizer(asked, options)

    def texts(arrays: Arrays) -> list[str]:
        if "text" in arrays:
            return [str(text) for text in arrays["text"].tolist()]
        if tokenizer is None or "input_ids" not in arrays:
            raise DataError(
                f"{asked.reference} takes text; the data has {', '.join(arrays)}. A tokenizer beside its model turns "
                "input_ids into text, a preprocessing that returns {'text': …} anything"
            )
        mask = arrays.get("attention_mask", np.ones_like(arrays["input_ids"]))
        rows = [ids[kept != 0].tolist() for ids, kept in zip(arrays["input_ids"], mask, strict=True)]
        decoded: list[str] = tokenizer.decode_batch(rows, skip_special_tokens=True)
        return decoded

    return texts


ORIGIN = _OpenAi()

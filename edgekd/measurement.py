"""What is measured, how, on what, and what came out: the values that devices and benchmarks hand over."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from edgekd.types import Json, JsonMixin, Precision

__all__ = ["Block", "DeviceStatus", "Measurement", "OperatorTime", "Plan", "Profile"]


@dataclass(frozen=True)
class Plan(JsonMixin):
    """How one side is measured. A block is one fresh process; the defaults are those of ``edgekd bench``.

    Warm-up, after the first inference: at least ``warmup_runs`` and ``warmup_s``, then until the medians of the last
    two windows of 10 differ by less than 2 %, for at most 200 more runs or 5 s more. Timed: at least ``min_runs`` and
    ``min_s``, but never longer than ``max_s``. With ``profile`` a block's operators are timed after all else, in a
    second session.

    Of a language model with caches an inference is one token: answers of ``new_tokens`` to a prompt of
    ``prompt_tokens`` follow each other, and their first tokens are timed on their own. Both are 0 for other models.
    """

    threads: int = 1
    blocks: int = 6
    warmup_runs: int = 10
    warmup_s: float = 0.5
    min_runs: int = 100
    min_s: float = 1.0
    max_s: float = 10.0
    profile: bool = False
    prompt_tokens: int = 0
    new_tokens: int = 0


@dataclass(frozen=True)
class OperatorTime(JsonMixin):
    """One node as the runtime ran it.

    Attributes:
        name: Of the node.
        type: Operator: ``Conv`` …
        unit: What ran it: an execution provider, a delegate.
        ms: Median over the profiled inferences, of ``benchmark_model`` their mean. Profiling itself takes time: compare
            nodes, not files.
    """

    name: str
    type: str
    unit: str
    ms: float


@dataclass(frozen=True)
class Block(JsonMixin):
    """One fresh process: all raw samples, nothing dropped.

    Attributes:
        runtime_load_ms: Importing and starting the runtime.
        model_load_ms: Reading and compiling the model.
        first_inference_ms: The first call.
        warmup_ms, latency_ms: One value per inference, in order.
        peak_memory_bytes: Of the process, resident.
        converged: Whether warm-up settled before its cap.
        conditions: Clock, governor, temperature, versions: what was readable, as text. ``emulated`` says by what, where
            the time is not that of the device's own hardware; ``delegation`` counts nodes by unit, that which was asked
            for first: ``XNNPACK=41 CPU=3``; ``delegation_unknown`` says why a browser does not tell.
        void: Why the block says nothing about the file (the device throttled, the page was hidden); empty when it does.
            A void block is measured again, with its partner, and counted.
        warm_load_ms: Loading the same file once more in the same process; None where that was not done.
        operators: Of the profile, in the order they ran; empty without one, or where the runtime has none.
        first_token_ms: Of a language model with caches, for each answer: from the prompt handed over to its first
            token. ``latency_ms`` has every further token, and ``first_inference_ms`` is the first answer's first token.
    """

    runtime_load_ms: float
    model_load_ms: float
    first_inference_ms: float
    warmup_ms: tuple[float, ...]
    latency_ms: tuple[float, ...]
    peak_memory_bytes: int | None
    converged: bool
    conditions: dict[str, str] = field(default_factory=dict)
    void: str = ""
    warm_load_ms: float | None = None
    operators: tuple[OperatorTime, ...] = ()
    first_token_ms: tuple[float, ...] = ()


@dataclass(frozen=True)
class Measurement(JsonMixin):
    """One artifact on one device. Statistics are derived by ``edgekd.benchmarks.stats``, never stored instead.

    Attributes:
        artifact_sha256: What was measured.
        target, precision: Of the artifact.
        device: Name of the device, and where that is (never a phone's name for a number taken on the host).
        status: ``measured`` or ``not_run`` with its reason.
        blocks: In the order they ran.
        size_bytes: Of the artifact.
        accuracy, teacher_agreement: From the same session and inputs; None without labels or teacher.
        samples: How many inputs accuracy and agreement speak of.
        flags: What forbids a claim: ``not_converged``, ``unpinned`` …
    """

    artifact_sha256: str
    target: str
    precision: Precision
    device: str
    status: Literal["measured", "not_run"]
    reason: str = ""
    plan: Plan = field(default_factory=Plan)
    blocks: tuple[Block, ...] = ()
    size_bytes: int = 0
    accuracy: float | None = None
    teacher_agreement: float | None = None
    samples: int = 0
    flags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Profile(JsonMixin):
    """One device as its TOML file tells it: ``devices/<name>.toml``, or one of the user's own (``edgekd.profiles``).

    Attributes:
        name: The file's, without its suffix.
        kind: Name of the module that drives it.
        facts: Model, processor, memory …: what is told of it, as text.
        sources: Where each fact is from, by the fact's name.
        identity: What the device must say of itself, or it is another one: which words, its kind knows.
        settings: How to reach and drive it; its kind checks them.
    """

    name: str
    kind: str
    facts: dict[str, str] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    identity: dict[str, str] = field(default_factory=dict)
    settings: Json = field(default_factory=dict)


@dataclass(frozen=True)
class DeviceStatus(JsonMixin):
    """Whether a device can be used now, and for which targets.

    Attributes:
        reason: Why not, with what mends it; empty when reachable.
        facts: Model, processor, memory, operating system: what was readable, as text.
        targets: Names of exporters whose files it runs.
        not_run: Targets that it does not run, each with the reason and what would run them.
        decodes: Targets whose language models with caches it runs.
    """

    reachable: bool
    reason: str = ""
    facts: dict[str, str] = field(default_factory=dict)
    targets: tuple[str, ...] = ()
    not_run: dict[str, str] = field(default_factory=dict)
    decodes: tuple[str, ...] = ()

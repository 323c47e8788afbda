"""What this machine can do, what it cannot, and the line that mends it."""

from __future__ import annotations

import importlib.metadata
import platform
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from edgekd import plugins
from edgekd.errors import UsageError
from edgekd.measurement import DeviceStatus
from edgekd.profiles import device_names, device_of, load_profile
from edgekd.types import Json

__all__ = ["KNOWN_BAD", "BadPair", "device_facts", "diagnose", "target_facts"]


@dataclass(frozen=True)
class BadPair:
    """Two packages that are known to fail together.

    Attributes:
        package: The one that sets the bound.
        other: The one that breaks it.
        below: The first version of ``other`` that fails.
        why: What happens.
    """

    package: str
    other: str
    below: tuple[int, ...]
    why: str


KNOWN_BAD = (
    BadPair(
        "coremltools", "numpy", (2, 4), "coremltools 9.0 fails on transformers with numpy 2.4 (apple/coremltools#2633)"
    ),
    BadPair("optimum-onnx", "transformers", (4, 58), "optimum-onnx 0.1 pins transformers below 4.58"),
    BadPair("litert-torch", "torch", (2, 15), "litert-torch 0.10 pins torch below 2.15"),
)


def target_facts() -> list[Json]:
    """Every target: what it writes, and whether its toolchain is installed."""
    facts = []
    for name in plugins.exporter_names():
        exporter = plugins.load_exporter(name)
        absent = plugins.missing(exporter.requires)
        reason = f"{', '.join(absent)} not installed; pip install 'edgekd[{exporter.extra}]'" if absent else ""
        facts.append(
            {
                "target": name,
                "suffix": exporter.suffix,
                "precisions": list(exporter.precisions),
                "ready": not absent,
                "reason": reason,
            }
        )
    return facts


def device_facts() -> list[Json]:
    """Every device: whether it can be used now, and for which targets.

    What the device says of itself goes before what its profile says.
    """
    with ThreadPoolExecutor(max_workers=8) as pool:  # most of it is waiting for those that do not answer
        return list(pool.map(_device_fact, device_names()))


def _device_fact(name: str) -> Json:
    kind, facts = "", {}
    try:
        profile = load_profile(name)
        kind, facts = profile.kind, profile.facts
        status = device_of(profile).probe()
    except UsageError as error:  # a file of the user's that is wrong hides no other device
        status = DeviceStatus(reachable=False, reason=str(error))
    return {"device": name, "kind": kind, **status.to_json(), "facts": facts | status.facts}


def diagnose() -> list[Json]:
    """All findings: ``good``, ``warn`` or ``bad``, with what mends them."""
    findings = [
        _finding("good" if sys.version_info >= (3, 11) else "bad", "python", platform.python_version(), ""),
        _finding("good", "torch", _version("torch") or "not installed", ""),
    ]
    for fact in target_facts():
        state = "good" if fact["ready"] else "bad"
        mend = "" if fact["ready"] else fact["reason"].partition("; ")[2]
        findings.append(_finding(state, f"target {fact['target']}", fact["reason"] or "ready", mend))
    for fact in device_facts():
        found = f"runs {', '.join(fact['targets'])}" if fact["reachable"] else fact["reason"]
        # A phone that is not attached is no fault of this machine.
        findings.append(_finding("good" if fact["reachable"] else "warn", f"device {fact['device']}", found, ""))
        findings += [
            _finding("warn", f"device {fact['device']}", f"does not run {target}", reason)
            for target, reason in fact["not_run"].items()
        ]
    findings += [_bad_pair(pair) for pair in KNOWN_BAD if _is_bad(pair)]
    return findings


def _is_bad(pair: BadPair) -> bool:
    version = _version(pair.other)
    return _version(pair.package) is not None and version is not None and _numbers(version) >= pair.below


def _bad_pair(pair: BadPair) -> Json:
    bound = ".".join(map(str, pair.below))
    found = f"{_version(pair.package)} with {pair.other} {_version(pair.other)}: {pair.why}"
    return _finding("bad", pair.package, found, f"pip install '{pair.other}<{bound}'")


def _numbers(version: str) -> tuple[int, ...]:
    parts = version.split("+")[0].split(".")
    return tuple(int(part) for part in parts if part.isdigit())


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _finding(state: str, what: str, found: str, mend: str) -> Json:
    return {"state": state, "what": what, "found": found, "mend": mend}

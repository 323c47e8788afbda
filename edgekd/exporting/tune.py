"""``int8`` by measurement: all forms that a target has are written, proven and timed; the fastest good one is taken."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from edgekd import plugins
from edgekd.compression.compress import choose_int8
from edgekd.errors import UsageError
from edgekd.exporting.export import Proof, Request
from edgekd.exporting.parity import TOLERANCES, compare, run_file
from edgekd.measurement import Measurement, Plan
from edgekd.profiles import load_device
from edgekd.programs.models import run_program
from edgekd.protocols import Progress
from edgekd.store import MANIFEST, load_artifact, write_json
from edgekd.types import Artifact, Precision, Student

__all__ = ["CANDIDATES", "LARGEST_DROP", "Candidate", "choose", "settle", "tune"]

CANDIDATES: tuple[Precision, ...] = ("w8a8", "w8d8", "w8")
"""What ``int8`` may become."""

LARGEST_DROP = 0.01
"""Share of right classes that a candidate may lose against fp32."""

PLAN = Plan(blocks=6, min_runs=50, min_s=0.3, max_s=3.0)
"""Short blocks, but as many as an interval needs."""


@dataclass(frozen=True)
class Candidate:
    """One int8 form of a model on one target.

    Attributes:
        precision: Its word.
        ratio: Its latency as a multiple of the fp32 file's; None where it could not be measured.
        fault: Why it cannot be taken; empty when it can.
    """

    precision: Precision
    ratio: float | None
    fault: str = ""


def choose(candidates: Sequence[Candidate]) -> tuple[Precision, str]:
    """The fastest candidate without a fault, and one sentence with all that was measured.

    Raises:
        UsageError: Every candidate has a fault.
    """
    told = ", ".join(
        f"{c.precision} " + (f"{c.ratio:.2f}×" if c.ratio is not None else "") + (f" ({c.fault})" if c.fault else "")
        for c in candidates
    )
    good = [candidate for candidate in candidates if not candidate.fault and candidate.ratio is not None]
    if not good:
        raise UsageError(f"no int8 form can be taken: {told}; keep fp32 or fp16")
    best = min(good, key=lambda candidate: candidate.ratio or 0.0)
    return best.precision, f"int8 is {best.precision} here: measured against fp32 on this machine: {told}"


def tune(
    folders: Sequence[Path], student: Student, proof: Proof, progress: Progress, plan: Plan = PLAN
) -> tuple[Path, str]:
    """Measure the finished artifacts of one target side by side, and note the choice in the manifest of the best.

    Args:
        folders: The fp32 artifact first, then the candidates.
        student: In fp32.
        proof: The samples that time the files, and what accuracy is judged on.

    Returns:
        The folder of the candidate that was chosen, and why.

    Raises:
        UsageError: No candidate is good enough, or the device does not run the target.
    """
    session = plugins.load_module("edgekd.benchmarks.session")
    artifacts = [(load_artifact(folder), folder) for folder in folders]
    measured = session.measure_many(artifacts, "host", load_device("host"), proof.samples, None, None, plan, progress)
    if measured[0].status != "measured":
        raise UsageError(f"--tune cannot measure {artifacts[0][0].target} here: {measured[0].reason}")
    parent = artifacts[0][0]
    candidates = [
        Candidate(found.precision, _ratio(measured[0], latency), _fault(found, folder, parent, student, proof))
        for (found, folder), latency in zip(artifacts[1:], measured[1:], strict=True)
    ]
    precision, why = choose(candidates)
    folder = next(folder for artifact, folder in artifacts[1:] if artifact.precision == precision)
    _note(folder, why)
    return folder, why


def settle(
    requests: Sequence[Request], written: Mapping[Request, Path], student: Student, proof: Proof, progress: Progress
) -> list[Path]:
    """The artifacts that were asked for; ``int8`` is the best candidate of its target.

    A target that this machine does not run is decided by rule, and the manifest says so.

    Args:
        requests: All that were made of what the user wrote.
        written: Those that came through, with their folders.

    Raises:
        UsageError: No candidate could be written, or none is good enough.
    """
    asked = [folder for request, folder in written.items() if request.is_asked]
    for target in dict.fromkeys(request.target for request in requests if request.is_candidate):
        runs = load_device("host").probe()
        forms = {r.precision: folder for r, folder in written.items() if r.target == target and r.is_candidate}
        if not forms:
            raise UsageError(f"int8 was asked, and none of its forms could be written for {target}; keep fp32 or fp16")
        if target in runs.targets:
            fp32 = next(folder for r, folder in written.items() if (r.target, r.precision) == (target, "fp32"))
            folder, why = tune([fp32, *forms.values()], student, proof, progress)
        else:
            precision, rule = choose_int8(student.program, forms)
            reason = runs.not_run.get(target, "this machine does not run it")
            folder, why = forms[precision], f"int8 is {precision} here, by rule: {rule}; not measured: {reason}"
            _note(folder, why)
        progress.say(f"{target}: {why}")
        asked.append(folder)
    return list(dict.fromkeys(asked))


def _note(folder: Path, why: str) -> None:
    artifact = load_artifact(folder)
    others = [note for note in artifact.notes if not note.startswith("int8 is ")]
    write_json(folder / MANIFEST, replace(artifact, notes=(why, *others)).to_json())


def _ratio(parent: Measurement, child: Measurement) -> float:
    stats = plugins.load_module("edgekd.benchmarks.stats")
    estimate: float = stats.latency_ratio(parent, child).estimate
    return estimate


def _fault(artifact: Artifact, folder: Path, parent: Artifact, student: Student, proof: Proof) -> str:
    """Why a proven file is not good enough beside fp32: accuracy where there are labels, else its outputs."""
    if artifact.accuracy is not None and parent.accuracy is not None:
        drop = parent.accuracy - artifact.accuracy
        return f"loses {drop * 100:.2f} points of accuracy" if drop > LARGEST_DROP else ""
    wanted = list(run_program(student.program, proof.samples).values())
    runner = plugins.load_exporter(artifact.target).load(folder / artifact.path)
    found = compare(student.card.outputs, wanted, run_file(runner, proof.samples), TOLERANCES["w8d8"], runner.runtime)
    return "" if found.status == "passed" else f"too far from fp32: cosine {found.cosine:.3f}"

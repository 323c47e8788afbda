"""The ledger and its measurements as one HTML file: no script, nothing loaded from anywhere, light and dark."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from edgekd.measurement import Measurement
from edgekd.reporting.ledger import (
    UNKNOWN,
    Ledger,
    file_column,
    format_bytes,
    format_count,
    format_gain,
    format_latency,
    format_number,
    format_perplexity,
    format_share,
    format_spread,
    label,
)

from . import charts, stats
from .page import Markup, escaped, figure, listed, page, section, table
from .session import FLAGS

__all__ = ["html"]

SYMBOLS = {
    "circle": '<circle cx="7" cy="7" r="5"/>',
    "square": '<rect x="2.5" y="2.5" width="9" height="9"/>',
    "triangle-up": '<path d="M7 2 12.5 12H1.5Z"/>',
    "triangle-down": '<path d="M7 12 12.5 2H1.5Z"/>',
    "diamond": '<path d="M7 1 12 7 7 13 2 7Z"/>',
}

PARITY_WORDS = {"passed": "passed", "failed": "failed", "not_run": "not run"}


def html(ledger: Ledger, measurements: Sequence[Measurement]) -> str:
    """One self-contained page.

    Args:
        ledger: The rows in the order in which they are shown.
        measurements: Of one interleaved session: their blocks are compared pair by pair.

    Returns:
        The whole document. Sections without content are left out.
    """
    sections = [
        _picture(ledger),
        _rows(ledger),
        _parity(ledger),
        _answers(measurements),
        _latency(measurements),
        _not_run(measurements),
        _arms(ledger),
        _classes(ledger),
        _lineage(ledger),
        _environment(ledger, measurements),
    ]
    return page(ledger.name, f"edgekd, {ledger.created}", ledger.sentences, sections, _figures(ledger))


def _figures(ledger: Ledger) -> str:
    """What a reader asks first, each with what it is compared with; the worse outcome is told like the better."""
    rows, gain = ledger.rows, ledger.gain
    teacher = next((row for row in rows if row.stage == "teacher"), None)
    student = next((row for row in rows if row.is_shipped), None)
    artifacts = [row for row in rows if row.stage == "artifact" and row.parity != "failed"]  # a wrong file is no praise
    cells: list[tuple[str, str, str]] = []
    if student and student.accuracy is not None:
        beside = f"teacher {format_share(teacher.accuracy)} %" if teacher and teacher.accuracy is not None else ""
        cells.append((f"{format_share(student.accuracy)} %", "student's accuracy", beside))
    if gain is not None:
        beside = f"{gain.seeds} {'seeds' if gain.seeds > 1 else 'seed'}: too few for an interval"
        if gain.low is not None and gain.high is not None:
            beside = f"95 % interval {gain.low:+.2f} to {gain.high:+.2f}, {gain.seeds} seeds"
        cells.append((f"{gain.points:+.2f} points", "from distillation", beside))
    sized = [row for row in artifacts if row.size_bytes]
    if sized:
        least = min(sized, key=lambda row: row.size_bytes or 0)
        beside = label(least)
        if teacher and teacher.size_bytes and least.size_bytes:
            beside = f"{_times(teacher.size_bytes / least.size_bytes)} smaller than the teacher: {label(least)}"
        cells.append((format_bytes(least.size_bytes), "smallest file", beside))
    timed = [row for row in artifacts if row.latency_ms is not None]
    if timed:
        fastest = min(timed, key=lambda row: row.latency_ms or 0.0)
        beside = f"{label(fastest)}, {fastest.latency_device}"
        speed = f"{format_latency(fastest.latency_ms)} ms"
        if fastest.tokens_per_second is not None:
            speed = f"{format_latency(fastest.tokens_per_second)} tokens/s"
        cells.append((speed, "fastest file, median", beside))
    if not cells:
        return ""
    inner = "".join(
        f"<div><span>{escaped(b)}</span><b>{escaped(a)}</b><span>{escaped(c)}</span></div>" for a, b, c in cells
    )
    return f'<div class="figures">{inner}</div>'


def _picture(ledger: Ledger) -> str:
    """Accuracy against size, and against latency on each device by itself."""
    figures = [figure(charts.accuracy_against(ledger.rows, "size"), "Accuracy and size")]
    for device in dict.fromkeys(row.latency_device for row in ledger.rows if row.latency_ms is not None):
        rows = [row for row in ledger.rows if row.latency_device == device]
        figures.append(figure(charts.accuracy_against(rows, "latency"), f"Accuracy and latency on {device}"))
    if not any(figures):
        return ""
    shown = [row for row in ledger.rows if row.accuracy is not None]
    kinds = [kind for kind in charts.KINDS if any(charts.kind_of(row) == kind for row in shown)]
    precisions = [name for name in charts.SHAPES if any((row.precision or "fp32") == name for row in shown)]
    legend = [f"{_symbol('circle', f'var(--{kind})', 'currentColor')}{escaped(kind)}" for kind in kinds]
    legend += [f"{_symbol(charts.SHAPES[name], 'none', 'var(--quiet)')}{escaped(name)}" for name in precisions]
    return section(
        "The picture",
        f'<div class="pictures">{"".join(figures)}</div>{listed(legend, "legend")}',
        "Up and to the left is better. Colour is the stage or the target, shape the precision. Files in the same place are drawn one inside the other.",
    )


def _symbol(shape: str, fill: str, stroke: str) -> str:
    stroke = fill if fill != "none" else stroke
    return f'<svg viewBox="0 0 14 14" aria-hidden="true" fill="{fill}" stroke="{stroke}" stroke-width="1.6">{SYMBOLS[shape]}</svg>'


def _rows(ledger: Ledger) -> str:
    rows = ledger.rows
    if not rows:
        return ""
    header, kinds = file_column(rows)
    columns: dict[str, list[str]] = {
        "": [
            Markup(f"{escaped(label(row))}{f'<small>{escaped(row.note)}</small>' if row.note else ''}") for row in rows
        ],
        header: list(kinds),
        "accuracy %": [format_share(row.accuracy) for row in rows],
        "agreement %": [format_share(row.teacher_agreement) for row in rows],
        "perplexity": [format_perplexity(row.perplexity) for row in rows],
        "cosine": [format_number(row.cosine) for row in rows],
        "neighbours %": [format_share(row.neighbours) for row in rows],
        "same label %": [format_share(row.same_label) for row in rows],
        "KL": [format_number(row.kl) for row in rows],
        "ECE": [format_number(row.ece) for row in rows],
        "size": [format_bytes(row.size_bytes) for row in rows],
        "parameters": [format_count(row.parameters) for row in rows],
        "MACs": [format_count(row.macs) for row in rows],
        "p50 ms": [UNKNOWN if row.tokens_per_second else format_latency(row.latency_ms) for row in rows],
        "first token ms": [format_latency(row.first_token_ms) for row in rows],
        "tokens/s": [format_latency(row.tokens_per_second) for row in rows],
        "parity": [_parity_mark(row.parity) for row in rows],
    }
    body = list(zip(*columns.values(), strict=True))
    return section(
        "From the teacher to the device",
        table(list(columns), body, numeric=range(2, len(columns) - 1)),
        "Agreement: share of samples with the teacher's top class. KL: divergence from the teacher, nats. "
        "ECE: expected calibration error. Neighbours: of the teacher's 10 nearest, the share among its own 10; same label: "
        "share of samples whose nearest neighbour has their label. A dash is a value that was not measured.",
    )


def _parity_mark(status: str) -> str:
    return Markup(f'<span class="{status}">{PARITY_WORDS[status]}</span>') if status in PARITY_WORDS else ""


def _parity(ledger: Ledger) -> str:
    body = []
    for row in ledger.rows:
        proof = row.proof
        if proof is None:
            continue
        failed = ", ".join(
            f"{output.name} (off by {output.max_abs:.2g})" for output in proof.outputs if not output.passed
        )
        told = proof.generation
        answers = told and f"{told.same} of {told.prompts} answers of {told.new_tokens} tokens are the program's own."
        reason = " ".join(part for part in (proof.reason, failed and f"Failed outputs: {failed}", answers) if part)
        body.append(
            [
                label(row),
                _parity_mark(proof.status),
                UNKNOWN if proof.max_abs is None else f"{proof.max_abs:.2g}",
                UNKNOWN if proof.cosine is None else f"{proof.cosine:.6f}",
                format_share(proof.agreement),
                str(proof.samples),
                proof.runtime or UNKNOWN,
                reason,
            ]
        )
    if not body:
        return ""
    headers = ["", "parity", "largest difference", "cosine", "agreement %", "samples", "runtime", "reason"]
    return section(
        "Is the file the program?",
        table(headers, body, numeric=range(2, 6), prose=(7,)),
        "Each file was loaded by its own runtime and compared with the program it was written from.",
    )


def _answers(measurements: Sequence[Measurement]) -> str:
    """What users of a language model wait for."""
    measured = [m for m in measurements if m.status == "measured" and stats.first_token_ms(m) is not None]
    body = []
    for m in measured:
        summary = stats.summarize(m)
        assert summary is not None
        spread = stats.spread(stats.first_token_medians(m))
        body.append(
            [
                _name(m),
                str(m.plan.prompt_tokens),
                format_latency(summary.first_token_ms),
                UNKNOWN if spread is None else f"{spread * 100:.1f} %",
                _against_fp32(m, measured, stats.first_token_medians),
                format_latency(summary.tokens_per_second),
                UNKNOWN if summary.spread is None else f"{summary.spread * 100:.1f} %",
                _against_fp32(m, measured),
                str(sum(len(block.first_token_ms) for block in m.blocks)),
                str(m.plan.new_tokens),
            ]
        )
    if not body:
        return ""
    headers = ["", "prompt", "first token ms", "spread", "times fp32", "tokens/s", "spread", "times fp32", "answers",
               "of tokens"]  # fmt: skip
    text = (
        "From a prompt of so many tokens handed over to the first token of the answer, and how many tokens a second "
        "follow: medians of the block medians. Times fp32: time to the first token, and time of a token after it, as "
        "multiples of the fp32 file's, with their 95 % intervals. Below, an inference is one token after the first."
    )
    return section(
        "How soon an answer begins, and how fast it goes on", table(headers, body, numeric=range(1, 10)), text
    )


def _latency(measurements: Sequence[Measurement]) -> str:
    measured = [measurement for measurement in measurements if measurement.status == "measured"]
    body, strips, several = [], [], len({measurement.device for measurement in measured}) > 1
    for measurement in measured:
        summary = stats.summarize(measurement)
        if summary is None:
            continue
        device = f"<small>{escaped(measurement.device)}</small>" if several else ""
        body.append(
            [
                Markup(f"{escaped(_name(measurement))}{device}"),
                format_latency(summary.p50_ms),
                format_latency(summary.p90_ms),
                format_latency(summary.p99_ms),
                UNKNOWN if summary.spread is None else f"{summary.spread * 100:.1f} %",
                _against_fp32(measurement, measured),
                format_latency(summary.first_inference_ms),
                format_latency(summary.model_load_ms),
                format_bytes(summary.peak_memory_bytes),
                f"{summary.samples:,}",
                str(summary.blocks),
                f"{summary.outliers / summary.samples * 100:.1f} %",
            ]
        )
        svg, beyond = charts.distribution(measurement)
        strips.append(figure(svg, f"{_name(measurement)}, ms by block", beyond))
    if not body:
        return ""
    devices = "; ".join(dict.fromkeys(measurement.device for measurement in measured))
    headers = [
        "", "p50 ms", "p90 ms", "p99 ms", "spread", "times fp32", "first ms", "load ms", "memory", "samples", "blocks", "outliers",
    ]  # fmt: skip
    text = (
        f"Measured on {devices}. A block is one fresh process; p50 is the median of the block medians, spread the distance "
        "between the slowest and the fastest block. p90 and p99 stand only where enough samples were taken (64 and 662). "
        "Times fp32: latency as a multiple of the fp32 file of the same target, with its 95 % interval. Outliers are Tukey's, "
        "counted and kept. Memory is the peak of the whole process, with Python and the runtime in it."
    )
    strip_text = "<p class='quiet'>The timed inferences of each block, darker where more lie; the tick is the block's median.</p>"
    return section(
        "How fast, and how sure", table(headers, body, numeric=range(1, 12)) + _flags(measured) + strip_text + f'<div class="strips">{"".join(strips)}</div>', text
    )  # fmt: skip


def _against_fp32(
    measurement: Measurement,
    measured: Sequence[Measurement],
    medians: Callable[[Measurement], Sequence[float]] = stats.block_medians,
) -> str:
    """Ratio to the fp32 file of the same target and device, where both were measured in as many blocks."""
    for other in measured:
        if (other.target, other.device, other.precision) == (measurement.target, measurement.device, "fp32"):
            if other is measurement or len(other.blocks) != len(measurement.blocks):
                return UNKNOWN
            found = stats.ratio(medians(other), medians(measurement))
            if found.low is None or found.high is None:
                return f"{found.estimate:.2f} (no interval)"
            return f"{found.estimate:.2f} ({found.low:.2f} to {found.high:.2f})"
    return UNKNOWN


def _flags(measured: Sequence[Measurement]) -> str:
    """Each flag once, in words, with whom it concerns."""
    lines = []
    for flag in dict.fromkeys(flag for measurement in measured for flag in measurement.flags):
        concerned = [_name(measurement) for measurement in measured if flag in measurement.flags]
        whom = "all" if len(concerned) == len(measured) else ", ".join(concerned)
        lines.append(
            f"<b>{escaped(flag.replace('_', ' '))}</b> {escaped(FLAGS.get(flag, ''))} <span class='quiet'>({escaped(whom)})</span>"
        )
    return listed(lines, "flags")


def _not_run(measurements: Sequence[Measurement]) -> str:
    body = [[_name(m), m.reason, m.device] for m in measurements if m.status == "not_run"]
    if not body:
        return ""
    return section(
        "Not measured", table(["", "reason", "device"], body, prose=(1, 2)), "Files that the device does not run."
    )


def _arms(ledger: Ledger) -> str:
    if not ledger.arms:
        return ""
    body = [
        [
            Markup(f"{escaped(row.arm)}{'<small>shipped</small>' if row.is_shipped else ''}"),
            str(row.seeds),
            format_spread(row),
            format_share(row.teacher_agreement),
            format_number(row.kl),
            format_share(row.mistakes_repeated),
            format_gain(row.gain),
        ]
        for row in ledger.arms
    ]
    headers = ["arm", "seeds", "accuracy %", "agrees with teacher %", "KL", "teacher's mistakes repeated %",
               "points over the control (95 %)"]  # fmt: skip
    text = "Means over the seeds ± standard deviation; the interval is for new seeds and new samples, paired by both."
    return section("Arms", table(headers, body, numeric=range(1, 7)), text)


def _classes(ledger: Ledger) -> str:
    if not ledger.classes:
        return ""
    body = [
        [
            Markup(f"{escaped(row.label)}{'<small>weak in the teacher</small>' if row.teacher_is_weak else ''}"),
            str(row.support),
            format_share(row.teacher_accuracy),
            format_share(row.control_accuracy),
            format_share(row.student_accuracy),
        ]
        for row in ledger.classes
    ]
    weak = [row.teacher_is_weak for row in ledger.classes]
    headers = ["class", "samples", "teacher %", "control %", "student %"]
    return section(
        "Class by class",
        table(headers, body, numeric=range(1, 5), marked=weak),
        "Where the teacher itself is weak, the student can learn little from it." if any(weak) else "",
    )


def _lineage(ledger: Ledger) -> str:
    if not ledger.lineage:
        return ""
    return section(
        "Lineage", f'<ol class="lineage">{"".join(f"<li>{escaped(line)}</li>" for line in ledger.lineage)}</ol>'
    )


def _environment(ledger: Ledger, measurements: Sequence[Measurement]) -> str:
    """Versions from the ledger, conditions from the blocks; a condition that changed is given as a range."""
    facts = dict(ledger.environment)
    seen: dict[str, list[str]] = {}
    for measurement in measurements:
        for block in measurement.blocks:
            for key, value in block.conditions.items():
                seen.setdefault(key, []).append(value)
    for key, values in seen.items():
        facts.setdefault(key.replace("_", " "), _range(values))
    if not facts:
        return ""
    entries = "".join(f"<dt>{escaped(key)}</dt><dd>{escaped(value)}</dd>" for key, value in facts.items())
    return section("Conditions", f"<dl>{entries}</dl>")


def _range(values: Sequence[str]) -> str:
    distinct = list(dict.fromkeys(values))
    try:
        numbers = sorted(distinct, key=float)
    except ValueError:
        return ", ".join(distinct)
    return numbers[0] if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"


def _name(measurement: Measurement) -> str:
    return f"{measurement.target} {measurement.precision}"


def _times(factor: float) -> str:
    return f"{factor:.1f} times" if factor < 10 else f"{factor:.0f} times"

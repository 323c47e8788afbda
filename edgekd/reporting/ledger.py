"""The ledger: what became of the teacher, stage by stage, in numbers that carry where they were taken."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from edgekd.types import JsonMixin, Parity, Precision

if TYPE_CHECKING:
    from rich.table import Table

__all__ = [
    "UNKNOWN",
    "ArmRow",
    "ClassRow",
    "Gain",
    "Ledger",
    "Row",
    "Stage",
    "arm_table",
    "file_column",
    "format_bytes",
    "format_count",
    "format_gain",
    "format_latency",
    "format_number",
    "format_perplexity",
    "format_share",
    "format_spread",
    "label",
    "table",
]

Stage = Literal["teacher", "control", "student", "compressed", "artifact"]

UNKNOWN = "–"
"""How a value that nobody measured is shown; a zero is a measured zero."""


@dataclass(frozen=True)
class Row(JsonMixin):
    """One program or file.

    Attributes:
        stage: Where it stands on the way from the teacher to the device.
        name: For people.
        target: Exporter of a file; empty for a program.
        precision: As trained or written; empty when a teacher has none that edgekd knows.
        accuracy: Share of right classes on the test split.
        teacher_agreement: Share of samples with the teacher's top class.
        kl: Mean divergence from the teacher's classes, nats.
        ece: Expected calibration error, 0 to 1.
        size_bytes: Of the file; of a program: of its saved form.
        parameters: Count of trained numbers.
        macs: Multiply-accumulates for one sample; of a language model, for one token.
        latency_ms: Median of the block medians.
        latency_device: Where that was measured.
        parity: ``passed``, ``failed``, ``not_run``; empty for a program.
        note: What a reader should know.
        proof: The whole comparison behind ``parity``, for the report.
        is_shipped: Of a student: whether the files were made from it.
        perplexity: Of a language model, on the tokens of the test split.
        cosine, neighbours, same_label: Of an embedding, on the test split
            (:class:`edgekd.distillation.embeddings.Likeness`).
        first_token_ms: Of a language model's file: from a prompt handed over to the first token of its answer.
        tokens_per_second: Of the same, after the first.
        prompt_tokens: How long that prompt was.
    """

    stage: Stage
    name: str
    target: str = ""
    precision: Precision | Literal[""] = ""
    accuracy: float | None = None
    teacher_agreement: float | None = None
    kl: float | None = None
    ece: float | None = None
    size_bytes: int | None = None
    parameters: int | None = None
    macs: int | None = None
    latency_ms: float | None = None
    latency_device: str = ""
    parity: str = ""
    note: str = ""
    proof: Parity | None = None
    is_shipped: bool = False
    perplexity: float | None = None
    cosine: float | None = None
    neighbours: float | None = None
    same_label: float | None = None
    first_token_ms: float | None = None
    tokens_per_second: float | None = None
    prompt_tokens: int = 0


@dataclass(frozen=True)
class ClassRow(JsonMixin):
    """One class of the test split.

    Attributes:
        support: How many samples have it.
        teacher_accuracy, control_accuracy, student_accuracy: Share of these that each got right.
        teacher_is_weak: The student can't learn from the teacher here what the teacher does not know.
    """

    label: str
    support: int
    teacher_accuracy: float | None = None
    control_accuracy: float | None = None
    student_accuracy: float | None = None
    teacher_is_weak: bool = False


@dataclass(frozen=True)
class Gain(JsonMixin):
    """What the teacher added: an arm against the control, on the test split.

    Attributes:
        points: Difference of the mean accuracies, in percentage points.
        low, high: Its 95 % interval, for new seeds and samples (``edgekd.reporting.pairing``); None with too few seeds.
        standard_error: Of it, in points; None as above.
        seeds: How many of each.
    """

    points: float
    low: float | None
    high: float | None
    standard_error: float | None
    seeds: int

    @property
    def helped(self) -> Literal["yes", "no", "cannot be told"]:
        """``no`` when it hurt; an interval with zero in it tells neither."""
        if self.low is not None and self.low > 0:
            return "yes"
        return "no" if self.high is not None and self.high < 0 else "cannot be told"


@dataclass(frozen=True)
class ArmRow(JsonMixin):
    """One way to train the student, over its seeds, on the test split.

    Attributes:
        accuracy, teacher_agreement, kl: Means.
        accuracy_deviation: Standard deviation over the seeds; None with one.
        mistakes_repeated: Share of the teacher's mistakes that it makes with the same wrong class; None without any.
        gain: Against the control; None of the control itself.
        is_shipped: Whether the files were made from it.
    """

    arm: str
    seeds: int
    accuracy: float
    teacher_agreement: float
    kl: float
    accuracy_deviation: float | None = None
    mistakes_repeated: float | None = None
    gain: Gain | None = None
    is_shipped: bool = False


@dataclass(frozen=True)
class Ledger(JsonMixin):
    """Everything a run found: the content of ``report.json``, next to the raw measurements.

    Attributes:
        name: Of the recipe.
        created: ISO 8601 with the zone.
        sentences: The verdicts in words, most important first.
        rows: In the order of the way: teacher, control, student, compressed, artifacts.
        classes: In the order of the labels.
        lineage: Oldest first, each ``stage: fingerprint``.
        environment: Versions and the machine.
        gain: Of the arm that is shipped; None when no arm was distilled.
        arms: Every way to train, over its seeds; the control first.
    """

    name: str
    created: str
    sentences: tuple[str, ...] = ()
    rows: tuple[Row, ...] = ()
    classes: tuple[ClassRow, ...] = ()
    lineage: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    gain: Gain | None = None
    arms: tuple[ArmRow, ...] = ()


def format_share(share: float | None) -> str:
    """0.98333 as ``98.33``; the heading says %."""
    return UNKNOWN if share is None else f"{share * 100:.2f}"


def format_number(number: float | None) -> str:
    """0.04567 as ``0.046``."""
    return UNKNOWN if number is None else f"{number:.3f}"


def format_perplexity(perplexity: float | None) -> str:
    """123.456 as ``123.5``."""
    return UNKNOWN if perplexity is None else f"{perplexity:.1f}"


def format_bytes(size: int | None) -> str:
    """1234567 as ``1.23 MB``, decimal like file managers and app stores."""
    return _scaled(size, ((1_000_000_000, "GB"), (1_000_000, "MB"), (1_000, "kB")), "B")


def format_count(count: int | None) -> str:
    """1234567 as ``1.23 M``."""
    return _scaled(count, ((1_000_000_000, "G"), (1_000_000, "M"), (1_000, "k")), "")


def format_latency(milliseconds: float | None) -> str:
    """Three significant digits, never in powers of ten: ``0.0317``, ``1.23``, ``123``."""
    return UNKNOWN if milliseconds is None else _three_digits(milliseconds)


def format_gain(gain: Gain | None) -> str:
    """In points, with its interval: ``+1.23 (0.40 to 2.06)``; without one where there are too few seeds."""
    if gain is None:
        return UNKNOWN
    interval = "" if gain.low is None or gain.high is None else f" ({gain.low:+.2f} to {gain.high:+.2f})"
    return f"{gain.points:+.2f}{interval}"


def format_spread(row: ArmRow) -> str:
    """Accuracy over the seeds: ``98.31 ± 0.12``."""
    spread = "" if row.accuracy_deviation is None else f" ± {row.accuracy_deviation * 100:.2f}"
    return format_share(row.accuracy) + spread


def arm_table(arms: Sequence[ArmRow]) -> Table:
    """The arms over their seeds, for a terminal."""
    from rich.table import Table

    made = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
    made.add_column(f"arm, {arms[0].seeds} seeds")
    for header in ("acc %", "agree %", "KL", "repeats teacher's mistakes %", "points over control (95 %)"):
        made.add_column(header, justify="right", no_wrap=True)
    for row in arms:
        numbers = (format_spread(row), format_share(row.teacher_agreement), format_number(row.kl))
        cells = (*numbers, format_share(row.mistakes_repeated), format_gain(row.gain))
        made.add_row(row.arm + (" (shipped)" if row.is_shipped else ""), *cells)
    return made


def table(ledger: Ledger) -> Table:
    """The rows for a terminal of 100 columns; a column that nobody has a value for is left out.

    Where a latency was measured, and the notes, stand below the table.
    """
    from rich.table import Table
    from rich.text import Text

    rows = ledger.rows
    devices = tuple(dict.fromkeys(row.latency_device for row in rows if row.latency_device))
    file_header, file_cells = file_column(rows)
    columns: dict[str, list[str]] = {
        file_header: list(file_cells),
        "acc %": [format_share(row.accuracy) for row in rows],
        "agree %": [format_share(row.teacher_agreement) for row in rows],
        "ppl": [format_perplexity(row.perplexity) for row in rows],
        "cosine": [format_number(row.cosine) for row in rows],
        "neighbours %": [format_share(row.neighbours) for row in rows],
        "same label %": [format_share(row.same_label) for row in rows],
        "KL": [format_number(row.kl) for row in rows],
        "ECE": [format_number(row.ece) for row in rows],
        "size": [format_bytes(row.size_bytes) for row in rows],
        "params": [format_count(row.parameters) for row in rows],
        "MACs": [format_count(row.macs) for row in rows],
        "p50 ms": [UNKNOWN if row.tokens_per_second else _latency_cell(row, devices) for row in rows],
        "first ms": [_marked(format_latency(row.first_token_ms), row, devices) for row in rows],
        "tokens/s": [_marked(format_latency(row.tokens_per_second), row, devices) for row in rows],
        "parity": [row.parity.replace("_", " ") for row in rows],
    }
    made = Table(
        box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold", caption_justify="left", caption_style="dim"
    )
    made.add_column("", overflow="fold", min_width=10)
    shown = {header: cells for header, cells in columns.items() if any(cell not in ("", UNKNOWN) for cell in cells)}
    for header in shown:
        is_text = header in (file_header, "parity")
        made.add_column(header, justify="left" if is_text else "right", no_wrap=header != file_header, overflow="fold")
    for index, row in enumerate(rows):
        cells = [shown[header][index] or UNKNOWN for header in shown]
        made.add_row(Text(label(row)), *(Text(cell) for cell in cells), style="dim" if row.stage == "control" else None)
    marks = [""] if len(devices) == 1 else [f"{_mark(index)} " for index in range(len(devices))]
    prompts = sorted({row.prompt_tokens for row in rows if row.prompt_tokens})
    what = f"first token after a prompt of {', '.join(map(str, prompts))}, and tokens/s" if prompts else "p50"
    below = [f"{mark}{what} on {device}" for mark, device in zip(marks, devices, strict=True)] if devices else []
    below += [f"{label(row)}: {row.note}" for row in rows if row.note]
    if below:
        made.caption = Text("\n".join(below))
    return made


def label(row: Row) -> str:
    """How a row is called: the stage and the name, once."""
    if row.stage == "artifact" or row.stage in row.name:
        return row.name
    return f"{row.stage} {row.name}".strip()


def file_column(rows: Sequence[Row]) -> tuple[str, tuple[str, ...]]:
    """Heading and cells that say what each file is: only the precision where the names hold the targets already."""
    if all(row.target in label(row) for row in rows):
        return "precision", tuple(row.precision for row in rows)
    return "file", tuple(f"{row.target} {row.precision}".strip() for row in rows)


def _latency_cell(row: Row, devices: tuple[str, ...]) -> str:
    """With the mark of its device where there are several: numbers of two devices must not pass for one column."""
    return _marked(format_latency(row.latency_ms), row, devices)


def _marked(shown: str, row: Row, devices: tuple[str, ...]) -> str:
    if len(devices) < 2 or shown == UNKNOWN:
        return shown
    return f"{shown} {_mark(devices.index(row.latency_device))}" if row.latency_device else shown


def _mark(index: int) -> str:
    return chr(ord("a") + index)


def _scaled(number: int | None, units: tuple[tuple[int, str], ...], smallest: str) -> str:
    if number is None:
        return UNKNOWN
    for factor, unit in units:
        if number >= factor * 0.9995:  # what would round to 1000 of the smaller unit is 1 of this one
            return f"{_three_digits(number / factor)} {unit}"
    return f"{number} {smallest}".strip()


def _three_digits(number: float) -> str:
    if number <= 0:
        return "0"
    decimals = max(0, 2 - math.floor(math.log10(number)))
    rounded = round(number, decimals)
    return f"{rounded:.{max(0, 2 - math.floor(math.log10(rounded)))}f}"  # 9.996 is 10.0, not 10.00

"""The ledger in the terminal: what fits, what is left out, what an unknown value looks like."""

import re
from dataclasses import replace

import pytest
from rich.console import Console

from edgekd.reporting.ledger import (
    ClassRow,
    Ledger,
    Row,
    format_bytes,
    format_count,
    format_latency,
    format_number,
    format_share,
    table,
)
from edgekd.types import OutputParity, Parity

FULL = Ledger(
    name="spam",
    created="2026-01-01T12:00:00+00:00",
    sentences=("The student keeps 99 % of the teacher.",),
    rows=(
        Row(
            "teacher", "MiniLM-L12-H384-uncased", "", "fp32", 0.9877, 1.0, 0.0, 0.0123,
            133_000_000, 33_360_000, 2_730_000_000,
        ),
        Row("control", "control", "", "fp32", 0.97, 0.96, 0.123, 0.04, 9_999_600, 2_500_000, 384_000_000),
        Row("student", "student", "", "fp32", 0.975, 0.97, 0.063, 0.03, 9_999_600, 2_500_000, 384_000_000),
        Row("compressed", "student", "", "w8a8", 0.975, 0.97, 0.063, 0.03, 2_999_600, 2_500_000, 384_000_000),
        Row(
            "artifact", "model-w8a8.onnx", "onnx", "w8a8", 0.975, 0.97, None, None, 2_999_600, None, None, 123.4,
            "host (AMD EPYC, Linux x86_64)", "passed", "int8 became w8a8: the model is a convnet", Parity("passed"),
        ),
        Row("artifact", "Model.mlpackage", "coreml", "fp16", 0.975, 0.97, None, None, 5_000_000, parity="not_run"),
    ),
    classes=(ClassRow("spam", 60, 0.99, 0.98, None, True),),
    lineage=("teacher: 12ab", "student: 34cd"),
    environment={"torch": "2.13.0"},
)  # fmt: skip


def printed(ledger: Ledger, width: int = 100) -> str:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    console.print(table(ledger))
    return console.export_text()


def test_a_ledger_survives_json() -> None:
    proof = Parity("failed", "off", outputs=(OutputParity("logits", 1.0, 0.9, None, False),))
    ledger = Ledger("x", "now", rows=(replace(FULL.rows[4], proof=proof), *FULL.rows), classes=FULL.classes)
    assert Ledger.from_json(ledger.to_json()) == ledger


def test_the_fullest_table_fits_100_columns_uncut() -> None:
    text = printed(FULL)
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 100
    assert "…" not in text
    for part in ("98.77", "133 MB", "33.4 M", "2.73 G", "123", "onnx w8a8", "coreml fp16", "not run", "passed"):
        assert part in text


def test_a_column_of_only_blanks_is_left_out() -> None:
    sparse = Ledger("x", "now", rows=(Row("teacher", "teacher", accuracy=0.9), Row("student", "student", accuracy=0.8)))
    head = printed(sparse).splitlines()[0]
    assert head.split() == ["acc", "%"]


def test_an_unknown_value_is_a_dash_and_a_zero_is_a_zero() -> None:
    rows = (Row("student", "a", accuracy=0.0, kl=0.0, size_bytes=0), Row("student", "b", ece=0.1, macs=1000))
    first, second = printed(Ledger("x", "now", rows=rows)).splitlines()[1:3]
    assert first.split()[2:] == ["0.00", "0.000", "–", "0", "B", "–"]
    assert second.split()[2:] == ["–", "–", "0.100", "–", "1.00", "k"]


def test_the_device_stands_below_and_the_notes_with_their_row() -> None:
    text = printed(FULL)
    assert "p50 on host (AMD EPYC, Linux x86_64)" in text
    assert "model-w8a8.onnx: int8 became w8a8: the model is a convnet" in text


def test_latencies_of_two_devices_are_told_apart() -> None:
    rows = (
        Row("artifact", "a", "onnx", "fp32", latency_ms=1.0, latency_device="host"),
        Row("artifact", "b", "onnx", "fp32", latency_ms=2.0, latency_device="board"),
        Row("artifact", "c", "coreml", "fp32"),
    )
    text = printed(Ledger("x", "now", rows=rows))
    assert re.search(r"1\.00 a\b", text)
    assert re.search(r"2\.00 b\b", text)
    assert "a p50 on host" in text
    assert "b p50 on board" in text


def test_names_are_shown_as_they_are_and_not_as_markup() -> None:
    text = printed(Ledger("x", "now", rows=(Row("artifact", "[red]model[/red]", "onnx", "fp32", 0.5, note="[b]x"),)))
    assert "[red]model[/red]" in text
    assert "[b]x" in text


def test_an_empty_ledger_has_a_table() -> None:
    assert printed(Ledger("x", "now")).strip() == ""


@pytest.mark.parametrize(
    ("shown", "wanted"),
    [
        (format_bytes(0), "0 B"),
        (format_bytes(999), "999 B"),
        (format_bytes(1000), "1.00 kB"),
        (format_bytes(999_949), "1.00 MB"),
        (format_bytes(999_400), "999 kB"),
        (format_bytes(12_345_678), "12.3 MB"),
        (format_bytes(2_500_000_000), "2.50 GB"),
        (format_bytes(None), "–"),
        (format_count(950), "950"),
        (format_count(1_234_567), "1.23 M"),
        (format_latency(0.0012345), "0.00123"),
        (format_latency(0.9996), "1.00"),
        (format_latency(9.996), "10.0"),
        (format_latency(1234.5), "1234"),
        (format_latency(None), "–"),
        (format_share(1.0), "100.00"),
        (format_share(None), "–"),
        (format_number(0.04567), "0.046"),
        (format_number(None), "–"),
    ],
)
def test_numbers_keep_three_digits(shown: str, wanted: str) -> None:
    assert shown == wanted

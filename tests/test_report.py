"""The page: whole, offline, escaped, and holding what was measured."""

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from edgekd.benchmarks import charts
from edgekd.benchmarks.report import html
from edgekd.benchmarks.session import measure_many
from edgekd.devices.host import HostDevice
from edgekd.measurement import Block, Measurement, Plan
from edgekd.reporting.ledger import ArmRow, ClassRow, Gain, Ledger, Row
from edgekd.types import Artifact, OutputParity, Parity

VOID = {"meta", "br", "link", "input", "hr", "img"}
HOSTILE = """<script>alert("x")</script>&'{$title}"""

File = tuple[Artifact, Path]


class Page(HTMLParser):
    """Checks that every tag is closed in order; keeps the tags, attributes and the text outside of styles."""

    def __init__(self, document: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(document)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data


def made_measurement(
    target: str = "onnx", precision: str = "fp32", factor: float = 1.0, blocks: int = 6
) -> Measurement:
    generator = np.random.default_rng(0)
    made = tuple(
        Block(
            60.0, 5.0, 3.0, (2.0,) * 20, tuple(factor * generator.gamma(9, 0.1, 120)), 60_000_000, True, {"cores": "2"}
        )
        for _ in range(blocks)
    )
    return Measurement("0" * 64, target, precision, "host (a processor)", "measured", blocks=made)


def made_ledger(text: str = "plain") -> Ledger:
    parity = Parity("passed", "", "runtime 1.0", 1e-6, 0.999999, 1.0, 100)
    failed = Parity("failed", text, "runtime 1.0", 2.5, 0.9, 0.5, 100, (OutputParity(text, 2.5, 0.9, 0.5, False),))
    return Ledger(
        name=text,
        created="2026-01-01",
        sentences=(f"First {text}", "Second"),
        rows=(
            Row("teacher", f"{text} teacher", "", "fp32", 0.98, 1.0, 0.0, 0.01, 4_000_000, 1_000_000, 9_000_000),
            Row("control", "control", "", "fp32", 0.95, 0.96, 0.1, 0.02, 400_000, 100_000, 900_000),
            Row("student", "student", "", "fp32", 0.94, 0.97, 0.1, 0.02, 400_000, 100_000, 900_000, is_shipped=True),
            Row("artifact", f"a {text}", "onnx", "fp32", 0.94, 0.97, size_bytes=410_000, latency_ms=0.9,
                latency_device=f"host {text}", parity="passed", note=text, proof=parity),
            Row("artifact", f"b {text}", text, "w8a8", 0.93, 0.97, size_bytes=110_000, latency_ms=0.4,
                latency_device=f"host {text}", parity="failed", proof=failed),
            Row("artifact", "c", "coreml", "fp16", size_bytes=210_000, parity="not_run", proof=Parity("not_run", text)),
        ),
        classes=(ClassRow(text, 10, 0.5, 0.4, None, True), ClassRow("other", 12, 0.99, 0.98, 0.97)),
        lineage=(f"teacher: {text}",),
        environment={text: text},
        gain=Gain(-1.0, -1.8, -0.2, 0.4, 3),
        arms=(ArmRow(f"control {text}", 3, 0.95, 0.96, 0.1, 0.01), ArmRow("kd", 3, 0.94, 0.97, 0.1, 0.01, 0.4,
              Gain(-1.0, -1.8, -0.2, 0.4, 3), True)),
    )  # fmt: skip


def test_nothing_is_loaded_and_no_script_runs() -> None:
    document = html(made_ledger(), [made_measurement()])
    page = Page(document)
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "link", "iframe", "img", "object", "embed", "base", "form"}
    attributes = {name for _, attributes in page.tags for name in attributes}
    assert not attributes & {"src", "href", "srcset", "xlink:href", "action", "style", "data"}
    assert not any(name.startswith("on") for name in attributes)
    assert "http:" not in document
    assert "https:" not in document
    assert not re.search(r"@import|url\(", document)
    policies = [attributes for _, attributes in page.tags if attributes.get("http-equiv") == "Content-Security-Policy"]
    assert [policy["content"] for policy in policies] == ["default-src 'none'; style-src 'unsafe-inline'"]


def test_all_text_is_escaped() -> None:
    hostile = replace(made_measurement(), target=HOSTILE, device=HOSTILE, flags=(HOSTILE,))
    absent = Measurement("0" * 64, HOSTILE, "fp32", HOSTILE, "not_run", HOSTILE)
    document = html(made_ledger(HOSTILE), [hostile, absent])
    page = Page(document)
    assert "script" not in {tag for tag, _ in page.tags}
    assert "<script" not in document
    assert page.text.count(HOSTILE) >= 15
    seen = {HOSTILE in (attributes.get("aria-label") or "") for _, attributes in page.tags}
    assert seen == {True, False}, "also in the charts"


def test_what_is_known_is_on_the_page() -> None:
    document = html(made_ledger(), [made_measurement(), made_measurement("onnx", "w8a8", 0.5)])
    text = Page(document).text
    for part in (
        "94.00 %", "-1.00 points", "95 % interval -1.80 to -0.20, 3 seeds", "110 kB",
        "210 kB", "19 times smaller", "0.900 ms",
        "First plain", "teacher: plain", "Failed outputs: plain (off by 2.5)", "weak in the teacher",
        "0.50 (0.50 to 0.50)", "720", "60.0 MB",
    ):  # fmt: skip
        assert part in text, part


def test_a_percentile_without_enough_samples_has_no_column() -> None:
    enough, few = (
        html(Ledger("x", "now"), [made_measurement(blocks=6)]),
        html(Ledger("x", "now"), [made_measurement(blocks=5)]),
    )
    assert ">p99 ms</th>" in enough
    assert ">p99 ms</th>" not in few, "600 samples are too few"
    assert ">p90 ms</th>" in few


def test_a_file_that_failed_parity_is_never_called_smallest_or_fastest() -> None:
    head = Page(html(made_ledger(), [])).text.split("The picture")[0]
    assert "210 kB" in head
    assert "0.900 ms" in head
    assert "110 kB" not in head
    assert "0.400 ms" not in head


def test_weak_classes_of_the_teacher_are_marked() -> None:
    page = Page(html(made_ledger(), []))
    assert [attributes.get("class") for tag, attributes in page.tags if tag == "tr"].count("weak") == 1


def test_what_was_not_run_stands_with_its_reason_and_no_number() -> None:
    absent = Measurement("0" * 64, "coreml", "fp16", "host", "not_run", "Core ML runs on Apple devices only")
    text = Page(html(Ledger("x", "now"), [absent])).text
    assert "Core ML runs on Apple devices only" in text
    assert "coreml fp16" in text
    assert "p50" not in text


def test_an_empty_ledger_is_still_a_page() -> None:
    page = Page(html(Ledger("nothing", "now"), []))
    assert "nothing" in page.text
    assert "svg" not in {tag for tag, _ in page.tags}


def test_an_interval_is_given_from_six_blocks_on() -> None:
    few = [made_measurement(blocks=5), made_measurement("onnx", "w8", 2.0, blocks=5)]
    assert "2.00 (no interval)" in Page(html(Ledger("x", "now"), few)).text
    uneven = [made_measurement(blocks=6), made_measurement("onnx", "w8", 2.0, blocks=7)]
    assert "times fp32" not in Page(html(Ledger("x", "now"), uneven)).text.replace("Times fp32", "")


def test_a_file_without_labels_has_no_accuracy_picture() -> None:
    rows = (Row("student", "student", size_bytes=10), Row("artifact", "a", "onnx", "fp32", size_bytes=10))
    assert charts.accuracy_against(rows, "size") is None
    assert "The picture" not in html(Ledger("x", "now", rows=rows), [])


def test_each_device_has_a_latency_picture_of_its_own() -> None:
    rows = tuple(
        Row("artifact", device, "onnx", "fp32", 0.9, latency_ms=1.0, latency_device=device) for device in ("one", "two")
    )
    text = Page(html(Ledger("x", "now", rows=rows), [])).text
    assert "latency on one" in text
    assert "latency on two" in text


def test_pictures_are_well_formed_and_name_their_points() -> None:
    picture = charts.accuracy_against(made_ledger(HOSTILE).rows, "size")
    assert picture is not None
    tree = ElementTree.fromstring(picture)
    titles = [title.text or "" for title in tree.iter() if title.tag.endswith("title")]
    assert sum(HOSTILE in title for title in titles) == 3
    assert any(title.endswith("94.00 %, 410 kB") for title in titles)
    for colour in ("--teacher", "--control", "--student", "--onnx", "--other"):
        assert f"var({colour})" in picture
    strip, beyond = charts.distribution(made_measurement())
    ElementTree.fromstring(strip)
    assert re.fullmatch(r"[345]\.\d % lie beyond, up to [\d.]+ ms", beyond)


def test_samples_that_are_all_alike_have_a_picture() -> None:
    flat = replace(made_measurement(), blocks=(replace(made_measurement().blocks[0], latency_ms=(2.0,) * 100),))
    picture, beyond = charts.distribution(flat)
    ElementTree.fromstring(picture)
    assert beyond == ""


@pytest.mark.parametrize(("low", "high"), [(0.03, 5), (1, 1.3), (0.9, 1000), (9.8, 10.3), (11.2, 11.25), (1e-3, 1e9)])
def test_a_logarithmic_axis_has_round_ticks_within_it(low: float, high: float) -> None:
    ticks = charts.log_ticks(low, high)
    assert 2 <= len(ticks) <= 7
    assert ticks == sorted(set(ticks))
    assert low <= ticks[0]
    assert ticks[-1] <= high


def test_a_real_session_becomes_a_small_page(onnx_file: File, tflite_file: File) -> None:
    images = np.random.default_rng(0).standard_normal((8, 1, 12, 12)).astype(np.float32)
    plan = Plan(blocks=2, warmup_runs=3, warmup_s=0.0, min_runs=100, min_s=0.05, max_s=2.0)
    core_ml = (replace(onnx_file[0], target="coreml"), onnx_file[1])
    found = measure_many(
        [onnx_file, tflite_file, core_ml], "host", HostDevice(), {"image": images}, np.zeros(8, int), None, plan
    )
    document = html(Ledger("real", "now"), found)
    text = Page(document).text
    assert "onnx fp32" in text
    assert "tflite fp32" in text
    assert "fewer than 6 fresh processes" in text
    assert "Not measured" in text
    assert len(document) < 400_000

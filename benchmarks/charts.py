"""The pictures of the report: Altair charts as SVG without any script, in colours that the page sets.

Colours are CSS variables (``--onnx``, ``--ink`` …), so one picture serves the light and the dark page.
"""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from edgekd.measurement import Measurement
from edgekd.reporting.ledger import Row, format_bytes, format_latency, format_share, label

from .stats import block_medians

__all__ = ["SHAPES", "accuracy_against", "distribution", "kind_of", "log_ticks", "over_releases"]

KINDS = ("teacher", "control", "student", "onnx", "coreml", "tflite", "other")
"""What colour means: programs by their stage, files by their target."""

SHAPES = {"fp32": "circle", "fp16": "square", "w8": "triangle-up", "w8d8": "triangle-down", "w8a8": "diamond"}
"""What shape means."""

AREAS = {"onnx": 260, "coreml": 140, "tflite": 60}
"""Files that share a place are rings in each other: one program in three formats often has one size and accuracy."""

BINS = 90  # of the time axis of a distribution

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif"


def kind_of(row: Row) -> str:
    """The colour of a row."""
    if row.stage == "artifact":
        return row.target if row.target in KINDS else "other"
    return "student" if row.stage == "compressed" else row.stage


def accuracy_against(rows: Sequence[Row], what: str) -> str | None:
    """Accuracy (upwards) against size or latency (a logarithmic axis) as SVG.

    Args:
        what: ``size`` or ``latency``.

    Returns:
        None when no row has both numbers.
    """
    points: list[dict[str, Any]] = []
    for row in rows:
        value = row.size_bytes if what == "size" else row.latency_ms
        if row.accuracy is not None and value:
            shown = format_bytes(row.size_bytes) if what == "size" else f"{format_latency(row.latency_ms)} ms"
            points.append(
                {
                    "x": value,
                    "y": row.accuracy * 100,
                    "kind": kind_of(row),
                    "precision": row.precision or "fp32",
                    "area": AREAS.get(row.target, 140) if row.stage == "artifact" else 160,
                    "text": f"{label(row)}: {format_share(row.accuracy)} %, {shown}",
                }
            )
    if not points:
        return None
    unit, name = _unit(max(point["x"] for point in points), what)
    for point in points:
        point["x"] /= unit
    import altair as alt

    low, high = min(p["x"] for p in points) / 1.35, max(p["x"] for p in points) * 1.35
    accuracies = [point["y"] for point in points]
    margin = max(0.15 * (max(accuracies) - min(accuracies)), 0.25)
    colors = alt.Scale(domain=list(KINDS), range=[f"var(--{kind})" for kind in KINDS])
    chart = (
        alt.Chart(alt.NamedData("points"))
        .mark_point(fillOpacity=0.16, opacity=1, strokeWidth=2)
        .encode(
            x=alt.X(
                "x:Q",
                title=f"{what}, {name} (logarithmic)",
                scale=alt.Scale(type="log", domain=[low, high], nice=False),
                axis=alt.Axis(values=log_ticks(low, high), format="~g"),
            ),
            y=alt.Y(
                "y:Q",
                title="accuracy, %",
                scale=alt.Scale(
                    domain=[min(accuracies) - margin, min(100 + margin / 2, max(accuracies) + margin)],
                    zero=False,
                    nice=False,
                ),
                axis=alt.Axis(tickCount=5),
            ),
            stroke=alt.Stroke("kind:N", legend=None, scale=colors),
            fill=alt.Fill("kind:N", legend=None, scale=colors),
            shape=alt.Shape(
                "precision:N", legend=None, scale=alt.Scale(domain=list(SHAPES), range=list(SHAPES.values()))
            ),
            size=alt.Size("area:Q", legend=None, scale=None),
            description="text:N",
        )
        .properties(width=380, height=250)
    )
    return _svg(chart, f"Accuracy against {what} of {len(points)} programs and files", points=points)


def distribution(measurement: Measurement) -> tuple[str, str]:
    """Timed samples of a measurement as SVG: one row for each block, darker where more samples lie.

    The axis ends a little beyond the 95th percentile, else a few slow samples would leave no room for the rest.

    Returns:
        The picture, and what lies beyond its axis in words; empty when nothing does.
    """
    import altair as alt

    samples = [np.asarray(block.latency_ms) for block in measurement.blocks]
    pooled = np.concatenate(samples)
    low, end = float(pooled.min()), float(np.quantile(pooled, 0.95))
    margin = 0.04 * (end - low) or 0.04 * end  # all samples may be alike
    low, end = low - margin, end + margin
    edges = np.linspace(low, end, BINS + 1)
    cells, medians = [], []
    for index, (values, median) in enumerate(zip(samples, block_medians(measurement), strict=True), start=1):
        counts, _ = np.histogram(values, edges)
        for left, right, count in zip(edges[:-1], edges[1:], counts, strict=True):
            if count:
                strength = 0.12 + 0.88 * math.sqrt(count / counts.max())
                cells.append(
                    {"x": round(left, 7), "x2": round(right, 7), "block": index, "strength": round(strength, 2)}
                )
        medians.append({"x": median, "block": index})
    kind = measurement.target if measurement.target in KINDS else "other"
    x = alt.X(
        "x:Q",
        title=None,
        scale=alt.Scale(domain=[low, end], zero=False, nice=False),
        axis=alt.Axis(tickCount=4, grid=False, labelFlush=True),
    )
    y = alt.Y(
        "block:O",
        title=None,
        axis=alt.Axis(domain=False, ticks=False, grid=False, minExtent=18, maxExtent=18),
        scale=alt.Scale(padding=0.2),
    )
    strip = (
        alt.Chart(alt.NamedData("cells"))
        .mark_rect(color=f"var(--{kind})", aria=False)
        .encode(x=x, x2="x2:Q", y=y, opacity=alt.Opacity("strength:Q", scale=None))
    )
    ticks = (
        alt.Chart(alt.NamedData("medians"))
        .mark_tick(color="var(--ink)", thickness=2, aria=False, bandSize=12)
        .encode(x=x, y=y)
    )
    chart = (strip + ticks).properties(width=300, height=max(2, len(samples)) * 15)
    beyond = float(np.mean(pooled > end))
    words = f"{beyond * 100:.1f} % lie beyond, up to {format_latency(float(pooled.max()))} ms"
    name = f"{measurement.target} {measurement.precision}"
    return _svg(
        chart, f"Latency of the timed inferences of {name}, by block", cells=cells, medians=medians
    ), words if beyond else ""


def over_releases(
    labels: Sequence[str], values: Sequence[float], what: str, unit: str, kind: str, at: Sequence[int]
) -> str:
    """One metric over the releases, oldest first, as SVG; a rule stands where the level changed.

    Args:
        labels: One for each value; the same label may come again.
        kind: The colour: one of ``KINDS``.
        at: Indices of the first values of new levels.
    """
    import altair as alt

    points = [
        {"x": index, "y": value, "text": f"{label}: {value:.4g} {unit}".strip()}
        for index, (label, value) in enumerate(zip(labels, values, strict=True))
    ]
    rules = [{"x": index - 0.5} for index in at]
    margin = 0.15 * (max(values) - min(values)) or 0.02 * abs(max(values)) or 1.0
    last = max(1, len(values) - 1)
    # At most ten labels, or they would lie over each other; each is cut.
    shown = sorted({round(last * step / min(9, last)) for step in range(min(9, last) + 1)})
    names = json.dumps([label[:12] for label in labels])
    x = alt.X(
        "x:Q",
        title=None,
        scale=alt.Scale(domain=[-0.5, len(values) - 0.5], nice=False),
        axis=alt.Axis(values=shown, labelExpr=f"{names}[datum.value]", grid=False, labelAngle=-35),
    )
    y = alt.Y(
        "y:Q",
        title=f"{what}, {unit}" if unit else what,
        scale=alt.Scale(domain=[min(values) - margin, max(values) + margin], zero=False, nice=False),
        axis=alt.Axis(tickCount=5),
    )
    color = f"var(--{kind if kind in KINDS else 'other'})"
    line = alt.Chart(alt.NamedData("points")).mark_line(color=color, strokeWidth=1.5, aria=False).encode(x=x, y=y)
    dots = alt.Chart(alt.NamedData("points")).mark_point(color=color, filled=True, size=36, opacity=1)
    layers = line + dots.encode(x=x, y=y, description="text:N")
    if rules:
        mark = alt.Chart(alt.NamedData("rules")).mark_rule(color="var(--bad)", strokeDash=[4, 3], aria=False)
        layers = layers + mark.encode(x=x)
    chart = layers.properties(width=380, height=200)
    return _svg(chart, f"{what} over {len(values)} measurements", points=points, rules=rules)


def log_ticks(low: float, high: float) -> list[float]:
    """Round values within a logarithmic axis: about 3 to 7 of them, at least 2 wherever they are."""
    for steps in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7), tuple(n / 10 for n in range(10, 100))):
        exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        ticks = [float(f"{step * 10.0**exponent:.3g}") for exponent in exponents for step in steps]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) >= 3:
            return ticks if len(ticks) <= 7 else ticks[:: math.ceil(len(ticks) / 7)]
    return [float(f"{value:.4g}") for value in (low, high)]


def _unit(largest: float, what: str) -> tuple[float, str]:
    if what == "latency":
        return 1.0, "ms"
    return (1e6, "MB") if largest >= 1e6 else (1e3, "kB")


def _svg(chart: Any, title: str, **datasets: list[dict[str, Any]]) -> str:
    """Converted offline by vl-convert; the size is the page's, a hover shows what a point is.

    The data sets are put in at the end, by name: Altair checks and copies what it holds at every step.
    """
    import vl_convert

    chart = chart.configure(font=FONT, background="transparent", padding=4).configure_view(stroke=None)
    chart = chart.configure_axis(
        labelColor="var(--quiet)",
        titleColor="var(--quiet)",
        titleFontWeight="normal",
        titleFontSize=12,
        labelFontSize=12,
        gridColor="var(--line)",
        domainColor="var(--line)",
        tickColor="var(--line)",
        titlePadding=8,
    )
    svg: str = vl_convert.vegalite_to_svg(chart.to_dict(validate=False) | {"datasets": datasets})
    svg = re.sub(r'<svg [^>]*?(viewBox="[^"]*")>', r'<svg role="img" \1>', svg, count=1)
    svg = svg.replace(">", f"><title>{html.escape(title)}</title>", 1)
    return re.sub(
        r'(<path aria-label="([^"]*)" [^>]*?role="graphics-symbol"[^>]*?)/>', r"\1><title>\2</title></path>", svg
    )

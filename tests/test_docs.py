"""Documentation is run: help pages and tables are the real ones, and the README's commands exist.

Run this file to write docs/cli.md, docs/coverage.md and the tables of README.md and docs/results.md anew.
"""

import json
import re
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from edgekd.benchmarks.coverage import page as coverage_page
from edgekd.benchmarks.distill_page import results_tables as distill_tables
from edgekd.benchmarks.gate_error_rates import others_table, rates_table
from edgekd.cli.app import app

from command import edgekd

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
EXAMPLES = ("digits", "fashion", "spam")
ARMS = ("control", "kd", "dist")


def commands_of(command: Any, words: tuple[str, ...] = ()) -> Iterator[str]:
    """Every command as it is typed, without the program's name."""
    if words:
        yield " ".join(words)
    for name, inner in getattr(command, "commands", {}).items():
        yield from commands_of(inner, (*words, name))


COMMANDS = list(commands_of(typer.main.get_command(app)))

pytestmark = pytest.mark.skipif(not (ROOT / "README.md").is_file(), reason="only in a checkout")


def help_page(command: str) -> str:
    done = edgekd(*command.split(), "--help", cwd=ROOT, COLUMNS="110", TERM="dumb", NO_COLOR="1")
    assert done.returncode == 0, done.stderr
    return "\n".join(line.rstrip() for line in done.stdout.strip().splitlines())


def cli_page() -> str:
    """docs/cli.md as it must be; run this file to write it."""
    intro = "# The command line\n\nWritten by `python tests/test_docs.py`; a test holds it equal to the real help.\n"
    pages = [f"## edgekd {command}".rstrip() + f"\n\n```\n{help_page(command)}\n```\n" for command in ["", *COMMANDS]]
    return "\n".join([intro, *pages])


def results_tables() -> str:
    """The README's tables, from what was measured: benchmarks/results/*.json."""
    reports = {name: json.loads((RESULTS / f"{name}.json").read_text()) for name in EXAMPLES}
    lines = [
        "| example | test samples | teacher | student | without teacher | kd | dist | gain of the shipped arm |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, report in reports.items():
        rows = report["ledger"]["rows"]
        teacher = next(row for row in rows if row["stage"] == "teacher")
        student = next(row for row in rows if row["is_shipped"])
        share = f"{student['parameters'] / teacher['parameters']:.1%} of its parameters"
        arms = [_spread([a["test"]["accuracy"] for a in report["arms"] if a["arm"] == arm]) for arm in ARMS]
        gain = report["ledger"]["gain"]
        error = "" if gain["standard_error"] is None else f" ± {gain['standard_error']:.2f}"
        told = f"{student['name']}: {gain['points']:+.2f}{error} points"
        samples = report["arms"][0]["test"]["samples"]
        lines.append(
            f"| [{name}](examples/{name}) | {samples:,} | {teacher['accuracy'] * 100:.2f} % | {share} | "
            f"{' | '.join(arms)} | {told} |"
        )
    lines += [
        "",
        "| example | file | accuracy | agrees with the teacher | size | p50 on the host | error to its program |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, report in reports.items():
        for row in (row for row in report["ledger"]["rows"] if row["stage"] == "artifact"):
            latency = "not run" if row["latency_ms"] is None else f"{row['latency_ms']:.3g} ms"
            lines.append(
                f"| {name} | {row['target']} {row['precision']} | {row['accuracy'] * 100:.2f} % | "
                f"{row['teacher_agreement'] * 100:.2f} % | {row['size_bytes'] / 1000:,.1f} kB | {latency} | "
                f"{row['proof']['max_abs']:.2g} ({row['parity']}) |"
            )
    return "\n".join(lines)


def _spread(values: list[float]) -> str:
    if not values:
        return "–"
    return f"{statistics.fmean(values) * 100:.2f} ± {statistics.stdev(values) * 100:.2f} %"


def readme_with_results() -> str:
    """README.md with its tables made anew."""
    text = (ROOT / "README.md").read_text()
    before, _, rest = text.partition("<!-- results -->\n")
    _, _, after = rest.partition("<!-- /results -->")
    return f"{before}<!-- results -->\n{results_tables()}\n<!-- /results -->{after}"


def with_table(page: Path, marker: str, table: Callable[..., str]) -> str:
    """A page with the table between its markers made anew from benchmarks/results/gate_error_rates.json."""
    before, _, rest = page.read_text().partition(f"<!-- {marker} -->\n")
    made = table(json.loads((RESULTS / "gate_error_rates.json").read_text()))
    return f"{before}<!-- {marker} -->\n{made}\n<!-- /{marker} -->{rest.partition(f'<!-- /{marker} -->')[2]}"


def results_page() -> str:
    """docs/results.md with its tables made anew."""
    before, _, rest = (ROOT / "docs" / "results.md").read_text().partition("<!-- results -->\n")
    _, _, after = rest.partition("<!-- /results -->")
    return f"{before}<!-- results -->\n{distill_tables(RESULTS)}\n<!-- /results -->{after}"


def test_the_results_page_is_what_was_measured() -> None:
    assert (ROOT / "docs" / "results.md").read_text() == results_page()


def test_the_readmes_tables_are_what_was_measured() -> None:
    assert (ROOT / "README.md").read_text() == readme_with_results()


def test_the_documented_help_is_the_real_one() -> None:
    assert (ROOT / "docs" / "cli.md").read_text() == cli_page()


def test_the_coverage_page_is_what_was_run() -> None:
    assert (ROOT / "docs" / "coverage.md").read_text() == coverage_page(RESULTS / "coverage.json")


@pytest.mark.parametrize(
    ("name", "marker", "table"), [("gate", "rates", rates_table), ("measuring", "others", others_table)]
)
def test_error_rates_are_those_that_were_measured(name: str, marker: str, table: Callable[..., str]) -> None:
    page = ROOT / "docs" / f"{name}.md"
    assert page.read_text() == with_table(page, marker, table)


def test_every_command_and_make_target_of_the_readme_exists() -> None:
    blocks = re.findall(r"```(?:sh|console)\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    lines = [line.split("#")[0].strip() for block in blocks for line in block.splitlines()]
    commands = [word.group(1) for line in lines if (word := re.search(r"\bedgekd ([a-z]+)", line))]
    targets = [line.split()[1] for line in lines if line.startswith("make ")]
    makefile = (ROOT / "Makefile").read_text()

    assert len(commands) >= 5
    assert set(commands) <= set(COMMANDS)
    assert targets[:2] == ["demo", "test"]
    assert all(f"\n{target}:" in makefile for target in targets)


def test_every_relative_link_leads_somewhere() -> None:
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/*/README.md")]
    assert len(pages) >= 8
    for page in pages:
        for link in re.findall(r"\]\((?!https?:|#|mailto:)([^)#]+)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


if __name__ == "__main__":
    (ROOT / "docs" / "cli.md").write_text(cli_page())
    (ROOT / "docs" / "coverage.md").write_text(coverage_page(RESULTS / "coverage.json"))
    (ROOT / "README.md").write_text(readme_with_results())
    (ROOT / "docs" / "results.md").write_text(results_page())
    for name, marker, table in (("gate", "rates", rates_table), ("measuring", "others", others_table)):
        page = ROOT / "docs" / f"{name}.md"
        page.write_text(with_table(page, marker, table))

"""Documentation is run: the help pages in docs/cli.md are the real ones, and the README's commands exist."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
COMMANDS = ["init", "check", "capture", "distill", "compress", "export", "verify", "bench", "report", "run"]
COMMANDS += ["targets", "devices", "doctor", "schema"]

pytestmark = pytest.mark.skipif(not (ROOT / "README.md").is_file(), reason="only in a checkout")


def help_page(command: str) -> str:
    environment = {**os.environ, "COLUMNS": "110", "TERM": "dumb", "NO_COLOR": "1"}
    arguments = [command, "--help"] if command else ["--help"]
    done = subprocess.run(
        [sys.executable, "-c", "from edgekd.cli import app; app(prog_name='edgekd')", *arguments],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    return "\n".join(line.rstrip() for line in done.stdout.strip().splitlines())


def cli_page() -> str:
    """docs/cli.md as it must be; run this file to write it."""
    intro = "# The command line\n\nWritten by `python tests/test_docs.py`; a test holds it equal to the real help.\n"
    pages = [f"## edgekd {command}".rstrip() + f"\n\n```\n{help_page(command)}\n```\n" for command in ["", *COMMANDS]]
    return "\n".join([intro, *pages])


def test_the_documented_help_is_the_real_one() -> None:
    assert (ROOT / "docs" / "cli.md").read_text() == cli_page()


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

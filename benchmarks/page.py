"""The pages' frame and pieces: no script, nothing loaded from anywhere, light and dark; all text is escaped."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from importlib.resources import files
from string import Template

from edgekd.reporting.ledger import UNKNOWN

__all__ = ["Markup", "escaped", "figure", "listed", "page", "section", "table"]


class Markup(str):
    """Text that is HTML already; all other text is escaped on its way into the page."""

    __slots__ = ()


def page(title: str, subtitle: str, verdicts: Iterable[str], sections: Iterable[str], figures: str = "") -> str:
    """One self-contained document.

    Args:
        verdicts: Sentences, as text.
        sections: Of HTML, in order; those without content are left out.
        figures: HTML that stands above them.
    """
    template = Template((files("edgekd.benchmarks") / "report.html").read_text(encoding="utf-8"))
    return template.substitute(
        title=escaped(title),
        subtitle=escaped(subtitle),
        verdicts=listed(map(escaped, verdicts), "verdicts"),
        figures=figures,
        sections="\n".join(filter(None, sections)),
    )


def section(title: str, content: str, about: str = "") -> str:
    """A heading, what is said of it, and its HTML."""
    note = f'<p class="quiet">{escaped(about)}</p>' if about else ""
    return f"<section><h2>{escaped(title)}</h2>{note}{content}</section>"


def figure(svg: str | None, caption: str, below: str = "") -> str:
    """A picture with its caption; empty without one."""
    note = f'<p class="quiet">{escaped(below)}</p>' if below else ""
    return f"<figure><figcaption>{escaped(caption)}</figcaption>{svg}{note}</figure>" if svg else ""


def listed(lines: Iterable[str], name: str) -> str:
    """Lines of HTML as a list of a class; empty without any."""
    items = "".join(f"<li>{line}</li>" for line in lines)
    return f'<ul class="{name}">{items}</ul>' if items else ""


def table(
    headers: Sequence[str],
    body: Sequence[Sequence[str]],
    numeric: Iterable[int] = (),
    prose: Iterable[int] = (),
    marked: Sequence[bool] = (),
) -> str:
    """A table without the columns that hold nothing; cells are escaped unless they are ``Markup``."""
    names = dict.fromkeys(numeric, "number") | dict.fromkeys(prose, "prose")
    kept = [index for index in range(len(headers)) if any(row[index] not in ("", UNKNOWN) for row in body)]

    def cell(tag: str, index: int, content: str) -> str:
        shown = content if isinstance(content, Markup) else escaped(content)
        name = f' class="{names[index]}"' if index in names else ""
        return f"<{tag}{name}>{shown}</{tag}>"

    head = "".join(cell("th", index, headers[index]) for index in kept)
    lines = [
        f"<tr{' class=weak' if marked and marked[number] else ''}>"
        f"{''.join(cell('td', index, row[index] or UNKNOWN) for index in kept)}</tr>"
        for number, row in enumerate(body)
    ]
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def escaped(value: str) -> str:
    """Text as HTML."""
    return html.escape(value, quote=True)

"""Errors: one line each, whatever someone else's code raises."""

import pytest

from edgekd.errors import first_line


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("no such layer\nat line 3"), "no such layer"),
        (RuntimeError("\n\n  CHECK failed  \n"), "CHECK failed"),
        (AssertionError(), "AssertionError"),
        (EOFError(" \n"), "EOFError"),
    ],
)
def test_what_others_raise_is_told_in_one_line_that_is_never_empty(error: Exception, line: str) -> None:
    assert first_line(error) == line

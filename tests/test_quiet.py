"""Toolchains are kept off the terminal, and what they complained of is kept."""

import logging
import warnings

import pytest

from edgekd.quiet import collected, quiet


def test_nothing_reaches_the_terminal_whatever_handlers_a_library_has(capfd: pytest.CaptureFixture[str]) -> None:
    library = logging.getLogger("a_library")
    handler = logging.StreamHandler()
    library.addHandler(handler)
    try:
        with quiet() as said:
            library.error("operator %s", "conv")
            library.info("a step")
            warnings.warn("an old name", FutureWarning, stacklevel=1)
    finally:
        library.removeHandler(handler)

    assert said == ["operator conv", "FutureWarning: an old name"]
    assert capfd.readouterr() == ("", "")


def test_complaints_are_collected_once_and_in_one_line_each() -> None:
    with collected() as complaints:
        for _ in range(2):
            with quiet():
                logging.getLogger("a_library").warning("two\n  lines")
        with quiet():
            warnings.warn("x" * 1000, stacklevel=1)

    assert complaints == ["two lines", "UserWarning: " + "x" * 287]


def test_logging_is_as_before_afterwards(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(RuntimeError), quiet():
        raise RuntimeError
    logging.getLogger("a_library").warning("heard")

    assert caplog.messages == ["heard"]

"""The garbage collector is paused, and goes on as it was."""

import gc

import pytest

from edgekd.collector import collector_paused


def test_it_is_paused_within_and_goes_on_after_an_error() -> None:
    found: list[bool] = []

    def refused() -> None:
        with collector_paused():
            found.append(gc.isenabled())
            raise ValueError("refused")

    assert gc.isenabled()
    with pytest.raises(ValueError, match="refused"):
        refused()
    assert found == [False]
    assert gc.isenabled()


def test_where_it_was_off_it_stays_off() -> None:
    gc.disable()
    try:
        with collector_paused():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()

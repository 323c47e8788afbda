"""Large buffers stay with the process while they are wanted, and go back to the system after that."""

import ctypes
import subprocess
import sys

import pytest

from edgekd.buffers import buffers_kept

needs_glibc = pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"), reason="needs glibc"
)

MANY_BUFFERS = """
import contextlib, os, resource, sys
import torch
from edgekd.buffers import buffers_kept

def pages_now():
    return int(open("/proc/self/statm").read().split()[1])

def cleared_so_far():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def steps(count):
    for _ in range(count):
        torch.empty(64 << 20, dtype=torch.uint8).fill_(1)

pages = pages_now()
with buffers_kept() if sys.argv[1] == "kept" else contextlib.nullcontext():
    steps(40)
    before = cleared_so_far()
    steps(40)
    cleared = cleared_so_far() - before
print(cleared * os.sysconf("SC_PAGE_SIZE") >> 20, (pages_now() - pages) * os.sysconf("SC_PAGE_SIZE") >> 20)
"""


def megabytes_cleared_and_left(how: str) -> tuple[int, int]:
    """Of 40 steps with a buffer of 64 MB, after 40 others: glibc tries a dozen places for it before it goes round."""
    told = subprocess.run([sys.executable, "-c", MANY_BUFFERS, how], capture_output=True, text=True, check=True)
    cleared, left = map(int, told.stdout.split())
    return cleared, left


@needs_glibc
def test_a_buffer_of_every_step_is_not_cleared_again_and_goes_back_at_the_end() -> None:
    usual, _ = megabytes_cleared_and_left("usual")
    kept, left = megabytes_cleared_and_left("kept")
    assert usual >= 40 * 64, "the kernel clears every page of each; else there is nothing to gain"
    assert kept <= 64
    assert left < 32


@needs_glibc
def test_an_error_ends_it_too(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[int, int]] = []

    class Libc:
        gnu_get_libc_version = None

        def mallopt(self, parameter: int, value: int) -> None:
            told.append((parameter, value))

        def malloc_trim(self, _: int) -> None:
            told.append((0, 0))

    monkeypatch.setattr(ctypes, "CDLL", lambda _: Libc())
    with pytest.raises(ValueError, match="broken"), buffers_kept():
        raise ValueError("broken")
    assert told[-1] == (0, 0)
    assert dict(told[:-1])[-4] == 65_536


def test_other_c_libraries_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda _: object())
    with buffers_kept():
        pass

"""What the agent says when it cannot go on."""

from __future__ import annotations


class AgentError(Exception):
    """Told to the caller as one line."""


def first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)

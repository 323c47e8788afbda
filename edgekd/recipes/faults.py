"""What is wrong with a file, as lines for people: a key path, what is wrong there, and what would work."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence

from pydantic import ValidationError

from edgekd.types import Json

__all__ = ["fault_lines", "no_such_key", "table_of", "texts_of"]

Location = tuple[int | str, ...]


def fault_lines(
    error: ValidationError,
    unknown: Callable[[Location], str],
    missing: str = "it has no default",
    under: str = "",
) -> list[str]:
    """One line for each key path.

    Args:
        unknown: What is said of a key that there is not, from its path.
        missing: What is said of a key that must be there.
        under: Key path of the table that was looked at; empty for a whole file.
    """
    lines: dict[str, str] = {}
    for item in error.errors():
        parts = [part for part in map(str, item["loc"]) if not part.startswith(("literal[", "function-"))]
        where = ".".join([*([under] if under else []), *parts])
        if item["type"] == "extra_forbidden":
            text = unknown(item["loc"])
        elif item["type"] == "too_short" and item["input"]:
            continue  # said of the items already: a wrong one is not counted
        elif item["type"] == "missing":
            text = f"missing; {missing}"
        elif item["type"] == "literal_error":
            wanted = item["ctx"]["expected"].replace("'", "")
            text = f"{item['input']!r} is not known; there are {wanted}"
        elif item["type"] == "value_error":
            text = str(item["ctx"]["error"])  # a sentence of our own, which says what was found
        else:
            text = f"{item['input']!r}: {item['msg'][:1].lower()}{item['msg'][1:]}"
        lines.setdefault(where, f"{where}: {text}")
    return list(lines.values())


def table_of(value: object) -> Json:
    """A table of a file that may hold anything; empty where it is none."""
    return value if isinstance(value, dict) else {}


def texts_of(value: object) -> list[str]:
    """The strings in a list that may hold anything; none where it is no list."""
    return [item for item in value if isinstance(item, str)] if isinstance(value, list) else []


def no_such_key(key: str, known: Sequence[str]) -> str:
    """What is said of a key that a table does not have."""
    near = difflib.get_close_matches(key, known, n=1)
    return f"no such key; {f'did you mean {near[0]}?' if near else 'there are ' + ', '.join(sorted(known))}"

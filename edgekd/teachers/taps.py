"""Listening to modules by name while a model runs: where features come from, of teachers and of students."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from edgekd.errors import UsageError
from edgekd.programs.models import flatten_outputs

__all__ = ["tapped"]


@contextlib.contextmanager
def tapped(module: nn.Module, names: Sequence[str], reference: str) -> Iterator[Callable[[str], Tensor]]:
    """While the block runs, the module is listened to; yields what gives the last output of a module by its name.

    Of a module that returns several tensors the first counts; of one that ran several times, the last run. It is
    copied: the next module may write over it (``ReLU(inplace=True)``).

    Raises:
        UsageError: There is no module of that name (the message has the near ones), or it did not run.
    """
    modules = dict(module.named_modules())
    for name in names:
        if name not in modules:
            near = difflib.get_close_matches(name, [known for known in modules if known], n=3, cutoff=0.3)
            hint = f"near names: {', '.join(near)}" if near else f"there are {', '.join(list(modules)[1:9])}"
            raise UsageError(f"{reference} has no module {name!r} for a feature; {hint}")
    seen: dict[str, list[Tensor]] = {}

    def listen(name: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            seen[name] = [tensor.clone() for tensor in flatten_outputs(output)[:1]]

        return modules[name].register_forward_hook(hook)

    def output_of(name: str) -> Tensor:
        tensors = seen.get(name)
        if not tensors:
            raise UsageError(f"module {name!r} of {reference} gave no tensor for a feature: it did not run")
        return tensors[0]

    handles = [listen(name) for name in dict.fromkeys(names)]
    try:
        yield output_of
    finally:
        for handle in handles:
            handle.remove()

"""Operators in place: pure where nobody sees the difference, and left alone where somebody does."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from edgekd.programs.fold import fold_batch_norm
from edgekd.programs.pure import is_in_place, pure_form
from edgekd.programs.tracing import export_program


class Calls(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function, self.layer = function, nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.layer(x) if self.function in ALONE else x)


def residual(x: Tensor) -> Tensor:
    return x.relu_().add_(torch.ones(1)).mul_(2)


def hard_swish(x: Tensor) -> Tensor:
    return nn.functional.hardswish(x, inplace=True)


def read_before_it_is_written(x: Tensor) -> Tensor:
    y = x * 2
    z = y + 0
    return y.relu_() + y + z


def read_through_a_view(x: Tensor) -> Tensor:
    y = x * 2
    part = y[:, :1]
    part.add_(1.0)
    return y


def of_a_view_that_was_made_before(x: Tensor) -> Tensor:
    y = x * 2
    z = y.type_as(x)
    z.add_(1.0)
    return y


def of_a_narrower_type(x: Tensor) -> Tensor:
    y = x.half()
    y.add_(x)
    return y


ALONE = (residual, hard_swish)
OBSERVED = (
    read_before_it_is_written,
    read_through_a_view,
    of_a_view_that_was_made_before,
    of_a_narrower_type,
)


def _program(function: Callable[[Tensor], Tensor]) -> tuple[nn.Module, ExportedProgram]:
    torch.manual_seed(0)
    module = Calls(function).eval()
    return module, export_program(module, [torch.zeros(1, 3, 4, 4)])


@pytest.mark.parametrize("function", [*ALONE, *OBSERVED])
def test_a_folded_program_has_no_operator_in_place_and_gives_the_same(function: Callable[[Tensor], Tensor]) -> None:
    module, program = _program(function)
    assert any(map(is_in_place, program.graph.nodes))
    folded = fold_batch_norm(program)
    assert not any(map(is_in_place, folded.graph.nodes))
    x = torch.randn(2, 3, 4, 4)
    with torch.no_grad():
        found, wanted = folded.module()(x.clone()), module(x.clone())
    assert found.dtype == wanted.dtype
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("function", ALONE)
def test_what_nobody_else_reads_becomes_pure_without_a_second_trace(
    function: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, program = _program(function)
    monkeypatch.delattr(ExportedProgram, "run_decompositions")
    fold_batch_norm(program)


@pytest.mark.parametrize("function", OBSERVED)
def test_what_is_seen_elsewhere_has_no_pure_form(function: Callable[[Tensor], Tensor]) -> None:
    _, program = _program(function)
    written = [node for node in program.graph.nodes if is_in_place(node)]
    assert written
    assert [pure_form(node) for node in written] == [None] * len(written)

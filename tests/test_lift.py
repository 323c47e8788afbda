"""A rewritten module becomes a program again without a tracer, and computes what the traced one does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils._pytree import tree_leaves

from edgekd.programs import lift, tracing
from edgekd.programs.fold import folded_module
from edgekd.programs.models import input_specs, output_specs
from edgekd.programs.tracing import at_batch, export_program, retrace


class Calls(nn.Module):
    def __init__(self, function: Callable[..., object]) -> None:
        super().__init__()
        self.function, self.layer = function, nn.Conv2d(3, 4, 3)
        self.register_buffer("shift", torch.arange(4.0)[:, None, None])

    def forward(self, x: Tensor) -> object:
        return self.function(self.layer(x) + self.shift)


def sizes_of_a_batch(x: Tensor) -> Tensor:
    return x.reshape(x.shape[0] * 2, -1).mean(1).view(x.shape[0], 2).expand(x.shape[0], 2)


def in_place(x: Tensor) -> Tensor:
    return x.relu_().add_(1)


def parts(x: Tensor) -> dict[str, Tensor]:
    low, high = x.split(2, 1)
    return {"low": low.mean((2, 3)), "high": high.amax((2, 3))}


PLAIN = (sizes_of_a_batch, in_place, parts)


@pytest.mark.parametrize("function", PLAIN)
@pytest.mark.parametrize("batch", [1, 3])
def test_a_program_of_a_fixed_batch_is_made_without_tracing(
    function: Callable[..., object], batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = Calls(function).eval()
    program = export_program(module, [torch.zeros(1, 3, 6, 6)])
    assert input_specs(program)[0].shape[0] == -1
    monkeypatch.delattr(torch.export, "export")
    fixed = at_batch(program, batch)
    assert input_specs(fixed)[0].shape == (batch, 3, 6, 6)
    assert [spec.name for spec in output_specs(fixed)] == [spec.name for spec in output_specs(program)]
    assert all(-1 not in spec.shape for spec in output_specs(fixed))
    x = torch.randn(batch, 3, 6, 6)
    with torch.no_grad():
        torch.testing.assert_close(fixed.module()(x.clone()), module(x.clone()), rtol=0, atol=0)
    torch.testing.assert_close(fixed.run_decompositions({}).module()(x.clone()), module(x.clone()))


def test_what_it_makes_is_what_the_tracer_makes(monkeypatch: pytest.MonkeyPatch) -> None:
    program = export_program(Calls(sizes_of_a_batch), [torch.zeros(1, 3, 6, 6)])
    bound = at_batch(program)
    lifted = retrace(program.module(check_guards=False), program, 1)
    monkeypatch.setattr(tracing, "lifted", lambda *_: None)
    traced = retrace(program.module(check_guards=False), program, 1)

    for ours in (bound, lifted):
        assert _calls(ours) == _calls(traced)
        assert {name: tuple(w.shape) for name, w in ours.state_dict.items()} == {
            name: tuple(w.shape) for name, w in traced.state_dict.items()
        }


def _calls(program: ExportedProgram) -> list[tuple[Any, ...]]:
    """Every operator with the shape and the strides of what it gives."""
    nodes = [node for node in program.graph.nodes if node.op == "call_function"]
    return [(node.target, *((v.shape, v.stride()) for v in tree_leaves(node.meta["val"]))) for node in nodes]


def test_dropout_in_place_writes_nothing_in_inference(monkeypatch: pytest.MonkeyPatch) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Dropout(0.5, inplace=True), nn.Linear(108, 2)).eval()
    program = torch.export.export(net, (torch.zeros(2, 3, 6, 6),))
    assert torch.ops.aten.dropout_.default in {node.target for node in program.graph.nodes}
    monkeypatch.delattr(type(program), "run_decompositions")
    folded = folded_module(program)
    x = torch.randn(2, 3, 6, 6)

    assert not [node for node in folded.graph.nodes if "dropout" in node.name]
    torch.testing.assert_close(folded(x), net(x), rtol=0, atol=0)


@pytest.mark.parametrize("returned", [False, True])
def test_a_traced_program_holds_no_dropout_but_one_whose_name_is_an_outputs(returned: bool) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(108, 2), *([nn.Dropout(0.5)] if returned else []))
    program = export_program(net, [torch.zeros(1, 3, 6, 6)])
    x = torch.randn(2, 3, 6, 6)

    assert [str(node.target) for node in program.graph.nodes].count("aten.dropout.default") == returned
    torch.testing.assert_close(program.module()(x), net(x), rtol=0, atol=0)
    torch.testing.assert_close(at_batch(program, 2).module()(x), net(x), rtol=0, atol=0)


class Named(nn.Module):
    def forward(self, input: Tensor, weight: Tensor, weight_0: Tensor) -> Tensor:  # names that are taken elsewhere
        return input * weight + weight_0


def test_a_program_that_holds_others_is_traced_at_another_batch() -> None:
    def with_regions(x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):  # as rotary positions of transformers have it
            return x.float() * 2

    program = export_program(Calls(with_regions).eval(), [torch.zeros(1, 3, 6, 6)])
    x = torch.randn(3, 3, 6, 6)
    with torch.no_grad():
        torch.testing.assert_close(at_batch(program, 3).module()(x), program.module()(x))


def test_names_of_inputs_stay() -> None:
    program = export_program(Named(), [torch.zeros(1, 2)] * 3)
    fixed = at_batch(program, 2)
    assert [spec.name for spec in input_specs(fixed)] == ["input", "weight", "weight_0"]
    one, two, three = torch.randn(3, 2, 2)
    assert torch.equal(fixed.run_decompositions({}).module()(one, two, three), one * two + three)


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.seen.add_(1)
        return x + self.seen


def test_a_module_that_keeps_state_is_left_to_the_tracer() -> None:
    program = export_program(Counts(), [torch.zeros(1, 2)])
    module = program.module(check_guards=False)
    example = torch.zeros(1, 2)
    assert lift.lifted(module, program, [example], ((example,), {})) is None
    assert at_batch(program).module()(torch.zeros(1, 2)).tolist() == [[1.0, 1.0]]

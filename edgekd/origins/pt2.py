"""``pt2:file``: a ``torch.export`` program."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgekd.protocols import Arrays, ModelRequest, OriginOptions
from edgekd.recipes.places import file_fault

if TYPE_CHECKING:
    from torch import nn

    from edgekd.teaching import Answer, Teacher

__all__ = ["ORIGIN"]


class _Program:
    requires: tuple[str, ...] = ()
    extra = ""
    options = OriginOptions
    fault = staticmethod(file_fault)

    def module(self, asked: ModelRequest) -> nn.Module:
        from edgekd.programs.models import load_program

        return load_program(asked.folder / asked.place).module()

    def teacher(self, asked: ModelRequest, example: Arrays) -> Teacher:
        """Features are the program's own outputs, by name: its modules are gone."""
        from edgekd.programs.models import (
            bind_inputs,
            count_macs,
            count_parameters,
            input_specs,
            load_program,
            run_program,
        )
        from edgekd.store import hash_path
        from edgekd.teachers.sources import answer_by_name
        from edgekd.teaching import Teacher

        path = asked.folder / asked.place
        program = load_program(path)

        def outputs(arrays: Arrays) -> Answer:
            return answer_by_name(asked, run_program(program, bind_inputs(input_specs(program), arrays)))

        return Teacher(
            outputs, hash_path(path)[:16], count_parameters(program), count_macs(program), path.stat().st_size
        )


ORIGIN = _Program()

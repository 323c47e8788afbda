"""A package that edgekd wrote, with the inputs and outputs of the program that it came from."""

from __future__ import annotations

import json

import numpy as np

from edgekd.errors import ModelFileError
from edgekd.protocols import Arrays
from edgekd.types import TensorSpec

from ._mil import MilProgram
from ._mil_convert import PROBABILITIES

__all__ = ["ProgramRunner"]


class ProgramRunner:
    """Fulfils ``edgekd.protocols.Runner``: calls follow one another, so a state lasts from one to the next.

    A classifier's label and probabilities become the output that they were made of, (1, labels), once the label was
    found to be that of the largest probability.

    Attributes:
        program: What the file holds.
        batch_sizes: That the file takes.
    """

    def __init__(self, program: MilProgram) -> None:
        self.program = program
        self.runtime = program.runtime
        self.inputs = program.inputs
        self.batch_sizes = program.batch_sizes
        self._state = program.make_state()
        self._labels: tuple[str, ...] = ()
        outputs = list(program.outputs)
        told = program.metadata.get(PROBABILITIES)
        if told is not None:
            classifier = next((step for step in program.steps if step.operator.name == "classify"), None)
            if classifier is None:
                raise ModelFileError(f"{program.path} says that it is a classifier, but classifies nothing")
            self._labels = classifier.constants["classes"]
            self._given = {name for name, _ in classifier.outputs}
            self._label, self._probabilities = (name for name, _ in classifier.outputs)
            outputs = [spec for spec in outputs if spec.name not in self._given]
            self._name: str = json.loads(told)["name"]
            spec = TensorSpec(self._name, (1, len(self._labels)), "float32", "probabilities")
            outputs.insert(json.loads(told)["place"], spec)
        self.outputs = tuple(outputs)

    def __call__(self, inputs: Arrays) -> dict[str, np.ndarray]:
        found = self.program(inputs, self._state)
        if not self._labels:
            return found
        label, shares = found[self._label], found[self._probabilities]
        if str(label.item()) != self._labels[int(shares.argmax())]:
            raise ModelFileError(
                f"{self.program.path} gives the label {label.item()!r}, which is not the most probable"
            )
        found = {name: array for name, array in found.items() if name not in self._given}
        found[self._name] = shares.reshape(1, -1)
        return {spec.name: found[spec.name] for spec in self.outputs}

    def first_overflow(self, inputs: Arrays) -> str | None:
        """See :meth:`MilProgram.first_overflow`; states start at zero."""
        return self.program.first_overflow(inputs)

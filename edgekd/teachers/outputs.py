"""What student and teacher give for a batch: something over classes, and features by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    import torch

    from edgekd.teachers.targets import Targets

__all__ = ["StudentOutputs", "TeacherOutputs", "student_outputs"]


@dataclass(frozen=True)
class StudentOutputs:
    """What a student in training returns.

    Attributes:
        logits: (batch, classes).
        features: By the name that the recipe gives them, batch first; each as wide as the teacher's of that name.
    """

    logits: Tensor
    features: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class TeacherOutputs:
    """What the teacher said of a batch of views, as the cache has it.

    Attributes:
        classes: What a loss over classes compares the student with.
        features: By name, batch first, float32.
    """

    classes: Targets
    features: Mapping[str, Tensor] = field(default_factory=dict)

    def to(self, device: torch.device) -> TeacherOutputs:
        """The same, there."""
        return TeacherOutputs(
            self.classes.to(device), {name: feature.to(device) for name, feature in self.features.items()}
        )


def student_outputs(returned: Any) -> StudentOutputs:
    """What a module returned: a plain module returns its logits."""
    return returned if isinstance(returned, StudentOutputs) else StudentOutputs(returned)

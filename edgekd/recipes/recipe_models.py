"""What a recipe can say of models: the tables ``[teacher]``, ``[student]`` and ``[distill.features]``."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from edgekd.teaching import Preprocessing
from edgekd.types import Json

__all__ = ["AS_DATA", "Feature", "Member", "Model", "Table", "Teacher"]

AS_DATA = "none"
"""In place of a preprocessing: the teacher takes what the student takes."""

Above = Annotated[float, Field(gt=0)]


Gives = Literal["logits", "probabilities", "log_probabilities", "embedding"]
"""What a teacher's first output is."""

Pool = Literal["none", "mean", "first"]
"""What becomes of the positions of an embedding: mean without padding, or the first."""


class Table(BaseModel):
    """A table of edgekd.toml."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Model(Table):
    """``module:function`` or ``prefix:place`` (a file of ``edgekd/origins`` is a prefix).

    Other keys are for its origin alone (``OriginOptions``): a file of weights, a prompt.
    """

    model_config = ConfigDict(extra="allow", frozen=True)

    model: str

    @property
    def told(self) -> Json:
        """What its origin alone is told."""
        return dict(self.__pydantic_extra__ or {})


class Member(Model):
    """One teacher.

    Attributes:
        share: Its weight among several; only ratios count.
        preprocessing: From the data's samples to its inputs: ``module:function``, or declared, or ``none`` where it
            takes what the student takes. None: its own where its library knows one (timm, torchvision), else ``none``.
        gives: What its first output is: ``probabilities`` where the model ends in a softmax, ``embedding`` where it is
            a vector that says nothing of classes.
        pool: Of an embedding with positions, as (batch, positions, width) of a text encoder.
    """

    share: Above = 1.0
    preprocessing: str | Preprocessing | None = None
    gives: Gives = "logits"
    pool: Pool = "none"


def _as_table(value: Any) -> Any:
    return {"model": value} if isinstance(value, str) else value


class Teacher(Table):
    """One teacher, or several in ``models``, whose probabilities are averaged; and how their outputs are kept.

    ``codec`` is ``dense-f16``, ``dense-u8``, ``top10`` (or another number) or ``sampled50``. Left out: dense where
    there are at most 256 classes or an arm needs all of them, else ``top10``. All other keys are those of
    :class:`Member`.
    """

    model_config = ConfigDict(extra="allow", frozen=True)

    model: str | None = None
    models: tuple[Annotated[Member, BeforeValidator(_as_table)], ...] = ()
    codec: Annotated[str, Field(pattern=r"^(dense-f16|dense-u8|(top|sampled)[1-9]\d*)$")] | None = None
    preprocessing: str | Preprocessing | None = None
    gives: Gives = "logits"
    pool: Pool = "none"

    @model_validator(mode="after")
    def _one_or_several(self) -> Teacher:
        if (self.model is None) == (not self.models):
            raise ValueError("a teacher is either model or models; give one of them")
        if self.models and (wrong := {*(self.__pydantic_extra__ or {}), *self.model_fields_set} - {"models", "codec"}):
            raise ValueError(
                f"{', '.join(sorted(wrong))} beside models is said of no teacher; say it in each of models"
            )
        return self

    @model_validator(mode="after")
    def _one_embedding(self) -> Teacher:
        if len(self.members) > 1 and any(member.gives == "embedding" for member in self.members):
            raise ValueError("embeddings of several teachers lie in no common space; take one of them as model")
        if self.embeds and self.codec is not None:
            raise ValueError(f"codec {self.codec!r} is for classes; an embedding is kept as it is, leave it out")
        if any(member.pool != "none" and member.gives != "embedding" for member in self.members):
            raise ValueError('pool is for gives = "embedding"; features have their own')
        return self

    @property
    def embeds(self) -> bool:
        """Whether students learn an embedding, and no classes."""
        return any(member.gives == "embedding" for member in self.members)

    @property
    def members(self) -> tuple[Member, ...]:
        """All teachers, one or several."""
        if self.model is None:
            return self.models
        told = dict(self.__pydantic_extra__ or {})
        return (Member(model=self.model, preprocessing=self.preprocessing, gives=self.gives, pool=self.pool, **told),)

    @property
    def name(self) -> str:
        """For people."""
        return " + ".join(member.model for member in self.members)


class Feature(Table):
    """A hidden state or an embedding that a student learns beside the classes; an arm names it among its losses.

    Attributes:
        teacher: Name of a module or an output of the teacher.
        student: Name of a module of the student.
        loss: ``mse``, ``cosine``, or ``module:function``.
        pool: What becomes of the axes between batch and width: kept (``none``), averaged (``mean``, padding left out),
            the first taken (``first``), or all laid in one row (``flat``).
        channels: Where the width is; by default first with four axes, as convolutions have it, else last.
        member: Which of several teachers, from 0.
    """

    teacher: str
    student: str
    loss: str = "mse"
    pool: Literal["none", "mean", "first", "flat"] = "none"
    channels: Literal["first", "last"] | None = None
    member: Annotated[int, Field(ge=0)] = 0

    @property
    def stored(self) -> str:
        """Name in the cache: features that differ in their loss alone are kept once."""
        return "|".join((str(self.member), self.teacher, self.pool, self.channels or ""))

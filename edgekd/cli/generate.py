"""``edgekd generate``: the teacher's own words as training data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgekd.cli.common import progress_bar, require_path, show
from edgekd.errors import UsageError

__all__ = ["generate"]


def generate(
    teacher: Annotated[str, typer.Argument(help="hf:folder of a causal language model.")],
    prompts: Annotated[Path, typer.Argument(help="A .jsonl; each row has a prompt.")],
    out: Annotated[Path, typer.Argument(help="A .jsonl for data.train; one that broke off is gone on with.")],
    tokenizer: Annotated[
        Path | None, typer.Option(help="tokenizer.json; by default the one in the teacher's folder.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Of a completion.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token each time.")] = 0.0,
    beams: Annotated[int, typer.Option(min=1, help="More than 1 searches for the likeliest completion.")] = 1,
    seed: Annotated[int, typer.Option(help="Of all draws.")] = 0,
    end: Annotated[str, typer.Option(help="The token that ends a completion, as in data.tokens.end.")] = "",
) -> None:
    """Have a teacher complete prompts: training data for sequence-level distillation."""
    prefix, _, rest = teacher.partition(":")
    if prefix != "hf" or not rest:
        raise UsageError(f"{teacher!r} does not generate text; hf:folder of a causal language model does")
    require_path(Path(rest), "model folder")
    require_path(prompts, "file of prompts")
    require_path(tokenizer, "tokenizer")
    from edgekd.programs.hugging_face import hugging_face_module
    from edgekd.teachers.completions import CompletionSettings, complete_file, teacher_writer

    settings = CompletionSettings(max_tokens, temperature, beams, seed, end)
    module = hugging_face_module(Path(rest))
    write, made_by = teacher_writer(module, tokenizer or Path(rest) / "tokenizer.json", settings)
    count = complete_file(prompts, out, write, made_by, seed, progress_bar())
    show(f"{out}: {count} completions written now")

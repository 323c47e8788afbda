"""``edgekd on-policy``: a language model learns from its teacher on its own words."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgekd.cli.common import progress_bar, require_path, show
from edgekd.errors import UsageError

__all__ = ["on_policy"]


def on_policy(
    teacher: Annotated[str, typer.Argument(help="hf:folder of a causal language model.")],
    student: Annotated[str, typer.Argument(help="hf:folder of another, with the same vocabulary.")],
    prompts: Annotated[Path, typer.Argument(help="A .jsonl; each row has a prompt.")],
    out: Annotated[Path, typer.Argument(help="The folder to write, as transformers has it.")],
    weights: Annotated[
        Path | None, typer.Option(help="What the student has learned so far: runs/NAME/students/ARM-SEED.")
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="tokenizer.json; by default the one in the teacher's folder.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Of the optimizer.")] = 100,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts of a step.")] = 4,
    learning_rate: Annotated[float, typer.Option(help="Of the first step; it falls to zero.")] = 1e-4,
    max_tokens: Annotated[int, typer.Option(min=1, help="Of a completion.")] = 64,
    temperature: Annotated[float, typer.Option(help="Of the student's draws.")] = 1.0,
    beta: Annotated[
        float, typer.Option(help="0 is KL(teacher || student), 1 KL(student || teacher), between is Jensen-Shannon.")
    ] = 0.5,
    seed: Annotated[int, typer.Option(help="Of the order of the prompts and of all draws.")] = 0,
    end: Annotated[str, typer.Option(help="The token that ends a completion, as in data.tokens.end.")] = "",
) -> None:
    """Train a language model on its own completions, token by token beside its teacher (GKD, by TRL)."""
    folders = []
    for who in (teacher, student):
        prefix, _, rest = who.partition(":")
        if prefix != "hf" or not rest:
            raise UsageError(f"{who!r} does not generate text; hf:folder of a causal language model does")
        folders.append(Path(rest))
        require_path(folders[-1], "model folder")
    require_path(prompts, "file of prompts")
    require_path(weights, "student")
    require_path(tokenizer, "tokenizer")
    from edgekd.distillation.on_policy import OnPolicySettings, train_on_policy
    from edgekd.programs.hugging_face import hugging_face_module
    from edgekd.teachers.language_student import put_weights

    settings = OnPolicySettings(steps, batch_size, learning_rate, max_tokens, temperature, beta, seed, end)
    teaching, learning = (hugging_face_module(folder) for folder in folders)
    if weights is not None:
        put_weights(learning, weights, student)
    card = train_on_policy(
        teaching, learning, prompts, tokenizer or folders[0] / "tokenizer.json", out, settings, progress_bar()
    )
    first, last = card["history"][0], card["history"][-1]
    show(f"{out}: trained for {steps} steps on its own words; the loss was {first:.4f} and is {last:.4f}")

"""On-policy distillation of language models: the student writes, and the teacher says what it would have written.

What a student learns from text of others leaves out the places where only its own mistakes lead. Here it completes
prompts itself and learns the teacher's distribution at each of its own tokens (Agarwal et al. 2023, arXiv:2306.13649).
TRL trains: ``trl.experimental.gkd.GKDTrainer`` with every batch the student's own, and the checkpoints of transformers'
Trainer. Nothing is cached: what the teacher is asked depends on what the student says.
"""

from __future__ import annotations

import contextlib
import copy
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edgekd import plugins
from edgekd.data.tokens import load_tokenizer
from edgekd.errors import DataError, MissingToolchainError, NumericalError, UsageError
from edgekd.programs.hugging_face import generating
from edgekd.protocols import Progress
from edgekd.quiet import quiet
from edgekd.store import atomic_folder, fingerprint, hash_path, read_json, write_json
from edgekd.teachers.completions import prompt_tokens
from edgekd.teachers.sources import module_fingerprint
from edgekd.types import Json

__all__ = ["OnPolicySettings", "train_on_policy"]

CHECKPOINT_EVERY = 20
"""Steps between checkpoints: three times the student on disk, each time."""

CARD = "on_policy.json"


@dataclass(frozen=True)
class OnPolicySettings:
    """How a student is trained on its own words.

    Attributes:
        steps: Of the optimizer (AdamW, a learning rate that falls to zero in a line).
        batch_size: Prompts of a step.
        learning_rate: Of the first step.
        max_tokens: Of a completion.
        temperature: Of the student's draws; the distributions are compared at 1.
        beta: Which divergence (generalized Jensen–Shannon): 0 is KL(teacher ‖ student), 1 is KL(student ‖ teacher).
        seed: Of the order of the prompts and of all draws.
        end: The token that ends a completion; empty for none.
    """

    steps: int = 100
    batch_size: int = 4
    learning_rate: float = 1e-4
    max_tokens: int = 64
    temperature: float = 1.0
    beta: float = 0.5
    seed: int = 0
    end: str = ""

    def __post_init__(self) -> None:
        if min(self.steps, self.batch_size, self.max_tokens) < 1 or self.learning_rate <= 0 or self.temperature <= 0:
            raise UsageError("steps, batch_size, max_tokens, learning_rate and temperature are above 0")
        if not 0 <= self.beta <= 1:
            raise UsageError(f"beta is {self.beta}; it is 0 (KL of the teacher) to 1 (KL of the student)")


def train_on_policy(
    teacher: nn.Module,
    student: nn.Module,
    prompts: Path,
    tokenizer_file: Path,
    out: Path,
    settings: OnPolicySettings,
    progress: Progress,
) -> Json:
    """Train a student on its own completions, and write it as a transformers folder with its tokenizer.

    A training that broke off goes on from its last checkpoint (``<out>.training``, gone when ``out`` stands), to the
    same student.

    Args:
        teacher: Of :func:`edgekd.programs.hugging_face.hugging_face_module`, a causal language model.
        student: The same, with the same vocabulary; it is trained in place.
        prompts: A .jsonl; each row has a ``prompt``.
        tokenizer_file: The ``tokenizer.json`` of both.
        out: The folder to write; where it was made from the same, nothing is done.

    Returns:
        What ``on_policy.json`` in it holds: the settings, the loss of each step, versions.

    Raises:
        MissingToolchainError: TRL is not installed.
        UsageError: A model does not generate, the vocabularies differ, or ``out`` was made by another teacher, from
            another student, or with other settings.
        DataError: The prompts cannot be read, or do not fit the models together with a completion.
        NumericalError: The loss is NaN or infinite.
    """
    if absent := plugins.missing(("trl", "transformers", "datasets")):
        raise MissingToolchainError("distilling on the student's own words", ", ".join(absent), "trl")
    models = generating(teacher), generating(student)
    for model, who in zip(models, ("teacher", "student"), strict=True):
        if model is None:
            raise UsageError(f"this {who} does not generate text; hf:folder of a causal language model does")
    sizes = [model.config.vocab_size for model in models]
    if sizes[0] != sizes[1]:
        raise UsageError(f"the teacher has {sizes[0]} tokens and the student {sizes[1]}; both need the same vocabulary")
    tokens, end = _read(prompts, tokenizer_file, settings, models)
    made_from = {
        "teacher": module_fingerprint(teacher),
        "student": module_fingerprint(student),
        "tokenizer": hash_path(tokenizer_file),
        "prompts": fingerprint(tokens),
        "settings": dict(vars(settings)),
        "trl": version("trl"),
    }
    if out.exists():
        _require_same(out / CARD, made_from, out)
        found: Json = read_json(out / CARD)
        return found
    checkpoints = out.with_name(f"{out.name}.training")
    if checkpoints.exists():
        _require_same(checkpoints / CARD, made_from, checkpoints)
    write_json(checkpoints / CARD, made_from)
    with _configured(models[1], end):
        history = _train(models, tokens, tokenizer_file, checkpoints, settings, progress)
    card: Json = made_from | {"history": history, "torch": torch.__version__}
    with atomic_folder(out) as folder, quiet():
        models[1].config.use_cache = True
        models[1].save_pretrained(folder)
        shutil.copyfile(tokenizer_file, folder / "tokenizer.json")
        write_json(folder / CARD, card)
    shutil.rmtree(checkpoints)
    return card


def _read(
    prompts: Path, tokenizer_file: Path, settings: OnPolicySettings, models: Sequence[Any]
) -> tuple[list[list[int]], int | None]:
    """The prompts as tokens, and the token that ends a completion."""
    tokenizer = load_tokenizer(tokenizer_file, "distilling on the student's own words")
    end = tokenizer.token_to_id(settings.end) if settings.end else None
    if settings.end and end is None:
        raise UsageError(f"{tokenizer_file.name} has no token {settings.end!r}")
    tokens = prompt_tokens(prompts, tokenizer, models, settings.max_tokens)
    if not tokens:
        raise DataError(f"{prompts.name} has no rows")
    return tokens, end


def _require_same(card: Path, made_from: Mapping[str, Any], folder: Path) -> None:
    found = read_json(card) if card.is_file() else {}
    if other := [key for key, value in made_from.items() if found.get(key) != value]:
        what = f"with another {', '.join(other)}" if found else "by something else"
        raise UsageError(f"{folder} was made {what}; remove it, or name another folder")


@contextlib.contextmanager
def _configured(model: Any, end: int | None) -> Iterator[None]:
    """GKDTrainer takes the tokens that end a completion from the model, and the Trainer writes those of the tokenizer
    into it; what the model's own files said is put back."""
    before = copy.deepcopy((model.config, model.generation_config))
    model.generation_config.eos_token_id = end
    try:
        yield
    finally:
        for kept, now in zip(before, (model.config, model.generation_config), strict=True):
            now.pad_token_id, now.bos_token_id, now.eos_token_id = (
                kept.pad_token_id,
                kept.bos_token_id,
                kept.eos_token_id,
            )


def _train(
    models: Sequence[Any],
    tokens: list[list[int]],
    tokenizer_file: Path,
    checkpoints: Path,
    settings: OnPolicySettings,
    progress: Progress,
) -> list[float]:
    """The loss of each step."""
    import datasets
    import huggingface_hub.constants

    huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY = True  # TRL would send statistics, and nobody was asked
    with quiet():
        from transformers import PreTrainedTokenizerFast, PrinterCallback, TrainerCallback
        from trl.experimental.gkd import GKDConfig, GKDTrainer

        class Told(TrainerCallback):
            def on_step_end(self, *_: Any, **__: Any) -> None:
                progress.advance()

        config = GKDConfig(
            output_dir=str(checkpoints),
            max_steps=settings.steps,
            per_device_train_batch_size=settings.batch_size,
            learning_rate=settings.learning_rate,
            max_new_tokens=settings.max_tokens,
            temperature=settings.temperature,
            beta=settings.beta,
            lmbda=1.0,  # every batch is the student's own
            seed=settings.seed,
            save_steps=CHECKPOINT_EVERY,
            save_total_limit=1,
            logging_steps=1,
            logging_nan_inf_filter=False,
            report_to="none",
            disable_tqdm=True,
            bf16=False,  # TRL's own default, and so is the next
            gradient_checkpointing=False,
        )
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(tokenizer_file))
        # Token 0 may be a word ("!" of GPT-2); it fills up what masks leave out, and TRL (1.16) finds the end of a
        # completion by the token that ends it, not by this one. A test holds that it is learned from.
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)
        trainer = GKDTrainer(
            model=models[1],
            teacher_model=models[0],
            args=config,
            data_collator=_left_padded,
            train_dataset=datasets.Dataset.from_dict({"tokens": tokens}),
            processing_class=tokenizer,
            callbacks=[Told()],
        )
        trainer.remove_callback(PrinterCallback)
        last = _last_checkpoint(checkpoints)
        progress.start(f"on-policy {checkpoints.stem}", settings.steps, int(last.name[11:]) if last else 0)
        trainer.train(resume_from_checkpoint=str(last) if last else None)
    progress.finish()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    if not all(torch.tensor(losses).isfinite()):
        raise NumericalError("the loss is NaN or infinite; a smaller learning rate, or another beta, may do")
    models[1].eval()
    return losses


def _last_checkpoint(folder: Path) -> Path | None:
    """The last one that was written whole: its ``trainer_state.json`` comes after all else."""
    whole = []
    for path in folder.glob("checkpoint-*"):
        try:
            whole.append((json.loads((path / "trainer_state.json").read_text())["global_step"], path))
        except (OSError, ValueError):
            shutil.rmtree(path)  # the process was killed while it was written
    return max(whole)[1] if whole else None


def _left_padded(rows: Sequence[Mapping[str, list[int]]]) -> dict[str, Tensor]:
    """Prompts alone, as GKDTrainer calls them: completions follow on their right.

    There are no labels, so that the loss is the mean over the tokens of the completions: with labels the Trainer would
    divide by how many there were before the student wrote its own.
    """
    longest = max(len(row["tokens"]) for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        ids[number, longest - len(row["tokens"]) :] = torch.tensor(row["tokens"])
        mask[number, longest - len(row["tokens"]) :] = 1
    return {"prompts": ids, "prompt_attention_mask": mask}

"""On-policy distillation by TRL: on the student's own words, seeded, and the same student after it broke off."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from typer.testing import CliRunner

from edgekd.cli.app import app
from edgekd.console import SilentProgress
from edgekd.distillation import on_policy
from edgekd.distillation.on_policy import OnPolicySettings, train_on_policy
from edgekd.errors import DataError, UsageError
from edgekd.programs.hugging_face import generating, hugging_face_module
from edgekd.programs.models import input_specs, output_specs
from edgekd.programs.student_files import save_student
from edgekd.programs.tracing import export_program
from edgekd.types import Card, Student

pytest.importorskip("trl", reason="trl is not installed; pip install 'edgekd[trl]'")
transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

WORDS = 20


def save(folder: Path, seed: int, words: int = WORDS, spread: float = 0.02) -> Path:
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=words, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        initializer_range=spread, max_position_embeddings=64, eos_token_id=3,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("on-policy")
    save(folder / "teacher", 0, spread=0.7)
    save(folder / "student", 1)
    save(folder / "narrow", 1, words=7)
    names = {"stop": WORDS - 1} | {f"w{number}": number for number in range(WORDS - 1)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(names, unk_token="w0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "teacher" / "tokenizer.json"))
    rows = [
        {"prompt": " ".join(f"w{place}" for place in range(number, number + 1 + number % 3))} for number in range(9)
    ]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def settings(**changes: Any) -> OnPolicySettings:
    told: dict[str, Any] = {"steps": 40, "learning_rate": 1e-2, "max_tokens": 8, "end": "stop"}
    return OnPolicySettings(**told | changes)


def train(folder: Path, out: Path, progress: SilentProgress | None = None, **changes: Any) -> Any:
    teacher, student = (hugging_face_module(folder / who) for who in ("teacher", "student"))
    words = folder / "teacher" / "tokenizer.json"
    told = settings(**changes)
    return train_on_policy(teacher, student, folder / "prompts.jsonl", words, out, told, progress or SilentProgress())


def divergence(teacher: nn.Module, student: nn.Module, ids: torch.Tensor) -> float:
    """KL(teacher ‖ student) at each position, by its formula."""
    with torch.no_grad():
        ours, theirs = (F.log_softmax(model(ids, torch.ones_like(ids)), -1) for model in (student, teacher))
    return float((theirs.exp() * (theirs - ours)).sum(-1).mean())


class Broken(SilentProgress):
    """Ends the training in the middle, as a user would."""

    def __init__(self, after: int) -> None:
        self.left = after

    def advance(self, steps: int = 1, note: str = "") -> None:
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def trained(folder: Path) -> Path:
    train(folder, folder / "trained")
    return folder / "trained"


def test_a_student_comes_nearer_to_its_teacher_where_its_own_words_lead(folder: Path, trained: Path) -> None:
    teacher, before, after = (hugging_face_module(path) for path in (folder / "teacher", folder / "student", trained))
    model = generating(after)
    torch.manual_seed(0)
    own = model.generate(torch.tensor([[0, 1, 2]] * 8), do_sample=True, max_new_tokens=12, eos_token_id=None, top_k=0)
    card = json.loads((trained / "on_policy.json").read_text())

    assert len(card["history"]) == 40
    assert divergence(teacher, after, own) < 0.6 * divergence(teacher, before, own)
    assert (trained / "tokenizer.json").is_file()
    assert model.generation_config.eos_token_id == 3  # the student's own, not the end of the training
    assert model.config.pad_token_id is None
    assert json.loads((trained / "config.json").read_text())["use_cache"]
    assert not trained.with_name("trained.training").exists()


def test_the_first_loss_is_the_divergence_at_the_tokens_that_the_student_wrote(folder: Path, tmp_path: Path) -> None:
    """One prompt, one token: nothing is drawn that the loss could depend on."""
    (tmp_path / "one.jsonl").write_text('{"prompt": "w1 w2"}\n')
    teacher, student = (hugging_face_module(folder / who) for who in ("teacher", "student"))
    ids = torch.tensor([[1, 2]])
    with torch.no_grad():
        ours, theirs = (F.log_softmax(model(ids, torch.ones_like(ids))[0, -1], -1) for model in (student, teacher))
    wanted = {0.0: (theirs.exp() * (theirs - ours)).sum(), 1.0: (ours.exp() * (ours - theirs)).sum()}
    for beta, value in wanted.items():
        told = settings(steps=1, batch_size=1, max_tokens=1, beta=beta)
        fresh = hugging_face_module(folder / "student")
        words = folder / "teacher" / "tokenizer.json"
        out = tmp_path / f"beta{beta}"
        card = train_on_policy(teacher, fresh, tmp_path / "one.jsonl", words, out, told, SilentProgress())
        assert card["history"] == [pytest.approx(float(value), abs=1e-4)]


@pytest.mark.parametrize("end", ["stop", ""])
def test_token_0_which_also_fills_up_is_learned_from_where_the_student_says_it(
    folder: Path, tmp_path: Path, end: str
) -> None:
    """In GPT-2, Llama 3 and Qwen 2 it is "!". Where all is w0, each position attends to the same."""
    (tmp_path / "one.jsonl").write_text('{"prompt": "w0 w0"}\n')
    teacher, student = (hugging_face_module(folder / who) for who in ("teacher", "student"))
    ids = torch.zeros(1, 6, dtype=torch.long)
    head = generating(student).lm_head.weight
    with torch.no_grad():
        hidden = generating(student).model(ids).last_hidden_state[0, -1]
        head[0] = 20 * hidden / hidden.square().sum()  # it says nothing but w0
        ours, theirs = (F.log_softmax(model(ids, torch.ones_like(ids))[0, 1:5], -1) for model in (student, teacher))
    assert ours[:, 0].exp().min() > 0.9999
    told = settings(steps=1, batch_size=1, max_tokens=4, beta=1.0, end=end)
    words, out = folder / "teacher" / "tokenizer.json", tmp_path / "out"
    card = train_on_policy(teacher, student, tmp_path / "one.jsonl", words, out, told, SilentProgress())

    wanted = (ours.exp() * (ours - theirs)).sum(-1).mean()
    assert card["history"] == [pytest.approx(float(wanted), abs=1e-4)]
    assert wanted > 0.1


def test_a_training_that_broke_off_goes_on_to_the_same_student(
    folder: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(on_policy, "CHECKPOINT_EVERY", 9)
    with pytest.raises(KeyboardInterrupt):
        train(folder, tmp_path / "out", Broken(24))
    left = tmp_path / "out.training"
    (left / "checkpoint-27").mkdir()  # the process was killed while it was written
    (left / "checkpoint-27" / "trainer_state.json").write_text('{"global_')
    with pytest.raises(UsageError, match=r"out.training was made with another settings; remove it"):
        train(folder, tmp_path / "out", seed=1)
    train(folder, tmp_path / "out")

    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (trained / "model.safetensors").read_bytes()
    assert (tmp_path / "out" / "on_policy.json").read_bytes() == (trained / "on_policy.json").read_bytes()


def test_what_is_there_is_not_made_again_and_not_of_other_settings(folder: Path, trained: Path) -> None:
    written = (trained / "model.safetensors").stat().st_mtime_ns
    train(folder, trained)
    with pytest.raises(UsageError, match="trained was made with another settings; remove it, or name another folder"):
        train(folder, trained, beta=1.0)
    with pytest.raises(UsageError, match="teacher was made by something else"):
        train(folder, folder / "teacher")

    assert (trained / "model.safetensors").stat().st_mtime_ns == written


def test_the_command_goes_on_from_what_an_arm_has_learned(folder: Path, tmp_path: Path) -> None:
    learned = hugging_face_module(save(tmp_path / "learned", 5))
    ones = torch.ones(1, 8, dtype=torch.int32)
    program = export_program(learned, [ones, ones.clone()])
    card = Card("student", input_specs(program), output_specs(program))
    save_student(tmp_path / "kd-0", Student(program, card), {})
    words = ["on-policy", f"hf:{folder / 'teacher'}", f"hf:{folder / 'student'}", str(folder / "prompts.jsonl")]
    more = ["--steps", "2", "--max-tokens", "4", "--learning-rate", "1e-7", "--weights", str(tmp_path / "kd-0")]
    result = CliRunner().invoke(app, [*words, str(tmp_path / "out"), *more], catch_exceptions=False)
    trained = hugging_face_module(tmp_path / "out")

    assert result.exit_code == 0, result.output
    assert f"{tmp_path / 'out'}: trained for 2 steps on its own words; the loss was " in result.output
    for (name, one), other in zip(trained.named_parameters(), learned.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0, msg=name)
    words[2] = f"hf:{folder / 'narrow'}"
    with pytest.raises(UsageError, match=r"kd-0 holds other weights than 'hf:.*narrow': weights of other shapes"):
        CliRunner().invoke(app, [*words, str(tmp_path / "b"), *more], catch_exceptions=False)
    with pytest.raises(UsageError, match="'onnx:a' does not generate text"):
        CliRunner().invoke(app, ["on-policy", "onnx:a", *words[2:], "b"], catch_exceptions=False)


def test_what_cannot_be_trained_is_said_before_it_begins(folder: Path, tmp_path: Path) -> None:
    teacher, student, narrow = (hugging_face_module(folder / who) for who in ("teacher", "student", "narrow"))
    words, prompts = folder / "teacher" / "tokenizer.json", folder / "prompts.jsonl"

    def refused(match: str, kind: type[Exception] = UsageError, **changes: Any) -> None:
        given: dict[str, Any] = {
            "teacher": teacher,
            "student": student,
            "prompts": prompts,
            "told": settings(),
        } | changes
        with pytest.raises(kind, match=match):
            train_on_policy(
                given["teacher"], given["student"], given["prompts"], words, tmp_path / "out", given["told"],
                SilentProgress(),
            )  # fmt: skip

    (tmp_path / "empty.jsonl").write_text("\n")
    refused("the teacher has 20 tokens and the student 7", student=narrow)
    refused("this student does not generate text", student=nn.Linear(2, 2))
    refused("has no token 'finis'", told=settings(end="finis"))
    refused(r"line 1 has 1 tokens of prompt; with 64 of completion", DataError, told=settings(max_tokens=64))
    refused("empty.jsonl has no rows", DataError, prompts=tmp_path / "empty.jsonl")
    with pytest.raises(UsageError, match="beta is 2"):
        settings(beta=2)
    assert not (tmp_path / "out.training").exists()

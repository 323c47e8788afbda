"""The teacher's completions as training data: seeded, the same after a kill, and read as prompts that do not count."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from edgekd.cli.app import app
from edgekd.console import SilentProgress
from edgekd.data.tokens import read_tokens
from edgekd.errors import DataError, UsageError
from edgekd.programs.hugging_face import hugging_face_module
from edgekd.recipes.recipe import TokenData
from edgekd.teachers.completions import CompletionSettings, Writer, complete_file, teacher_writer

WORDS = 30


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    pytest.importorskip("optimum.exporters.tasks")
    folder = tmp_path_factory.mktemp("teacher")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=WORDS, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        initializer_range=0.5,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    names = {"stop": WORDS - 2, "?": WORDS - 1} | {f"w{number}": number for number in range(WORDS - 2)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(names, unk_token="?"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    rows = [{"id": number, "prompt": f"w{number} w{number + 1}"} for number in range(8)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def generate(folder: Path, out: Path, *words: str) -> None:
    arguments = ["generate", f"hf:{folder}", str(folder / "prompts.jsonl"), str(out), "--max-tokens", "7", *words]
    result = CliRunner().invoke(app, [*arguments, "--end", "stop"], catch_exceptions=False)
    assert result.exit_code == 0


def test_how_the_teacher_samples_by_default_does_not_bend_what_was_asked(folder: Path, tmp_path: Path) -> None:
    own = shutil.copytree(folder, tmp_path / "own")
    habit = json.loads((own / "generation_config.json").read_text()) | {"do_sample": True, "top_p": 0.01}
    (own / "generation_config.json").write_text(json.dumps(habit))
    for teacher in (folder, own):
        generate(teacher, tmp_path / f"{teacher.name}.jsonl", "--temperature", "2.5")

    assert (tmp_path / "own.jsonl").read_text() == (tmp_path / f"{folder.name}.jsonl").read_text()


def test_the_likeliest_completion_is_that_of_the_logits_token_by_token(folder: Path, tmp_path: Path) -> None:
    generate(folder, tmp_path / "out.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    module = hugging_face_module(folder)
    ids = [0, 1]
    while len(ids) < 9 and ids[-1] != WORDS - 2:
        now = torch.tensor([ids])
        ids.append(int(module(now, torch.ones_like(now))[0, -1].argmax()))
    ended = ids[-1] == WORDS - 2

    assert [row["id"] for row in rows] == list(range(8))
    assert rows[0]["completion"].split() == [f"w{i}" if i < WORDS - 2 else "?" for i in ids[2 : len(ids) - ended]]
    assert rows[0]["ended"] == ended


def test_a_file_that_broke_off_goes_on_and_is_the_same(folder: Path, tmp_path: Path) -> None:
    generate(folder, tmp_path / "whole.jsonl", "--temperature", "1.5")
    whole = (tmp_path / "whole.jsonl").read_bytes()
    third = whole.split(b"\n")[2]
    (tmp_path / "cut.jsonl").write_bytes(whole[: whole.index(third) + len(third) // 2])
    generate(folder, tmp_path / "cut.jsonl", "--temperature", "1.5")
    generate(folder, tmp_path / "other.jsonl", "--temperature", "1.5", "--seed", "1")

    assert (tmp_path / "cut.jsonl").read_bytes() == whole
    assert (tmp_path / "other.jsonl").read_bytes() != whole


def test_rows_of_other_settings_or_prompts_are_never_mixed(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    generate(folder, out)
    write, made_by = teacher_writer(hugging_face_module(folder), folder / "tokenizer.json", CompletionSettings(7, 1.5))
    with pytest.raises(UsageError, match="line 1 was made from another teacher or other settings"):
        complete_file(folder / "prompts.jsonl", out, write, made_by, 0, SilentProgress())
    made_by = json.loads(out.read_text().splitlines()[0])["made_by"]
    (tmp_path / "changed.jsonl").write_text('{"prompt": "w5"}\n')
    with pytest.raises(UsageError, match="line 1 was made from another prompt"):
        complete_file(tmp_path / "changed.jsonl", out, write, made_by, 0, SilentProgress())


def test_a_separator_that_json_may_hold_as_it_is_ends_no_row(folder: Path, tmp_path: Path) -> None:
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    rows = [{"prompt": f"w1{separator}w2"} for separator in "\u2028\x85"]
    prompts.write_text("\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows))

    writer = Writer(lambda prompts: None, lambda prompt, seed: ("w3\u2029w4", True))

    assert complete_file(prompts, out, writer, "me", 0, SilentProgress()) == 2
    assert complete_file(prompts, out, writer, "me", 0, SilentProgress()) == 0  # its own rows are read again
    spec = TokenData(tokenizer="tokenizer.json", length=6, end="stop")
    _, _, labels = read_tokens("jsonl", out, spec, folder)
    assert labels.tolist() == [[-1, 3, 4, WORDS - 2, -1, -1]] * 2


def test_what_cannot_be_completed_is_said(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "no.jsonl").write_text('{"prompt": "w1"}\n{"text": "w2"}\n')
    module = hugging_face_module(folder)
    write, made_by = teacher_writer(module, folder / "tokenizer.json", CompletionSettings())
    with pytest.raises(DataError, match="line 2 has no 'prompt'; it has text"):
        complete_file(tmp_path / "no.jsonl", tmp_path / "out.jsonl", write, made_by, 0, SilentProgress())
    with pytest.raises(UsageError, match="has no token 'finis'"):
        teacher_writer(module, folder / "tokenizer.json", CompletionSettings(end="finis"))
    with pytest.raises(UsageError, match="2 beams"):
        teacher_writer(module, folder / "tokenizer.json", CompletionSettings(beams=2, temperature=1.0))
    with pytest.raises(UsageError, match="does not generate text"):
        teacher_writer(torch.nn.Linear(2, 2), folder / "tokenizer.json", CompletionSettings())


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("w1 " * 2042, r"long.jsonl line 3 has 2042 tokens of prompt; with 7 of completion, 1 to 2041 fit"),
        (" ", r"long.jsonl line 3 has 0 tokens of prompt"),
    ],
)
def test_a_prompt_that_does_not_fit_is_told_before_any_is_completed(
    folder: Path, tmp_path: Path, prompt: str, message: str
) -> None:
    prompts, out = tmp_path / "long.jsonl", tmp_path / "out.jsonl"
    prompts.write_text('{"prompt": "w1"}\n\n' + json.dumps({"prompt": prompt}) + "\n")
    words = folder / "tokenizer.json"
    writer, made_by = teacher_writer(hugging_face_module(folder), words, CompletionSettings(7))
    with pytest.raises(DataError, match=message):
        complete_file(prompts, out, writer, made_by, 0, SilentProgress())

    assert not out.exists()


def test_completions_are_windows_whose_prompt_does_not_count_and_end_only_where_they_ended(
    folder: Path, tmp_path: Path
) -> None:
    rows = [
        {"prompt": "w1 w2", "completion": "w3 w4", "ended": True},
        {"prompt": "w1 w2", "completion": "w3 w4", "ended": False},
    ]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    spec = TokenData(tokenizer="tokenizer.json", length=6, end="stop")
    _, _, labels = read_tokens("jsonl", tmp_path / "train.jsonl", spec, folder)

    assert labels.tolist() == [[-1, 3, 4, WORDS - 2, -1, -1], [-1, 3, 4, -1, -1, -1]]

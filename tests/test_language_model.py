"""A causal language model through the whole recipe: text to windows, cache, arms, perplexity, report."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from edgekd.console import SilentProgress
from edgekd.data.tokens import document_windows, row_window
from edgekd.distillation.perplexity import quality_of_tokens, tokens_of
from edgekd.errors import DataError, RecipeError, UsageError
from edgekd.exporting.external import export_external
from edgekd.recipes.reading import load_recipe
from edgekd.reporting.summary import write_report
from edgekd.stages.check import check_workspace
from edgekd.stages.pipeline import capture_stage, distill_stage, export_stage
from edgekd.stages.workspace import Workspace
from edgekd.store import load_artifact
from edgekd.teachers.targets import DenseTargets

WORDS = 40

CODE = f"""
import torch
from torch import nn

class Reader(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.words, self.out = nn.Embedding({WORDS}, width), nn.Linear(width, {WORDS})

    def forward(self, input_ids, attention_mask):
        return self.out(self.words(input_ids))

class Knows(nn.Module):  # the next word is the one after, or the one two after, as the text was written
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding({WORDS}, {WORDS})
        steps = torch.full(({WORDS}, {WORDS}), -4.0)
        for word in range({WORDS}):
            steps[word, (word + 1) % {WORDS}], steps[word, (word + 2) % {WORDS}] = 2.0, 1.0
        self.table.weight.data.copy_(steps)

    def forward(self, input_ids, attention_mask):
        return self.table(input_ids)

def teacher():
    return Knows()

def student():
    return Reader(16)

def narrow():
    model = Reader(16)
    model.out = nn.Linear(16, 7)
    return model
"""

RECIPE = """
name = "counting"

[data]
train = "jsonl:train.jsonl"
test = "text:test.txt"
validation_share = 0.15

[data.tokens]
tokenizer = "tokenizer.json"
length = 12
end = "end"

[teacher]
model = "mine:teacher"
codec = "sampled50"

[student]
model = "mine:student"

[distill]
arms = ["control", "kd"]
epochs = 15
batch_size = 8
learning_rate = 1e-2
temperature = 1.0
label_weight = 0.2
threads = 1
"""


def story(random: np.random.Generator, words: int) -> str:
    steps = 1 + (random.random(words) < np.exp(1) / (np.exp(1) + np.exp(2)))
    return " ".join(f"w{word}" for word in np.cumsum(steps) % (WORDS - 2))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tokenizers = pytest.importorskip("tokenizers")
    names = {"end": WORDS - 2, "?": WORDS - 1} | {f"w{number}": number for number in range(WORDS - 2)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(names, unk_token="?"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    random = np.random.default_rng(0)
    rows = [{"text": story(random, 40)} for _ in range(12)]
    rows += [{"prompt": story(random, 6), "completion": story(random, 9)} for _ in range(12)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "test.txt").write_text(story(random, 150))
    (tmp_path / "mine.py").write_text(CODE)
    (tmp_path / "edgekd.toml").write_text(RECIPE)
    return tmp_path


def test_each_token_of_a_document_but_the_first_is_a_label_once() -> None:
    ids, mask, labels = document_windows(range(10, 20), 4)

    assert ids.tolist() == [[10, 11, 12, 13], [14, 15, 16, 17], [18, 0, 0, 0]]
    assert labels.tolist() == [[11, 12, 13, 14], [15, 16, 17, 18], [19, -1, -1, -1]]
    assert mask.tolist() == [[1] * 4, [1] * 4, [1, 0, 0, 0]]
    assert len(document_windows([5], 4)[0]) == 0


def test_a_prompt_is_read_and_does_not_count() -> None:
    ids, mask, labels = row_window([1, 2, 3], [4, 5], 8)

    assert ids.tolist() == [[1, 2, 3, 4, 0, 0, 0, 0]]
    assert labels.tolist() == [[-1, -1, 4, 5, -1, -1, -1, -1]]
    assert mask.sum() == 4
    assert len(row_window(range(9), [4, 5], 8)[0]) == 0  # the prompt fills the window
    assert row_window(range(8), [4, 5], 8)[2].tolist() == [[-1] * 7 + [4]]


def test_perplexity_and_agreement_are_those_of_their_formulas() -> None:
    random = np.random.default_rng(0)
    own, teacher = random.normal(size=(2, 30, 9)).astype(np.float32) * 2
    labels = random.integers(0, 9, 30)
    p, q = (np.exp(x) / np.exp(x).sum(1, keepdims=True) for x in (teacher.astype(float), own.astype(float)))
    tokens = tokens_of(torch.from_numpy(own), torch.from_numpy(labels), DenseTargets(torch.from_numpy(teacher)))
    found = quality_of_tokens(tokens, np.array([10, 5, 15]))
    losses = -np.log(q[np.arange(30), labels])

    assert found.perplexity == pytest.approx(np.exp(losses.mean()), rel=1e-5)
    assert found.kl == pytest.approx((p * np.log(p / q)).sum(1).mean(), rel=1e-5)
    assert found.teacher_agreement == pytest.approx((p.argmax(1) == q.argmax(1)).mean())
    assert found.window_losses == pytest.approx([losses[:10].sum(), losses[10:15].sum(), losses[15:].sum()], abs=1e-3)
    assert found.score == pytest.approx(-losses.mean(), rel=1e-5)


def test_a_language_model_goes_through_the_whole_recipe(folder: Path) -> None:
    work = Workspace(load_recipe(folder / "edgekd.toml"))
    capture_stage(work, SilentProgress())
    results = distill_stage(work, SilentProgress())
    ledger = write_report(work)
    teacher, control, student = ledger.rows[:3]
    again = distill_stage(Workspace(load_recipe(folder / "edgekd.toml")), SilentProgress())

    assert [result.arm for result in results] == ["control", "kd"]
    assert again == results  # unchanged, not done again
    assert all(row.perplexity is not None for row in (teacher, control, student))
    # The text was made with the teacher's own odds, so nothing can be better than it, and few words were shown.
    assert (teacher.perplexity or 0) < (student.perplexity or 0) < (control.perplexity or 0) < WORDS
    assert (student.teacher_agreement or 0) > 0.5
    assert 0 < (teacher.ece or 0) < 0.3
    assert ledger.sentences[1].startswith("Whether distillation helped cannot be told: perplexity")  # of one seed
    assert "next token is the teacher's" in ledger.sentences[1]
    assert "perplexity" in (folder / "runs" / "counting" / "report.html").read_text()
    with pytest.raises(
        UsageError, match=r"no causal language model of transformers; edgekd export .*students/ARM-SEED"
    ):
        export_stage(work, SilentProgress())
    (written,) = export_external(str(work.folder.arm("kd", 0)), ["onnx"], ["fp32"], folder / "files", SilentProgress())
    assert load_artifact(written).parity.status == "passed"


def test_the_check_says_how_many_tokens_count_and_what_the_cache_takes(folder: Path) -> None:
    facts = check_workspace(Workspace(load_recipe(folder / "edgekd.toml")))

    assert "sampled50" in facts["teacher cache"]
    assert facts["tokens that count"].startswith("train ")
    assert facts["files"].startswith("none, edgekd run stops after distill: files of language models keep keys")


def test_a_student_of_another_vocabulary_is_refused(folder: Path) -> None:
    (folder / "edgekd.toml").write_text(RECIPE.replace("mine:student", "mine:narrow"))
    work = Workspace(load_recipe(folder / "edgekd.toml"))

    with pytest.raises(DataError, match=r"\(21, 12, 7\).*\(batch, 12, 40\)"):
        check_workspace(work)


@pytest.mark.parametrize(
    ("changed", "to", "message"),
    [
        ("temperature = 1.0", "temperature = 2.0", "teacher.codec: 'sampled50' keeps draws alone, and kd: draws are"),
        ('"kd"', '"reverse_kl"', "reverse_kl is not linear"),
        ('"text:test.txt"', '"text:none.txt"', "data.test: no 'none.txt'"),
        ('"tokenizer.json"', '"none.json"', "data.tokens.tokenizer: no file 'none.json'"),
        ("[data.tokens]", "[data.text]\nmax_length = 3", "text needs \\[data.tokens\\]"),
    ],
)
def test_what_does_not_go_with_tokens_is_said_before_anything_runs(
    folder: Path, changed: str, to: str, message: str
) -> None:
    assert changed in RECIPE
    (folder / "edgekd.toml").write_text(RECIPE.replace(changed, to))

    with pytest.raises(RecipeError, match=message):
        load_recipe(folder / "edgekd.toml")


def test_the_codec_left_out_is_draws_where_they_serve_every_arm_else_the_largest(folder: Path) -> None:
    text = RECIPE.replace('codec = "sampled50"\n', "")
    for arms, temperature, codec in (("kd", 1.0, "sampled50"), ("kd", 2.0, "top50"), ("dist", 1.0, "dense-f16")):
        (folder / "edgekd.toml").write_text(
            text.replace('"kd"', f'"{arms}"').replace("temperature = 1.0", f"temperature = {temperature}")
        )
        assert load_recipe(folder / "edgekd.toml").codec(49_152, positions=12) == codec


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "w1 w2"}\n{"words": 1}\n', "line 2 has neither 'text' nor 'prompt' and 'completion'; it has words"),
        ('{"text": "w1"\n', "line 1 is not JSON"),
        ('{"prompt": "w1", "completion": ""}\n', None),
        ('{"text": ""}\n', "has no position whose next token counts"),
    ],
)
def test_rows_that_are_no_text_are_said(folder: Path, content: str, message: str | None) -> None:
    (folder / "train.jsonl").write_text(content + '{"text": ""}\n' * 3)
    if message is None:  # an empty completion still ends: its end token counts
        content += "".join(f'{{"prompt": "w{word}", "completion": ""}}\n' for word in range(2, 32))
        (folder / "train.jsonl").write_text(content)
        splits = Workspace(load_recipe(folder / "edgekd.toml")).splits
        assert splits.train.labels is not None
        assert (splits.train.labels >= 0).sum() == len(splits.train)
        return
    with pytest.raises(DataError, match=message):
        _ = Workspace(load_recipe(folder / "edgekd.toml")).splits

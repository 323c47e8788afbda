"""A recipe of windows, the whole way: a student with caches in files, judged, timed token by token, told of."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgekd import plugins
from edgekd.benchmarks.distill import found
from edgekd.benchmarks.distill_page import results_tables
from edgekd.distillation.perplexity import judge_student
from edgekd.errors import UsageError
from edgekd.exporting.generation import ProgramDecoder, generate
from edgekd.measurement import DeviceStatus, Measurement, Plan
from edgekd.profiles import load_device
from edgekd.programs.student_files import load_student
from edgekd.protocols import Side
from edgekd.recipes.reading import load_recipe
from edgekd.reporting.summary import write_report
from edgekd.stages.bench import bench_stage
from edgekd.stages.check import check_workspace
from edgekd.stages.pipeline import capture_stage, compress_stage, distill_stage, export_stage
from edgekd.stages.proofs import proof_of
from edgekd.stages.verify import verify_artifacts
from edgekd.stages.workspace import Workspace
from edgekd.store import load_artifact, read_json, write_json
from edgekd.teachers.language_student import trained_decoder
from edgekd.types import Artifact, Json

from elsewhere import check_turns
from listening import Listening

transformers = pytest.importorskip("transformers")
pytest.importorskip("tokenizers")
pytest.importorskip("onnxruntime")

WORDS, LENGTH, CONTEXT = 40, 12, 24

CODE = f"""
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

class Logits(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask):
        return self.model(input_ids=input_ids, attention_mask=attention_mask).logits

def student():
    config = LlamaConfig(vocab_size={WORDS}, hidden_size=32, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=32, num_hidden_layers=1, max_position_embeddings=64, tie_word_embeddings=True)
    config.use_cache = False
    return Logits(LlamaForCausalLM(config))

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
"""

RECIPE = f"""
name = "counting"

[data]
train = "jsonl:train.jsonl"
test = "text:test.txt"
validation_share = 0.15

[data.tokens]
tokenizer = "tokenizer.json"
length = {LENGTH}
end = "end"

[teacher]
model = "mine:teacher"

[student]
model = "mine:student"

[distill]
arms = ["kd"]
epochs = 4
batch_size = 8
learning_rate = 1e-2
temperature = 1.0
threads = 1

[export]
targets = ["onnx"]
precisions = ["fp32"]
context = {CONTEXT}
accuracy_samples = 100

[bench]
blocks = 2
warmup_s = 0.01
min_s = 0.01
prompt_tokens = 5
new_tokens = 7
"""


def story(random: np.random.Generator, words: int) -> str:
    steps = 1 + (random.random(words) < np.exp(1) / (np.exp(1) + np.exp(2)))
    return " ".join(f"w{word}" for word in np.cumsum(steps) % (WORDS - 2))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import tokenizers

    folder = tmp_path_factory.mktemp("recipe")
    names = {"end": WORDS - 2, "?": WORDS - 1} | {f"w{number}": number for number in range(WORDS - 2)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(names, unk_token="?"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    random = np.random.default_rng(0)
    rows = [{"text": story(random, 40)} for _ in range(12)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "test.txt").write_text(story(random, 150))
    (folder / "mine.py").write_text(CODE)
    (folder / "edgekd.toml").write_text(RECIPE)
    return folder


@pytest.fixture(scope="module")
def work(folder: Path) -> Workspace:
    """The whole way, once for all who look at it."""
    work = Workspace(load_recipe(folder / "edgekd.toml"))
    capture_stage(work, Listening())
    distill_stage(work, Listening())
    export_stage(work, Listening())
    bench_stage(work, Listening())
    return work


@pytest.fixture(scope="module")
def artifacts(work: Workspace) -> dict[str, Artifact]:
    return {path.name: load_artifact(path) for path in work.folder.artifacts()}


@pytest.fixture(scope="module")
def told(work: Workspace) -> tuple[Any, Json, str]:
    """The ledger, report.json and report.html."""
    ledger = write_report(work)
    return ledger, read_json(work.folder.report_json), work.folder.report_html.read_text()


def test_the_check_says_what_the_files_will_be(folder: Path) -> None:
    facts = check_workspace(Workspace(load_recipe(folder / "edgekd.toml")))

    assert facts["files"] == f"keep keys and values; prompt and answer have {CONTEXT} tokens together"


def test_a_context_that_holds_no_window_is_said_before_hours_are_spent(folder: Path, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "train.jsonl", "test.txt", "mine.py"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    (tmp_path / "edgekd.toml").write_text(RECIPE.replace("context = 24", "context = 8"))

    with pytest.raises(UsageError, match=r"export\.context: 8 slots do not hold a window of 12"):
        check_workspace(Workspace(load_recipe(tmp_path / "edgekd.toml")))


def test_a_precision_that_has_no_caches_is_refused(work: Workspace) -> None:
    with pytest.raises(UsageError, match="onnx writes no language models with caches in w8a8; there are fp32"):
        export_stage(work, Listening(), precisions=["w8a8"])


def test_the_files_are_of_the_weights_that_were_trained(work: Workspace) -> None:
    """All positions of a window at once, and with caches: the same logits."""
    windows, _ = load_student(work.folder.arm("kd", 0))
    decoder, assets = load_student(work.folder.decoder)
    test, cache = work.splits.test, work.cache("test")
    one, other = judge_student(windows, test, cache), judge_student(decoder, test, cache)

    assert decoder.card.decoder is not None
    assert (decoder.card.decoder.context, decoder.card.decoder.end_tokens) == (CONTEXT, (WORDS - 2,))
    assert decoder.card.lineage == windows.card.lineage
    assert list(assets) == ["tokenizer.json"]
    assert other.perplexity == pytest.approx(one.perplexity, rel=1e-5)
    assert other.teacher_agreement == one.teacher_agreement
    assert (one.perplexity or 0) < WORDS / 2  # it has learned something, which fresh weights have not


def test_a_file_is_proven_by_its_answers_and_judged_token_by_token(
    work: Workspace, artifacts: dict[str, Artifact]
) -> None:
    fp32, judged = artifacts["onnx-fp32"], proof_of(work).windows
    assert judged is not None
    wanted = judge_student(load_student(work.folder.decoder)[0], judged.split, judged.cache)

    assert list(artifacts) == ["onnx-fp32"]
    assert wanted.samples == 108  # whole windows: nine of twelve tokens
    assert fp32.perplexity == pytest.approx(wanted.perplexity, rel=1e-4)
    assert fp32.accuracy == pytest.approx(wanted.accuracy)
    assert fp32.teacher_agreement == pytest.approx(wanted.teacher_agreement)
    assert fp32.parity.status == "passed"
    assert fp32.parity.generation is not None
    assert (fp32.parity.generation.prompts, fp32.parity.generation.same) == (4, 4)
    assert fp32.notes == ("judged on 108 of the 150 next tokens of the test split",)
    assert (work.folder.artifact("onnx", "fp32") / "tokenizer.json").is_file()


def test_unchanged_files_are_not_written_again_and_prove_themselves_again(work: Workspace) -> None:
    said = Listening()
    export_stage(work, said)
    bench_stage(work, said)

    assert said.lines == [
        "decoder: unchanged, not done again",
        "export-onnx-fp32: unchanged, not done again",
        "bench-host: unchanged, not done again",
    ]
    assert [artifact.parity.status for artifact in verify_artifacts(work, Listening())] == ["passed"]


def test_answers_are_timed_to_their_first_token_and_token_by_token(work: Workspace) -> None:
    stats = plugins.load_module("edgekd.benchmarks.stats")
    for path in sorted(work.folder.path.glob("measurements/host/*.json")):
        measured = Measurement.from_json(read_json(path))
        summary = stats.summarize(measured)
        assert (measured.plan.prompt_tokens, measured.plan.new_tokens) == (5, 7)
        assert [len(block.first_token_ms) >= 5 for block in measured.blocks] == [True, True]
        # An answer of 7 tokens is a first one and 6 more, so answers and further tokens go together.
        assert all(len(b.first_token_ms) >= -(-len(b.latency_ms) // 6) for b in measured.blocks)
        assert summary.tokens_per_second == pytest.approx(1e3 / summary.p50_ms)
        assert summary.first_token_ms == stats.first_token_ms(measured) > 0
        assert "few_blocks" in measured.flags


def test_the_report_tells_perplexity_first_token_and_tokens_a_second(
    told: tuple[Any, Json, str], artifacts: dict[str, Artifact]
) -> None:
    ledger, content, page = told
    rows = [row for row in ledger.rows if row.stage == "artifact"]
    entries = plugins.load_module("edgekd.benchmarks.history")

    student = next(row for row in ledger.rows if row.stage == "student")
    assert {row.parameters for row in rows} == {student.parameters}, "tied weights count once"
    assert all(row.macs and student.macs and 0.5 < row.macs / student.macs < 2 for row in rows), "of a token"
    assert [row.perplexity for row in rows] == [artifacts[row.name].perplexity for row in rows]
    assert all(row.tokens_per_second and row.first_token_ms and row.prompt_tokens == 5 for row in rows)
    assert all(m["summary"]["tokens_per_second"] for m in content["measurements"])
    assert "tokens/s" in page
    assert "answers of 18 tokens are the program" in page  # what a prompt of 6 leaves of the context
    if entries.is_available():
        store = entries.History()
        lines = plugins.load_module("edgekd.benchmarks.history_page").lines(store.entries("counting"))
        store.close()
        assert any("first token" in line and "tokens/s" in line for line in lines)


def test_the_benchmark_of_distillation_tells_perplexities_beside_the_control(work: Workspace, tmp_path: Path) -> None:
    task = found("brown", work, {"kd, seed 0": {"cpu_hours": 0.01}}, {})
    write_json(tmp_path / "distill.json", {"tasks": {"tiny": task}})
    told = results_tables(tmp_path)

    kd, control = task["arms"]["kd"]["0"], task["arms"]["control"]["0"]
    assert task["best"] == "kd"
    assert task["gains"]["kd"]["ratio"] == pytest.approx(kd["perplexity"] / control["perplexity"], rel=1e-3)
    assert task["gains"]["kd"]["low"] is None, "one seed"
    assert task["bar"]["met"] is None
    assert f"| kd (best) | {kd['perplexity']:.1f}, one seed | {task['gains']['kd']['ratio']:.3f}× |" in told
    assert "36 s a seed |" in told
    assert f"by perplexity: {task['gains']['kd']['ratio']:.3f}× the control's |" in told
    assert "- **torchdistill**: not beside tiny." in told


def test_two_files_take_turns_and_answer_alike(work: Workspace, artifacts: dict[str, Artifact]) -> None:
    """As a comparison measures them."""
    cells = plugins.load_module("edgekd.benchmarks.cells")
    prompt = {"tokens": proof_of(work).samples["tokens"][:1]}
    sides = [Side(artifacts["onnx-fp32"], work.folder.artifact("onnx", "fp32"), prompt)] * 2
    plan = Plan(warmup_s=0.0, warmup_runs=1, min_runs=20, min_s=0.0, prompt_tokens=6, new_tokens=8)
    found = load_device("host").run_in_turns(sides, plan, seed=0)  # type: ignore[attr-defined]
    reference = ProgramDecoder(load_student(work.folder.decoder)[0])

    assert [outputs["tokens"].shape for _, outputs in found] == [(1, 8), (1, 8)]
    for _, outputs in found:
        assert outputs["tokens"][0].tolist() == generate(reference, prompt["tokens"][0].tolist(), 8)
    assert all(cells.value_of(block, "first_token") > 0 for block, _ in found)
    assert check_turns([block for block, _ in found], plan) > 0


def test_a_prompt_that_leaves_no_room_for_an_answer_is_refused(work: Workspace, artifacts: dict[str, Artifact]) -> None:
    prompts = {"tokens": np.zeros((1, CONTEXT - 3), np.int32)}
    plan = Plan(blocks=1, prompt_tokens=CONTEXT - 3, new_tokens=4)
    folder = work.folder.artifact("onnx", "fp32")

    with pytest.raises(
        UsageError, match=r"21 tokens of prompt and 4 new ones were asked for; model\.onnx holds 24 together"
    ):
        load_device("host").run(artifacts["onnx-fp32"], folder, prompts, plan)


def test_a_device_that_decodes_nothing_says_so(artifacts: dict[str, Artifact]) -> None:
    session = plugins.load_module("edgekd.benchmarks.session")
    status = DeviceStatus(reachable=True, targets=("onnx",))

    assert session.why_not_run(artifacts["onnx-fp32"], "phone", status) == (
        "phone runs language models with caches of no target; not of onnx"
    )


def test_a_changed_student_is_trained_again(work: Workspace, tmp_path: Path) -> None:
    changed = CODE.replace("hidden_size=32", "hidden_size=16")
    assert changed != CODE
    for name in ("tokenizer.json", "train.jsonl", "test.txt"):
        (tmp_path / name).write_bytes((work.recipe.folder / name).read_bytes())
    (tmp_path / "mine.py").write_text(changed)
    (tmp_path / "edgekd.toml").write_text(RECIPE)

    with pytest.raises(UsageError, match="holds other weights than 'mine:student'"):
        trained_decoder(Workspace(load_recipe(tmp_path / "edgekd.toml")), work.folder.arm("kd", 0))


def test_a_language_model_is_compressed_to_what_its_files_take(work: Workspace) -> None:
    with pytest.raises(UsageError, match="compressed to w8; w8a8 was asked"):
        compress_stage(work, Listening(), ["w8a8"])


def test_tied_weights_stay_one(work: Workspace) -> None:
    decoder, _ = load_student(work.folder.decoder)
    tables = [t for t in decoder.program.state_dict.values() if t.shape == torch.Size([WORDS, 32])]

    assert len({t.data_ptr() for t in tables}) == 1


@pytest.mark.slow
def test_files_of_fewer_bits_are_told_beside_fp32(work: Workspace) -> None:
    export_stage(work, Listening(), precisions=["w8", "w8d8"])
    bench_stage(work, Listening(), force=True)
    ledger = write_report(work)
    found = {path.name: load_artifact(path) for path in work.folder.artifacts()}
    fp32 = found["onnx-fp32"].perplexity

    assert list(found) == ["onnx-fp32", "onnx-w8", "onnx-w8d8"]
    for name in ("onnx-w8", "onnx-w8d8"):
        assert found[name].perplexity == pytest.approx(fp32, rel=0.05)
        assert found[name].perplexity != fp32
    assert any("onnx w8 against fp32" in line and "perplexity" in line for line in ledger.sentences)

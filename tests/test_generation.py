"""Language models with caches: the program beside transformers' own generation, and each file beside the program."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgekd import plugins
from edgekd.compression.compress import compress
from edgekd.console import SilentProgress
from edgekd.errors import DataError, DeviceError, ModelFileError, UsageError
from edgekd.exporting.export import Proof, export_student
from edgekd.exporting.external import export_external, language_model
from edgekd.exporting.generation import ProgramDecoder, Sampling, generate, prove_generation, tell
from edgekd.measurement import Plan
from edgekd.profiles import load_device
from edgekd.programs.decoder import decoder_program, last_token
from edgekd.programs.models import output_specs
from edgekd.programs.student_files import load_student, save_student
from edgekd.protocols import Decoding
from edgekd.store import load_artifact
from edgekd.types import Artifact, Student

transformers = pytest.importorskip("transformers")

CONTEXT, VOCABULARY, ANSWER = 72, 512, 64


def _model(architecture: str = "Llama", **more: Any) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{architecture}Config")(
        vocab_size=VOCABULARY,
        hidden_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=128,
        max_position_embeddings=128,
        initializer_range=0.2,
        **({"num_hidden_layers": 2, "tie_word_embeddings": True} | more),
    )
    return getattr(transformers, f"{architecture}ForCausalLM")(config).eval()


@pytest.fixture(scope="module")
def model() -> Any:
    return _model()


@pytest.fixture(scope="module")
def student(model: Any) -> Student:
    return language_model(model, Path("none"), CONTEXT)[0]


@pytest.fixture(scope="module")
def shallow() -> Student:
    """Of one layer: where nothing is asked of the second, half the time to trace and translate."""
    return language_model(_model(num_hidden_layers=1), Path("none"), CONTEXT)[0]


@pytest.fixture(scope="module")
def folder(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As transformers saves it, with a tokenizer."""
    tokenizers = pytest.importorskip("tokenizers")
    folder: Path = tmp_path_factory.mktemp("transformers")
    model.save_pretrained(folder)
    names = {"[UNK]": 0, "of": 1, "the": 2, "and": 3}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(names, unk_token="[UNK]"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def exported(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder as an ONNX artifact in fp32: one for all who look at it."""
    _need("onnx")
    out = tmp_path_factory.mktemp("out")
    (found,) = export_external(f"hf:{folder}", ["onnx"], ["fp32"], out, SilentProgress(), max_length=CONTEXT)
    return found


PROMPTS = np.random.default_rng(1).integers(0, VOCABULARY, (3, 7)).astype(np.int32)


def _answer_of(model: Any, prompt: list[int], new_tokens: int) -> list[int]:
    """By transformers, with its own cache."""
    model.generation_config.eos_token_id = None
    found = model.generate(torch.tensor([prompt]), max_new_tokens=new_tokens, do_sample=False, pad_token_id=0)
    return list(found[0, len(prompt) :].tolist())


@pytest.mark.parametrize("architecture", ["Llama", "Qwen2", "Qwen3"])
def test_a_program_answers_as_transformers_does(architecture: str) -> None:
    more = {"head_dim": 16} if architecture == "Qwen3" else {}
    more["num_hidden_layers"] = 2 if architecture == "Llama" else 1
    found = _model(architecture, tie_word_embeddings=False, **more)
    student = language_model(found, Path("none"), CONTEXT)[0]
    for prompt in PROMPTS.tolist():
        assert generate(ProgramDecoder(student), prompt, ANSWER) == _answer_of(found, prompt, ANSWER)


def test_a_model_is_as_it_was_after_it_was_traced(model: Any, student: Student) -> None:
    assert model.config._attn_implementation == "sdpa"
    assert type(model.model.rotary_emb).__name__ == "LlamaRotaryEmbedding"
    assert not any("forward" in vars(module) for module in model.modules())


def test_an_architecture_that_slots_do_not_serve_is_refused() -> None:
    class Odd(transformers.LlamaForCausalLM):  # type: ignore[name-defined]
        """Adds what it cannot see from a cache: how many tokens are read at once."""

        def forward(self, input_ids: Any = None, **more: Any) -> Any:
            output = super().forward(input_ids=input_ids, **more)
            output.logits = output.logits + input_ids.shape[1]
            return output

    with pytest.raises(ModelFileError, match="something else with a cache"):
        decoder_program(Odd(_model(num_hidden_layers=1).config).eval(), CONTEXT)


def test_a_context_beyond_the_model_s_is_refused(model: Any) -> None:
    with pytest.raises(UsageError, match="1000 tokens was asked for; this model takes 2 to 128"):
        decoder_program(model, 1000)


def test_a_program_stays_the_same_on_disk(shallow: Student, tmp_path: Path) -> None:
    save_student(tmp_path / "student", shallow, {})
    loaded, _ = load_student(tmp_path / "student")
    assert loaded.card == shallow.card
    prompt = PROMPTS[0].tolist()
    assert generate(ProgramDecoder(loaded), prompt, 8) == generate(ProgramDecoder(shallow), prompt, 8)


def test_the_last_token_s_logits_are_those_of_all(shallow: Student) -> None:
    short = last_token(shallow.program)
    assert output_specs(short)[0].shape == (1, 1, VOCABULARY)
    tokens, positions = torch.arange(5, dtype=torch.int32)[None], torch.arange(5, dtype=torch.int32)[None]
    caches = [torch.zeros(spec.shape) for spec in shallow.card.inputs[2:]]
    (one, *_), (every, *_) = (p.module()(tokens, positions, *caches) for p in (short, shallow.program))
    torch.testing.assert_close(one[0, -1], every[0, -1])


def test_sampling_repeats_itself_by_its_seed_and_keeps_to_the_likeliest(student: Student) -> None:
    prompt = PROMPTS[0].tolist()

    def answer(**how: Any) -> list[int]:
        return generate(ProgramDecoder(student), prompt, 32, Sampling(**how))

    assert answer(temperature=2.0, seed=3) == answer(temperature=2.0, seed=3)
    assert answer(temperature=2.0, seed=3) != answer(temperature=2.0, seed=4)
    assert answer(temperature=5.0, top_k=1, seed=3) == answer()


def test_an_end_token_ends_an_answer(student: Student) -> None:
    whole = generate(ProgramDecoder(student), [1, 2, 3], 32)
    end = whole[5]
    assert generate(ProgramDecoder(student), [1, 2, 3], 32, end_tokens=[end]) == whole[: whole.index(end) + 1]


def test_more_tokens_than_the_context_are_refused(student: Student) -> None:
    with pytest.raises(DataError, match=f"{CONTEXT} together"):
        generate(ProgramDecoder(student), [1] * CONTEXT, 1)


def _need(target: str) -> Any:
    exporter = plugins.load_exporter(target)
    if absent := plugins.missing(exporter.requires):
        pytest.skip(f"{', '.join(absent)} not installed")
    return exporter


def test_a_folder_of_a_language_model_is_exported_with_its_tokenizer(folder: Path, exported: Path) -> None:
    artifact = load_artifact(exported)
    assert artifact.card.decoder is not None
    assert artifact.card.decoder.context == CONTEXT
    assert (exported / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    told = artifact.parity.generation
    assert told is not None
    assert (artifact.parity.status, told.same, told.first_difference, told.agreement) == ("passed", 4, None, 1.0)


FILES: dict[str, tuple[str, dict[str, Any]]] = {
    "onnx": ("fp32", {}),
    "tflite": ("fp32", {"prefill": "8"}),
    "coreml": ("fp16", {"minimum_deployment_target": "iOS18"}),
}
"""What of each target is nearest to the program."""

TARGETS = ["onnx", "tflite", pytest.param("coreml", marks=pytest.mark.slow)]


@pytest.fixture(scope="module")
def file_of(
    shallow: Student, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Student, Path]]:
    """A student and its artifact for a target: one for all who look at it."""

    @functools.cache
    def written(target: str) -> tuple[Student, Path]:
        if target == "onnx":
            return request.getfixturevalue("student"), request.getfixturevalue("exported")
        folder = tmp_path_factory.mktemp(target) / "a"
        _export(shallow, target, FILES[target][0], folder, **FILES[target][1])
        return shallow, folder

    return written


def _load(folder: Path) -> Any:
    artifact = load_artifact(folder)
    return _need(artifact.target).load(folder / artifact.path)


@pytest.mark.parametrize("target", TARGETS)
def test_a_file_gives_the_tokens_of_its_program(file_of: Callable[[str], tuple[Student, Path]], target: str) -> None:
    student, folder = file_of(target)
    runner = _load(folder)
    assert isinstance(runner, Decoding)
    assert runner.context == CONTEXT
    answers = [
        (generate(runner, prompt, ANSWER), generate(ProgramDecoder(student), prompt, ANSWER))
        for prompt in PROMPTS.tolist()  # one after the other: nothing of an answer may be left for the next
    ]
    same = [file == program for file, program in answers]
    assert sum(same) >= (2 if target == "coreml" else 3)  # half precision decides a near tie the other way


@pytest.mark.parametrize("target", TARGETS)
def test_a_prompt_in_parts_is_the_same_prompt(file_of: Callable[[str], tuple[Student, Path]], target: str) -> None:
    runner = _load(file_of(target)[1])
    prompt = np.random.default_rng(2).integers(0, VOCABULARY, CONTEXT).tolist()
    whole = runner.read(prompt, 0)
    for start, end in ((0, 1), (1, 31), (31, CONTEXT - 3), (CONTEXT - 3, CONTEXT)):  # the last ones leave no room
        parts = runner.read(prompt[start:end], start)
    np.testing.assert_allclose(parts, whole, atol=5e-2 if target == "coreml" else 1e-4)
    with pytest.raises(DataError, match=f"2 tokens from position {CONTEXT - 1}; the caches hold {CONTEXT}"):
        runner.read([1, 2], CONTEXT - 1)


@pytest.mark.parametrize("target", ["onnx", "tflite"])
@pytest.mark.parametrize("prompt_tokens", [1, 7, 21])  # a signature reads 8: less than one, one, several
def test_a_device_times_the_answers_of_the_program(
    file_of: Callable[[str], tuple[Student, Path]], target: str, prompt_tokens: int
) -> None:
    student, folder = file_of(target)
    prompts = np.random.default_rng(3).integers(0, VOCABULARY, (2, prompt_tokens)).astype(np.int32)
    plan = Plan(warmup_s=0.0, warmup_runs=1, min_runs=20, min_s=0.0, prompt_tokens=prompt_tokens, new_tokens=12)
    host = load_device("host")
    assert target in host.probe().decodes
    artifact = load_artifact(folder)
    inputs = plugins.load_module("edgekd.benchmarks.session").inputs_of(artifact, {"tokens": prompts})
    (block,), outputs = host.run(artifact, folder, inputs, replace(plan, blocks=1))

    wanted = [generate(ProgramDecoder(student), prompt, 12) for prompt in prompts.tolist()]
    assert outputs["tokens"].tolist() == wanted
    assert len(block.latency_ms) == 20
    assert len(block.first_token_ms) >= 5
    assert min(*block.latency_ms, *block.first_token_ms) > 0


def test_a_damaged_tflite_file_of_a_language_model_is_one_line(
    file_of: Callable[[str], tuple[Student, Path]], tmp_path: Path
) -> None:
    _, folder = file_of("tflite")
    artifact = load_artifact(folder)
    (tmp_path / artifact.path).write_bytes((folder / artifact.path).read_bytes()[:20_000])
    plan = Plan(blocks=1, prompt_tokens=7, new_tokens=12)
    # Where the file is cut decides whether LiteRT says so or ends the process.
    said = r"ai_edge_litert\.compiled_model cannot load .*model\.tflite: .+|process was ended by SIGSEGV"
    with pytest.raises(DeviceError, match=said):
        load_device("host").run(artifact, tmp_path, {"tokens": PROMPTS}, plan)


def test_a_tflite_file_has_its_weights_once_and_the_signatures_of_litert_lm(
    file_of: Callable[[str], tuple[Student, Path]],
) -> None:
    student, folder = file_of("tflite")
    from ai_edge_litert.interpreter import Interpreter

    found = Interpreter(str(folder / "model.tflite")).get_signature_list()
    caches = ["kv_cache_k_0", "kv_cache_v_0"]
    assert set(found) == {"prefill_8", "decode"}
    for name, signature in found.items():
        assert sorted(signature["inputs"]) == sorted([*caches, "input_pos", "tokens"])
        assert sorted(signature["outputs"]) == sorted(caches + (["logits"] if name == "decode" else []))
    assert (folder / "model.tflite").stat().st_size < 1.3 * 4 * student.card.parameters


@pytest.mark.slow
def test_a_core_ml_package_keeps_its_caches_as_states(file_of: Callable[[str], tuple[Student, Path]]) -> None:
    _, folder = file_of("coreml")
    from edgekd.exporters.coreml import load

    program = load(folder / "model.mlpackage")
    assert set(program.states) == {"kv_cache_k_0", "kv_cache_v_0"}
    assert [spec.name for spec in program.inputs] == ["tokens", "input_pos"]
    assert [spec.name for spec in program.outputs] == ["logits"]
    operators = [step.operator.name for step in program.steps]
    assert operators.count("slice_update") == operators.count("write_state") == 2
    assert "scatter" not in " ".join(operators)


@pytest.mark.slow
@pytest.mark.parametrize(("target", "options"), [("tflite", {"prefill": "4,16"}), ("coreml", {"length": "1,4,16"})])
def test_layers_and_lengths_are_not_mixed_up(
    student: Student, tmp_path: Path, target: str, options: dict[str, Any]
) -> None:
    precision, told = FILES[target]
    artifact = _export(student, target, precision, tmp_path / "a", **told | options)
    assert artifact.parity.generation is not None
    assert artifact.parity.generation.agreement >= (1.0 if target == "tflite" else 0.95)
    runner = _load(tmp_path / "a")
    prompt = np.random.default_rng(2).integers(0, VOCABULARY, 40).tolist()
    whole = ProgramDecoder(student).read(prompt, 0)
    np.testing.assert_allclose(runner.read(prompt, 0), whole, atol=0.3 if target == "coreml" else 1e-4)


def _export(student: Student, target: str, precision: str, folder: Path, **options: Any) -> Artifact:
    exporter = _need(target)
    source = compress(student, exporter.precisions[precision].source, None)
    told = exporter.options(**options)
    return export_student(source, {}, target, precision, folder, Proof({"tokens": PROMPTS}), options=told)


@pytest.mark.parametrize(
    ("target", "precision"),
    [
        ("onnx", "fp16"),
        ("onnx", "w8d8"),
        pytest.param("tflite", "fp16", marks=pytest.mark.slow),
        pytest.param("tflite", "w8", marks=pytest.mark.slow),
        pytest.param("tflite", "w8d8", marks=pytest.mark.slow),
    ],
)
def test_a_file_of_fewer_bits_says_where_its_answers_part(
    shallow: Student, tmp_path: Path, target: str, precision: str
) -> None:
    artifact = _export(shallow, target, precision, tmp_path / "a")
    told = load_artifact(tmp_path / "a").parity.generation
    assert told is not None
    assert told == artifact.parity.generation
    assert (told.first_difference is None) == (told.same == 3) == (told.agreement == 1.0)
    assert told.agreement > 0.7


def _rounded(weight: torch.Tensor, symmetric: bool) -> torch.Tensor:
    """4 bits for each 32 numbers of a row, by the formula: from smallest to largest, or as far to both sides."""
    blocks = weight.reshape(len(weight), -1, 32)
    if symmetric:
        scale = (blocks.abs().amax(-1, keepdim=True) / 7).half().float()
        return ((blocks / scale).round().clamp(-8, 7) * scale).reshape(weight.shape)
    low, high = blocks.amin(-1, keepdim=True).clamp(max=0), blocks.amax(-1, keepdim=True).clamp(min=0)
    scale = (high - low) / 15
    zero = (-low / scale).round()
    return (((blocks / scale).round() + zero).clamp(0, 15).sub(zero) * scale).reshape(weight.shape)


@pytest.mark.parametrize(
    ("target", "precision", "nearest"),
    [
        ("onnx", "w4", 0.99999),
        pytest.param("tflite", "w4d8", 0.99, marks=pytest.mark.slow),  # activations are in 8 bits as well
    ],
)
def test_what_four_bits_lose_is_what_the_weights_lose(
    shallow: Student, tmp_path: Path, target: str, precision: str, nearest: float
) -> None:
    """Random weights lose so much in 4 bits that the proof fails; the file is still exactly the rounded model."""
    exporter = _need(target)
    exporter.write(shallow, tmp_path / "file", precision, exporter.options())
    rounded = _model(num_hidden_layers=1)
    with torch.no_grad():
        for parameter in rounded.parameters():
            if parameter.ndim == 2:  # a table that embeds and multiplies is one parameter
                parameter.copy_(_rounded(parameter, symmetric=target == "tflite"))
    decoders = [ProgramDecoder(shallow), ProgramDecoder(language_model(rounded, Path("none"), CONTEXT)[0])]
    answer = tell(decoders[0], PROMPTS[0].tolist()).answer
    plain, wanted, found = (
        tell(decoder, PROMPTS[0].tolist(), answer).logits.ravel()
        for decoder in (*decoders, exporter.load(tmp_path / "file"))
    )

    def cosine(one: np.ndarray, other: np.ndarray) -> float:
        return float(one @ other / np.linalg.norm(one) / np.linalg.norm(other))

    assert cosine(found, wanted) > nearest
    assert cosine(plain, wanted) < 0.95


@pytest.mark.parametrize(
    ("target", "options", "said"),
    [
        ("tflite", {"prefill": "100"}, "prefill=100, but a signature reads a fixed number of tokens, 2 to 72"),
        ("tflite", {"batch": "4"}, "only prefill can be set"),
        ("coreml", {}, "a language model with caches needs iOS18; minimum_deployment_target is iOS17"),
        ("coreml", {"minimum_deployment_target": "iOS18", "length": "8,64"}, "and 1 must be among them"),
        ("coreml", {"minimum_deployment_target": "iOS18", "classifier": True}, "are not for a language model"),
    ],
)
def test_options_that_caches_do_not_go_with_are_refused(
    shallow: Student, tmp_path: Path, target: str, options: dict[str, Any], said: str
) -> None:
    exporter = _need(target)
    with pytest.raises(UsageError, match=said):
        exporter.write(shallow, tmp_path / "model", FILES[target][0], exporter.options(**options))


def test_another_model_s_file_fails_its_proof(shallow: Student, exported: Path) -> None:
    exporter = _need("onnx")
    runner = exporter.load(exported / load_artifact(exported).path)
    parity = prove_generation(shallow, runner, PROMPTS, exporter.precisions["fp32"].tolerance)
    assert parity.status == "failed"
    assert parity.generation is not None
    assert parity.generation.same == 0


@pytest.mark.parametrize(
    ("target", "precision", "said"),
    [
        ("ort", "fp32", "ort writes no language models with caches; there are coreml, onnx, tflite"),
        ("onnx", "w8a8", "in w8a8; there are"),
        ("coreml", "fp32", "in fp32; there are fp16"),
    ],
)
def test_what_a_target_does_not_write_with_caches_is_said(
    folder: Path, target: str, precision: str, said: str, tmp_path: Path
) -> None:
    _need(target)
    with pytest.raises(UsageError, match=said):
        export_external(f"hf:{folder}", [target], [precision], tmp_path / "out", SilentProgress(), max_length=CONTEXT)
    assert not (tmp_path / "out").exists()

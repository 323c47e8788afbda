"""Teachers and students by reference: every prefix, on real files."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from edgekd.errors import DataError, ModelFileError, UsageError
from edgekd.plugins import load_exporter
from edgekd.programs.hugging_face import hugging_face_example, hugging_face_module
from edgekd.programs.models import program_bytes
from edgekd.teachers.sources import load_student_module, load_teacher
from edgekd.types import Student


@pytest.fixture
def images() -> dict[str, np.ndarray]:
    return {"image": np.random.default_rng(0).normal(size=(7, 1, 12, 12)).astype(np.float32)}


@pytest.fixture
def expected(images: dict[str, np.ndarray], small_convnet: nn.Module) -> np.ndarray:
    with torch.no_grad():
        return small_convnet(torch.from_numpy(images["image"])).numpy()


def test_a_program_is_a_teacher(
    tmp_path: Path, images: dict[str, np.ndarray], expected: np.ndarray, convnet_student: Student
) -> None:
    (tmp_path / "t.pt2").write_bytes(program_bytes(convnet_student.program))
    teacher = load_teacher("pt2:t.pt2", tmp_path, images)

    np.testing.assert_allclose(teacher.logits(images), expected, atol=1e-5)
    assert teacher.macs is not None


def test_an_onnx_file_is_a_teacher(
    tmp_path: Path, images: dict[str, np.ndarray], expected: np.ndarray, convnet_student: Student
) -> None:
    pytest.importorskip("onnxruntime")
    exporter = load_exporter("onnx")
    exporter.write(convnet_student, tmp_path / "t.onnx", "fp32", exporter.options())
    teacher = load_teacher("onnx:t.onnx", tmp_path, images)

    np.testing.assert_allclose(teacher.logits(images), expected, atol=1e-4)
    assert teacher.parameters is not None
    assert teacher.parameters > 0
    assert teacher.macs is None


def test_a_function_is_a_teacher_and_its_weights_are_its_fingerprint(
    tmp_path: Path, images: dict[str, np.ndarray]
) -> None:
    (tmp_path / "mine.py").write_text(
        "import torch\nfrom torch import nn\n"
        "def teacher(seed=0):\n"
        "    torch.manual_seed(seed)\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(144, 3))\n"
        "def other():\n    return teacher(1)\n"
        "def wrong():\n    return 3\n"
        "def flat():\n    return nn.Flatten(0)\n"
    )
    one, again, other = (load_teacher(f"mine:{n}", tmp_path, images) for n in ("teacher", "teacher", "other"))

    assert one.fingerprint == again.fingerprint != other.fingerprint
    assert one.logits(images).shape == (7, 3)
    with pytest.raises(DataError, match=r"returned int; a torch\.nn\.Module works"):
        load_teacher("mine:wrong", tmp_path, images)
    with pytest.raises(DataError, match=r"logits of \(batch, classes\) are needed"):
        load_teacher("mine:flat", tmp_path, images).logits(images)


def test_the_same_seed_starts_the_same_student(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("from torch import nn\ndef student():\n    return nn.Linear(3, 2)\n")
    weights = [load_student_module("mine:student", tmp_path, seed).weight for seed in (0, 0, 1)]

    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_an_onnx_file_is_no_student(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be trained"):
        load_student_module("onnx:x.onnx", tmp_path, 0)


def _save_bert(folder: Path, kind: str, safe: bool = True) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("optimum.exporters.tasks")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, num_labels=4
    )
    model = getattr(transformers, kind)(config).eval()
    model.save_pretrained(folder, safe_serialization=safe)
    return model


@pytest.mark.parametrize("kind", ["BertForSequenceClassification", "BertModel"])
def test_a_transformers_folder_of_text_is_found_by_its_task(tmp_path: Path, kind: str) -> None:
    model = _save_bert(tmp_path / "m", kind)
    module = hugging_face_module(tmp_path / "m")
    ids, mask = hugging_face_example(tmp_path / "m", module, 6)
    output = module(ids, mask)
    reference = model(input_ids=ids, attention_mask=mask)
    expected = reference.logits if kind.endswith("Classification") else reference.last_hidden_state

    assert ids.dtype == torch.int32
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-4)


def _save_llama(folder: Path) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("optimum.exporters.tasks")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=32, tie_word_embeddings=True,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    model.save_pretrained(folder)
    return model


def test_a_causal_language_model_gives_the_next_token_at_each_position_whatever_pads_the_end(tmp_path: Path) -> None:
    model = _save_llama(tmp_path / "m")
    ids = np.arange(14, dtype=np.int32).reshape(2, 7)
    mask = np.ones_like(ids)
    mask[1, 4:] = 0
    teacher = load_teacher("hf:m", tmp_path, {"input_ids": ids, "attention_mask": mask})
    found = teacher.logits({"input_ids": ids, "attention_mask": mask})
    expected = model(input_ids=torch.from_numpy(ids[1:, :4]).long()).logits.detach()

    assert found.shape == (2, 7, 50)
    assert teacher.parameters is not None
    assert teacher.size_bytes < teacher.parameters * 4 + 200  # the table that input and output share lies there once
    np.testing.assert_allclose(found[1:, :4], expected, atol=1e-5)


def test_a_transformers_folder_of_images_is_found_by_its_task(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("optimum.exporters.tasks")
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=16, patch_size=8,
        num_labels=3,
    )  # fmt: skip
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path / "m")
    module = hugging_face_module(tmp_path / "m")
    (image,) = hugging_face_example(tmp_path / "m", module, 1)

    assert image.shape == (1, 3, 16, 16)
    assert module(image).shape == (1, 3)


def test_a_transformers_folder_is_a_teacher(tmp_path: Path) -> None:
    _save_bert(tmp_path / "m", "BertForSequenceClassification")
    ids = np.ones((5, 6), np.int32)
    teacher = load_teacher("hf:m", tmp_path, {"input_ids": ids, "attention_mask": ids})

    assert teacher.logits({"input_ids": ids, "attention_mask": ids}).shape == (5, 4)
    assert teacher.parameters


def test_pickled_weights_of_a_transformers_folder_are_never_loaded(tmp_path: Path) -> None:
    _save_bert(tmp_path / "m", "BertForSequenceClassification", safe=False)
    assert (tmp_path / "m" / "pytorch_model.bin").is_file()

    with pytest.raises(ModelFileError, match="cannot be loaded") as caught:
        hugging_face_module(tmp_path / "m")
    assert "\n" not in str(caught.value)


def test_what_is_no_transformers_folder_says_so(tmp_path: Path) -> None:
    pytest.importorskip("optimum.exporters.tasks")
    with pytest.raises(ModelFileError, match=r"it has no config\.json"):
        hugging_face_module(tmp_path)
    _save_bert(tmp_path / "m", "BertForMaskedLM")
    with pytest.raises(ModelFileError, match="task 'fill-mask' is not supported; there are text-classification"):
        hugging_face_module(tmp_path / "m")


def test_a_function_that_is_missing_is_a_usage_error(tmp_path: Path, images: dict[str, np.ndarray]) -> None:
    with pytest.raises(UsageError, match="no module 'nobody_has_this'"):
        load_teacher("nobody_has_this:teacher", tmp_path, images)

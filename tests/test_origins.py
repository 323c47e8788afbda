"""Teachers from other toolchains, each run by its own; files that would run code are refused before anything runs."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edgekd import plugins
from edgekd.errors import DataError, ModelFileError, UsageError
from edgekd.protocols import Origin, Teaching, Trainable
from edgekd.teachers.sources import load_teacher

ORIGINS = ("blocks_of", "hf", "keras", "onnx", "openai", "pt2", "savedmodel", "timm", "torchscript", "torchvision")


def images(channels: int = 3, size: int = 32) -> dict[str, np.ndarray]:
    return {"image": np.random.default_rng(0).normal(size=(3, channels, size, size)).astype(np.float32)}


def test_a_file_is_a_prefix() -> None:
    assert set(plugins.origin_names()) >= set(ORIGINS)
    for name in (*ORIGINS, "function"):
        origin: Origin = plugins.load_origin(name)
        assert isinstance(origin, Teaching | Trainable), name
        assert origin.options.model_json_schema()["additionalProperties"] is False
    assert plugins.origin_of("keras:a.keras") == ("keras", "a.keras")
    assert plugins.origin_of("mine.models:teacher") == ("function", "mine.models:teacher")


def test_origins_import_no_toolchain_before_they_are_asked() -> None:
    code = f"""
import sys
from edgekd import plugins
for name in {ORIGINS!r}: plugins.load_origin(name)
heavy = [m for m in ("torch", "tensorflow", "keras", "timm", "torchvision", "transformers", "onnx") if m in sys.modules]
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)

    assert done.returncode == 0, done.stderr


# ── TorchScript ───────────────────────────────────────────────────────────────────────────────────────────────────────


class TwoHeads(nn.Module):
    """Logits and a hidden state."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.head = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = torch.relu(self.hidden(x))
        return self.head(hidden), hidden


class Writing(nn.Module):
    """Reads a file when it runs."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.from_file("/etc/hostname", size=1, dtype=torch.uint8) + x


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_torchscript_file_is_a_teacher_and_its_further_outputs_are_features(tmp_path: Path) -> None:
    module, x = TwoHeads().eval(), np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    torch.jit.script(module).save(tmp_path / "t.pt")
    teacher = load_teacher("torchscript:t.pt", tmp_path, {"x": x}, taps=["output 1"])
    with torch.no_grad():
        logits, hidden = module(torch.from_numpy(x))
    answer = teacher.outputs({"x": x})

    np.testing.assert_allclose(answer.logits, logits, atol=1e-6)
    np.testing.assert_allclose(answer.features["output 1"], hidden, atol=1e-6)
    assert teacher.parameters == 4 * 6 + 6 + 6 * 3 + 3
    with pytest.raises(UsageError, match=r"has no output 'head' for a feature; it has output 0, output 1"):
        load_teacher("torchscript:t.pt", tmp_path, {"x": x}, taps=["head"]).logits({"x": x})
    with pytest.raises(DataError, match=r"teacher 'torchscript:t.pt' cannot take x \(5, 3\)"):
        teacher.logits({"x": x[:, :3]})


def _with_pickle(source: Path, target: Path, name: str, content: bytes) -> None:
    """The archive with one entry's bytes replaced."""
    replaced = 0
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for item in old.namelist():
            hit = item.endswith(name)
            replaced += hit
            new.writestr(item, content if hit else old.read(item))
    assert replaced == 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("entry", ["/data.pkl", "/constants.pkl"])
def test_a_pickle_in_a_torchscript_archive_calls_nothing(tmp_path: Path, entry: str) -> None:
    torch.jit.script(TwoHeads().eval()).save(tmp_path / "good.pt")
    trap = tmp_path / "ran"
    code = f"cposix\nsystem\n(S'touch {trap}'\ntR.".encode()
    _with_pickle(tmp_path / "good.pt", tmp_path / "bad.pt", entry, code)

    with pytest.raises(ModelFileError, match=r"bad\.pt cannot be loaded as TorchScript"):
        load_teacher("torchscript:bad.pt", tmp_path, {"x": np.zeros((1, 4), np.float32)})
    assert not trap.exists()
    import pickle

    pickle.loads(code)
    assert trap.exists()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_torchscript_model_that_reads_files_is_refused(tmp_path: Path) -> None:
    torch.jit.script(Writing().eval()).save(tmp_path / "w.pt")

    with pytest.raises(ModelFileError, match="uses aten::from_file, which touches files; it is never run"):
        load_teacher("torchscript:w.pt", tmp_path, {"x": np.zeros((1, 4), np.float32)})


def test_silero_vad_loads_as_torchscript() -> None:
    pytest.importorskip("silero_vad")
    import silero_vad

    folder = Path(silero_vad.__file__).parent / "data"
    from edgekd.origins.torchscript import _loaded

    module = _loaded(folder / "silero_vad.jit")
    assert module(torch.zeros(1, 512), 16000).shape == (1, 1)


# ── ONNX ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_an_inner_tensor_of_an_onnx_file_is_a_feature(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    from onnx import TensorProto, helper, numpy_helper

    weight = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    nodes = [helper.make_node("Relu", ["x"], ["hidden"]), helper.make_node("MatMul", ["hidden", "w"], ["logits"])]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(nodes, "g", [value("x", TensorProto.FLOAT, ["n", 4])],
                              [value("logits", TensorProto.FLOAT, ["n", 3])],
                              [numpy_helper.from_array(weight, "w")])  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, tmp_path / "t.onnx")
    x = np.random.default_rng(1).normal(size=(5, 4)).astype(np.float32)
    answer = load_teacher("onnx:t.onnx", tmp_path, {"x": x}, taps=["hidden"]).outputs({"x": x})

    np.testing.assert_array_equal(answer.features["hidden"], np.maximum(x, 0))
    np.testing.assert_allclose(answer.logits, np.maximum(x, 0) @ weight, rtol=1e-5)
    with pytest.raises(UsageError, match="has no tensor 'hid' for a feature; its last are hidden, logits"):
        load_teacher("onnx:t.onnx", tmp_path, {"x": x}, taps=["hid"])


def test_weights_beside_an_onnx_file_belong_to_its_fingerprint_and_its_size(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    from onnx import TensorProto, helper, numpy_helper

    value, x, teachers = helper.make_tensor_value_info, np.ones((5, 400), np.float32), []
    for seed in (0, 1):
        weight = np.random.default_rng(seed).normal(size=(400, 3)).astype(np.float32)
        graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["logits"])], "g",
                                  [value("x", TensorProto.FLOAT, ["n", 400])],
                                  [value("logits", TensorProto.FLOAT, ["n", 3])],
                                  [numpy_helper.from_array(weight, "w")])  # fmt: skip
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
        (tmp_path / str(seed)).mkdir()
        path = tmp_path / str(seed) / "t.onnx"
        onnx.save_model(model, path, save_as_external_data=True, location="t.onnx.data", size_threshold=0)
        teachers.append(load_teacher("onnx:t.onnx", path.parent, {"x": x}))

    assert (tmp_path / "0" / "t.onnx").read_bytes() == (tmp_path / "1" / "t.onnx").read_bytes()
    assert teachers[0].fingerprint != teachers[1].fingerprint
    assert teachers[0].size_bytes > 4800
    assert teachers[0].parameters == 1200


# ── Keras and TensorFlow: in a process of their own, since Keras has one backend for life ─────────────────────────────


MAKE = """
import sys, numpy as np, keras
from keras import layers
folder = sys.argv[1]
keras.utils.set_random_seed(0)
model = keras.Sequential([keras.Input((12, 12, 3)), layers.Conv2D(4, 3, activation="relu", name="conv"),
    layers.BatchNormalization(), layers.GlobalAveragePooling2D(), layers.Dense(5, activation="softmax")])
x = np.random.default_rng(0).normal(size=(3, 12, 12, 3)).astype("float32")
model.save(folder + "/t.keras")
model.save(folder + "/t.h5")
if keras.backend.backend() == "tensorflow":
    model.export(folder + "/saved")
np.save(folder + "/expected.npy", np.asarray(model.predict_on_batch(x)))
np.save(folder + "/hidden.npy", np.asarray(keras.ops.convert_to_numpy(model.layers[0](x))))
code = keras.Sequential([keras.Input((4,)), layers.Lambda(lambda x: x * 2)])
code.save(folder + "/lambda.keras")
code.save(folder + "/lambda.h5")
"""

RUN = """
import json, sys, numpy as np
from pathlib import Path
from edgekd.teachers.sources import load_teacher
x = np.random.default_rng(0).normal(size=(3, 12, 12, 3)).astype("float32")
for reference, taps in json.loads(sys.argv[2]):
    answer = load_teacher(reference, Path(sys.argv[1]), {"image": x}, taps=taps).outputs({"image": x})
    np.testing.assert_allclose(answer.logits, np.load(sys.argv[1] + "/expected.npy"), atol=1e-5)
    for tap in taps:
        hidden = np.load(sys.argv[1] + "/hidden.npy").transpose(0, 3, 1, 2)
        np.testing.assert_allclose(answer.features[tap], hidden, atol=1e-5)
    try:
        load_teacher(reference, Path(sys.argv[1]), {"image": x}).outputs({"image": x.transpose(0, 3, 1, 2)})
    except Exception as error:
        print(type(error).__name__, error)
"""


def run(code: str, *arguments: str, backend: str) -> str:
    environment = {**os.environ, "KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "2", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def keras_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("h5py")
    if plugins.missing(("keras",)):
        pytest.skip("keras is not installed")
    folder = tmp_path_factory.mktemp("keras")
    run(MAKE, str(folder), backend="tensorflow" if not plugins.missing(("tensorflow",)) else "torch")
    return folder


def test_a_keras_file_gives_the_same_on_pytorch_as_where_it_was_made(keras_files: Path) -> None:
    asked = json.dumps([["keras:t.keras", ["conv"]], ["keras:t.h5", []]])
    said = run(RUN, str(keras_files), asked, backend="torch")

    assert said.count("DataError") == 2
    assert 'preprocessing = { layout = "NHWC" } beside the teacher\'s model would fit' in said


def test_a_saved_model_gives_what_keras_gives(keras_files: Path) -> None:
    pytest.importorskip("tensorflow")
    said = run(RUN, str(keras_files), json.dumps([["savedmodel:saved", []]]), backend="tensorflow")

    assert 'layout = "NHWC"' in said


def test_code_in_keras_files_is_refused_before_it_is_loaded(keras_files: Path, tmp_path: Path) -> None:
    for name in ("lambda.keras", "lambda.h5"):
        with pytest.raises(ModelFileError, match=r"holds code \(Lambda\), which is never run"):
            load_teacher(f"keras:{name}", keras_files, {})
    with zipfile.ZipFile(keras_files / "t.keras") as old, zipfile.ZipFile(tmp_path / "t.keras", "w") as new:
        for item in old.namelist():
            content = old.read(item)
            if item == "config.json":
                content = content.replace(b'"module": "keras.layers", "class_name": "Dense"',
                                          b'"module": "os.path", "class_name": "join"')  # fmt: skip
                assert b"os.path" in content
            new.writestr(item, content)
    with pytest.raises(ModelFileError, match=r"names os\.path\.join, which is not Keras' own and is never imported"):
        load_teacher("keras:t.keras", tmp_path, {})
    (tmp_path / "no.keras").write_text("nothing")
    with pytest.raises(ModelFileError, match=r"no\.keras is no \.keras file and no \.h5 with a model"):
        load_teacher("keras:no.keras", tmp_path, {})


READING = """
import sys, tensorflow as tf
class Reads(tf.Module):
    @tf.function(input_signature=[tf.TensorSpec((None, 4), tf.float32, name="x")])
    def __call__(self, x):
        return {"logits": x + tf.cast(tf.strings.length(tf.io.read_file("/etc/hostname")), tf.float32)}
module = Reads()
tf.saved_model.save(module, sys.argv[1], signatures=module.__call__)
"""


def test_a_saved_model_that_reads_files_is_refused(tmp_path: Path) -> None:
    if plugins.missing(("tensorflow",)):
        pytest.skip("tensorflow is not installed")
    run(READING, str(tmp_path / "reads"), backend="tensorflow")
    code = "import sys; from pathlib import Path; from edgekd.teachers.sources import load_teacher\n" \
           "try: load_teacher('savedmodel:reads', Path(sys.argv[1]), {})\n" \
           "except Exception as error: print(type(error).__name__, error)"  # fmt: skip

    assert "ModelFileError" in (said := run(code, str(tmp_path), backend="tensorflow"))
    assert "uses ReadFile: it touches files or calls Python, and is never run" in said


@pytest.mark.parametrize(
    ("reference", "fault"),
    [
        ("keras:gone.keras", "no file 'gone.keras' beside the recipe"),
        ("savedmodel:gone", "no SavedModel 'gone' beside the recipe"),
        ("torchscript:gone.pt", "no file 'gone.pt' beside the recipe"),
        ("openai:localhost#m", "'localhost#m' is not URL#model"),
        ("openai:http://localhost:1/v1", "is not URL#model"),
        ("timm:", "timm: needs the name of a model"),
        ("torchvision:", "torchvision: needs the name of a model"),
    ],
)
def test_what_cannot_be_there_is_seen_without_loading(tmp_path: Path, reference: str, fault: str) -> None:
    name, place = plugins.origin_of(reference)

    assert fault in plugins.load_origin(name).fault(place, tmp_path)

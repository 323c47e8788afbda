"""Features: losses against their formulas, pooling, projectors that learn and are left behind, and the cache."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import edgekd.distillation.train
from edgekd.console import progress_for
from edgekd.data.samples import split_from_arrays
from edgekd.data.split import Split
from edgekd.data.views import Views
from edgekd.distillation.arms import arm_inputs, objective_of
from edgekd.distillation.feature_losses import feature_cosine, feature_mse
from edgekd.distillation.features import FeatureStudent, bare_student, with_features
from edgekd.distillation.train import TrainingPlan, train
from edgekd.errors import CacheError, DataError, NumericalError, UsageError
from edgekd.programs.student_files import load_student
from edgekd.programs.tracing import export_program
from edgekd.recipes.reading import load_recipe
from edgekd.recipes.recipe_models import Feature
from edgekd.stages.pipeline import capture_stage, distill_stage
from edgekd.stages.workspace import Workspace
from edgekd.teachers.capture import capture
from edgekd.teachers.pooling import pooled
from edgekd.teachers.records import record_bytes
from edgekd.teachers.sources import load_teacher, module_fingerprint
from edgekd.teachers.taps import tapped
from edgekd.teachers.targets import codec_of
from edgekd.teachers.teacher_cache import CaptureKey, TeacherCache
from edgekd.teaching import Answer, Teacher


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_mse_is_the_formula() -> None:
    student, teacher = random(6, 3, 5), random(6, 3, 5, seed=1)
    expected = ((student.numpy() - teacher.numpy()) ** 2).mean()

    assert float(feature_mse(student, teacher)) == pytest.approx(expected, rel=1e-5)
    assert float(feature_mse(student, student)) == 0


def test_cosine_is_the_formula_and_lengths_do_not_matter() -> None:
    student, teacher = random(6, 5), random(6, 5, seed=1)
    a, b = student.numpy().astype(np.float64), teacher.numpy().astype(np.float64)
    expected = (1 - (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)).mean()

    assert float(feature_cosine(student, teacher)) == pytest.approx(expected, rel=1e-5)
    assert float(feature_cosine(3 * student, student)) == pytest.approx(0, abs=1e-6)
    assert float(feature_cosine(-student, student)) == pytest.approx(2)


@pytest.mark.parametrize("loss", [feature_mse, feature_cosine])
def test_padding_does_not_count_and_no_gradient_flows_into_the_teacher(loss: object) -> None:
    assert callable(loss)
    student, teacher = random(2, 4, 3).requires_grad_(), random(2, 4, 3, seed=1).requires_grad_()
    with torch.no_grad():
        teacher[:, 2:] = 0
    whole, short = loss(student, teacher), loss(student[:, :2], teacher[:, :2])
    whole.backward()

    assert float(whole.detach()) == pytest.approx(float(short.detach()))
    assert teacher.grad is None
    assert student.grad is not None
    assert float(student.grad[:, 2:].abs().max()) == 0


def test_shapes_that_differ_are_refused_by_the_losses() -> None:
    with pytest.raises(ValueError, match=r"student \(2, 3\) and teacher \(2, 4\) must have the same shape"):
        feature_mse(torch.zeros(2, 3), torch.zeros(2, 4))


def spec(pool: str = "none", channels: str | None = None, student: str = "1", loss: str = "mse") -> Feature:
    told = {"teacher": "0", "student": student, "pool": pool, "channels": channels, "loss": loss}
    return Feature.model_validate(told)


def test_pooling_finds_the_width_and_leaves_padding_out() -> None:
    image, text = random(2, 3, 4, 5), random(2, 4, 3)
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])

    torch.testing.assert_close(pooled(image, spec("mean")), image.mean((2, 3)))
    torch.testing.assert_close(pooled(image, spec("none")), image.flatten(2).transpose(1, 2))
    torch.testing.assert_close(pooled(image, spec("flat")), image.flatten(1))
    torch.testing.assert_close(pooled(text, spec("mean"), mask)[0], text[0, :2].mean(0))
    torch.testing.assert_close(pooled(text, spec("mean", "first")), text.mean(2))
    torch.testing.assert_close(pooled(text, spec("first")), text[:, 0])
    assert float(pooled(text, spec("none"), mask)[0, 2:].abs().max()) == 0


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 2))


def learner(widths: Sequence[int] = (6,), **told: str) -> nn.Module:
    feature = spec(**told)
    return with_features(network(), {"hint": feature}, {feature.stored: widths}, {"x": torch.zeros(3, 4)}, 7)


def test_a_projector_is_there_only_where_widths_differ() -> None:
    wider, same = learner((6,)), learner((16,))
    assert isinstance(wider, FeatureStudent)
    assert isinstance(same, FeatureStudent)

    assert wider(random(3, 4)).features["hint"].shape == (3, 6)
    assert [tuple(p.shape) for p in wider.projectors.parameters()] == [(6, 16), (6,)]
    assert list(same.projectors.parameters()) == []
    assert with_features(wider, {}, {}, {}, 0) is wider


def test_a_projector_over_positions_is_a_1x1_convolution() -> None:
    feature = Feature(teacher="0", student="0")
    student = nn.Sequential(nn.Conv2d(1, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    made = with_features(student, {"hint": feature}, {feature.stored: (4, 5)}, {"x": torch.zeros(2, 1, 4, 4)}, 0)
    assert isinstance(made, FeatureStudent)
    linear, x = made.projectors[0], random(2, 1, 4, 4)
    assert isinstance(linear, nn.Linear)
    convolved = nn.functional.conv2d(student[0](x), linear.weight[:, :, None, None], linear.bias)

    torch.testing.assert_close(made(x).features["hint"], convolved.flatten(2).transpose(1, 2))


def test_other_positions_and_unknown_modules_say_what_would_work() -> None:
    feature = Feature(teacher="0", student="0")
    with pytest.raises(DataError, match=r"student's '0' is \(4, 8\) and the teacher's '0' \(9, 8\).*pool = \"mean\""):
        with_features(nn.Sequential(nn.Conv2d(1, 8, 3)), {"hint": feature}, {feature.stored: (9, 8)},
                      {"x": torch.zeros(2, 1, 4, 4)}, 0)  # fmt: skip
    with pytest.raises(UsageError, match="the student has no module 'layer' for a feature; "):
        learner(student="layer")


def test_a_module_is_a_teacher_with_features(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import torch\nfrom torch import nn\n"
        "def teacher():\n    torch.manual_seed(0)\n"
        "    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))\n"
    )
    x = random(5, 4).numpy()
    teacher = load_teacher("mine:teacher", tmp_path, {"x": x}, taps=["0"])
    torch.manual_seed(0)
    expected = nn.Linear(4, 6)(torch.from_numpy(x)).detach().numpy()

    np.testing.assert_allclose(teacher.outputs({"x": x}).features["0"], expected, atol=1e-6)
    with pytest.raises(UsageError, match=r"mine:teacher has no module 'hidden' for a feature; there are 0, 1, 2"):
        load_teacher("mine:teacher", tmp_path, {"x": x}, taps=["hidden"]).logits({"x": x})


def test_a_feature_is_what_its_module_returned_also_where_the_next_one_writes_over_it() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 2))
    with tapped(net, ["0"], "net") as seen:
        net(random(5, 4))
        found = seen("0").detach()

    torch.testing.assert_close(found, net[0](random(5, 4)))
    assert float(found.min()) < 0


STORED = spec("mean").stored


def hinting() -> Teacher:
    """Its hidden state is a rotation of the inputs, its class their product's sign."""
    turn = np.linalg.qr(np.random.default_rng(1).normal(size=(4, 4)))[0].astype(np.float32)

    def outputs(arrays: object) -> Answer:
        assert isinstance(arrays, dict)
        x = arrays["x"]
        product = x[:, 0] * x[:, 1]
        return Answer(np.stack([-product, product], 1), {STORED: x @ turn})

    return Teacher(outputs, "t", 0, None, 0)


@pytest.fixture
def material(tmp_path: Path) -> tuple[Split, TeacherCache]:
    x = np.random.default_rng(0).normal(size=(200, 4)).astype(np.float32)
    split = split_from_arrays({"x": x, "label": (x[:, 0] * x[:, 1] > 0).astype(int)}, labels=("no", "yes"))
    key = CaptureKey("t", "d", "", 1, 0, features=(STORED,))
    return split, capture(tmp_path / "cache", split, hinting(), key, Views(), progress_for())


def test_the_cache_keeps_features_as_f16_beside_the_logits(material: tuple[Split, TeacherCache]) -> None:
    split, cache = material
    fresh = hinting().outputs(split.arrays()).features[STORED]
    outputs = cache.read(cache.rows(split.ids), np.zeros(200)).outputs

    np.testing.assert_allclose(outputs.features[STORED].numpy(), fresh, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(cache.feature(split.ids[:3], STORED), fresh[:3], rtol=1e-3, atol=1e-4)
    assert record_bytes(codec_of("dense-f16"), 2, features=cache.features) == 4 + 2 * 2 + 4 * 2
    with pytest.raises(CacheError, match="has no feature 'other'; it has "):
        cache.feature(split.ids, "other")


@pytest.mark.parametrize(("value", "message"), [(np.nan, "NaN or infinity in feature"), (1e6, "reaches 1e\\+06")])
def test_features_that_f16_cannot_hold_are_refused(tmp_path: Path, value: float, message: str) -> None:
    def outputs(arrays: object) -> Answer:
        answer = hinting().outputs(arrays)  # type: ignore[arg-type]
        answer.features[STORED][3, 1] = value
        return answer

    split = split_from_arrays({"x": random(8, 4).numpy(), "label": np.arange(8) % 2}, labels=("a", "b"))
    key = CaptureKey("t", "d", "", 1, 0, features=(STORED,))
    with pytest.raises(NumericalError, match=message):
        capture(tmp_path / "c", split, Teacher(outputs, "t", 0, None, 0), key, Views(), progress_for())


RECIPE = """
name = "hints"
labels = ["no", "yes"]
[data]
train = "mine:train"
test = "mine:test"
[teacher]
model = "mine:teacher"
[student]
model = "mine:student"
[distill]
arms = ["control", "hint", "both"]
epochs = 2
[distill.features.hint]
teacher = "0"
student = "0"
[distill.features.turned]
teacher = "0"
student = "0"
loss = "cosine"
[distill.overrides.both]
losses = { kd = 1.0, hint = 0.5, turned = 2.0 }
[export]
targets = ["onnx"]
"""

CODE = """
import numpy as np, torch
from torch import nn
def arrays(count, seed):
    x = np.random.default_rng(seed).normal(size=(count, 4)).astype(np.float32)
    return {"x": x, "label": (x[:, 0] * x[:, 1] > 0).astype(int)}
def train(): return arrays(300, 0)
def test(): return arrays(100, 1)
def net(width):
    return nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 2))
def teacher():
    torch.manual_seed(0)
    return net(32)
def student(): return net(8)
"""


def workspace(folder: Path, recipe: str = RECIPE) -> Workspace:
    (folder / "mine.py").write_text(CODE)
    (folder / "edgekd.toml").write_text(recipe)
    return Workspace(load_recipe(folder / "edgekd.toml"))


def test_a_student_that_shall_learn_another_feature_of_the_teacher_is_another(tmp_path: Path) -> None:
    """Both recipes keep the same two features of the teacher, and only say otherwise which of them is the hint."""
    swapped = RECIPE.replace('hint]\nteacher = "0"', 'hint]\nteacher = "1"')
    other = RECIPE.replace('turned]\nteacher = "0"', 'turned]\nteacher = "1"')
    works = [workspace(tmp_path, recipe) for recipe in (swapped, other)]
    asked = [arm_inputs(work.recipe, work.splits, "hint", 0, work.capture_key("train").to_json()) for work in works]

    assert asked[0]["data"] == asked[1]["data"]
    assert asked[0]["features"] != asked[1]["features"]


def test_features_beside_kd_go_with_a_cache_of_draws(tmp_path: Path) -> None:
    distill = workspace(tmp_path, RECIPE.replace("epochs = 2", "epochs = 2\ntemperature = 1.0")).recipe.distill

    assert distill.not_served_by_draws() == ""
    assert distill.model_copy(update={"temperature": 2.0}).not_served_by_draws() == (
        "both: draws are those at T = 1, of logits as they are"
    )


def test_a_recipe_with_features_trains_and_what_is_saved_has_no_projector(tmp_path: Path) -> None:
    work = workspace(tmp_path)
    capture_stage(work, progress_for())
    results = distill_stage(work, progress_for())
    student, _ = load_student(work.folder.arm("both", 0))
    plain = export_program(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), [torch.zeros(2, 4)])

    assert [result.arm for result in results] == ["control", "hint", "both"]
    assert len(work.cache("train").features) == 1  # two losses, one feature
    assert work.cache("test").features == {}
    assert {name: tuple(w.shape) for name, w in student.program.state_dict.items()} == {
        name: tuple(w.shape) for name, w in plain.state_dict.items()
    }
    assert student.card.parameters == 4 * 8 + 8 + 8 * 2 + 2


def test_the_log_has_every_part_and_its_share_of_the_gradient_by_the_students_weights(
    tmp_path: Path, material: tuple[Split, TeacherCache]
) -> None:
    recipe, (split, cache) = workspace(tmp_path).recipe, material
    features = {name: Feature(teacher="0", student="0", pool="mean", loss=feature.loss)
                for name, feature in recipe.distill.features.items()}  # fmt: skip
    recipe = recipe.model_copy(update={"distill": recipe.distill.model_copy(update={"features": features})})
    module = with_features(network(), features, {STORED: (4,)}, {"x": torch.zeros(3, 4)}, 0)
    assert isinstance(module, FeatureStudent)
    before = [p.clone() for p in module.projectors.parameters()]
    plan = TrainingPlan(epochs=15, batch_size=16, learning_rate=1e-2, weight_decay=0, warmup_share=0.1, seed=3)
    history = train(module, split, cache, Views(), objective_of(recipe, "both"), plan, tmp_path / "c.pt",
                    progress_for(), "both")  # fmt: skip
    shares = {name: history[-1][f"gradient share of {name}"] for name in ("labels", "kd", "hint", "turned")}

    assert sum(shares.values()) == pytest.approx(1)
    assert min(shares.values()) > 0
    assert history[-1]["hint"] < 0.3 * history[0]["hint"]
    assert history[-1]["turned"] < 0.3 * history[0]["turned"]
    assert all(not torch.equal(a, b) for a, b in zip(before, module.projectors.parameters(), strict=True))
    assert bare_student(module) is module.student


def test_a_broken_off_training_resumes_its_projectors_bit_for_bit(
    tmp_path: Path, material: tuple[Split, TeacherCache], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(edgekd.distillation.train, "CHECKPOINT_EVERY_S", 0.0)
    split, cache = material
    plan = TrainingPlan(epochs=2, batch_size=16, learning_rate=1e-2, weight_decay=0, warmup_share=0.1, seed=3)

    def objective(student, teacher, labels):  # type: ignore[no-untyped-def]
        return {"hint": feature_mse(student.features["hint"], teacher.features[STORED])}

    class Stop(Exception): ...

    def stop(epoch: int, means: object) -> None:
        raise Stop

    def made() -> nn.Module:
        return with_features(network(), {"hint": spec("mean")}, {STORED: (4,)}, {"x": torch.zeros(3, 4)}, 7)

    whole, broken, resumed = made(), made(), made()
    history = train(whole, split, cache, Views(), objective, plan, tmp_path / "w.pt", progress_for(), "x")
    with pytest.raises(Stop):
        train(broken, split, cache, Views(), objective, plan, tmp_path / "c.pt", progress_for(), "x", stop)
    again = train(resumed, split, cache, Views(), objective, plan, tmp_path / "c.pt", progress_for(), "x")

    assert again == history
    assert module_fingerprint(resumed) == module_fingerprint(whole)


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ('loss = "cosine"', 'loss = "cos"', "distill.features.turned.loss: 'cos' is not known; there are mse, cosine"),
        ("features.hint", "features.kd", "distill.features.kd: a loss has this name"),
        ('loss = "cosine"', "member = 1", "distill.features.turned.member: 1 is no teacher; they are numbered 0 to 0"),
        ("hint = 0.5", "hnt = 0.5", "distill.overrides.both.losses: no loss called 'hnt'"),
    ],
)
def test_faults_of_features_are_told_by_key(tmp_path: Path, old: str, new: str, fault: str) -> None:
    with pytest.raises(UsageError) as caught:
        workspace(tmp_path, RECIPE.replace(old, new))

    assert fault in str(caught.value)

"""Teachers of timm and torchvision by name: their weights, and what their libraries show them."""

import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edgekd import plugins
from edgekd.errors import DataError, ModelFileError, UsageError
from edgekd.recipes.reading import load_recipe
from edgekd.stages.workspace import Workspace
from edgekd.teachers.named_weights import library
from edgekd.teachers.sources import load_student_module, load_teacher, own_preprocessing
from edgekd.teachers.teacher_inputs import prepared_images
from edgekd.teaching import Preprocessing

SMALL = {"timm": "mobilenetv3_small_050", "torchvision": "shufflenet_v2_x0_5"}
IMAGES = {"image": np.random.default_rng(0).random((3, 3, 32, 32), np.float32)}


def need(name: str) -> Any:
    """The library, or a skip that says why not."""
    for module in (name, "torchvision"):
        if plugins.missing((module,)):
            pytest.skip(f"{module} is not installed")
        try:
            library(module)
        except UsageError as error:
            pytest.skip(str(error))
    return library(name)


@pytest.fixture(autouse=True)
def empty_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of both libraries; and who tries to download, fails."""

    def refuse(self: socket.socket, address: object) -> None:
        raise AssertionError(f"a download from {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    if not plugins.missing(("huggingface_hub",)):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))


def expected(module: nn.Module) -> np.ndarray:
    with torch.no_grad():
        made: np.ndarray = module.eval()(torch.from_numpy(IMAGES["image"])).numpy()
    return made


def test_a_library_of_another_build_than_torch_is_told_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "of_another_build.py").write_text("raise RuntimeError('operator other::nms does not exist')")
    monkeypatch.syspath_prepend(tmp_path)

    with pytest.raises(
        UsageError, match=r"cannot be imported \(operator other::nms does not exist\); torch .* one build"
    ):
        library("of_another_build")


@pytest.mark.parametrize(("name", "layer"), [("timm", "blocks.1"), ("torchvision", "stage2")])
def test_an_architecture_with_weights_beside_the_recipe_is_a_teacher(tmp_path: Path, name: str, layer: str) -> None:
    need(name)
    from safetensors.torch import save_file

    reference, labels = f"{name}:{SMALL[name]}", ("a", "b", "c", "d")
    module = load_student_module(reference, tmp_path, 0, {}, labels)
    save_file(module.state_dict(), tmp_path / "w.safetensors")
    torch.save({"state_dict": module.state_dict()}, tmp_path / "w.pth")
    teachers = [
        load_teacher(reference, tmp_path, IMAGES, {"weights": file}, [layer], labels)
        for file in ("w.safetensors", "w.pth")
    ]
    for teacher in teachers:
        answer = teacher.outputs(IMAGES)
        np.testing.assert_allclose(answer.logits, expected(module), atol=1e-5)
        assert answer.logits.shape == (3, 4)
        assert answer.features[layer].ndim == 4
    assert teachers[0].fingerprint == teachers[1].fingerprint
    assert (teachers[0].macs or 0) > 100_000


@pytest.mark.parametrize("name", ["timm", "torchvision"])
def test_weights_that_are_not_there_are_not_downloaded_and_random_ones_are_asked_for_in_words(
    tmp_path: Path, name: str
) -> None:
    need(name)
    reference = f"{name}:{SMALL[name]}"
    with pytest.raises(
        UsageError, match=r"not in the library's cache \(.*cache.*\), and nothing is downloaded; .*rand"
    ):
        load_teacher(reference, tmp_path, IMAGES)

    assert load_teacher(reference, tmp_path, IMAGES, {"weights": "random"}).logits(IMAGES).shape == (3, 1000)
    with pytest.raises(UsageError, match=f"{name} has no .*'{SMALL[name]}x'; near names: .*{SMALL[name]}"):
        load_teacher(f"{reference}x", tmp_path, IMAGES)


@pytest.mark.parametrize("name", ["timm", "torchvision"])
def test_weights_in_the_cache_of_the_library_are_those_of_the_teacher(tmp_path: Path, name: str) -> None:
    need(name)
    reference = f"{name}:{SMALL[name]}"
    module = load_student_module(reference, tmp_path, 3)
    if name == "torchvision":
        weights = library("torchvision.models").get_model_weights(SMALL[name]).DEFAULT
        path = tmp_path / "cache" / "hub" / "checkpoints" / weights.url.rsplit("/", 1)[-1]
        path.parent.mkdir(parents=True)
        torch.save(module.state_dict(), path)
    else:
        from safetensors.torch import save_file

        settings = library("timm.models").get_pretrained_cfg(SMALL[name])
        folder = tmp_path / "cache" / f"models--{settings.hf_hub_id.replace('/', '--')}"
        (folder / "snapshots" / "abc").mkdir(parents=True)
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text("abc")
        save_file(module.state_dict(), folder / "snapshots" / "abc" / "model.safetensors")
        embedding = load_teacher(reference, tmp_path, IMAGES, {"classes": 0}).logits(IMAGES)
        assert embedding.shape == (3, 1024)

    np.testing.assert_allclose(load_teacher(reference, tmp_path, IMAGES).logits(IMAGES), expected(module), atol=1e-5)
    with pytest.raises(UsageError, match="the library's weights are for 1000 classes, and there are 2 labels"):
        load_teacher(reference, tmp_path, IMAGES, labels=("a", "b"))


def test_weights_that_do_not_fit_and_files_that_are_none_say_so(tmp_path: Path) -> None:
    need("torchvision")
    from safetensors.torch import save_file

    reference = f"torchvision:{SMALL['torchvision']}"

    def load(file: str, *labels: str) -> None:
        load_teacher(reference, tmp_path, IMAGES, {"weights": file}, labels=labels)

    with pytest.raises(ModelFileError, match=r"no weights at .*gone\.safetensors"):
        load("gone.safetensors")
    module = load_student_module(reference, tmp_path, 0)
    save_file(module.state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(ModelFileError, match=r"fc\.weight is \(1000, 1024\) and not \(2, 1024\) \(and 1 more\)"):
        load("w.safetensors", "a", "b")
    save_file({"x": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ModelFileError, match=r"other\.safetensors does not fit .*: no conv1.*more\)"):
        load("other.safetensors")
    torch.save(module, tmp_path / "whole.pth")
    with pytest.raises(ModelFileError, match=r"whole\.pth cannot be read as weights"):
        load("whole.pth")


@pytest.mark.parametrize("size", [(40, 40), (48, 61), (301, 260)])
@pytest.mark.parametrize("reference", ["timm:mobilenetv3_small_050", "timm:convnext_atto", "torchvision:resnet18"])
def test_what_the_library_shows_its_model_is_declared_and_gives_the_same_pixels(
    tmp_path: Path, reference: str, size: tuple[int, int]
) -> None:
    name, _, place = reference.partition(":")
    need(name)
    pixels = np.random.default_rng(1).random((2, 3, *size), np.float32)
    if name == "timm":
        data = library("timm.data")
        settings = data.resolve_data_config(pretrained_cfg=library("timm.models").get_pretrained_cfg(place).to_dict())
        transform = data.create_transform(**settings, is_training=False)
    else:
        transform = library("torchvision.models").get_model_weights(place).DEFAULT.transforms()
    theirs: Tensor = transform(torch.from_numpy(pixels))
    spec = own_preprocessing(reference, tmp_path)

    assert spec is not None
    np.testing.assert_allclose(prepared_images(pixels, spec), theirs.numpy(), atol=1e-5)


def test_a_square_is_cut_from_the_centre_of_what_was_resized() -> None:
    wide = np.broadcast_to(np.arange(8, dtype=np.float32), (1, 1, 4, 8))

    np.testing.assert_array_equal(prepared_images(wide, Preprocessing(resize=4, size=2))[0, 0], [[3, 4], [3, 4]])
    assert prepared_images(wide, Preprocessing(resize=2, size=2, interpolation="bicubic")).shape == (1, 1, 2, 2)
    with pytest.raises(ValueError, match="resize must be at least size"):
        Preprocessing(resize=4, size=5)
    with pytest.raises(ValueError, match="resize must be at least size"):
        Preprocessing(resize=4)


RECIPE = """
name = "named"
labels = ["a", "b"]
data = { train = "train.npz", test = "test.npz" }
teacher = { model = "torchvision:shufflenet_v2_x0_5", weights = "random" }
student = { model = "torchvision:shufflenet_v2_x0_5" }
"""


def test_the_teachers_own_preprocessing_is_kept_beside_the_students(tmp_path: Path) -> None:
    need("torchvision")
    (tmp_path / "edgekd.toml").write_text(RECIPE)
    for name, scale in (("train", 1), ("test", 1), ("bytes", 255)):
        pixels = np.random.default_rng(len(name)).random((40, 3, 40, 40), np.float32) * scale
        np.savez(tmp_path / f"{name}.npz", image=pixels, label=np.arange(40) % 2)

    def work(recipe: str) -> Workspace:
        (tmp_path / "edgekd.toml").write_text(recipe)
        return Workspace(load_recipe(tmp_path / "edgekd.toml"))

    own = work(RECIPE)
    teacher = own.teacher
    assert own.splits.preprocessing == {}
    assert '"resize":256,"interpolation":"bilinear"' in teacher.lineage[1].replace(" ", "")
    told = work(RECIPE.replace('"random"', '"random", preprocessing = "none"')).teacher
    assert told.lineage == ()
    assert told.logits(own.splits.test.arrays(slice(2))).shape == (2, 2)
    with pytest.raises(DataError, match=r"shown images of 0 to 1 by its library, and image is .* to 255"):
        _ = work(RECIPE.replace("train.npz", "bytes.npz")).teacher

"""Data: every source, ids that follow the content, and what does not fit."""

import io
from pathlib import Path

import numpy as np
import pytest

from edgekd.data.files import ImageFiles
from edgekd.data.samples import load_arrays, load_splits, split_from_arrays
from edgekd.errors import DataError, NumericalError
from edgekd.recipes.reading import load_recipe
from edgekd.recipes.recipe import ImageData, Recipe


def _arrays(count: int = 40, seed: int = 0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {"x": random.normal(size=(count, 3)).astype(np.float32), "label": random.integers(0, 2, count)}


def _save(path: Path, arrays: dict[str, np.ndarray]) -> None:
    np.savez(path, allow_pickle=False, **arrays)


def _recipe(folder: Path, data: str, labels: str = "") -> Recipe:
    (folder / "model.py").write_text("def teacher(): ...\ndef student(): ...\n")
    path = folder / "edgekd.toml"
    models = '[teacher]\nmodel = "model:teacher"\n[student]\nmodel = "model:student"\n'
    path.write_text(f'name = "x"\n{labels}\n[data]\n{data}\n{models}')
    return load_recipe(path)


def test_ids_follow_the_content_and_not_the_position() -> None:
    arrays = _arrays()
    order = np.random.default_rng(1).permutation(40)
    a = split_from_arrays(arrays)
    b = split_from_arrays({name: array[order] for name, array in arrays.items()})

    assert (a.ids[order] == b.ids).all()
    assert a.fingerprint != b.fingerprint


def test_copies_of_a_sample_have_ids_of_their_own() -> None:
    split = split_from_arrays({"x": np.zeros((5, 2), np.float32), "label": np.zeros(5, int)})

    assert len(set(split.ids.tolist())) == 5


def test_npz_splits_hold_out_validation_by_id(tmp_path: Path) -> None:
    _save(tmp_path / "train.npz", _arrays(200))
    _save(tmp_path / "test.npz", _arrays(30, seed=9))
    splits = load_splits(_recipe(tmp_path, 'train = "train.npz"\ntest = "test.npz"\nvalidation_share = 0.2'))

    assert len(splits.train) + len(splits.validation) == 200
    assert 20 <= len(splits.validation) <= 60
    assert not set(splits.train.ids.tolist()) & set(splits.validation.ids.tolist())
    assert splits.labels == ("0", "1")


def test_the_test_split_is_not_read_before_it_is_asked_for(tmp_path: Path) -> None:
    _save(tmp_path / "train.npz", _arrays(200))
    _save(tmp_path / "test.npz", _arrays(30, seed=9))
    recipe = _recipe(tmp_path, 'train = "train.npz"\ntest = "test.npz"\nvalidation_share = 0.2')
    (tmp_path / "test.npz").unlink()
    splits = load_splits(recipe)

    assert len(splits.train) + len(splits.validation) == 200
    with pytest.raises(DataError, match=r"no data file at .*test\.npz"):
        _ = splits.test


def test_images_of_a_folder_become_arrays(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    image = pytest.importorskip("PIL.Image")
    for split, count in (("train", 12), ("test", 4)):
        for index in range(count):
            name = ("cat", "dog")[index % 2]
            folder = tmp_path / split / name
            folder.mkdir(parents=True, exist_ok=True)
            pixels = np.full((20, 30, 3), 255 if name == "dog" else 0, np.uint8)
            pixels[0, 0] = index + count
            image.fromarray(pixels).save(folder / f"{index}.png")
    data = 'train = "imagefolder:train"\ntest = "imagefolder:test"\nvalidation_share = 0.3\n'
    recipe = _recipe(tmp_path, data + "[data.image]\nsize = 8\nmean = [0.5, 0.5, 0.5]\nstd = [0.5, 0.5, 0.5]")
    splits = load_splits(recipe)
    arrays = splits.test.arrays()

    assert splits.labels == ("cat", "dog")
    assert arrays["image"].shape == (4, 3, 8, 8)
    assert splits.test.labels is not None
    means = arrays["image"].mean(axis=(1, 2, 3))
    np.testing.assert_allclose(means, np.where(splits.test.labels == 1, 1.0, -1.0), atol=0.05)
    assert splits.preprocessing["size"] == [8, 8]
    assert len(splits.train) + len(splits.validation) == 12


def test_an_image_that_is_asked_for_several_times_at_once_is_decoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    image = pytest.importorskip("PIL.Image")
    files = []
    for grey in (10, 20, 30):
        buffer = io.BytesIO()
        image.fromarray(np.full((9, 9), grey, np.uint8)).save(buffer, "PNG")
        files.append({"bytes": buffer.getvalue(), "path": None})
    opened: list[object] = []
    column, plain = ImageFiles(files, ImageData(size=4, channels=1)), image.open

    def counting(source: object) -> object:
        opened.append(source)
        return plain(source)

    monkeypatch.setattr(image, "open", counting)
    pixels = column[np.array([2, 0, 2, 2, 0])]

    assert len(opened) == 2
    np.testing.assert_allclose(pixels[:, 0, 0, 0] * 255, [30, 10, 30, 30, 10], atol=1e-4)
    np.testing.assert_allclose(column[1][0, 0, 0] * 255, 20, atol=1e-4)


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_text_files_become_token_ids(tmp_path: Path, kind: str) -> None:
    datasets = pytest.importorskip("datasets")
    from importlib.resources import files

    template = files("edgekd") / "templates" / "text"
    (tmp_path / "tokenizer.json").write_bytes((template / "tokenizer.json").read_bytes())
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_bytes((template / f"{name}.jsonl").read_bytes())
        if kind != "jsonl":
            table = datasets.load_dataset("json", data_files=str(tmp_path / f"{name}.jsonl"), split="train")
            getattr(table, f"to_{kind}")(str(tmp_path / f"{name}.{kind}"))
    data = f'train = "{kind}:train.{kind}"\ntest = "{kind}:test.{kind}"\n'
    recipe = _recipe(
        tmp_path, data + '[data.text]\ntokenizer = "tokenizer.json"\nmax_length = 8', 'labels = ["calm", "angry"]'
    )
    splits = load_splits(recipe)
    arrays = splits.test.arrays()

    assert list(arrays) == ["input_ids", "attention_mask"]
    assert arrays["input_ids"].shape == (50, 8)
    assert arrays["input_ids"].dtype == np.int32
    assert ((arrays["input_ids"] == 0) == (arrays["attention_mask"] == 0)).all()
    assert set(splits.assets) == {"tokenizer.json"}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"label": np.full(40, 7)}, DataError, "label 7 is out of range; there are 2 labels, 0 to 1"),
        ({"label": np.full(40, -1)}, DataError, "label -1 is out of range"),
        ({"label": np.zeros(39, int)}, DataError, "same samples on the first axis"),
        ({"label": np.zeros((40, 2), int)}, DataError, r"one class per sample"),
        ({"label": np.zeros(40, float)}, DataError, "class numbers or names"),
        ({"x": np.full((40, 3), np.nan, np.float32)}, NumericalError, "NaN or infinity, first in sample 0"),
        ({"x": np.array(["a"] * 40)}, DataError, "cannot be fed to a model"),
        ({"id": np.zeros(40, int)}, DataError, "the same value twice"),
    ],
)
def test_what_does_not_fit_is_one_line(change: dict[str, np.ndarray], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        split_from_arrays({**_arrays(), **change}, "train", ("no", "yes"))

    assert "\n" not in str(caught.value)


def test_an_npz_with_pickled_objects_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.array([{}], dtype=object))

    with pytest.raises(DataError, match=r"cannot be read as \.npz"):
        load_arrays(tmp_path / "a.npz")


def test_a_truncated_npz_is_one_line(tmp_path: Path) -> None:
    _save(tmp_path / "a.npz", _arrays())
    content = (tmp_path / "a.npz").read_bytes()
    (tmp_path / "a.npz").write_bytes(content[: len(content) // 2])

    with pytest.raises(DataError, match=r"cannot be read as \.npz"):
        load_arrays(tmp_path / "a.npz")

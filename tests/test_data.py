"""Data: every source, ids that follow the content, and what does not fit."""

import hashlib
import io
from pathlib import Path

import numpy as np
import pytest

from edgekd.data.files import ImageFiles
from edgekd.data.samples import Splits, load_arrays, load_splits, split_from_arrays
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


def _three(folder: Path, validation: dict[str, np.ndarray], test: dict[str, np.ndarray]) -> Splits:
    """Splits of 40 training samples, ``_arrays()``, and these."""
    for name, arrays in (("train", _arrays()), ("validation", validation), ("test", test)):
        _save(folder / f"{name}.npz", arrays)
    return load_splits(_recipe(folder, 'train = "train.npz"\nvalidation = "validation.npz"\ntest = "test.npz"'))


def _rows(arrays: dict[str, np.ndarray], rows: list[int]) -> dict[str, np.ndarray]:
    return {name: array[rows] for name, array in arrays.items()}


def test_a_test_split_of_nothing_but_training_samples_is_refused_where_validation_is_held_out_too(
    tmp_path: Path,
) -> None:
    _save(tmp_path / "train.npz", _arrays(200))
    splits = load_splits(_recipe(tmp_path, 'train = "train.npz"\ntest = "train.npz"\nvalidation_share = 0.2'))

    with pytest.raises(DataError, match=r"all 200 samples of data\.test are in train or validation"):
        _ = splits.test


def test_a_validation_split_of_nothing_but_training_samples_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"all 3 samples of data\.validation are in train"):
        _three(tmp_path, _rows(_arrays(), [5, 1, 1]), _arrays(9, seed=2))


def test_some_samples_in_two_splits_are_counted_with_every_copy(tmp_path: Path) -> None:
    train, fresh = _arrays(), _arrays(9, seed=2)
    validation = {name: np.concatenate([train[name][[5, 5, 7]], fresh[name][:4]]) for name in train}
    test = {name: np.concatenate([train[name][[1]], fresh[name][[0, 0, 8]]]) for name in train}
    splits = _three(tmp_path, validation, test)

    assert (splits.validation_in_train, splits.test_in_others) == (3, 3)


def test_samples_are_the_same_by_content_whatever_ids_they_were_given(tmp_path: Path) -> None:
    given = {"validation": _arrays(10, seed=2), "test": _arrays(20, seed=3)}
    splits = _three(tmp_path, *({**arrays, "id": np.arange(len(arrays["x"]))} for arrays in given.values()))

    assert (len(splits.test), splits.validation_in_train, splits.test_in_others) == (20, 0, 0)


@pytest.mark.parametrize("name", ["validation", "test"])
def test_inputs_of_another_name_or_order_are_one_line(tmp_path: Path, name: str) -> None:
    parts = {"validation": _arrays(9, seed=2), "test": _arrays(9, seed=3)}
    parts[name] = {"y" if key == "x" else key: array for key, array in parts[name].items()}

    with pytest.raises(DataError, match=f"train has the inputs x; {name} has y"):
        _ = _three(tmp_path, parts["validation"], parts["test"]).test


def _held_out(folder: Path, arrays: dict[str, np.ndarray], share: float = 0.3) -> Splits:
    _save(folder / "train.npz", arrays)
    return load_splits(_recipe(folder, f'train = "train.npz"\ntest = "train.npz"\nvalidation_share = {share}'))


@pytest.mark.parametrize("ids", [None, np.arange(120), np.array([f"row {i}" for i in range(120)])])
def test_all_copies_of_a_sample_are_on_the_same_side_and_stay_there(tmp_path: Path, ids: np.ndarray | None) -> None:
    copies = {name: np.tile(array, (3, *[1] * (array.ndim - 1))) for name, array in _arrays().items()}
    copies |= {} if ids is None else {"id": ids}
    some, splits = _held_out(tmp_path, _arrays()), _held_out(tmp_path, copies)
    sides = [{row.tobytes() for row in part.inputs["x"]} for part in (splits.train, splits.validation)]  # type: ignore[attr-defined]

    assert len(splits.train) + len(splits.validation) == 120
    assert not sides[0] & sides[1]
    assert {row.tobytes() for row in some.validation.inputs["x"]} == sides[1]  # type: ignore[attr-defined]


def test_too_few_different_samples_to_hold_out_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"40 training samples \(1 different\) are too few to hold out a share of 0\.3"):
        _held_out(tmp_path, {"x": np.ones((40, 2), np.float32), "label": np.arange(40) % 2})


def test_given_whole_numbers_become_ids_that_are_spread_out(tmp_path: Path) -> None:
    splits = _held_out(tmp_path, {**_arrays(500), "id": np.arange(500)}, 0.1)
    ids = np.concatenate([splits.train.ids, splits.validation.ids])

    assert 25 <= len(splits.validation) <= 80
    assert len(set(ids.tolist())) == 500
    assert 0.4 < (ids > 2**63).mean() < 0.6


def test_ids_from_content_are_hashes_of_it() -> None:
    x = np.array([[1, 2], [3, 4], [1, 2]], np.float32)
    first, second = (hashlib.blake2b(row.tobytes(), digest_size=8).digest() for row in x[:2])
    copy = hashlib.blake2b(first + (1).to_bytes(8, "little"), digest_size=8).digest()

    assert split_from_arrays({"x": x}).ids.tolist() == [int.from_bytes(d, "little") for d in (first, second, copy)]


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


def _image_folders(folder: Path, **counts: int) -> None:
    """Uncompressed images, so that all files have one size and those of all splits the same names."""
    image = pytest.importorskip("PIL.Image")
    for split, count in counts.items():
        for index in range(count):
            path = folder / split / ("cat", "dog")[index % 2] / f"{index}.bmp"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.fromarray(np.full((9, 9, 3), 10 * index + len(split), np.uint8)).save(path)


def test_how_pixels_become_inputs_is_in_the_fingerprint(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    _image_folders(tmp_path, train=12, test=4)
    data = 'train = "imagefolder:train"\ntest = "imagefolder:test"\nvalidation_share = 0.3\n[data.image]\nsize = 8\n'
    prints = {
        extra: load_splits(_recipe(tmp_path, data + extra)).test.fingerprint
        for extra in ("", "mean = [0.5]", "std = [0.5]", 'column = "image"')
    }

    assert len(set(prints.values())) == 3
    assert prints[""] == prints['column = "image"']


def test_image_files_of_one_name_and_size_are_the_same_only_by_content(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    _image_folders(tmp_path, train=12, test=4)
    data = 'train = "imagefolder:train"\ntest = "imagefolder:test"\nvalidation_share = 0.3\n[data.image]\nsize = 8\n'
    assert load_splits(_recipe(tmp_path, data)).test_in_others == 0

    (tmp_path / "test/cat/2.bmp").write_bytes((tmp_path / "train/cat/2.bmp").read_bytes())
    assert load_splits(_recipe(tmp_path, data)).test_in_others == 1

    with pytest.raises(DataError, match=r"all 12 samples of data\.test are in train"):
        _ = load_splits(_recipe(tmp_path, data.replace("imagefolder:test", "imagefolder:train"))).test


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
    ("name", "content"),
    [
        ("a.csv", "text,label\na,1\nb,0\nc,\nd,1\n"),
        ("a.csv", "text,label\na,yes\nb,no\nc,\nd,no\n"),
        ("a.jsonl", '{"text": "a", "label": 1}\n{"text": "b", "label": 0}\n{"text": "c", "label": null}\n'),
        ("a.jsonl", '{"text": "a", "label": "no"}\n{"text": "b", "label": "no"}\n{"text": "c", "label": ""}\n'),
        ("a.jsonl", '{"text": "a", "label": "no"}\n{"text": "b", "label": "no"}\n{"text": "c"}\n'),
    ],
)
def test_a_row_without_its_label_is_named(tmp_path: Path, name: str, content: str) -> None:
    pytest.importorskip("datasets")
    (tmp_path / name).write_text(content)
    (tmp_path / "tokenizer.json").write_text("{}")
    data = f'train = "{name[2:]}:{name}"\ntest = "{name[2:]}:{name}"\n[data.text]\nmax_length = 4\n'

    with pytest.raises(DataError, match=rf"{name[2:]}:{name}: row 3 has no 'label'.*data\.unlabeled") as caught:
        load_splits(_recipe(tmp_path, data + 'tokenizer = "tokenizer.json"'))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "cannot be read: it holds no rows"),
        (b'{"text": "a", "label": 1}\n{"text": "b", "label": 0\n', "cannot be read: .*in row 1"),
        (b'{"text": "a", "label": 1}\n{"text": "\xff", "label": 0}\n', "row 2 is not UTF-8"),
        (b'{"text": "a", "label": 1}\n{"text": null, "label": 0}\n', "row 2 has no 'text'"),
        (b'{"text": "a", "label": 1}\n{"txt": "b", "label": 0}\n', "row 2 has no 'text'"),
    ],
    ids=["empty", "broken", "latin-1", "null", "misspelt"],
)
def test_rows_that_cannot_be_read_are_one_line(
    tmp_path: Path, content: bytes, told: str, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("datasets")
    pytest.importorskip("tokenizers")
    (tmp_path / "a.jsonl").write_bytes(content)
    (tmp_path / "tokenizer.json").write_text("{}")
    data = 'train = "jsonl:a.jsonl"\ntest = "jsonl:a.jsonl"\n[data.text]\nmax_length = 4\n'

    with pytest.raises(DataError, match=rf"jsonl:a\.jsonl:? {told}") as caught:
        load_splits(_recipe(tmp_path, data + 'tokenizer = "tokenizer.json"'))
    assert "\n" not in str(caught.value)
    assert "Failed to load" not in capfd.readouterr().err


def test_a_class_of_minus_one_is_a_label_that_a_row_lacks(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    kinds = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    table = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, -1]}, features=kinds)
    table.to_parquet(str(tmp_path / "a.parquet"))
    (tmp_path / "tokenizer.json").write_text("{}")
    data = 'train = "parquet:a.parquet"\ntest = "parquet:a.parquet"\n[data.text]\nmax_length = 4\n'

    with pytest.raises(DataError, match=r"parquet:a\.parquet: row 2 has no 'label'"):
        load_splits(_recipe(tmp_path, data + 'tokenizer = "tokenizer.json"'))


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
        ({"id": np.arange(39)}, DataError, "same samples on the first axis.*'id': 39"),
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

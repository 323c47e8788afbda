"""edgekd.toml: every fault at once, each with its key path and what would work."""

import contextlib
from pathlib import Path

import pytest

from edgekd.errors import RecipeError, UsageError
from edgekd.recipes.reading import find_recipe, load_recipe, parse_options
from edgekd.recipes.recipe import Mix, json_schema

GOOD = """
name = "x"
[data]
train = "model:train"
test = "model:test"
[teacher]
model = "model:teacher"
[student]
model = "model:student"
"""
CODE = "def train(): ...\ndef test(): ...\ndef teacher(): ...\ndef student(): ...\n"


def _write(folder: Path, recipe: str) -> Path:
    (folder / "model.py").write_text(CODE)
    path = folder / "edgekd.toml"
    path.write_text(recipe)
    return path


def test_a_short_recipe_is_enough(tmp_path: Path) -> None:
    recipe = load_recipe(_write(tmp_path, GOOD))

    assert recipe.distill.arms == ("control", "kd", "dist")
    assert recipe.run_folder == tmp_path.resolve() / "runs" / "x"
    assert recipe.distill.mix("kd") == Mix({"kd": 1.0}, 2.0, 0.3)
    assert recipe.distill.mix("dist") == Mix({"dist": 1.0}, 1.0, 0.33)
    assert recipe.distill.mix("control") == Mix({}, 1.0, 1.0)


def test_an_arm_can_mix_losses_and_leaves_the_others_as_they_are(tmp_path: Path) -> None:
    mix = """
[distill]
arms = ["kd", "dist", "both"]
[distill.overrides.both]
losses = { kd = 1.0, dist = 2.0 }
label_weight = 0.5
standardize = true
"""
    distill = load_recipe(_write(tmp_path, GOOD + mix)).distill

    assert distill.mix("both") == Mix({"kd": 1.0, "dist": 2.0}, 2.0, 0.5, standardize=True)
    assert distill.mix("dist") == Mix({"dist": 1.0}, 1.0, 0.33)


def test_ten_mistakes_get_ten_lines_with_their_key_paths(tmp_path: Path) -> None:
    bad = """
name = "x y"
[data]
train = "model:trian"
test = "nowhere.npz"
veiws = 3
validation_share = 1.5
[teacher]
model = "hf:missing"
[student]
[distill]
arms = ["control", "kdd"]
epochs = 0
[export]
targets = ["onxx"]
precisions = ["int9"]
"""
    with pytest.raises(RecipeError) as caught:
        load_recipe(_write(tmp_path, bad))
    faults = "\n".join(caught.value.faults)

    assert len(caught.value.faults) == 11
    for line in (
        "name: ",
        "data.train: model.py beside the recipe defines no 'trian'",
        "data.test: no file 'nowhere.npz'",
        "data.veiws: no such key; did you mean views?",
        "data.validation_share: 1.5",
        "teacher.model: no 'missing' beside the recipe",
        "student.model: missing",
        "distill.arms.1: no loss called 'kdd'; there are kd, dist, reverse_kl",
        "distill.epochs: 0",
        "export.targets.0: no target 'onxx'; there are coreai, coreml, executorch, onnx, ort, tflite",
        "export.precisions.0: onnx has no precision 'int9'; it has fp32, fp16, w8,",
    ):
        assert line in faults


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("[bench]\ndevices = ['pixel9']", "bench.devices.0: no device 'pixel9'; there are"),
        ("[distill]\nship = 'mine'", "distill.ship: 'mine' is not an arm"),
        ("[distill]\narms = ['model:loss']", "distill.arms.0: model.py beside the recipe defines no 'loss'"),
        ("[distill]\nseeds = []", "distill.seeds: "),
        (
            "[distill]\narms = ['both']\n[distill.overrides.both]\nlosses = { kdd = 1 }",
            "distill.overrides.both.losses: no loss called 'kdd'",
        ),
        ("[compress]\nmax_drop = 'little'", "compress.max_drop: 'little' is no budget; 0.5pt (half a point) or 0.005"),
    ],
)
def test_names_that_do_not_exist_are_answered_with_those_that_do(tmp_path: Path, extra: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(_write(tmp_path, GOOD + extra))

    assert message in "\n".join(caught.value.faults)


def test_the_control_may_be_trained_otherwise_and_refuses_what_it_would_not_hear(tmp_path: Path) -> None:
    control = GOOD + "[distill.overrides.control]\nepochs = 3\n"
    deaf = {"temperature": "4.0", "label_weight": "0.5", "losses": "{ kd = 1 }", "standardize": "true"}

    assert load_recipe(_write(tmp_path, control)).distill.for_arm("control").epochs == 3
    with pytest.raises(RecipeError) as caught:
        load_recipe(_write(tmp_path, control + "".join(f"{key} = {value}\n" for key, value in deaf.items())))
    assert caught.value.faults == tuple(
        f"distill.overrides.control.{key}: the control learns from labels alone; "
        "there are epochs, batch_size, learning_rate, weight_decay, warmup_share"
        for key in deaf
    )


@pytest.mark.parametrize(
    ("codec", "arms", "message"),
    [
        ("top", "['kd']", "teacher.codec: 'top'"),
        ("sampled256", "['kd']\ntemperature = 1.0", "teacher.codec: 'sampled256' are more draws than one byte counts"),
        ("top10", "['kd', 'dist']", "dist compares classes over the batch; take 'dense-f16'"),
        ("top10", "['kd']\ntemperature = 3", "kept for T = 1, 2, 4, not for 3"),
        ("top10", "['kd']\n[distill.overrides.kd]\nstandardize = true", "standardize looks at the logits of all"),
    ],
)
def test_a_cache_of_the_top_classes_is_for_losses_that_need_no_more(
    tmp_path: Path, codec: str, arms: str, message: str
) -> None:
    text = GOOD.replace("[student]", f"codec = '{codec}'\n[student]") + f"[distill]\narms = {arms}\n"
    with pytest.raises(RecipeError) as caught:
        load_recipe(_write(tmp_path, text))

    assert message in "\n".join(caught.value.faults)


def test_the_cache_keeps_what_the_arms_need(tmp_path: Path) -> None:
    both, only = (
        load_recipe(_write(tmp_path, GOOD + f"[distill]\narms = {arms}\n")) for arms in ("['kd', 'dist']", "['kd']")
    )

    assert [recipe.codec(256) for recipe in (both, only)] == ["dense-f16", "dense-f16"]
    assert [recipe.codec(257) for recipe in (both, only)] == ["dense-f16", "top10"]


def test_views_without_an_augmentation_are_a_fault(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"data\.views"):
        load_recipe(_write(tmp_path, GOOD.replace("[teacher]", "views = 4\n[teacher]")))


@pytest.mark.parametrize(
    ("lines", "fault"),
    [
        ('mix = "mixdown"', r"data\.mix: 'mixdown' is not known; there are mixup, cutmix, and module:function"),
        ("mix_alpha = 0.2", r"data\.mix_alpha: nothing is mixed; set data\.mix"),
        ('mix = "mixup"\nviews = 4\nviews_per_decode = 3', r"views_per_decode: 3 does not divide the 4 views"),
        ("views_per_decode = 2", r"views_per_decode: 2 does not divide the 1 views"),
    ],
)
def test_mixing_and_views_that_do_not_fit_are_faults(tmp_path: Path, lines: str, fault: str) -> None:
    with pytest.raises(RecipeError, match=fault):
        load_recipe(_write(tmp_path, GOOD.replace("[teacher]", f"{lines}\n[teacher]")))


def test_losses_that_look_at_the_one_label_refuse_mixed_samples(tmp_path: Path) -> None:
    mixed = GOOD.replace("[teacher]", 'mix = "mixup"\nviews = 4\n[teacher]')

    assert load_recipe(_write(tmp_path, mixed)).data.mix == "mixup"
    with pytest.raises(RecipeError, match=r"distill: dkd: dkd looks at the one label of a sample, and data\.mix"):
        load_recipe(_write(tmp_path, mixed + '[distill]\narms = ["dkd"]\n'))


def test_what_is_not_toml_says_so(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="not TOML"):
        load_recipe(_write(tmp_path, "name = "))


def test_the_recipe_is_found_from_a_folder_below(tmp_path: Path) -> None:
    path = _write(tmp_path, GOOD)
    below = tmp_path / "a" / "b"
    below.mkdir(parents=True)

    assert find_recipe(below) == path.resolve()


def test_no_recipe_says_what_writes_one(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="edgekd init"):
        find_recipe(tmp_path)


def test_the_schema_describes_every_table() -> None:
    assert set(json_schema()["properties"]) >= {"data", "teacher", "student", "distill", "compress", "export", "bench"}


def test_every_template_and_example_is_a_good_recipe() -> None:
    root = Path(__file__).parent.parent
    found = sorted([*root.glob("edgekd/templates/*/edgekd.toml"), *root.glob("examples/*/*.toml")])
    if not (root / "examples").is_dir():
        pytest.skip("the examples are not part of the wheel")
    assert len(found) == 12
    faults: list[str] = []
    for path in found:
        with contextlib.suppress(RecipeError):
            load_recipe(path)
            continue
        with pytest.raises(RecipeError) as caught:
            load_recipe(path)
        faults += caught.value.faults
    # data and teachers of the long examples are fetched by hand; nothing else may be wrong
    assert all("beside the recipe" in fault for fault in faults), faults


def test_a_target_has_precisions_and_options_of_its_own(tmp_path: Path) -> None:
    recipe = load_recipe(_write(tmp_path, GOOD + '\n[export.onnx]\nprecisions = ["w8d8"]\n'))

    assert recipe.export.precisions_of("onnx") == ("w8d8",)
    assert recipe.export.precisions_of("coreml") == recipe.export.precisions
    with pytest.raises(RecipeError, match=r"export.coreml.images: coreml has no such option"):
        load_recipe(_write(tmp_path, GOOD + "\n[export.coreml]\nimages = true\n"))
    with pytest.raises(RecipeError, match=r"export.coreml.precisions.0: coreml has no precision 'w8d8'; it has fp32"):
        load_recipe(_write(tmp_path, GOOD + '\n[export.coreml]\nprecisions = ["w8d8"]\n'))
    with pytest.raises(RecipeError, match=r"export.onyx: no such key; did you mean onnx\?"):
        load_recipe(_write(tmp_path, GOOD + "\n[export.onyx]\n"))


@pytest.mark.parametrize("value", ['"fp16"', "16", "[16]", '[["fp16"]]'])
def test_precisions_that_are_no_list_of_words_are_one_fault(tmp_path: Path, value: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(_write(tmp_path, GOOD + f"\n[export.onnx]\nprecisions = {value}\n"))

    found = value.replace('"', "'")
    assert caught.value.faults == (f'export.onnx.precisions: {found} is not a list of words, as ["fp32", "int8"] is',)


def test_options_on_the_command_line_name_their_target_where_there_are_several() -> None:
    with pytest.raises(RecipeError, match=r"export.onnx.speed: onnx has no such option"):
        parse_options(["speed=3"], ["onnx"])
    with pytest.raises(UsageError, match=r"'speed=3' is not target.key=value with a target of onnx, coreml"):
        parse_options(["speed=3"], ["onnx", "coreml"])
    assert parse_options([], ["onnx"]) == {}
    assert parse_options(["batch=4"], ["onnx"])["onnx"].model_dump()["batch"] == "4"  # one of "4", "1,4" and "1..4"


def test_a_table_for_an_arm_that_is_not_trained_is_a_fault(tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(_write(tmp_path, GOOD + "[distill.overrides.dkd]\ntemperature = 4.0\n"))

    assert caught.value.faults == (
        "distill.overrides.dkd: no arm 'dkd' is trained; distill.arms has control, kd, dist",
    )
    load_recipe(_write(tmp_path, GOOD + "[distill.overrides.control]\nepochs = 3\n"))

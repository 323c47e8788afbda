"""Students from their teacher's blocks: which there are, which stay, and that they compute what they should."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from edgekd.console import SilentProgress
from edgekd.errors import RecipeError, UsageError
from edgekd.programs.student_files import load_student
from edgekd.recipes.reading import load_recipe
from edgekd.reporting.summary import collect
from edgekd.stages.check import check_workspace
from edgekd.stages.pipeline import capture_stage, distill_stage
from edgekd.stages.workspace import Workspace
from edgekd.teachers.blocks import Stack, find_stacks, keep_blocks, spread_evenly, started_from
from edgekd.teachers.sources import load_student_module


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


class Network(nn.Module):
    """Two stages, as a ResNet has them: the first block of a stage changes the width."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(4, 8), *(Residual(8) for _ in range(4)))
        self.second = nn.ModuleList([nn.Linear(8, 6), Residual(6), Residual(6)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.second:
            x = block(x)
        return x


def network() -> Network:
    torch.manual_seed(0)
    return Network()


def test_blocks_spread_evenly_over_the_teacher_as_distilbert_chose_them() -> None:
    assert spread_evenly(12, 6) == (0, 2, 4, 7, 9, 11)
    assert spread_evenly(4, 2) == (0, 3)
    assert spread_evenly(7, 1) == (0,)
    assert spread_evenly(3, 3) == (0, 1, 2)


def test_stacks_are_runs_of_equal_blocks_and_the_outermost_alone() -> None:
    assert find_stacks(network()) == [Stack("first", 1, 4), Stack("second", 1, 2)]
    assert find_stacks(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.ReLU(), nn.Linear(8, 2))) == []
    assert find_stacks(nn.Sequential(Residual(3), Residual(3))) == [Stack("", 0, 2)]


def test_what_stays_is_computed_as_by_hand() -> None:
    x, whole, cut = torch.randn(5, 4), network(), network()
    kept = keep_blocks(cut, every=2)
    by_hand = whole.first[4](whole.first[1](whole.first[0](x)))
    by_hand = whole.second[1](whole.second[0](by_hand))

    assert [positions for _, positions in kept] == [(0, 3), (0,)]
    torch.testing.assert_close(cut(x), by_hand)


def test_one_stack_alone_may_be_cut_and_blocks_may_be_named() -> None:
    cut = network()
    kept = keep_blocks(cut, keep=[3, 1], stacks=["first"])

    assert kept == [(Stack("first", 1, 4), (1, 3))]
    assert (len(cut.first), len(cut.second)) == (3, 3)
    torch.testing.assert_close(cut.first[1].inner[0].weight, network().first[2].inner[0].weight)


@pytest.mark.parametrize(
    ("keep", "stacks", "fault"),
    [
        ([0, 4], ["first"], "block 4 is asked of first; it has 4"),
        ([0, 1, 2, 3], ["first"], r"all blocks would stay; there are first \(4\), second \(2\)"),
        ([0], ["third"], r"no stack of equal blocks called 'third'; there are first \(4\), second \(2\)"),
    ],
)
def test_what_cannot_be_kept_is_one_line(keep: list[int], stacks: list[str], fault: str) -> None:
    with pytest.raises(UsageError, match=fault):
        keep_blocks(network(), keep=keep, stacks=stacks)


def test_a_model_without_repeated_blocks_says_so() -> None:
    with pytest.raises(UsageError, match="Linear repeats no block of equal shapes"):
        keep_blocks(nn.Linear(3, 2), every=2)


@pytest.mark.parametrize("kind", ["bert", "llama", "t5"])
def test_transformers_compute_with_the_blocks_that_stay(kind: str) -> None:
    """Encoder, decoder, and both: the same as a whole model whose other blocks are passed over."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    size = {"vocab_size": 40, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}
    ids, more = torch.randint(1, 40, (2, 7)), {}
    if kind == "bert":
        config = transformers.BertConfig(**size, num_hidden_layers=4, attn_implementation="eager")
        model, stack = transformers.BertForSequenceClassification(config), "bert.encoder.layer"
    elif kind == "llama":
        config = transformers.LlamaConfig(**size, num_hidden_layers=4, num_key_value_heads=2)
        model, stack = transformers.LlamaForCausalLM(config), "model.layers"
    else:
        told = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "num_heads": 2, "d_ff": 24, "num_layers": 5}
        config = transformers.T5Config(**told, num_decoder_layers=5)
        model, stack = transformers.T5ForConditionalGeneration(config), "encoder.block"
        more = {"decoder_input_ids": ids}
    model.config.use_cache = False
    model.eval()
    blocks = model.get_submodule(stack)
    first = find_stacks(model)[0].first  # 1 of T5, whose first block alone holds the positions
    wanted = [0, 1, 4] if first else [0, 2]
    whole = [blocks[i] for i in range(len(blocks))]
    with torch.no_grad():
        for i in set(range(len(blocks))) - set(wanted):  # passed over: returns what it is given
            whole[i].forward = lambda hidden, *a, **k: hidden if kind == "llama" else (hidden, *a[1:2] * 2)
        try:
            expected = model(input_ids=ids, **more).logits
        finally:
            for block in whole:
                block.__dict__.pop("forward", None)
        keep_blocks(model, keep=[w - first for w in wanted if w >= first], stacks=[stack])
        found = model(input_ids=ids, **more).logits

    torch.testing.assert_close(found, expected)
    if kind == "llama":
        assert model.config.num_hidden_layers == 2
        assert [block.self_attn.layer_idx for block in model.model.layers] == [0, 1]


RECIPE = """
name = "blocks"
[data]
train = "mine:train"
test = "mine:test"
[teacher]
model = "mine:teacher"
[student]
model = "blocks_of:mine:teacher"
every = 2
[distill]
arms = ["control", "kd"]
epochs = 2
learning_rate = 1e-4
threads = 1
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
class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(8, 8)
    def forward(self, x):
        return x + torch.relu(self.inner(x))
def teacher():
    state = torch.random.get_rng_state()
    torch.manual_seed(5)
    made = nn.Sequential(nn.Linear(4, 8), Block(), Block(), Block(), Block(), nn.Linear(8, 2))
    torch.random.set_rng_state(state)
    return made.requires_grad_(False)
"""


def workspace(folder: Path, recipe: str = RECIPE) -> Workspace:
    (folder / "mine.py").write_text(CODE)
    (folder / "edgekd.toml").write_text(recipe)
    return Workspace(load_recipe(folder / "edgekd.toml"))


def test_a_recipe_trains_a_student_from_its_teachers_blocks_and_tells_that_the_control_had_them_too(
    tmp_path: Path,
) -> None:
    work = workspace(tmp_path)
    capture_stage(work, SilentProgress())
    distill_stage(work, SilentProgress())
    cards = [load_student(work.folder.arm(arm, 0))[0].card for arm in ("control", "kd")]
    lines = [next(line for line in card.lineage if line.startswith("student starts from: ")) for card in cards]
    fresh = load_student_module("blocks_of:mine:teacher", tmp_path, 3, {"every": 2})

    assert lines[0] == lines[1] == f"student starts from: {started_from(fresh)}"
    assert "(2 of 4 in the model: 0, 3)" in lines[0]
    assert all(parameter.requires_grad for parameter in fresh.parameters())
    assert cards[0].parameters == 4 * 8 + 8 + 2 * (8 * 8 + 8) + 8 * 2 + 2
    assert any("Every arm starts from the same weights, the control too" in s for s in collect(work)[0].sentences)
    assert "the control too" in check_workspace(work)["student starts from"]


@pytest.mark.parametrize(
    ("told", "fault"),
    [
        ("", "student: blocks_of: needs every = 2 (one block of two) or keep = [0, 2, 5], one of them"),
        ("every = 1", "student.every: 1: input should be greater than or equal to 2"),
        ("evry = 2", "student.evry: no such key; did you mean every?"),
    ],
)
def test_what_a_recipe_says_wrongly_of_blocks_is_told_by_key(tmp_path: Path, told: str, fault: str) -> None:
    with pytest.raises(RecipeError) as caught:
        workspace(tmp_path, RECIPE.replace("every = 2", told))

    assert fault in caught.value.faults


def test_blocks_of_a_teacher_that_is_not_there_are_told_before_anything_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"student\.model: no 'gone' beside the recipe"):
        workspace(tmp_path, RECIPE.replace("blocks_of:mine:teacher", "blocks_of:hf:gone"))

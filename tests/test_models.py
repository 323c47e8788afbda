"""Programs: names, batches, counts, and that no file can run code."""

import io
import pickle
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from edgekd.errors import DataError, ModelFileError
from edgekd.programs.models import (
    bind_inputs,
    count_macs,
    count_parameters,
    input_specs,
    load_program,
    output_specs,
    program_bytes,
    run_program,
)
from edgekd.programs.student_files import load_student
from edgekd.programs.tracing import at_batch, export_program, rename_outputs
from edgekd.store import hash_path
from edgekd.types import Student, TensorSpec


class Evil:
    """Unpickling it leaves a mark."""

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (str(Evil.mark), "w")

    mark = Path("unset")


def test_the_batch_is_dynamic_and_can_be_fixed(convnet_student: Student) -> None:
    program = convnet_student.program

    assert input_specs(program)[0].shape == (-1, 1, 12, 12)
    assert input_specs(at_batch(program))[0].shape == (1, 1, 12, 12)
    assert output_specs(at_batch(program))[0].shape == (1, 5)
    assert at_batch(at_batch(program)) is not program


def test_a_module_that_takes_one_batch_only_is_exported_with_a_batch_of_one() -> None:
    class Stubborn(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.reshape(1, 4) * 2

    program = export_program(Stubborn(), [torch.zeros(1, 2, 2)])

    assert input_specs(program)[0].shape == (1, 2, 2)
    outputs = run_program(program, {"x": np.ones((3, 2, 2), np.float32)})
    assert next(iter(outputs.values())).shape == (3, 4)


def test_running_in_batches_changes_nothing(convnet_student: Student, small_convnet: nn.Module) -> None:
    x = np.random.default_rng(0).normal(size=(70, 1, 12, 12)).astype(np.float32)
    output = next(iter(run_program(convnet_student.program, {"arr_0": x}, batch=32).values()))

    with torch.no_grad():
        expected = small_convnet(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(output, expected, atol=1e-5)


def test_a_saved_program_loads_with_its_names(tmp_path: Path, convnet_student: Student) -> None:
    program = rename_outputs(export_program(nn.Linear(3, 2), [torch.zeros(1, 3)]), ["logits"])
    (tmp_path / "m.pt2").write_bytes(program_bytes(program))
    loaded = load_program(tmp_path / "m.pt2")

    assert [spec.name for spec in output_specs(loaded)] == ["logits"]
    assert [spec.name for spec in output_specs(at_batch(loaded))] == ["logits"]


def test_a_model_file_is_read_once(tmp_path: Path, convnet_student: Student) -> None:
    """What was looked through for pickles, what is loaded and what the hash is of are the same bytes."""
    path = tmp_path / "net.pt2"
    path.write_bytes(program_bytes(convnet_student.program))
    opened: list[str] = []
    watching = True

    def note(event: str, found: tuple[object, ...]) -> None:  # no hook can be taken away again
        if watching and event == "open":
            opened.append(str(found[0]))

    sys.addaudithook(note)
    loaded, _ = load_student(path)
    watching = False
    assert opened.count(str(path)) == 1
    assert loaded.card.lineage == (f"file: {hash_path(path)[:16]}",)


def test_counts_are_those_of_the_formula() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Flatten(), nn.Linear(8 * 16, 10))
    program = export_program(net, [torch.zeros(1, 3, 4, 4)])

    assert count_parameters(net) == count_parameters(program) == 3 * 8 * 9 + 8 + 128 * 10 + 10
    assert count_macs(program) == 16 * 3 * 8 * 9 + 128 * 10


@pytest.mark.parametrize("where", ["sample_inputs", "custom_obj", "use_pickle"])
def test_no_pickle_is_ever_loaded(tmp_path: Path, convnet_student: Student, where: str) -> None:
    """A .pt2 archive with a payload in each of the places that torch itself would unpickle."""
    Evil.mark = tmp_path / "mark"
    payload = io.BytesIO()
    torch.save({"x": Evil()}, payload)
    source = zipfile.ZipFile(io.BytesIO(program_bytes(convnet_student.program)))
    path = tmp_path / "evil.pt2"
    with zipfile.ZipFile(path, "w") as archive:
        for item in source.infolist():
            content = source.read(item)
            if where == "sample_inputs" and "sample_inputs" in item.filename:
                content = payload.getvalue()
            if where == "use_pickle" and item.filename.endswith("weights_config.json"):
                content = content.replace(b'"use_pickle": false', b'"use_pickle": true')
            archive.writestr(item, content)
        if where == "custom_obj":
            archive.writestr("archive/data/constants/custom_obj_0", pickle.dumps(Evil()))

    with pytest.raises(ModelFileError, match="never loaded"):
        load_program(path)
    assert not Evil.mark.exists()


def test_arrays_bind_by_name_or_by_order() -> None:
    specs = [TensorSpec("ids", (1, 4), "int64"), TensorSpec("mask", (1, 4), "int64")]
    ids, mask = np.zeros((2, 4), np.int32), np.ones((2, 4), np.int32)

    by_name = bind_inputs(specs, {"mask": mask, "ids": ids})
    by_order = bind_inputs(specs, {"arr_0": ids, "arr_1": mask})

    assert by_name["mask"].sum() == by_order["mask"].sum() == 8
    assert by_name["ids"].dtype == np.int64


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({}, "takes x; the data has nothing"),
        ({"x": np.zeros((2, 5), np.float32)}, r"\(samples, 4\)"),
        ({"x": np.zeros((2, 4), np.int64)}, "takes float32; the data is int64"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(arrays: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(DataError, match=message):
        bind_inputs([TensorSpec("x", (-1, 4), "float32")], arrays)


def test_a_causal_transformer_goes_through_a_file_with_its_mask(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=20, n_embd=16, n_layer=1, n_head=2, n_positions=8, use_cache=False)
    torch.manual_seed(0)
    inner = transformers.GPT2Model(config).eval()

    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            hidden: torch.Tensor = self.inner(input_ids=ids, attention_mask=mask).last_hidden_state
            return hidden

    ids = torch.randint(0, 20, (3, 8))
    mask = (torch.arange(8) < torch.tensor([[8], [5], [3]])).long()
    program = export_program(Decoder(), [ids[:1], mask[:1]])
    path = tmp_path / "decoder.pt2"
    path.write_bytes(program_bytes(program))

    loaded = load_program(path)
    assert input_specs(loaded)[0].shape[0] == -1
    torch.testing.assert_close(loaded.module()(ids, mask), Decoder()(ids, mask))

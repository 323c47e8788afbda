"""The layout and its traps: each of these was seen to fail once (docs/decisions/0001-layout.md)."""

import ast
import graphlib
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

import pytest

import edgekd
from edgekd import plugins

ROOT = Path(__file__).parent.parent
MAPPED = ("exporters", "devices", "benchmarks")
in_tree = pytest.mark.skipif(not (ROOT / "pyproject.toml").is_file(), reason="only in a checkout")


def test_the_built_in_targets_and_devices_are_found() -> None:
    assert {"coreai", "coreml", "executorch", "onnx", "ort", "tflite"} <= set(plugins.exporter_names())
    assert {"android", "browser", "fake", "host", "ssh"} <= set(plugins.kind_names())
    assert "agent" not in plugins.kind_names()


@pytest.mark.parametrize(
    ("package", "name"),
    [
        ("edgekd", "py.typed"),
        ("edgekd", "templates/image/edgekd.toml"),
        ("edgekd", "templates/text/tokenizer.json"),
        ("edgekd.devices", "host.toml"),
        ("edgekd.devices", "page/index.html"),
        ("edgekd.devices", "page/run.js"),
        ("edgekd.devices", "page/package-lock.json"),
        ("edgekd.benchmarks", "report.html"),
    ],
)
def test_data_files_are_installed(package: str, name: str) -> None:
    assert files(package).joinpath(*name.split("/")).is_file()


@pytest.mark.parametrize("name", MAPPED)
def test_no_mapped_folder_is_imported_by_its_bare_name(name: str) -> None:
    code = f"import sys, edgekd.{name}; assert {name!r} not in sys.modules; import edgekd.cli.app"

    assert subprocess.run([sys.executable, "-P", "-c", code]).returncode == 0


def test_the_core_imports_no_plugin_by_a_statement() -> None:
    folder = Path(edgekd.__file__).parent
    seen = 0
    for path in folder.rglob("*.py"):
        if path.relative_to(folder).parts[0] in MAPPED:  # where a wheel puts them
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                seen += 1
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
                names += [f"{node.module}.{a.name}" for a in node.names] if isinstance(node, ast.ImportFrom) else []
                assert not any(n.startswith(tuple(f"edgekd.{m}" for m in MAPPED)) for n in names), path
    assert seen > 100


def test_rooms_import_in_one_direction() -> None:
    """A room is a folder of ``edgekd/``; what lies beside the rooms serves all of them and knows none."""
    folder = Path(edgekd.__file__).parent
    mapped = [folder / name for name in (*MAPPED, "templates")]
    rooms = {p.name for p in folder.iterdir() if (p / "__init__.py").is_file() and p not in mapped}
    uses: dict[str, set[str]] = {room: set() for room in rooms}
    for path in sorted(folder.rglob("*.py")):
        room = path.parent.name if path.parent != folder else ""
        if room not in {"", *rooms} or path.name == "__main__.py":
            continue
        used = {name.split(".")[1] for name in _imported_when_run(ast.parse(path.read_text())) if "." in name}
        assert room or not used & rooms, f"{path.name} serves all rooms, but needs {used & rooms}"
        if room:
            uses[room] |= used & rooms - {room}
    assert len(uses["cli"]) > 3

    graphlib.TopologicalSorter(uses).prepare()  # raises CycleError, which names the circle
    if (ROOT / "CONTRIBUTING.md").is_file():
        listed = re.search(r"edgekd/ .*?\n((?:  .*\n)+)", (ROOT / "CONTRIBUTING.md").read_text())
        assert listed
        order = [name for name in re.findall(r"\b([a-z]+)/", listed[1]) if name in rooms]
        assert sorted(order) == sorted(rooms)
        for place, room in enumerate(order):
            assert uses[room] <= set(order[:place]), f"{room} needs what is listed below it"


@in_tree
def test_files_import_each_other_in_no_circle_not_even_for_their_types() -> None:
    sources = {ROOT / "edgekd": "edgekd", **{ROOT / name: f"edgekd.{name}" for name in MAPPED}}
    modules = {
        ".".join((name, *path.relative_to(folder).with_suffix("").parts)).removesuffix(".__init__"): path
        for folder, name in sources.items()
        for path in folder.rglob("*.py")
        if "templates" not in path.parts
    }
    uses: dict[str, set[str]] = {}
    for name, path in modules.items():
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        froms = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
        origins = [(package + "." * bool(node.module) if node.level else "") + (node.module or "") for node in froms]
        named = {f"{origin}.{alias.name}" for node, origin in zip(froms, origins, strict=True) for alias in node.names}
        uses[name] = (named | set(origins)) & set(modules) - {name, "edgekd", *(f"edgekd.{m}" for m in MAPPED)}
    assert sum(map(len, uses.values())) > 500

    graphlib.TopologicalSorter(uses).prepare()  # raises CycleError, which names the circle


def _imported_when_run(tree: ast.AST) -> Iterator[str]:
    """Modules of edgekd that a module imports, at its top or in a function, but for its types alone."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("edgekd"):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("edgekd."))
        elif not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
            yield from _imported_when_run(node)


def test_nothing_in_the_core_shadows_a_mapped_folder() -> None:
    """A stray edgekd/devices.py or edgekd/exporters/ would win over the mapping and hide the built-in ones."""
    folder = Path(edgekd.__file__).parent
    if (folder / "exporters" / "onnx.py").is_file():
        pytest.skip("installed from a wheel: the folders really lie there")
    assert not [name for name in MAPPED if (folder / name).exists() or (folder / f"{name}.py").exists()]


@in_tree
def test_every_folder_of_code_is_packaged() -> None:
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    mapped = {ROOT / folder for folder in config["package-dir"].values()}
    holding = {
        path.parent
        for top in ("edgekd", *MAPPED)
        for path in (ROOT / top).rglob("*.py")
        if "templates" not in path.parts and "__pycache__" not in path.parts
    }

    assert len(holding) == 17
    assert holding <= mapped
    assert set(config["packages"]) == set(config["package-dir"])


def test_help_imports_no_toolchain_and_no_torch() -> None:
    code = """
import sys
import edgekd.cli.app
unwanted = ("torch", "numpy", "onnx", "coremltools", "litert_torch", "transformers", "pydantic")
heavy = [m for m in unwanted if m in sys.modules]
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)

    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["coreai", "coreml", "executorch", "onnx", "ort", "tflite"])
def test_an_exporter_can_be_asked_without_its_toolchain(name: str) -> None:
    code = f"""
import sys
from edgekd.plugins import load_exporter
exporter = load_exporter({name!r})
heavy = [m for m in exporter.requires if m in sys.modules]
assert not heavy, heavy
assert exporter.suffix.startswith(".") and "fp32" in exporter.precisions
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)

    assert done.returncode == 0, done.stderr


@in_tree
def test_the_version_stands_once_more_in_pyproject() -> None:
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())

    assert config["project"]["version"] == edgekd.__version__


@in_tree
def test_no_file_holds_a_path_of_this_machine() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    if not tracked:
        pytest.skip("not a git checkout")
    home = str(Path.home())
    for name in tracked:
        path = ROOT / name
        if path.is_file() and path.suffix in (".py", ".md", ".toml", ".json", ".txt", ".yml", ""):
            text = path.read_text(errors="replace")
            assert f"{ROOT}/" not in text, name
            assert home == "/" or f"{home}/" not in text, name

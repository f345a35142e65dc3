"""Truth: the house. A folder is a floor; imports go strictly down, and the package brings no heavy library with it."""

import ast
import importlib.util
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from twins import accepts

import scoreaction

HEAVY = {"diffusers", "transformers", "peft", "sklearn", "matplotlib", "torchvision", "tensorboard", "torchmetrics", "pandas"}
ROOT = Path(__file__).parents[1] / "src" / "scoreaction"
FLOORS = [
    {"types", "errors", "world"},
    {"catalog", "disk", "settings", "yaml_text"},
    {"diffusion"},
    {"networks"},
    {"tasks"},
    {"models", "rewards", "sampling"},
    {"algorithms"},
    {"training"},
    {"recipes"},
    {"report"},
    {"commands"},
    {"cli", "__init__"},
    {"__main__"},
]
FLOOR_OF = {name: floor for floor, names in enumerate(FLOORS) for name in names}


def edges():
    files = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in ROOT.rglob("*.py")}
    modules = {name.removesuffix(".__init__"): path for name, path in files.items()}
    for name, path in modules.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "scoreaction":
                for alias in node.names:
                    inside = f"{node.module}.{alias.name}".removeprefix("scoreaction").removeprefix(".")
                    while inside and inside not in modules:
                        inside = inside.rpartition(".")[0]
                    yield name, inside or "__init__"


def only_down(found):
    for above, below in found:
        here, there = above.split(".")[0], below.split(".")[0]
        assert here == there or FLOOR_OF[here] > FLOOR_OF[there], f"{above} imports {below}"


def no_circle(found):
    graph = {}
    for above, below in found:
        if above != below:
            graph.setdefault(above, set()).add(below)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        raise AssertionError(error.args[1]) from error


def test_imports_go_strictly_down():
    found = list(edges())
    accepts(
        only_down,
        found,
        upwards=[*found, ("diffusion.solvers", "training.finetuner")],
        sideways=[*found, ("rewards.linear", "models.digits")],
    )
    accepts(no_circle, found, circle=[*found, ("diffusion.processes", "diffusion.transitions")])


def imported_by(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(*{{name.split('.')[0] for name in sys.modules}})"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(result.stdout.split())


def no_heavy_library(modules: set[str]) -> None:
    assert not modules & HEAVY, f"importing scoreaction imports {', '.join(sorted(modules & HEAVY))}"


@pytest.mark.slow
def test_importing_the_package_needs_torch_and_small_libraries_only():
    floors_0_to_2 = "import scoreaction, scoreaction.diffusion.mixtures, scoreaction.diffusion.solvers"
    accepts(no_heavy_library, imported_by(floors_0_to_2), heavy=imported_by("import matplotlib"))


@pytest.mark.slow
def test_the_package_says_where_its_names_are_from() -> None:
    """What type checkers read is what is imported on demand; a command answers before torch is imported."""
    tree = ast.parse((ROOT / "__init__.py").read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    told = {
        alias.name: (node.module or "").removeprefix("scoreaction").removeprefix(".")
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    modules = {name: home for name, home in scoreaction._HOMES.items() if home.rpartition(".")[2] == name}
    expected = scoreaction._HOMES | {name: home.rpartition(".")[0] for name, home in modules.items()}
    accepts(
        lambda homes: _equal(homes, expected), told, another_home=told | {"VP": "model"}, one_less=dict([*told.items()][1:])
    )
    for name in scoreaction.__all__:
        assert getattr(scoreaction, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = scoreaction.nothing
    quick = "import sys, scoreaction.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", quick], check=False).returncode == 0
    assert subprocess.run([sys.executable, "-c", quick.replace(";", "; scoreaction.VP;")], check=False).returncode == 1


def _equal(found: object, expected: object) -> None:
    assert found == expected


@pytest.mark.parametrize("name", ["scoreaction.predictions", "scoreaction.pretraining.shapes"])
def test_a_module_that_pages_named_says_where_it_is(name: str) -> None:
    with pytest.raises(ModuleNotFoundError, match="has moved to scoreaction"):
        importlib.import_module(name)
    with pytest.raises(ModuleNotFoundError, match="No module named"):
        importlib.import_module("scoreaction.prediction")
    home = scoreaction._MOVED[".".join(name.split(".")[:2])]
    assert importlib.util.find_spec(home) is not None

"""Truth: the house. Imports go strictly down its floors, and importing the package brings no heavy library with it."""

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from twins import accepts

import scoreaction

ROOT = Path(__file__).parents[1] / "src" / "scoreaction"
FLOORS = {
    0: ["types", "shelf"],
    1: ["processes", "predictions", "gaussians", "conditions", "models._shapes_scenes"],
    2: ["solvers", "exact", "linear_quadratic", "adapters", "models._digits_nets", "models._shapes_nets"],
    2.5: ["_lora_file"],
    3: ["model", "value", "kl", "proxy"],
    3.2: ["consistency"],
    3.5: ["rewards", "models"],  # the open shelves of floor 3: they may use its modules, not one another
    4: ["rollout"],
    4.5: ["replay"],
    5: ["algorithms"],
    6: [
        "finetuner",
        "evaluation",
        "sampling",
        "checkpoints",
        "collecting",
        "journal",
        "export",
        "online",
        "selection",
        "distillation",
        "optimising",
        "summarising",
        "_checking",
        "_recipe_text",
        "_prompts",
    ],
    7: [
        "cli",
        "config",
        "building",
        "doctor",
        "_doctor_finding",
        "_doctor_model",
        "_doctor_reward",
        "_doctor_training",
        "report",
        "_report_run",
        "_report_comparison",
        "_report_parts",
        "pictures",
        "frontiers",
        "training",
        "distilling",
        "model_card",
        "planning",
        "_plan_watch",
        "live_memory",
        "measuring",
        "serving",
        "comparing",
        "tables",
        "loading",
        "keys",
        "pretraining",
        "__main__",
        "__init__",
    ],
}
FLOOR_OF = {name: floor for floor, names in FLOORS.items() for name in names}
MEET = (1, 6, 7)
"""Floors whose modules may import one another, though never in a circle."""
HEAVY = {"diffusers", "transformers", "peft", "sklearn", "matplotlib", "torchvision", "tensorboard", "torchmetrics", "pandas"}

Edge = tuple[str, str]


def floor(module: str) -> float | None:
    return FLOOR_OF.get(module, FLOOR_OF.get(module.split(".", maxsplit=1)[0]))


def edges() -> list[Edge]:
    """(module, what it imports of this package), wherever in the file the import stands."""
    files = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in ROOT.rglob("*.py")}
    modules = {name.removesuffix(".__init__"): path for name, path in files.items()}
    found = []
    for name, path in modules.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                targets = [alias.name for alias in node.names if alias.name.split(".")[0] == "scoreaction"]
            elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "scoreaction":
                assert node.level == 0, f"{name}: write imports in full"
                targets = [f"{node.module}.{alias.name}" for alias in node.names]
            else:
                continue
            for target in targets:
                inside = target.removeprefix("scoreaction").removeprefix(".")
                while inside and inside not in modules:  # the name of a function: its module is before the dot
                    inside = inside.rpartition(".")[0]
                found.append((name, inside or "__init__"))
    return found


def only_down(found: list[Edge]) -> None:
    for above, below in found:
        for module in (above, below):
            assert floor(module) is not None, f"{module} has no floor: give it one in FLOORS"
        same_shelf = above.split(".")[0] == below.split(".")[0]
        may_meet = same_shelf or (floor(above) == floor(below) and floor(above) in MEET)
        assert floor(above) > floor(below) or may_meet, (
            f"{above} (floor {floor(above)}) imports {below} (floor {floor(below)}): imports go strictly down"
        )


def no_circle(found: list[Edge]) -> None:
    graph: dict[str, set[str]] = {}
    for above, below in found:
        if above != below:
            graph.setdefault(above, set()).add(below)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        raise AssertionError(f"modules import one another in a circle: {error.args[1]}") from error


def test_imports_go_strictly_down():
    found = edges()
    assert ("solvers", "processes") in found
    assert ("gaussians", "predictions") in found
    accepts(
        only_down,
        found,
        upwards=[*found, ("solvers", "finetuner")],
        sideways=[*found, ("exact", "solvers")],
        between_shelves=[*found, ("rewards.linear", "models.digits")],
        unknown=[*found, ("utils", "types")],
    )
    accepts(no_circle, found, circle=[*found, ("processes", "gaussians")])


def imported_by(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(*{{name.split('.')[0] for name in sys.modules}})"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(result.stdout.split())


def no_heavy_library(modules: set[str]) -> None:
    assert not modules & HEAVY, f"importing scoreaction imports {', '.join(sorted(modules & HEAVY))}"


@pytest.mark.slow
def test_importing_the_package_needs_torch_and_small_libraries_only():
    floors_0_to_2 = "import scoreaction, scoreaction.exact, scoreaction.linear_quadratic, scoreaction.solvers"
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

"""Truth: the house style of names and docstrings, read from the source without importing it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
from twins import accepts

ROOT = Path(__file__).parents[1] / "src" / "scoreaction"
PLACES = sorted(path.name for path in ROOT.iterdir() if path.name != "__pycache__")
"""Folders and files that keep to the rules on first words and names."""
RIDDLES = {"what", "where", "whether", "how", "when", "which", "who"}
BANNED = {
    *("said", "told", "asked", "found", "mine", "near", "way", "owner", "given", "held", "improved", "stepped", "pull", "stay"),
}
FOREIGN = {"forward", "do_GET", "do_POST"}
"""Methods whose meaning a class of torch or of the standard library fixes."""

Definition = ast.FunctionDef | ast.ClassDef


@cache
def parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def sources(*places: str) -> dict[str, ast.Module]:
    """The parsed files in these folders and files, by their path."""
    files = [file for place in places for file in ([ROOT / place] if place.endswith(".py") else (ROOT / place).rglob("*.py"))]
    return {str(file.relative_to(ROOT)): parsed(file) for file in files}


def definitions(body: list[ast.stmt], prefix: str = "") -> Iterator[tuple[str, Definition]]:
    """Public functions, classes and methods with their names; what is inside a function is private."""
    for node in body:
        if isinstance(node, Definition) and not node.name.startswith("_"):
            yield prefix + node.name, node
            if isinstance(node, ast.ClassDef):
                yield from definitions(node.body, f"{prefix}{node.name}.")


def docstrings(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Every docstring of a module with the name that it belongs to; that of a constant stands below it."""
    for node in (node for node in ast.walk(tree) if isinstance(node, ast.Module | Definition)):
        if text := ast.get_docstring(node):
            yield getattr(node, "name", "module"), text
        for above, below in pairwise(node.body):
            value = below.value if isinstance(below, ast.Expr) else None
            if (
                isinstance(above, ast.Assign | ast.AnnAssign)
                and isinstance(value, ast.Constant)
                and isinstance(value.value, str)
            ):
                yield ast.unparse(above).partition("=")[0], value.value


def bases(node: ast.ClassDef) -> list[str]:
    """The last parts of the names of a class's bases."""
    return [ast.unparse(base).partition("[")[0].rpartition(".")[2] for base in node.bases]


def documented(trees: dict[str, ast.Module]) -> None:
    """Public things have a docstring, or override a method that has one."""
    classes = {node.name: node for tree in trees.values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}

    def inherits(kind: ast.ClassDef, method: str) -> bool:
        parents = [classes[name] for name in bases(kind) if name in classes]
        own = [node for parent in parents for node in parent.body if isinstance(node, ast.FunctionDef) and node.name == method]
        return any(map(ast.get_docstring, own)) or any(inherits(parent, method) for parent in parents)

    for path, tree in trees.items():
        assert ast.get_docstring(tree), f"{path}: no docstring"
        for name, node in definitions(tree.body):
            kind, _, method = name.rpartition(".")
            overrides = kind in classes and (method in FOREIGN or inherits(classes[kind], method))
            assert ast.get_docstring(node) or overrides, f"{path}: {name}: no docstring"


def begin_well(trees: dict[str, ast.Module]) -> None:
    """The first word of a docstring is no question word."""
    for path, tree in trees.items():
        for name, text in docstrings(tree):
            assert text.split()[0].strip(",:").lower() not in RIDDLES, f"{path}: {name}: {text.splitlines()[0]}"


def plain_names(trees: dict[str, ast.Module]) -> None:
    """No function, class, argument, attribute or variable has a banned name, also not behind an underscore."""
    for path, tree in trees.items():
        for node in ast.walk(tree):
            names = [getattr(node, field, None) for field in ("name", "arg", "attr", "id")]
            for name in names:
                plain = name.strip("_").lower() if isinstance(name, str) else ""
                assert plain not in BANNED, f"{path}, line {getattr(node, 'lineno', 0)}: {name}"


CHILD = """
class Base:
    '''A base.'''
    def f(self):
        {}
class Child(Base):
    '''A child.'''
    def f(self): ...
"""


def module(text: str) -> dict[str, ast.Module]:
    return {"twin.py": ast.parse(f'"""A twin."""\n{text}')}


def test_public_things_have_a_docstring() -> None:
    trees = sources("")
    assert len(trees) > 100
    accepts(
        documented,
        trees,
        module={"twin.py": ast.parse("x = 1")},
        function=module("def f(): ..."),
        method=module('class A:\n    """A class."""\n    def f(self): ...'),
        forgotten_base=module(CHILD.format("pass")),
    )
    documented(module(CHILD.format("'A method.'")))
    documented(module("def _private(): ..."))


@pytest.mark.parametrize("place", PLACES)
def test_docstrings_begin_with_a_verb_or_a_noun(place: str) -> None:
    accepts(
        begin_well,
        sources(place),
        function=module('def f():\n    """What it is."""'),
        private=module('def _f():\n    """Whether it is."""'),
        constant=module('X = 1\n"""Where it is."""'),
        field=module('class A:\n    """A class."""\n    x: int = 1\n    """How it is."""'),
        file={"twin.py": ast.parse('"""What it holds."""')},
    )


@pytest.mark.parametrize("place", PLACES)
def test_names_are_the_fields_nouns(place: str) -> None:
    accepts(
        plain_names,
        sources(place),
        function=module("def _said(): ..."),
        kind=module("class Found: ..."),
        argument=module("def f(*, told): ..."),
        attribute=module("x.pull = 1"),
        variable=module("near = 1"),
        keyword=module("f(stay=1)"),
    )


def test_messages_name_no_private_module() -> None:
    """What a user reads, and may import, begins with no underscore."""

    def public(trees: dict[str, ast.Module]) -> None:
        for path, tree in trees.items():
            for node in ast.walk(tree):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    assert not re.search(r"scoreaction\.[\w.]*\b_\w", node.value), f"{path}, line {node.lineno}: {node.value}"

    accepts(public, sources(""), private=module("raise ValueError('is no scoreaction.algorithms._learner.Algorithm')"))

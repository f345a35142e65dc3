"""Truth: the house style's list of words. Names are nouns of the field, docstrings begin with one or with a verb."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from twins import accepts

ROOT = Path(__file__).parents[1] / "src" / "scoreaction"
CLEAN = ["recipes", "commands", "report", "rewards", "models", "cli.py"]
"""Folders that keep to it; it only grows."""
RIDDLES = {
    "said", "told", "asked", "found", "mine", "near", "way", "owner", "given", "held", "improved", "stepped", "pull", "stay",
}  # fmt: skip


def trees() -> Iterator[tuple[str, ast.Module]]:
    for place in CLEAN:
        for path in [ROOT / place] if place.endswith(".py") else sorted((ROOT / place).rglob("*.py")):
            yield str(path.relative_to(ROOT)), ast.parse(path.read_text(encoding="utf-8"))


def names_of(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        match node:
            case ast.Name(ctx=ast.Store()):
                yield node.id
            case ast.Attribute(ctx=ast.Store()):
                yield node.attr
            case ast.arg():
                yield node.arg
            case ast.FunctionDef() | ast.ClassDef():
                yield node.name


def docs_of(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (text := ast.get_docstring(node)):
            yield text


def plain_names(found: list[tuple[str, str]]) -> None:
    wrong = [f"{where}: {name}" for where, name in found if name.strip("_") in RIDDLES]
    assert not wrong, wrong


def plain_docs(found: list[tuple[str, str]]) -> None:
    wrong = [f"{where}: {text[:60]}" for where, text in found if re.match(r"(What|Where|Whether|How|Which|Who)\b", text)]
    assert not wrong, wrong


def no_private_module(found: list[tuple[str, str]]) -> None:
    """A message names what a user may import: no scoreaction.x._y."""
    wrong = [f"{where}: {text[:60]}" for where, text in found if re.search(r"scoreaction[\w.]*\._\w", text)]
    assert not wrong, wrong


def test_names_and_docstrings_are_plain() -> None:
    names = [(where, name) for where, tree in trees() for name in names_of(tree)]
    docs = [(where, text) for where, tree in trees() for text in docs_of(tree)]
    texts = [
        (where, node.value)
        for where, tree in trees()
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    accepts(plain_names, names, riddle=[*names, ("x.py", "_said")])
    accepts(plain_docs, docs, question=[*docs, ("x.py", "Whether it holds.")])
    accepts(no_private_module, texts, private=[*texts, ("x.py", "is no scoreaction.algorithms._learner.Algorithm")])

"""Truth: the tests' own source. Every test has a failing twin, or is one of the few that this file counts."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from twins import accepts

HERE = Path(__file__).parent
WITHOUT = 24
"""How many tests have no failing twin. It may only shrink: give a test its twin, then lower it."""
TOLERANCES = {"atol", "rtol"}


def name_of(call: ast.Call) -> str:
    return call.func.id if isinstance(call.func, ast.Name) else call.func.attr if isinstance(call.func, ast.Attribute) else ""


def bites(call: ast.Call) -> bool:
    """A check with a named wrong variant, or an input that must be refused: by an exception, or by the command line."""
    if name_of(call) in ("accepts", "close", "same"):
        return any(keyword.arg not in TOLERANCES for keyword in call.keywords)
    return name_of(call) in ("raises", "refused")


def calls_of(function: ast.AST) -> Iterator[ast.Call]:
    return (node for node in ast.walk(function) if isinstance(node, ast.Call))


def has_twin(function: ast.FunctionDef, helpers: dict[str, ast.FunctionDef]) -> bool:
    """In its own body, or in that of a helper or fixture of the tests that it names, however deep."""
    waiting, seen = [function], {function.name}
    while waiting:
        body = waiting.pop()
        if any(bites(call) for call in calls_of(body)):
            return True
        named = {name_of(call) for call in calls_of(body)} | {argument.arg for argument in body.args.args}
        waiting += [helpers[name] for name in (named & helpers.keys()) - seen]
        seen |= named
    return False


def without_twin(sources: dict[str, str]) -> list[str]:
    """`file::test` of each test function that has none; sources by file name."""
    functions = {
        file: [node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)] for file, text in sources.items()
    }
    shared = {f.name: f for found in functions.values() for f in found if not f.name.startswith("test_")}
    return [
        f"{file}::{f.name}"
        for file, found in functions.items()
        for f in found
        if f.name.startswith("test_") and not has_twin(f, shared | {f.name: f for f in found if not f.name.startswith("test_")})
    ]


def own_sources() -> dict[str, str]:
    return {str(path.relative_to(HERE)): path.read_text(encoding="utf-8") for path in sorted(HERE.rglob("*.py"))}


@pytest.mark.slow
def test_the_tests_without_a_twin_only_become_fewer() -> None:
    found = without_twin(own_sources())

    def not_more(names: list[str]) -> None:
        assert len(names) <= WITHOUT, "give one of these a twin, or more than one:\n" + "\n".join(names)

    accepts(not_more, found, one_more=[*found, *["new"] * (WITHOUT + 1 - len(found))])


@pytest.mark.parametrize(
    ("body", "has"),
    [
        ("close(f(1), 2)", False),
        ("close(f(1), 2, atol=1e-3, rtol=0)", False),
        ("close(f(1), 2, sign=-f(1))", True),
        ("accepts(check, f(1))", False),
        ("accepts(check, f(1), sign=-f(1))", True),
        ("assert f(1) == 2", False),
        ("with pytest.raises(ValueError): f(-1)", True),
        ("assert refused('train') == 'f: is wrong'", True),
        ("helper()", True),
        ("deeper()", True),
        ("idle()", False),
    ],
)
def test_what_counts_as_a_twin(body: str, has: bool) -> None:
    """By hand; a helper's twin counts, where it is called."""
    helpers = "def helper(): close(1, 1, two=2)\ndef deeper(): helper()\ndef idle(): return idle()\n"

    def check(text: str) -> None:
        assert without_twin({"a.py": text}) == ([] if has else ["a.py::test_it"])

    right, other = (f"{helpers}def test_it():\n    {line}\n" for line in (body, "pass" if has else "f(close(1, 1, two=2))"))
    accepts(check, right, the_other_kind=other)

"""Malformed recipes. Truth: whatever a file holds, it is a recipe that reads back, or one refusal that names key or file."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from malformed import malformed
from twins import accepts, same

from scoreaction.errors import UserError
from scoreaction.recipes.recipe import dump, load_recipe
from scoreaction.yaml_text import parse_yaml

SLOWEST = 10.0
"""Seconds of the processor for one file at most."""


def outcome(path: Path) -> str:
    """`refused: LINE` or `valid`; any other exception is the fault that is looked for."""
    try:
        recipe = load_recipe(str(path), trust=False)
    except UserError as error:
        return f"refused: {error}"
    again = path.with_name("again.yaml")
    again.write_text(dump(recipe), encoding="utf-8")
    assert load_recipe(str(again), trust=False) == recipe, "written and read again it is another recipe"
    return "valid"


def read_all(count: int, folder: Path) -> tuple[list[str], float]:
    outcomes, slowest = [], 0.0
    for i, data in enumerate(malformed(count, seed=0)):
        path = folder / "case.yaml"
        path.write_bytes(data)
        began = time.process_time()
        try:
            outcomes.append(outcome(path))
        except Exception as error:
            pytest.fail(f"file {i} of {count}: {type(error).__name__}: {str(error)[:200]}; it begins {data[:200]!r}")
        slowest = max(slowest, time.process_time() - began)
    return outcomes, slowest


@pytest.mark.parametrize("count", [60, pytest.param(2000, marks=pytest.mark.long)])
def test_each_is_valid_or_refused_by_key_or_file_within_seconds(count: int, tmp_path: Path) -> None:
    outcomes, slowest = read_all(count, tmp_path)
    assert slowest < SLOWEST
    valid = outcomes.count("valid")
    print(f"{count} files: {valid} valid, {count - valid} refused; slowest {slowest:.1f} s of the processor")

    def named(lines: list[str]) -> None:
        bad = [line for line in lines if not line.partition(": ")[2].partition(":")[0].strip()]
        assert not bad, f"each begins with a key or the file: {bad[:3]}"

    refused = [line for line in outcomes if line != "valid"]
    assert len(refused) > count // 2
    accepts(named, refused, without=["refused: : what"])


def test_a_control_character_is_refused_with_its_line() -> None:
    def line(text: str) -> str:
        with pytest.raises(UserError) as caught:
            parse_yaml(text, where="here")
        return str(caught.value)

    same(line("a: 1\nb: \x00"), "here line 2: not valid YAML: the control character '\\x00'", of_the_first=line("a: \x00"))

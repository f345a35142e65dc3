"""Truth: the files in `src`: a wheel has all of them that are not Python, and every promised Python is one that is tested."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from twins import accepts

if sys.version_info < (3, 11):
    pytest.skip("tomllib is in Python 3.11 or newer", allow_module_level=True)
import tomllib

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "scoreaction"
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_the_wheel_has_all_data() -> None:
    """`make wheel` builds one and trains with it; here its list of files. Twin: any of the patterns left out."""
    data = {path for path in PACKAGE.rglob("*") if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".py"}

    def covers(patterns: list[str]) -> None:
        covered = {path for pattern in patterns for path in PACKAGE.glob(pattern)}
        assert data <= covered, sorted(data - covered)

    patterns = PYPROJECT["tool"]["setuptools"]["package-data"]["scoreaction"]
    accepts(covers, patterns, **{left_out: [one for one in patterns if one != left_out] for left_out in patterns})


def test_the_promised_pythons_are_those_of_the_workflow() -> None:
    """Classifiers and the workflow's list; the oldest is the one that pip is told. Twin: one Python less."""
    workflow = (ROOT / ".github" / "workflows" / "test.yml").read_text(encoding="utf-8")
    listed = re.search(r"python: \[(.*)\]", workflow)
    assert listed is not None
    tested = re.findall(r'"(3\.\d+)"', listed[1])
    promised = re.findall(r"Python :: (3\.\d+)", "\n".join(PYPROJECT["project"]["classifiers"]))
    assert PYPROJECT["project"]["requires-python"] == f">={tested[0]}"

    def same(versions: list[str]) -> None:
        assert versions == tested

    accepts(same, promised, one_less=promised[1:])


def test_printed_remedies_work_from_a_clone() -> None:
    """Names that pip is told anywhere in the code are of packages that an index has; pages name extras in a clone alone."""
    said = {
        path: path.read_text(encoding="utf-8") for path in [*PACKAGE.rglob("*.py"), ROOT / "README.md", *ROOT.glob("docs/*.md")]
    }

    def there(texts: dict[Path, str]) -> None:
        for path, text in texts.items():
            for name in re.findall(r"pip install (?:-e )?\"?(scoreaction|\.\[[\w,]+\])", text):
                assert name != "scoreaction", f"{path}: {name} is on no index"
                assert path.suffix == ".md", f"{path}: {name} is a clone's"
                extras = set(name[2:-1].split(","))
                assert extras <= PYPROJECT["project"]["optional-dependencies"].keys(), f"{path}: {extras}"

    twin = {ROOT / "README.md": 'pip install "scoreaction[all]"'}
    accepts(there, said, on_an_index=twin, no_such_extra={ROOT / "README.md": 'pip install -e ".[everything]"'})

"""Lookup of models, rewards, algorithms, critics and writers: the name is the file's, or a dotted path to one of the user's."""

from __future__ import annotations

import ast
import importlib
import os
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Literal

from scoreaction.errors import UserError, missing, nearest

Kind = Literal["model", "reward", "algorithm", "critic", "writer"]

PACKAGE = Path(__file__).parent
TOKEN_VARIABLE = "SCOREACTION_TOKEN"
"""Environment variable with the token that a reward server shares with its clients."""
SHELVES: dict[Kind, str] = {"model": "models", "reward": "rewards", "algorithm": "algorithms"}
"""Folder of each kind; critics and writers are all of users' own."""


def files(kind: Kind) -> dict[str, Path]:
    """Files of a kind's folder by name, without those that begin with _."""
    shelf = (PACKAGE / SHELVES[kind]).glob("*.py") if kind in SHELVES else []
    return {path.stem: path for path in sorted(shelf) if not path.stem.startswith("_")}


def summary(path: Path) -> str:
    """First line of a file's docstring, read without importing the file."""
    doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return doc.partition("\n")[0]


def find(kind: Kind, name: object, *, key: str) -> ModuleType:
    """Imports the module of that name; `key` is the setting that messages name.

    UserError for an unknown name, a module that cannot be imported, or one without `Config` (and, but for an algorithm,
    `build`).
    """
    if not isinstance(name, str):
        raise UserError(f"{key}: must be a name (got {name!r})")
    if "." in name:
        module = _import_user(name, key)
    elif name in files(kind):
        module = _import_shipped(kind, name, key)
    else:
        known = f"{nearest(name, files(kind))} " if files(kind) else ""
        raise UserError(f"{key}: unknown {kind} {name!r}; {known}({_own(name)})")
    needed = ["Config"] if kind == "algorithm" else ["Config", "build"]
    missing = [part for part in needed if not hasattr(module, part)]
    if missing:
        raise UserError(f"{key}: {name} has no {missing[0]}; a {kind} file defines {' and '.join(needed)}")
    return module


def _own(name: str) -> str:
    """Hint for a name without a dot: how a file of the user's own is named."""
    file = name if name.isidentifier() else "mine"
    return f"one of your own goes by its file: my_package.{file} is my_package/{file}.py"


def _import_shipped(kind: Kind, name: str, key: str) -> ModuleType:
    try:
        return importlib.import_module(f"scoreaction.{SHELVES[kind]}.{name}")
    except ImportError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "scoreaction"):
            raise
        raise UserError(f"{key}: {name} {missing(package)}") from error


def _import_user(name: str, key: str) -> ModuleType:
    """Imports a user's own module; the working directory is searched too, as `python -m` does."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
        importlib.invalidate_caches()
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name or name
        if name == missing or name.startswith(missing + "."):
            raise UserError(f"{key}: no module {missing!r}; is its folder the working directory or on PYTHONPATH?") from error
        raise UserError(f"{key}: {name} needs the package {missing!r}, which is not installed") from error
    except (Exception, SystemExit) as error:
        raise UserError(f"{key}: importing {name} raised {type(error).__name__}: {error}") from error


@cache
def recipes() -> dict[str, Path]:
    """Shipped recipes by name."""
    return {path.stem: path for path in sorted((PACKAGE / "recipes").glob("*.yaml"))}


@cache
def prompt_sets() -> dict[str, Path]:
    """Shipped sets of prompts by name: text files, a prompt a line."""
    return {path.stem: path for path in sorted((PACKAGE / "data" / "prompts").glob("*.txt"))}


@cache
def tables() -> dict[str, Path]:
    """Shipped tables by name: csv files, a line of names and a row of numbers a line."""
    return {path.stem: path for path in sorted((PACKAGE / "data" / "tables").glob("*.csv"))}

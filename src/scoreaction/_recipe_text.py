"""The text of recipes: safe YAML, files and shipped names, and `key=value` overrides; what they say is not checked here."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from scoreaction import shelf
from scoreaction._checking import Values, dotted
from scoreaction.shelf import Kind, UserError, nearest

KEYS = ["model", "reward", "algorithm", "sampler", "train", "prompts", "evaluation", "early_stop", "online", "distill"]


class _Loader(yaml.SafeLoader):
    """Safe YAML in which 1e-3 is a number and a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value} is given twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Writes what `_Loader` reads back: a text that looks like a number to it gets quotes."""


for kind in (_Loader, _Dumper):
    kind.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
    )


def dump_yaml(values: Values) -> str:
    """Plain values as YAML that `parse_yaml` reads back.

    >>> dump_yaml({"prompts": ["1e5", "a cat"]})
    "prompts: ['1e5', a cat]\\n"
    """
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, default_flow_style=None, width=110, allow_unicode=True)


def parse_yaml(text: str, *, where: str) -> Any:
    """Safe YAML; a UserError names `where` and the line.

    >>> parse_yaml("1e-3", where="here")
    0.001
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        line = f" line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{where}{line}: not valid YAML: {error.problem}") from error
    except (yaml.YAMLError, RecursionError, TypeError) as error:  # the last for a list where a key should be
        raise UserError(f"{where}: not valid YAML") from error


def read_recipe(name_or_path: str) -> tuple[Values, Path]:
    """The unchecked values of a shipped recipe or a YAML file, and the folder it lies in."""
    path = shelf.recipes().get(name_or_path, Path(name_or_path))
    try:
        there = path.is_file()
    except OSError:  # a name that no file can have
        there = False
    if not there:
        looks_like_path = path.suffix in (".yaml", ".yml") or len(path.parts) > 1
        hint = "give a shipped name or a YAML file" if looks_like_path else nearest(name_or_path, shelf.recipes())
        raise UserError(f"{name_or_path}: no such recipe; {hint}")
    values = parse_yaml(read_text(path), where=str(path))
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise UserError(f"{path}: a recipe is a mapping with the keys {', '.join(KEYS)}")
    return values, path.parent


def read_text(path: Path) -> str:
    """A UTF-8 file; UserError that names it."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as UTF-8 text ({type(error).__name__})") from error


def parse_override(text: str) -> tuple[list[str], Any]:
    """`algorithm.beta=0.2` to its key and value, which is YAML.

    >>> parse_override("model.means=[[1, 0]]")
    (['model', 'means'], [[1, 0]])
    """
    key, equals, value = text.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise UserError(f"{text}: an override is key=value, for example algorithm.beta=0.2")
    return parts, parse_yaml(value, where=key)


def assign(values: Values, key: list[str], value: Any) -> None:
    """Sets a dotted key. A new name for a block drops the settings of the old one that are not of the same kind in the new."""
    place: Any = values
    for depth, part in enumerate(key):
        at = dotted(key[:depth])
        if isinstance(place, list):
            if not part.isdecimal() or int(part) >= len(place):
                raise UserError(f"{at}.{part}: {at} is a list; use {at}.0 to {at}.{len(place) - 1}")
            index: int | str = int(part)
        elif isinstance(place, dict):
            index = part
        else:
            raise UserError(f"{dotted(key)}: {at} is {place!r}, which has no keys")
        if depth == len(key) - 1:
            if part == "name":
                _rename(place, key, value)
            place[index] = value
        else:
            if isinstance(place, dict) and place.get(part) is None:
                place[part] = {}
            place = place[index]


def _rename(block: Values, key: list[str], name: Any) -> None:
    kinds: dict[str, Kind] = {"model": "model", "reward": "reward", "algorithm": "algorithm", "evaluation": "reward"}
    kind = kinds.get(key[0])
    if kind is None or block.get("name") in (None, name):
        return
    new = shelf.find(kind, name, key=dotted(key)).Config.model_fields
    try:
        old = shelf.find(kind, block["name"], key=dotted(key)).Config.model_fields
    except UserError:  # a misspelt name is mended: its settings were meant for the right one
        old = new
    for setting in set(block) - {"name", "weight"}:  # clips are clips, but the estimators of two algorithms are not the same
        if setting not in old or setting not in new or old[setting].annotation != new[setting].annotation:
            del block[setting]
